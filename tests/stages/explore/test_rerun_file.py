"""What a recording for the Rerun viewer is given, by a stand-in for its SDK, which is large."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from stages.explore.layers import MASK_COLOURS
from stages.explore.rerun_file import import_rerun, write_recording
from stages.progress import SilentProgress
from tests.stages.explore.conftest import (
    CAPTIONS,
    FRAMES,
    GRID,
    HTML,
    ROWS,
    masks_of,
    open_explorer,
)


class Made(SimpleNamespace):
    """A component of the SDK with its arguments."""

    def compress(self):
        return Made(**self.__dict__, compressed=True)


class Recording:
    """Keeps what is logged, by entity and frame."""

    def __init__(self, application_id):
        self.logged, self.times = {}, {}

    def save(self, path):
        self.path = path

    def set_time(self, timeline, **value):
        self.times[timeline] = value

    def log(self, path, made, static=False):
        moment = None if static else self.times["frame"]["sequence"]
        if not static:
            assert self.times["time"] == {"duration": pytest.approx(moment / 8.0)}
        entities = self.logged.setdefault(tuple(path), {})
        assert moment not in entities
        entities[moment] = made

    def flush(self):
        assert not self.path.with_name("clips.rrd").exists()
        self.path.write_bytes(b"a recording")

    def disconnect(self):
        pass


@pytest.fixture
def recordings(monkeypatch):
    """The recordings that are made."""
    found = []

    def stream(application_id):
        found.append(Recording(application_id))
        return found[-1]

    makers = {
        name: lambda *values, name=name, **named: Made(kind=name, values=values, named=named)
        for name in (
            "AnnotationContext",
            "Arrows2D",
            "Image",
            "Scalars",
            "SegmentationImage",
            "TextDocument",
        )
    }
    makers |= {"RecordingStream": stream, "set_strict_mode": lambda strict: None}
    monkeypatch.setitem(sys.modules, "rerun", SimpleNamespace(**makers))
    return found


def test_a_recording_holds_every_part_of_each_clip_on_its_frame(cache, tmp_path, recordings):
    explorer = open_explorer(cache, tmp_path)
    out = tmp_path / "new" / "clips.rrd"
    write_recording(explorer, ["walk/0001", "walk/0002"], out, SilentProgress())
    assert out.read_bytes() == b"a recording"
    assert list(out.parent.iterdir()) == [out]
    (recording,) = recordings
    logged = {path[1:]: made for path, made in recording.logged.items() if path[0] == "walk/0001"}
    frames = logged["frames",]
    assert list(frames) == list(range(FRAMES))
    for moment, made in frames.items():
        assert made.compressed and abs(int(made.values[0][20, 30, 0]) - 20 * moment) <= 6
    width, height = 64, 48
    mask_Thw = masks_of("walk/0001") >= 128
    for direction, number, of_track in (
        ("forward", 1, mask_Thw),
        ("backward", 2, np.roll(mask_Thw, 1, axis=2)),
    ):
        of_direction = logged["frames", "tracks", direction]
        for moment in range(FRAMES):
            (drawn,) = of_direction[moment].values
            assert drawn.shape == (height, width)
            enlarged = of_track[moment].repeat(4, axis=0).repeat(4, axis=1)
            np.testing.assert_array_equal(drawn, number * enlarged)
    (context,) = logged["frames", "tracks"][None].values
    assert [f"#{bytes(colour).hex()}" for *_, colour in context[1:]] == list(MASK_COLOURS.values())
    for part in ("fused", "forward", "backward"):
        pictures = logged["components", part]
        assert [made.values[0].shape for made in pictures.values()] == [(*GRID, 3)] * FRAMES
    assert [made.values[0] for made in logged["valid",].values()] == [1.0] * 7 + [0.0] * 2
    assert logged["quality", "quality"][None].values == (pytest.approx(0.9),)
    assert logged["quality", "lost"][None].values == (0.0,)
    assert ("quality", "confidence") not in logged


def test_arrows_are_the_implied_motion_in_pixels(cache, tmp_path, recordings):
    explorer = open_explorer(cache, tmp_path, pairs="both")
    write_recording(explorer, ["walk/0001"], tmp_path / "clips.rrd", SilentProgress())
    flow = explorer.layers(ROWS.index("walk/0001")).flow
    for direction, later in (("forward", 0), ("backward", 1)):
        motion_Phw2 = flow.motion(direction, explorer.sources.lgf.temperature)
        arrows = recordings[0].logged["walk/0001", "frames", "flow", direction]
        assert list(arrows) == [pair + later for pair in range(FRAMES - 1)]
        made = arrows[3 + later].named
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                number = y * GRID[1] + x
                # A token is 16x16 pixels of a 48x64 frame.
                assert made["origins"][number].tolist() == [16 * x + 8, 16 * y + 8]
                np.testing.assert_allclose(made["vectors"][number], 16 * motion_Phw2[3, y, x])


def test_texts_of_the_dataset_are_plain(cache, tmp_path, recordings):
    explorer = open_explorer(cache, tmp_path)
    write_recording(explorer, ["walk/0002"], tmp_path / "clips.rrd", SilentProgress())
    caption = recordings[0].logged["walk/0002", "caption"][None]
    assert caption.values == (CAPTIONS["walk/0002"],) == (HTML,)
    texts = [
        made
        for entities in recordings[0].logged.values()
        for made in entities.values()
        if made.kind == "TextDocument"
    ]
    assert len(texts) == 2
    assert all(made.named == {"media_type": "text/plain"} for made in texts)


def test_a_recording_that_fails_leaves_the_earlier_one(cache, tmp_path, recordings, monkeypatch):
    out = tmp_path / "clips.rrd"
    out.write_bytes(b"earlier")
    explorer = open_explorer(cache, tmp_path)
    monkeypatch.setattr(Recording, "log", lambda *values, **named: 1 / 0)
    monkeypatch.setattr(Recording, "save", lambda self, path: path.write_bytes(b"half"))
    with pytest.raises(ZeroDivisionError):
        write_recording(explorer, ["walk/0001"], out, SilentProgress())
    assert out.read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".*"))


def test_a_missing_sdk_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ValueError, match=r'pip install "sam2videox\[rerun\]"'):
        import_rerun()
