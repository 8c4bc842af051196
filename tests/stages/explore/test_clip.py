"""One clip: its pictures, and the Gram flow of a token against a loop in float64."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from cache_schema import CacheError, StoreReader
from stages.clips import ClipDataset, ClipsConfig
from stages.explore.explorer import NoSuchClip
from stages.explore.flow_view import NoSuchToken
from stages.explore.layers import load_layers, thumbnail_frames
from stages.explore.leave_out import LeaveOutList
from stages.explore.pictures import make_sheet, make_thumbnail
from stages.explore.stores import open_cache
from stages.train_student.data.splits import read_keys
from stages.train_student.objectives.config import LgfConfig
from tests.stages.explore.conftest import (
    CUT,
    FRAMES,
    GRID,
    ROWS,
    VIDEO,
    Shard,
    features_of,
    masks_of,
    open_explorer,
    write_store,
)

WALK = ROWS.index("walk/0001")


@pytest.fixture(scope="module")
def explorer(cache, tmp_path_factory):
    return open_explorer(cache, tmp_path_factory.mktemp("clip"))


def cell(layer, moment):
    """The picture of a moment, cut out of its sheet as the page does."""
    sheet = layer.sheet
    picture = np.asarray(Image.open(io.BytesIO(sheet.data)))
    top, left = moment // sheet.columns * sheet.height, moment % sheet.columns * sheet.width
    return picture[top : top + sheet.height, left : left + sheet.width]


def window_loop(query_HWC, keys_HWC, y, x, radius, temperature):
    """Cosines of a token with its window and their softmax; None outside the grid."""
    cosines = []
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            inside = 0 <= y + dy < GRID[0] and 0 <= x + dx < GRID[1]
            a, b = query_HWC[y, x], keys_HWC[y + dy, x + dx] if inside else None
            cosines.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) if inside else None)
    exps = [None if s is None else math.exp(s / temperature) for s in cosines]
    total = sum(e for e in exps if e is not None)
    return cosines, [None if e is None else e / total for e in exps]


def close(found, wanted, tolerance=2e-3):
    assert [value is None for value in found] == [value is None for value in wanted]
    pairs = zip(found, wanted, strict=True)
    assert all(a is None or abs(a - b) < tolerance for a, b in pairs)


@pytest.mark.parametrize("place", [(0, 0, 0), (3, 1, 2), (5, 2, 3)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_a_tokens_window_is_the_fused_gram_flow(explorer, place, temperature):
    pair, y, x = place
    parts = [features_of(ROWS[WALK], part).astype(np.float64) for part in (0, 1)]
    fused = np.concatenate(parts, axis=-1) / 2**0.5
    found = explorer.flow(WALK, "teacher").window("forward", *place, temperature)
    similarity, probability = window_loop(fused[pair], fused[pair + 1], y, x, 1, temperature)
    close(found["similarity"], similarity)
    close(found["probability"], probability)
    offsets = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    expected = [
        sum(p * o[axis] for p, o in zip(probability, offsets, strict=True) if p is not None)
        for axis in (0, 1)
    ]
    assert found["offset"] == pytest.approx(expected, abs=5e-3)
    assert found["radius"] == 1 and found["valid"] is True


def test_crossed_pairs_take_each_direction_from_its_own_track(cache, tmp_path):
    layers = open_explorer(cache, tmp_path, pairs="crossed").layers(WALK)
    assert set(layers.flow.by_direction) == {"forward", "backward"}
    forward, backward = (features_of(ROWS[WALK], part).astype(np.float64) for part in (0, 1))
    ahead = layers.flow.window("forward", 2, 1, 1, 0.1)["similarity"]
    close(ahead, window_loop(backward[2], backward[3], 1, 1, 1, 0.1)[0])
    # The window of the pair's second map in its first.
    behind = layers.flow.window("backward", 2, 1, 1, 0.1)["similarity"]
    close(behind, window_loop(forward[3], forward[2], 1, 1, 1, 0.1)[0])


def test_pairs_that_training_masks_out_are_marked(explorer):
    layers = explorer.layers(WALK)
    valid = [layers.flow.window("forward", pair, 0, 0, 0.1)["valid"] for pair in range(FRAMES - 1)]
    assert valid == [True] * 6 + [False] * 2  # the last two maps are not valid


@pytest.mark.parametrize(
    "place", [("forward", -1, 0, 0), ("forward", 8, 0, 0), ("backward", 0, 0, 0)]
)
def test_tokens_that_are_not_there_are_refused(explorer, place):
    with pytest.raises(NoSuchToken):
        explorer.flow(WALK, "teacher").window(*place, 0.1)


def test_every_frame_of_the_masks_is_in_its_place_on_the_sheet(explorer):
    layers = explorer.layers(WALK)
    for moment in range(FRAMES):
        assert np.array_equal(
            cell(layers.layers["mask_forward"], moment), masks_of(ROWS[WALK])[moment]
        )
    assert layers.layers["mask_forward"].moments == tuple(range(FRAMES))
    # The block of 4x4 pixels begins at row 4 and column 0, of 12x16.
    assert layers.subject_yx == pytest.approx((6 / 12, 2 / 16))


def test_every_frame_of_the_video_is_in_its_place_on_the_sheet(explorer):
    layer = explorer.layers(WALK).layers["frames"]
    for moment in range(FRAMES):
        assert abs(int(cell(layer, moment)[20, 30, 0]) - 20 * moment) <= 6


def test_without_its_source_a_clip_shows_its_features_and_says_why(explorer):
    layers = explorer.layers(ROWS.index("walk/0002"))
    assert "frames" not in layers.layers
    assert layers.notes[0].startswith("no frames: ")
    assert {"components_fused", "components_forward", "components_backward"} <= set(layers.layers)
    still, loop = explorer.thumbnail(ROWS.index("walk/0002"))
    assert Image.open(io.BytesIO(still)).size == (192, 144)
    assert Image.open(io.BytesIO(loop)).n_frames > 1


def test_entries_of_another_video_are_not_shown_together(tmp_path):
    """The masks are of a video that has been replaced; the latents, of the one that replaced it."""
    valid = np.ones(FRAMES, np.uint8)
    arrays = {"masks": lambda key: {"forward": masks_of(key), "valid": valid}}
    arrays["latents"] = lambda key: {"mean": np.ones((3, 4, 6, 8), np.float16)}
    videos = {"masks": b"as it was", "latents": VIDEO}
    readers = {
        kind: StoreReader(write_store(tmp_path, kind, of, {"clips": CUT}, video=videos[kind]))
        for kind, of in arrays.items()
    }
    data = ClipsConfig(path=tmp_path, num_frames=FRAMES, height=48, width=64)
    source = {"data": data, "dataset": ClipDataset((Shard(),), layout="one clip")}
    found = load_layers(readers, ROWS[WALK], "walk", lgf=LgfConfig(), **source)
    assert set(found.layers) == {"mask_forward"}
    assert "no frames: the dataset's video of this clip is another one than" in found.notes[0]
    assert "no latents: made from another video of this clip than masks" in found.notes[1]
    pictures, _ = thumbnail_frames(readers, ROWS[WALK], "walk", **source)
    assert len(pictures) == 3  # of the latents, not of the video


def test_a_thumbnail_shows_the_middle_and_the_loop_every_frame(explorer):
    still, loop = (Image.open(io.BytesIO(data)) for data in explorer.thumbnail(WALK))
    assert abs(np.asarray(still.convert("L"))[50, 50] - 80) < 8
    levels = []
    for number in range(loop.n_frames):
        loop.seek(number)
        levels.append(int(np.asarray(loop.convert("L"))[50, 50]))
    assert np.abs(np.array(levels) - 20 * np.arange(FRAMES)).max() < 8


def test_facts_of_a_clip_are_json_with_records_settings_and_origin(explorer):
    found = json.loads(json.dumps(explorer.clip(WALK), allow_nan=False))
    assert [store["kind"] for store in found["stores"]] == ["masks", "teacher", "text"]
    masks = found["stores"][0]
    assert masks["settings"]["clips"] == CUT
    assert masks["made_with"] == {"sam2videox": "0.1.0"}
    assert masks["attributes"]["quality"] == 0.9
    assert (masks["shard"], masks["source"]) == ("walk", "walk.tar")
    assert found["facts"][:2] == ["prompt: dataset mask on frame 0", "cycle consistency 0.90"]
    assert found["flow"]["shape"] == [FRAMES - 1, *GRID, 9]
    with pytest.raises(NoSuchClip):
        explorer.clip(5)


def test_a_stored_gram_flow_is_shown_with_the_window_it_has(tmp_path):
    flow = np.linspace(-1, 1, 8 * 12 * 9, dtype=np.float16).reshape(8, 3, 4, 9)
    path = write_store(
        tmp_path,
        "gram_flow",
        lambda key: {"gram_flow": flow, "valid": np.ones(FRAMES, np.uint8)},
        {"clips": CUT, "pairs": "forward"},
    )
    data = ClipsConfig(path=tmp_path, num_frames=FRAMES, height=48, width=64)
    layers = load_layers(
        {"gram_flow": StoreReader(path)},
        ROWS[0],
        "run",
        data=data,
        dataset=None,
        lgf=LgfConfig(radius=3, pairs="crossed"),
    )
    found = layers.flow.window("forward", 7, 1, 1, 0.1)["similarity"]
    assert found == pytest.approx(flow[7, 1, 1].tolist())
    assert layers.notes[1:] == [
        "Gram flow of radius 1, the largest stored",
        "pairs forward as stored, not train.lgf.pairs=crossed",
    ]


def test_two_stores_of_one_kind_and_size_must_be_chosen_from(cache, tmp_path):
    (store,) = cache.glob("masks-*")
    other = tmp_path / "cache"
    other.mkdir()
    for name in ("masks-a", "masks-b"):
        (other / name).symlink_to(store)
    with pytest.raises(CacheError, match="several masks stores of the same clip size"):
        open_cache(other)
    (size,) = open_cache(other, {"masks": ("masks-b",)})
    assert size.listed.name == "masks-b"


def test_large_frames_are_scaled_and_values_are_not():
    frames = np.zeros((2, 100, 1280, 3), np.uint8)
    assert (make_sheet(frames, "JPEG").width, make_sheet(frames, "PNG").width) == (640, 1280)
    still, _ = make_thumbnail(frames, 8.0)
    assert Image.open(io.BytesIO(still)).size == (192, 15)


def test_the_list_is_what_training_reads_and_keeps_the_lines_of_others(tmp_path):
    listed = LeaveOutList(tmp_path / "new" / "leave_out.jsonl")
    assert listed.keys() == frozenset()
    key = 'walk/"<b>\u202e 1'
    listed.change(key, leave_out=True)
    listed.change(key, leave_out=True)
    assert listed.path.read_text().count("\n") == 1
    foreign = '{"key":  "other", "reason": "too_short"}'
    listed.path.write_text(listed.path.read_text() + foreign + "\n\n")
    assert read_keys(listed.path) == {key, "other"}
    listed.change(key, leave_out=False)
    assert listed.path.read_text() == foreign + "\n"


def test_a_file_that_is_no_list_stays_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a list\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        LeaveOutList(path).change("walk/0001", leave_out=True)
    assert path.read_text() == "not a list\n"
