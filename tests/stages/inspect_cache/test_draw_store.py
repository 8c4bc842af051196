from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_schema import ClipMissing
from stages.clips import ClipDataset, ClipRecord, encode_video, open_dataset, read_video
from stages.inspect_cache.draw_store import draw_store
from stages.progress import SilentProgress


def draw(store, clips, tmp_path, *, key=None, dataset=None):
    return draw_store(
        store,
        key,
        out_dir=tmp_path / "pictures",
        clips=clips,
        dataset=dataset,
        radius=2,
        temperature=0.1,
        progress=SilentProgress(),
    )


class Shard:
    """An input shard with one clip."""

    name, source = "00000", "00000.tar"

    def __init__(self, key, video):
        self.record = ClipRecord(key=key, video=video, caption=None, prompt=None)

    def num_clips(self):
        return 1

    def records(self):
        yield self.record


def dataset(clips, key="walk/0007", num_frames=9, height=None):
    shape = (num_frames, height or clips.height, clips.width, 3)
    frames_THWC = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    return ClipDataset((Shard(key, encode_video(frames_THWC, 8.0)),))


def test_a_teacher_store_becomes_a_picture_and_a_video(
    moving_features, write_store, clips, tmp_path
):
    store = write_store("teacher", "features", moving_features(1, 0))
    drawing = draw(store, clips, tmp_path, dataset=dataset(clips))
    assert drawing.key == "walk/0007"
    assert drawing.notes == ()
    assert drawing.picture == tmp_path / "pictures/walk-0007.png"
    picture = Image.open(drawing.picture)
    frames_THWC, fps = read_video(drawing.video)
    assert picture.width == frames_THWC.shape[2]
    assert len(frames_THWC) == 8
    assert fps == 8
    assert sorted(p.name for p in drawing.picture.parent.iterdir()) == [
        "walk-0007.mp4",
        "walk-0007.png",
    ]


def test_a_latents_store_is_drawn_without_flow_at_its_own_rate(write_store, clips, tmp_path):
    mean = np.random.default_rng(0).standard_normal((3, 4, 12, 16)).astype(np.float16)
    drawing = draw(write_store("latents", "mean", mean, axes="fchw"), clips, tmp_path)
    frames_THWC, fps = read_video(drawing.video)
    assert len(frames_THWC) == 3
    assert fps == pytest.approx(8 * 3 / 9, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (None, "no dataset at"),
        ({"key": "other"}, "has no clip 'walk/0007' in shard 00000"),
        ({"num_frames": 3}, "too_short"),
    ],
)
def test_frames_that_cannot_be_had_are_left_out_with_the_reason(
    moving_features, write_store, clips, tmp_path, changes, reason
):
    store = write_store("teacher", "features", moving_features(1, 0))
    found = None if changes is None else dataset(clips, **changes)
    drawing = draw(store, clips, tmp_path, dataset=found)
    (note,) = drawing.notes
    assert reason in note
    assert drawing.picture.is_file()


def test_a_folder_of_clips_gives_the_frames(moving_features, write_store, clips, tmp_path):
    clips.path.mkdir()
    (clips.path / "metadata.jsonl").write_text('{"file_name": "walk/0007.mp4", "caption": "x"}\n')
    (clips.path / "walk").mkdir()
    shape = (9, clips.height, clips.width, 3)
    video = encode_video(np.zeros(shape, np.uint8), 8.0)
    (clips.path / "walk/0007.mp4").write_bytes(video)
    store = write_store("teacher", "features", moving_features(1, 0))
    assert draw(store, clips, tmp_path, dataset=open_dataset(clips)).notes == ()


@pytest.mark.parametrize("key", ["../../escape", "/etc/passwd", 'a b*?"<>|', "走る犬", "..."])
def test_no_key_leads_out_of_the_folder(moving_features, write_store, clips, tmp_path, key):
    store = write_store("teacher", "features", moving_features(1, 0), key=key)
    drawing = draw(store, clips, tmp_path, key=key)
    assert Path(drawing.picture).resolve().parent == (tmp_path / "pictures").resolve()
    assert drawing.picture.is_file()


def test_an_unknown_clip_is_named(moving_features, write_store, clips, tmp_path):
    store = write_store("teacher", "features", moving_features(1, 0))
    with pytest.raises(ClipMissing, match="walk/0009"):
        draw(store, clips, tmp_path, key="walk/0009")


def test_a_store_without_a_picture_says_so(write_store, clips, tmp_path):
    store = write_store("text", "embeds", np.zeros((4, 8), np.float16), axes="ld")
    with pytest.raises(ValueError, match="is a text store, which has no picture"):
        draw(store, clips, tmp_path)
