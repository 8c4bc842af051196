from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache_schema import ClipMissing, StoreReader
from stages.clips import encode_video, open_dataset, read_video
from stages.inspect_cache.clip_view import flow_of_features, view_clip
from stages.inspect_cache.colours import flow_colours
from stages.inspect_cache.draw_store import draw_flow, draw_store, view_figure
from stages.inspect_cache.drawing import panel_figure, spread_moments
from stages.inspect_cache.drawing import pixels as rendered
from stages.local_gram_flow import regrid_fused
from stages.progress import SilentProgress
from stages.teacher_store.features import encode_features
from stages.teacher_store.gram_flow import compute_gram_flow, encode_gram_flow


def draw_all(store, keys, clips, tmp_path, *, dataset=None, radius=2):
    drawings = draw_store(
        StoreReader(store),
        keys,
        out_dir=tmp_path / "pictures",
        clips=clips,
        dataset=dataset,
        radius=radius,
        temperature=0.1,
        progress=SilentProgress(),
    )
    return list(drawings)


def draw(store, clips, tmp_path, *, key="walk/0007", **options):
    (drawing,) = draw_all(store, [key], clips, tmp_path, **options)
    return drawing


def test_a_teacher_store_becomes_a_picture_and_a_video(
    moving_features, write_store, clips, dataset, tmp_path
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
        ({"num_frames": 17}, "video of this clip is another one than the store was made from"),
    ],
)
def test_frames_that_cannot_be_had_are_left_out_with_the_reason(
    moving_features, write_store, clips, dataset, tmp_path, changes, reason
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
    store = write_store("teacher", "features", moving_features(1, 0), video=video)
    assert draw(store, clips, tmp_path, dataset=open_dataset(clips)).notes == ()


@pytest.mark.parametrize(
    "key", ["..escape/x", "~/x", r"..\..\escape", 'a b*?"<>|', "走る犬", "..."]
)
def test_no_key_leads_out_of_the_folder(moving_features, write_store, clips, tmp_path, key):
    store = write_store("teacher", "features", moving_features(1, 0), keys=(key,))
    drawing = draw(store, clips, tmp_path, key=key)
    assert Path(drawing.picture).resolve().parent == (tmp_path / "pictures").resolve()
    assert drawing.picture.is_file()


def test_an_unknown_clip_is_named(moving_features, write_store, clips, tmp_path):
    store = write_store("teacher", "features", moving_features(1, 0))
    with pytest.raises(ClipMissing, match="walk/0009"):
        draw(store, clips, tmp_path, key="walk/0009")


def test_a_store_without_a_picture_says_so(write_store, clips, tmp_path):
    store = write_store("text", "embeds", np.zeros((4, 8), np.float16), axes="ld")
    with pytest.raises(ValueError, match="is a text store, which cannot be drawn by itself"):
        draw(store, clips, tmp_path)


def test_the_clip_of_a_retry_shard_is_found(moving_features, write_store, clips, dataset, tmp_path):
    store = write_store("teacher", "features", moving_features(1, 0), shard="00000-retry2")
    assert draw(store, clips, tmp_path, dataset=dataset(clips)).notes == ()


def test_keys_that_read_alike_get_files_of_their_own(moving_features, write_store, clips, tmp_path):
    keys = ("a/b", "a-b", "c/d")
    store = write_store("teacher", "features", moving_features(1, 0), keys=keys)
    pictures = [drawing.picture for drawing in draw_all(store, keys, clips, tmp_path)]
    assert pictures[0] == draw(store, clips, tmp_path, key="a/b").picture
    assert len(set(pictures)) == 3
    assert pictures[2].name == "c-d.png"


def test_features_on_sam2s_own_grid_are_shown_on_the_students(
    moving_features, write_store, clips, dataset, tmp_path
):
    """The picture is that of the resampled features, stored on the student's grid."""
    native = moving_features(1, 0, grid=(8, 8))
    settings = {"grid": [8, 8], "grid_source": "native", "parts": 2}
    store = write_store("teacher", "features", native, settings=settings)
    drawing = draw(store, clips, tmp_path / "native", dataset=dataset(clips))
    assert drawing.notes == ("8x8 tokens resampled to 6x8, as in training",)
    resampled = regrid_fused(torch.from_numpy(native), *clips.token_grid, 2).numpy()
    other = write_store("teacher", "features", resampled, shard="00001")
    same = draw(other, clips, tmp_path / "student", dataset=dataset(clips, name="00001"))
    assert (pixels(drawing) == pixels(same)).all()


def test_moments_that_are_not_valid_are_marked(moving_features, write_store, clips, tmp_path):
    features_THWC = moving_features(1, 0)
    features_THWC[6:] = 0
    red = []
    for valid in (np.ones(9), np.arange(9) < 6):
        settings = {"all valid": bool(valid.all())}
        store = write_store("teacher", "features", features_THWC, valid=valid, settings=settings)
        picture = pixels(draw(store, clips, tmp_path))
        red.append(int((np.abs(picture - (200, 30, 30)).sum(-1) < 3).sum()))
    assert red[0] == 0
    assert red[1] > 500


def test_a_teacher_store_that_does_not_say_what_is_valid_is_refused(
    moving_features, write_store, clips, tmp_path
):
    bare = write_store("teacher", "features", moving_features(1, 0), valid=None)
    with pytest.raises(ValueError, match="holds no array valid"):
        draw(bare, clips, tmp_path)


@pytest.fixture
def write_flow(write_store):
    """A gram_flow store of the flow of some features, stored with radius 2."""

    def write(features_THWC, dtype="float16", **more):
        flow_PHWK = compute_gram_flow(
            torch.from_numpy(features_THWC), radius=2, token_grid=features_THWC.shape[1:3]
        )
        arrays = encode_gram_flow(flow_PHWK, dtype)
        arrays["valid"] = np.ones(len(features_THWC), np.uint8)
        flow = arrays.pop("gram_flow")
        return write_store("gram_flow", "gram_flow", flow, axes="phwk", arrays=arrays, **more)

    return write


def pixels(drawing):
    """Below the title, which names the store."""
    return np.asarray(Image.open(drawing.picture).convert("RGB")).astype(int)[40:]


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_gram_flow_store_shows_the_flow_that_its_features_show(
    moving_features, write_store, write_flow, clips, dataset, tmp_path, dtype
):
    """The picture without the column of colours, but for rounding."""
    features_THWC = moving_features(1, 0)
    teacher = write_store("teacher", "features", features_THWC)
    flow = write_flow(features_THWC, dtype)
    whole = draw(teacher, clips, tmp_path / "features", dataset=dataset(clips))
    drawing = draw(flow, clips, tmp_path / "flow", dataset=dataset(clips))
    assert drawing.notes == ()
    found, expected = pixels(drawing), pixels(whole)
    width = found.shape[1] - 180  # the flow's column begins to the right of labels and frames
    assert found.shape[0] == expected.shape[0]
    panels = np.abs(found[:, -width // 2 :] - expected[:, -width // 2 :])[20:]
    assert (panels.max(-1) > 24).mean() < 0.01
    video_THW3, fps = read_video(drawing.video)
    assert len(video_THW3) == 8
    assert fps == 8


def test_a_smaller_window_than_is_stored_is_shown_on_request(
    moving_features, write_store, write_flow, clips, tmp_path
):
    features_THWC = moving_features(1, 0)
    flow = write_flow(features_THWC)
    narrow = draw(flow, clips, tmp_path / "narrow", radius=1)
    wide = draw(flow, clips, tmp_path / "wide", radius=7)
    stored = draw(flow, clips, tmp_path / "stored")
    assert "flow of radius 2, the largest stored" in wide.notes
    assert len(wide.notes) == len(narrow.notes) + 1
    assert (pixels(wide) == pixels(stored)).all()
    assert (pixels(narrow) != pixels(stored)).any()
    crossed = draw(write_flow(features_THWC, settings={"pairs": "crossed"}), clips, tmp_path / "x")
    assert any("of the backward track" in note for note in crossed.notes)


def test_features_of_int8_show_what_float16_shows(moving_features, write_store, clips, tmp_path):
    features_THWC = moving_features(1, 0)
    arrays = encode_features(torch.from_numpy(features_THWC), "int8")
    features = arrays.pop("features")
    coded = write_store("teacher", "features", features, arrays=arrays)
    exact = write_store("teacher", "features", features_THWC)
    found = pixels(draw(coded, clips, tmp_path / "coded"))
    expected = pixels(draw(exact, clips, tmp_path / "exact"))
    assert (np.abs(found - expected).max(-1) > 24).mean() < 0.01


def figure(features_THWC, moments, *, flow=True, colours=True, frames_THWC=None, **more):
    flow_PHW2 = flow_of_features(features_THWC, 2, 0.1) if flow else None
    view = view_clip(features_THWC if colours else None, flow_PHW2, num_frames=9)
    return view_figure(view, moments, more.get("title", "walk/0007"), frames_THWC)


def captions(drawn):
    return [axes.get_title(loc="left") for axes in drawn.axes if axes.get_title(loc="left")]


def test_columns_appear_as_there_is_data(moving_features):
    features_THWC = moving_features(1, 0)
    frames_THWC = np.zeros((9, 96, 128, 3), np.uint8)
    frame, colours = "frame", "principal components as RGB"
    flow = "implied flow to the next frame"
    assert captions(figure(features_THWC, [0], flow=False)) == [colours]
    assert captions(figure(features_THWC, [0], frames_THWC=frames_THWC)) == [frame, colours, flow]
    assert captions(figure(features_THWC, [0], colours=False)) == [flow]


def test_frames_stand_beside_their_own_moment(moving_features):
    """At latent rate, a row shows the last frame of its group."""
    frames_THWC = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full(
        (1, 96, 128, 3), 20, np.uint8
    )
    drawn = figure(moving_features(1, 0)[[0, 4, 8]], [0, 1], frames_THWC=frames_THWC)
    rows = [axes for axes in drawn.axes if axes.get_ylabel()]
    assert [axes.get_ylabel() for axes in rows] == ["frame 0", "frame 4"]
    assert [axes.images[0].get_array().max() for axes in rows] == [0, 80]


def test_every_video_frame_has_the_same_even_size(moving_features):
    features_THWC = moving_features(0, 1, grid=(7, 5))
    shapes = {rendered(figure(features_THWC, [moment])).shape for moment in range(8)}
    ((height, width, _),) = shapes
    assert height % 2 == width % 2 == 0


@pytest.mark.parametrize("title", ["走る犬/" + "W" * 400, r"$\frac{1$ \u202e"])
def test_a_title_too_long_or_in_another_script_stays_within_the_picture(
    moving_features, title, recwarn
):
    drawn = figure(moving_features(1, 0), [0], title=title)
    picture = rendered(drawn)
    box = drawn.texts[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= picture.shape[1]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    if title.startswith("走"):
        assert drawn.texts[0].get_text().startswith(r"\u8d70")


def flow_panel(flow_HW2, largest=1.0):
    drawn, ((panel,),) = panel_figure("", "", (1, 1), (1.0, 1.0))
    draw_flow(panel, flow_HW2, largest, 1.0)
    drawn.canvas.draw()
    return panel.images[0].get_array(), panel.collections[0], rendered(drawn)


def test_arrows_and_colours_are_those_of_the_flow():
    flow_HW2 = np.random.default_rng(0).uniform(-1, 1, (4, 6, 2))
    flow_HW2[0, 0] = (30, 40)
    colours, arrows, _ = flow_panel(flow_HW2)
    assert (colours == flow_colours(flow_HW2, 1.0)).all()
    lengths = np.hypot(*flow_HW2.reshape(-1, 2).T)
    expected_N2 = flow_HW2.reshape(-1, 2) / np.maximum(lengths, 1)[:, None]
    np.testing.assert_allclose(np.stack([arrows.U, arrows.V], -1), expected_N2)
    np.testing.assert_allclose(arrows.XY[8], [2, 1])


def test_arrows_point_along_the_flow():
    """The head is the broad end: more ink on the side the flow goes to; y is downwards."""
    flow_HW2 = np.zeros((1, 1, 2))
    flow_HW2[..., 0] = 1.0
    for flow, along in ((flow_HW2, 1), (flow_HW2[..., ::-1], 0)):
        ink = np.argwhere(flow_panel(flow)[2][30:].max(-1) < 90)[:, along]
        middle = (ink.min() + ink.max()) / 2
        assert (ink > middle).sum() > 1.5 * (ink < middle).sum()


def test_fine_grids_get_fewer_arrows_than_tokens():
    _, arrows, _ = flow_panel(np.tile(np.array([1.0, 0.0]), (64, 64, 1)))
    assert 20 < len(arrows.U) < 100


def test_the_legend_shows_each_direction_where_it_points(moving_features):
    drawn = figure(moving_features(1, 0), [0])
    (wheel,) = (a for panel in drawn.axes for a in panel.child_axes)
    colours = wheel.images[0].get_array()
    middle = len(colours) // 2
    assert colours[middle, middle].min() > 240
    assert colours[middle, -1].tolist() == pytest.approx([255, 0, 0], abs=5)
    below = flow_colours(np.array([[[0.0, 1.0]]]), 1.0)[0, 0]
    assert colours[-1, middle].tolist() == pytest.approx(below.tolist(), abs=5)


def test_moments_are_spread_but_never_miss_what_matters():
    assert spread_moments(8, 3) == [0, 4, 7]
    assert spread_moments(8, 50) == list(range(8))
    assert spread_moments(49, 8) == [0, 7, 14, 21, 27, 34, 41, 48]
    assert spread_moments(49, 8, [0]) == [0, 7, 14, 21, 27, 34, 41, 48]
    assert spread_moments(49, 8, [9, 8]) == [0, 8, 9, 21, 27, 34, 41, 48]
    assert spread_moments(5, 8, [3]) == [0, 1, 2, 3, 4]
    assert len(spread_moments(49, 8, list(range(20)))) == 8
