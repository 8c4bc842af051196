"""Features of sets of clips: kept by content, refreshed on any change, resumed after a kill."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.clips import BadRecord, ClipsConfig, load_clip
from stages.progress import SilentProgress, Task
from stages.video_features import clip_features
from stages.video_features.clip_features import features_of_clips
from stages.video_features.network import FeatureProtocol, read_at

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks here hold nothing, and a collection takes half a second."""
    monkeypatch.setattr(clip_features, "release_memory", lambda: None)


@dataclass
class Counting:
    """Mean colour of the first and the last frame; counts loads and calls."""

    protocol: FeatureProtocol
    loads: int = 0
    calls: int = 0
    fail_at: int | None = None
    not_finite: set[int] = field(default_factory=set)

    def load(self, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
        self.loads += 1

        def features_of(frames_THWC: np.ndarray) -> np.ndarray:
            self.calls += 1
            if self.calls == self.fail_at:
                raise ValueError("killed")
            ends = frames_THWC[[0, -1]].astype(np.float32).mean(axis=(1, 2)).ravel()
            return ends * np.nan if self.calls in self.not_finite else ends

        return features_of


@pytest.fixture
def protocol(clips: ClipsConfig) -> FeatureProtocol:
    return FeatureProtocol(
        network="counting",
        sha256="0" * 64,
        clips=read_at(clips, 12),
        resize="none",
        features="means",
    )


@pytest.fixture
def compute(tmp_path: Path) -> Callable:
    def run(records, network, progress=None):
        return features_of_clips(
            records,
            network,
            tmp_path / "features",
            device=CPU,
            name="set",
            total=len(records),
            progress=progress or SilentProgress(),
        )

    return run


def test_rows_are_the_features_of_the_first_frames_in_order(compute, protocol, write_clips, clips):
    records = write_clips("a", "b", "c")
    found = compute(records, Counting(protocol))
    expected = [
        load_clip(one, clips.model_copy(update={"num_frames": 12}))
        .frames_THWC[[0, 11]]
        .mean(axis=(1, 2))
        .ravel()
        for one in records
    ]
    assert found.features_ND.dtype == np.float32
    assert found.features_ND == pytest.approx(np.stack(expected), rel=1e-5)
    assert not found.problems


def test_a_second_run_loads_no_network(compute, protocol, write_clips):
    records = write_clips("a", "b")
    first = compute(records, Counting(protocol))
    again = Counting(protocol)
    second = compute(records, again)
    assert np.array_equal(first.features_ND, second.features_ND)
    assert (again.loads, again.calls) == (0, 0)


def test_only_changed_and_new_clips_are_computed(compute, protocol, write_clips):
    compute(write_clips("a", "b"), Counting(protocol))
    write_clips("b", first_seed=50)
    again = Counting(protocol)
    both = [*write_clips("a"), *write_clips("b", "c", first_seed=50)]
    found = compute(both, again)
    assert again.calls == 2
    assert np.array_equal(found.features_ND, compute(both, Counting(protocol)).features_ND)


def test_a_renamed_clip_is_not_computed_again(compute, protocol, write_clips, tmp_path):
    [record] = write_clips("a")
    compute([record], Counting(protocol))
    moved = record.video.rename(tmp_path / "elsewhere.mp4")
    again = Counting(protocol)
    assert len(compute([replace(record, key="z", video=moved)], again).features_ND) == 1
    assert again.calls == 0


def changed(protocol: FeatureProtocol, name: str) -> FeatureProtocol:
    clips = protocol.clips
    updates: dict[str, dict] = {
        "num_frames": {"num_frames": 11},
        "fps": {"fps": None},
        "height": {"height": 32},
        "width": {"width": 48},
        "hdr": {"hdr": "skip"},
        "interlaced": {"interlaced": "skip"},
    }
    if name in updates:
        return replace(protocol, clips=clips.model_copy(update=updates[name]))
    other: Any = {name: "1" * 64}
    return replace(protocol, **other)


@pytest.mark.parametrize(
    "name",
    ["sha256", "resize", "features", "num_frames", "fps", "height", "width", "hdr", "interlaced"],
)
def test_every_ingredient_changes_the_hash(name, compute, protocol, write_clips):
    records = write_clips("a")
    compute(records, Counting(protocol))
    other = Counting(changed(protocol, name))
    assert other.protocol.digest != protocol.digest
    compute(records, other)
    assert other.calls == 1


def test_labels_and_places_do_not_change_the_hash(protocol):
    other = replace(protocol, network="another name")
    moved = replace(
        protocol, clips=protocol.clips.model_copy(update={"path": Path("x"), "clips_per_shard": 3})
    )
    assert protocol.digest == other.digest == moved.digest


def test_a_failure_loses_nothing_finished(compute, protocol, write_clips):
    records = write_clips("a", "b", "c", "d")
    with pytest.raises(ValueError, match="killed"):
        compute(records, Counting(protocol, fail_at=3))
    again = Counting(protocol)
    assert len(compute(records, again).features_ND) == 4
    assert again.calls == 2


def test_a_kill_loses_one_part_at_most(compute, protocol, write_clips, monkeypatch):
    monkeypatch.setattr(clip_features, "_CLIPS_PER_FILE", 2)
    records = write_clips("a", "b", "c", "d", "e")
    killed, write = Counting(protocol, fail_at=4), clip_features.write_atomic
    with monkeypatch.context() as patch:
        # A killed process writes nothing more.
        patch.setattr(
            clip_features, "write_atomic", lambda *a, **b: killed.calls < 4 and write(*a, **b)
        )
        with pytest.raises(ValueError, match="killed"):
            compute(records, killed)
    again = Counting(protocol)
    compute(records, again)
    assert again.calls == 3


class StopAfter(SilentProgress):
    """Raises at the n-th advance, as a stop request does."""

    def __init__(self, clips: int) -> None:
        self.left = clips

    @contextmanager
    def task(self, *_, **__) -> Iterator[Task]:
        with super().task("", 1) as silent:
            outer = self

            class Stopping:
                def advance(self, amount: int = 1) -> None:
                    outer.left -= 1
                    if not outer.left:
                        raise KeyboardInterrupt

                expect, note = silent.expect, silent.note

            yield Stopping()


def test_a_stop_keeps_what_is_finished(compute, protocol, write_clips):
    records = write_clips("a", "b", "c")
    with pytest.raises(KeyboardInterrupt):
        compute(records, Counting(protocol), StopAfter(2))
    again = Counting(protocol)
    compute(records, again)
    assert again.calls == 1


def test_clips_without_features_are_counted_never_padded(compute, protocol, write_clips, tmp_path):
    short, good = write_clips("short", frames=11), write_clips("good")
    broken = replace(good[0], key="broken", video=tmp_path / "broken.mp4")
    broken.video.write_bytes(b"no video")
    missing = replace(good[0], key="missing", video=tmp_path / "missing.mp4")
    bad = BadRecord(key="bad", reason="bad_record", detail="no such file")
    found = compute([*short, broken, *good, missing, bad], Counting(protocol))
    assert len(found.features_ND) == 1
    assert found.problems["short"] == "too_short: 11 frames at 8 frames/s, needs 12"
    assert found.problems["broken"].startswith("undecodable: ")
    assert found.problems["missing"] == "undecodable: the file cannot be read"
    assert found.problems["bad"] == "bad_record: no such file"


def test_features_that_are_not_finite_are_a_problem_and_not_kept(compute, protocol, write_clips):
    records = write_clips("a", "b")
    found = compute(records, Counting(protocol, not_finite={1}))
    assert len(found.features_ND) == 1
    assert found.problems == {"a": "bad_features: the network's features are NaN or infinite"}
    again = Counting(protocol)
    assert len(compute(records, again).features_ND) == 2 and again.calls == 1


def test_a_damaged_file_is_named(compute, protocol, write_clips, tmp_path):
    records = write_clips("a")
    compute(records, Counting(protocol))
    [file] = (tmp_path / "features").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file.name} is damaged; delete it"):
        compute(records, Counting(protocol))


def test_a_set_without_usable_clips_is_empty(compute, protocol, write_clips):
    found = compute(write_clips("a", frames=3), Counting(protocol))
    assert found.features_ND.shape == (0, 0) and len(found.problems) == 1
