import numpy as np
import pytest
from PIL import Image

from cache_schema import ClipMissing, StoreReader
from stages.clips import Clip, ClipsConfig, SubjectPrompt, read_video
from stages.clips.geometry import cover_and_crop
from stages.inspect_cache.clip_facts import describe_track
from stages.inspect_cache.overlay import draw_overlay, prompts_of
from stages.inspect_cache.overlay_picture import BACKWARD, FORWARD, PROMPT, sheet_moments
from stages.progress import SilentProgress

FRAMES, SIZE = 9, (24, 32)
RED = (200, 30, 30)


def attributes(**changes):
    prompt = {"source": "dataset", "kinds": ["box"], "frame": 0, "subjects": 1}
    prompt |= {"confidence": None, "backward": "track"} | changes.pop("prompt", {})
    track = {"first_frame": 0, "last_frame": 8, "lost_at": None, "valid_frames": 9}
    return track | {"prompt": prompt, "quality": 0.912} | changes


def masks(left, right):
    """A block from row 6 to 18 and between two columns, at the stored size."""
    mask_Thw = np.zeros((FRAMES, *SIZE), np.uint8)
    mask_Thw[:, 6:18, left:right] = 255
    return mask_Thw


@pytest.fixture
def store(write_store):
    def write(*, backward=True, **changes):
        more = {"arrays": {"backward": masks(12, 24)}} if backward else {}
        settings = {"axes": "thw", "attributes": attributes()} | more | changes
        return write_store("masks", "forward", masks(8, 20), **settings)

    return write


def draw(path, clips, tmp_path, *, key="walk/0007", dataset=None):
    (drawing,) = draw_overlay(
        StoreReader(path),
        [key],
        out_dir=tmp_path / "overlays",
        clips=clips,
        dataset=dataset,
        progress=SilentProgress(),
    )
    return drawing


def sheet(drawing):
    return np.asarray(Image.open(drawing.picture).convert("RGB")).astype(int)


def count(picture, colour, tolerance=3):
    """Pixels of a colour above the legend."""
    return int((np.abs(picture[:-40] - colour).max(-1) <= tolerance).sum())


def test_a_masks_store_becomes_a_sheet_and_a_video_at_the_clips_rate(
    store, clips, dataset, tmp_path
):
    drawing = draw(store(), clips, tmp_path, dataset=dataset(clips))
    assert drawing.key == "walk/0007"
    assert drawing.notes == ()
    assert drawing.picture == tmp_path / "overlays/walk-0007.overlay.png"
    video_THW3, fps = read_video(drawing.video)
    assert len(video_THW3) == FRAMES
    assert fps == 8
    names = {path.name for path in drawing.picture.parent.iterdir()}
    assert names == {"walk-0007.overlay.png", "walk-0007.overlay.mp4"}


def test_every_video_frame_shows_its_own_frame_of_the_clip(store, clips, dataset, tmp_path):
    """Frame t has the grey level 20 t; a corner of the panel is free of masks."""
    drawing = draw(store(), clips, tmp_path, dataset=dataset(clips))
    video_THW3, _ = read_video(drawing.video)
    height, width = video_THW3.shape[1:3]
    corner_T3 = video_THW3[:, height - 60, width - 30].astype(int)
    assert (np.abs(corner_T3 - 20 * np.arange(FRAMES)[:, None]) <= 6).all()


def test_masks_are_drawn_where_they_are(store, clips, dataset, tmp_path):
    """The stored block spans columns 8 to 20 of 32 (forward) and 12 to 24 (backward)."""
    picture = sheet(draw(store(), clips, tmp_path, dataset=dataset(clips)))
    panel = picture[60 : 60 + 240, 8 : 8 + 320]  # the first of the sheet's panels, frame 0
    columns = {}
    for name, colour in (("forward", FORWARD), ("backward", BACKWARD)):
        columns[name] = np.nonzero((np.abs(panel - colour).max(-1) <= 3).any(0))[0]
    assert abs(columns["forward"].min() - 80) <= 3
    assert abs(columns["backward"].min() - 120) <= 3
    assert abs(columns["backward"].max() - 240) <= 3
    tint = panel[120, 100]
    assert tint[0] > 60 and tint[1] < 40, "inside the forward mask, over black"
    tint = panel[120, 230]
    assert tint[2] > 60 and tint[0] < 40, "inside the backward mask, over black"


@pytest.mark.parametrize("shift", [0, 1])
def test_where_both_tracks_agree_both_are_seen(store, clips, dataset, tmp_path, shift):
    path = store(arrays={"backward": masks(8 + shift, 20 + shift)})
    picture = sheet(draw(path, clips, tmp_path, dataset=dataset(clips)))
    seen = {colour: count(picture, colour) for colour in (FORWARD, BACKWARD)}
    assert min(seen.values()) > 0.6 * max(seen.values())


def test_a_store_of_one_direction_is_drawn(store, clips, tmp_path):
    attributes_ = attributes(quality=None, prompt={"backward": None})
    path = store(backward=False, attributes=attributes_)
    picture = sheet(draw(path, clips, tmp_path))
    assert count(picture, FORWARD) > 500
    assert count(picture, BACKWARD) == 0


def test_frames_that_are_not_valid_are_marked_and_shown(store, clips, tmp_path):
    whole = sheet(draw(store(), clips, tmp_path))
    valid = np.arange(FRAMES) < 7
    lost = store(valid=valid, settings={"lost": True}, attributes=attributes(lost_at=7))
    picture = sheet(draw(lost, clips, tmp_path))
    assert count(whole, RED) == 0
    assert count(picture, RED) > 1000


def test_the_prompt_is_drawn_on_its_frame_alone(store, clips, dataset, tmp_path):
    box = SubjectPrompt(box_xyxy=(30.0, 20.0, 90.0, 80.0))
    drawing = draw(store(), clips, tmp_path, dataset=dataset(clips, prompts=(box,)))
    video_THW3, _ = read_video(drawing.video)
    shown = [
        int((np.abs(image.astype(int)[:-40] - PROMPT).max(-1) < 90).sum()) for image in video_THW3
    ]
    assert shown[0] > 300
    assert max(shown[1:]) < 30


def test_without_frames_the_masks_stand_on_grey_and_a_note_says_why(store, clips, tmp_path):
    drawing = draw(store(), clips, tmp_path)
    assert drawing.notes == (f"no frames: no dataset at {clips.path}",)
    assert count(sheet(drawing), (128, 128, 128)) > 10000


def test_other_stores_and_other_sizes_are_refused(store, write_store, clips, tmp_path):
    path = store()
    with pytest.raises(ClipMissing, match="walk/0009"):
        draw(path, clips, tmp_path, key="walk/0009")
    text = write_store("text", "embeds", np.zeros((4, 8), np.float16), axes="ld")
    with pytest.raises(ValueError, match="is a text store; overlays need a masks store"):
        draw(text, clips, tmp_path)
    longer = ClipsConfig(path=clips.path, num_frames=17, height=96, width=128)
    wider = ClipsConfig(path=clips.path, num_frames=9, height=96, width=160)
    for other in (longer, wider):
        with pytest.raises(ValueError, match=r"9 masks of 24x32 .* was made with"):
            draw(path, other, tmp_path)


def test_facts_tell_source_confidence_and_consistency():
    assert describe_track(attributes(), 9) == (
        "prompt: dataset box on frame 0",
        "cycle consistency 0.91",
        "9 of 9 frames valid",
    )
    found = {"source": "grounding", "kinds": ["box", "box"], "frame": 4, "confidence": 0.4321}
    given = attributes(prompt=found | {"phrase": "a dog."}, lost_at=7, valid_frames=3)
    assert describe_track(given, 9) == (
        "prompt: grounding box+box on frame 4",
        "looked for 'a dog.'",
        "confidence 0.43",
        "cycle consistency 0.91",
        "3 of 9 frames valid",
        "lost at frame 7",
    )
    chosen = {"source": "automatic", "kinds": ["mask"], "moves": True, "tokens_per_frame": 0.456}
    assert "moves 0.46 tokens a frame" in describe_track(attributes(prompt=chosen), 9)
    assert "stands still" in describe_track(attributes(prompt=chosen | {"moves": False}), 9)


def clip(**prompts):
    frames_THWC = np.zeros((9, 96, 128, 3), np.uint8)
    geometry = cover_and_crop(96, 128, height=96, width=128, source_fps=8.0, sampling="time")
    return Clip(key="k", frames_THWC=frames_THWC, geometry=geometry, **prompts)


def test_prompts_come_from_where_the_tracks_took_them():
    first, last = (SubjectPrompt(box_xyxy=(1.0, 1.0, 9.0, edge)) for edge in (5.0, 6.0))
    both = clip(prompts=(first,), last_frame_prompts=(last,))
    assert prompts_of(attributes(), both) == {0: (first,)}
    assert prompts_of(attributes(prompt={"backward": "dataset"}), both) == {0: (first,), 8: [last]}
    assert prompts_of(attributes(), None) == {}
    boxes = {"source": "grounding", "frame": 4, "boxes": [{"box_xyxy": [2, 3, 4, 5]}]}
    ((frame, (prompt,)),) = prompts_of(attributes(prompt=boxes), both).items()
    assert (frame, prompt.box_xyxy) == (4, (2, 3, 4, 5))


def test_a_sheets_frames_are_spread_but_never_miss_what_matters():
    assert sheet_moments(49, 8, []) == [0, 7, 14, 21, 27, 34, 41, 48]
    assert sheet_moments(49, 8, [0]) == [0, 7, 14, 21, 27, 34, 41, 48]
    assert sheet_moments(49, 8, [9, 8]) == [0, 8, 9, 21, 27, 34, 41, 48]
    assert sheet_moments(5, 8, [3]) == [0, 1, 2, 3, 4]
    assert len(sheet_moments(49, 8, list(range(20)))) == 8
