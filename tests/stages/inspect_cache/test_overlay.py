import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from cache_schema import ClipMissing, StoreReader
from stages.clips import Clip, ClipsConfig, SubjectPrompt, read_video
from stages.clips.geometry import cover_and_crop
from stages.inspect_cache.clip_facts import describe_track
from stages.inspect_cache.drawing import WARNING, panel_figure, pixels
from stages.inspect_cache.overlay import (
    BACKWARD,
    FORWARD,
    PROMPT,
    OverlayView,
    draw_mask,
    draw_overlay,
    draw_prompt,
    overlay_figure,
    prompts_of,
)
from stages.progress import SilentProgress

FRAMES, SIZE = 9, (24, 32)


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
    rgb = 255 * np.array(to_rgb(colour))
    return int((np.abs(picture[:-60] - rgb).max(-1) <= tolerance).sum())


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
    """Frame t has the grey level 20 t; the right of the panel is free of masks."""
    drawing = draw(store(), clips, tmp_path, dataset=dataset(clips))
    video_THW3, _ = read_video(drawing.video)
    height, width = video_THW3.shape[1:3]
    right_T3 = video_THW3[:, height // 2, width - 30].astype(int)
    assert (np.abs(right_T3 - 20 * np.arange(FRAMES)[:, None]) <= 6).all()


def shown(moment=0, *, backward=True, prompts=(), valid=None):
    """The panel of one black frame, and a function from frame pixels to its rendered colour."""
    view = OverlayView(
        title="walk/0007",
        facts=(),
        frames_THW3=np.zeros((FRAMES, 96, 128, 3), np.uint8),
        forward_Thw=masks(8, 20),
        backward_Thw=masks(12, 24) if backward else None,
        valid_T=np.ones(FRAMES, bool) if valid is None else valid,
        prompts={0: prompts} if prompts else {},
    )
    drawn = overlay_figure(view, [moment], 2.0)
    return drawn, colours_of(drawn, drawn.axes[0])


def colours_of(drawn, panel):
    picture_HW3 = pixels(drawn)

    def at(x, y):
        column, row = panel.transData.transform((x, y))
        return picture_HW3[int(len(picture_HW3) - row), int(column)].astype(int)

    return at


def test_masks_are_drawn_where_they_are():
    """Of 32 columns, the block spans 8 to 20 (forward) and 12 to 24 (backward)."""
    drawn, at = shown()
    forward, _, backward, _ = drawn.axes[0].collections[0:4]
    for mask, left, right in ((forward, 8, 20), (backward, 12, 24)):
        extent = mask.get_datalim(drawn.axes[0].transData)
        assert extent.x0 == pytest.approx(4 * left - 0.5, abs=0.1)
        assert extent.x1 == pytest.approx(4 * right - 0.5, abs=0.1)
        assert (extent.y0, extent.y1) == pytest.approx((4 * 6 - 0.5, 4 * 18 - 0.5), abs=0.1)
    red, green, _ = at(40, 48)
    assert red > 60 and green < 40, "inside the forward mask, over black"
    red, _, blue = at(90, 48)
    assert blue > 60 and red < 40, "inside the backward mask, over black"
    assert at(60, 48).min() > 40, "both"
    assert at(120, 48).max() == at(60, 10).max() == 0


def test_a_pixel_is_in_from_a_half_on_and_the_frames_edge_is_no_outline():
    for level, inside in ((127, False), (128, True)):
        drawn, ((panel,),) = panel_figure("", "", (1, 1), (1.0, 1.0))
        panel.imshow(np.zeros((8, 8, 3), np.uint8), aspect="auto")
        panel.autoscale(False)
        draw_mask(panel, np.full((4, 4), level, np.uint8), "#ffffff", tint=1.0)
        assert len(panel.collections) == 1, "no outline"
        at = colours_of(drawn, panel)
        assert {int(at(x, y).max()) for x in (0, 7) for y in (0, 7)} == {255 * inside}


@pytest.mark.parametrize("shift", [0, 1])
def test_where_both_tracks_agree_both_are_seen(store, clips, dataset, tmp_path, shift):
    path = store(arrays={"backward": masks(8 + shift, 20 + shift)})
    picture = sheet(draw(path, clips, tmp_path, dataset=dataset(clips)))
    seen = {colour: count(picture, colour) for colour in (FORWARD, BACKWARD)}
    assert min(seen.values()) > 0.4 * max(seen.values())


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
    assert count(whole, WARNING) == 0
    assert count(picture, WARNING) > 1000


def test_the_prompt_is_drawn_on_its_frame_alone(store, clips, dataset, tmp_path):
    box = SubjectPrompt(box_xyxy=(30.0, 20.0, 90.0, 80.0))
    drawing = draw(store(), clips, tmp_path, dataset=dataset(clips, prompts=(box,)))
    video_THW3, _ = read_video(drawing.video)
    pixels_T = [count(image.astype(int), PROMPT, tolerance=90) for image in video_THW3]
    assert pixels_T[0] > 300
    assert max(pixels_T[1:]) < 30


@pytest.mark.parametrize(
    ("prompt", "coloured", "untouched"),
    [
        (SubjectPrompt(box_xyxy=(30.0, 20.0, 90.0, 80.0)), (30, 50), (60, 50)),
        (SubjectPrompt(box_xyxy=(-50.0, 20.0, 500.0, 80.0)), (60, 20), (60, 50)),
        (SubjectPrompt(box_xyxy=(-50.0, 20.0, 500.0, 80.0)), (127, 50), (60, 50)),
        (
            SubjectPrompt(points_xy=np.array([[50.0, 60.0]]), point_labels=np.array([1])),
            (50, 60),
            (70, 60),
        ),
        (SubjectPrompt(mask_HW=np.arange(128)[None].repeat(96, 0) >= 64), (63.5, 50), (70, 50)),
    ],
    ids=["box", "top of a box beyond the frame", "right of it", "point", "mask"],
)
def test_a_prompt_stands_where_it_points_to(prompt, coloured, untouched):
    drawn, ((panel,),) = panel_figure("", "", (1, 1), (2.0, 1.5))
    panel.imshow(np.zeros((96, 128, 3), np.uint8), aspect="auto")
    panel.autoscale(False)
    draw_prompt(panel, prompt)
    at = colours_of(drawn, panel)
    assert np.abs(at(*coloured) - 255 * np.array(to_rgb(PROMPT))).max() < 60
    assert at(*untouched).max() == 0


def test_a_point_off_the_subject_has_no_colour():
    points = np.array([[20.0, 20.0], [90.0, 60.0]])
    prompt = SubjectPrompt(points_xy=points, point_labels=np.array([0, 1]))
    _, at = shown(prompts=[prompt], backward=False)
    assert at(20, 20).max() < 60
    assert np.abs(at(90, 60) - 255 * np.array(to_rgb(PROMPT))).max() < 10


def test_without_frames_the_masks_stand_on_grey_and_a_note_says_why(store, clips, tmp_path):
    drawing = draw(store(), clips, tmp_path)
    assert drawing.notes == (f"no frames: no dataset at {clips.path}",)
    assert count(sheet(drawing), "#808080") > 10000


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
