"""Masks beside first frames, and beside the videos that begin with them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.clips import ClipsConfig, SubjectPrompt, videos_below, write_video
from stages.evaluate.first_frame_masks import masks_beside, place_masks, write_subjects
from stages.students.sampler import first_frame

SIZE = ClipsConfig(path=Path("unused"), num_frames=9, height=32, width=48)


def rectangle(height, width, top, left):
    """A mask whose edges stay between pixels when it is halved."""
    mask_HW = np.zeros((height, width), bool)
    mask_HW[top : top + 16, left : left + 20] = True
    return mask_HW


def save(mask_HW, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask_HW.astype(np.uint8) * 255).save(path, **options)
    return path


def read(path):
    return np.asarray(Image.open(path)) > 127


@pytest.mark.parametrize("shape", [(32, 48), (64, 96), (64, 120), (80, 96)])
def test_a_mask_is_scaled_and_cropped_as_its_image(tmp_path, shape):
    """The image shows its own mask: afterwards it still does."""
    mask_HW = rectangle(*shape, top=12, left=16)
    image = save(mask_HW, tmp_path / "dog.png")
    save(mask_HW, tmp_path / "dog.mask.png")
    place_masks(image, tmp_path / "videos" / "a dog.-0.mp4", SIZE)
    placed_HW = read(tmp_path / "videos" / "a dog.-0.mask.png")
    shown_HW = np.asarray(first_frame(image, SIZE))[..., 0] > 127
    assert placed_HW.shape == (32, 48)
    assert (placed_HW == shown_HW).all()


def test_a_mask_is_of_the_upright_image(tmp_path):
    """A camera that was held upright stores its picture lying, with a tag."""
    upright_HW = rectangle(48, 32, top=4, left=8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = save(np.rot90(upright_HW), tmp_path / "dog.png", exif=exif)
    save(upright_HW, tmp_path / "dog.mask.png")
    size = SIZE.model_copy(update={"height": 48, "width": 32})
    place_masks(image, tmp_path / "video.mp4", size)
    assert (read(tmp_path / "video.mask.png") == upright_HW).all()


def test_a_video_has_the_mask_as_its_prompt(tmp_path, draw_frames):
    mask_HW = rectangle(32, 48, top=12, left=16)
    image = save(mask_HW, tmp_path / "dog.png")
    save(mask_HW, tmp_path / "dog.mask.png")
    folder = tmp_path / "videos"
    for stem in ("A dog runs by a wall.-0", "A dog runs by a wall.-1"):
        place_masks(image, folder / f"{stem}.mp4", SIZE)
        write_video(folder / f"{stem}.mp4", draw_frames(9, 32, 48), 8.0)
    (shard,) = videos_below(SIZE.model_copy(update={"path": folder})).shards
    records = list(shard.records())
    assert len(records) == 2
    for record in records:
        (prompt,) = record.prompts
        assert (prompt.mask_HW == mask_HW).all()


def test_a_changed_mask_replaces_that_of_the_video(tmp_path):
    video = tmp_path / "videos" / "dog-0.mp4"
    for left in (16, 20):
        mask_HW = rectangle(32, 48, top=12, left=left)
        image = save(mask_HW, tmp_path / "dog.png")
        save(mask_HW, tmp_path / "dog.mask.png")
        place_masks(image, video, SIZE)
        assert (read(video.with_suffix(".mask.png")) == mask_HW).all()


@pytest.mark.parametrize(
    ("mask_HW", "message"),
    [
        (rectangle(64, 96, 12, 16), r"64x96 \(HxW\), but the image .*dog.png is 64x240"),
        (rectangle(64, 240, 12, 8), "lies outside the crop of .*dog.png to 32x48"),
        (np.zeros((64, 240), bool), "lies outside the crop"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path, mask_HW, message):
    image = save(rectangle(64, 240, 12, 16), tmp_path / "dog.png")
    save(mask_HW, tmp_path / "dog.mask.png")
    with pytest.raises(ValueError, match=rf"dog\.mask\.png: .*{message}"):
        place_masks(image, tmp_path / "dog-0.mp4", SIZE)
    assert not (tmp_path / "dog-0.mask.png").exists()


def test_a_mask_that_the_image_lacks_is_not_left_beside_the_video(tmp_path):
    image = save(rectangle(32, 48, 12, 16), tmp_path / "dog.png")
    left = save(rectangle(32, 48, 12, 16), tmp_path / "videos" / "dog-0.mask.png")
    with pytest.raises(ValueError, match=r"dog-0\.mask\.png is a mask that the first frame"):
        place_masks(image, tmp_path / "videos" / "dog-0.mp4", SIZE)
    assert left.exists()


def test_masks_of_other_names_are_not_those_of_an_image(tmp_path):
    for name in ("dog.mask.png", "dog.mask.3.png", "dogs.mask.png", "dog-1.mask.png"):
        (tmp_path / name).touch()
    assert set(masks_beside(tmp_path / "dog.png")) == {".mask.png", ".mask.3.png"}
    assert masks_beside(tmp_path / "nowhere" / "dog.png") == {}


MASKS = [SubjectPrompt(mask_HW=rectangle(32, 48, 12, left)) for left in (4, 20)]
BOX = SubjectPrompt(box_xyxy=(1.0, 2.0, 30.0, 20.0))


@pytest.mark.parametrize(
    ("subjects", "names"),
    [
        (MASKS[:1], ["dog.mask.png"]),
        (MASKS, ["dog.mask.0.png", "dog.mask.1.png"]),
        ([MASKS[0], BOX], []),
        ([], []),
    ],
)
def test_the_subjects_of_a_frame_replace_those_of_an_earlier_one(tmp_path, subjects, names):
    for earlier in (MASKS, MASKS[:1]):
        write_subjects(tmp_path / "dog.png", earlier)
        write_subjects(tmp_path / "dog.png", subjects)
        assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, subject in zip(names, subjects, strict=False):
        assert (read(tmp_path / name) == subject.mask_HW).all()
