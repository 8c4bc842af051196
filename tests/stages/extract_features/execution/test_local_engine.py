"""What a worker reads before its first clip, and totals of its progress bar."""

import functools
import io
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stages.clips import ClipsConfig
from stages.clips.dataset.tars import MemberGroup, TarReader
from stages.extract_features.config import Kind
from stages.extract_features.execution import comparison
from stages.extract_features.execution.worker import _batches
from stages.progress import SilentProgress
from tests.stages.extract_features.conftest import Extract

NUM_TARS = 40


@pytest.fixture
def clips(tmp_path: Path) -> ClipsConfig:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(NUM_TARS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for clip in range(1 + number % 3):
                for suffix in ("mp4", "txt"):
                    member = tarfile.TarInfo(f"clip{clip}.{suffix}")
                    member.size = 4
                    tar.addfile(member, io.BytesIO(b"text"))
    return ClipsConfig(path=folder, num_frames=9, height=64, width=96)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tars whose headers are read, in order."""
    names: list[str] = []
    groups = TarReader.groups

    def noting(self: TarReader) -> list[MemberGroup]:
        names.append(self._path.name)
        return groups(self)

    monkeypatch.setattr(TarReader, "groups", noting)
    return names


class Bar(SilentProgress):
    """Notes totals and what is done; may stop at the first clip."""

    def __init__(self, *, stops: bool) -> None:
        self.totals: list[int | None] = []
        self.completed = 0
        self._stops = stops

    @contextmanager
    def task(self, description: str, total: int | None, **options: Any) -> Iterator[Any]:
        self.totals.append(total)
        yield self

    def expect(self, total: int) -> None:
        self.totals.append(total)

    def advance(self, amount: int = 1) -> None:
        self.completed += amount
        if amount and self._stops:
            raise KeyboardInterrupt


@pytest.fixture
def extract(extract: Extract, clips: ClipsConfig, tmp_path: Path) -> Extract:
    return functools.partial(extract, tmp_path / "cache", clips=clips, kinds=("text",))


@pytest.mark.parametrize("rank", [0, 5])
def test_before_the_first_clip_only_its_tar_is_opened(
    extract: Extract, rank: int, clips: ClipsConfig, opened: list[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        extract(progress=Bar(stops=True), rank=rank, world_size=8)
    assert set(opened) == {f"{rank:05d}.tar"}


@pytest.mark.parametrize(("rank", "first"), [(0, 24), (5, 21)])
def test_of_finished_tars_one_is_opened_before_the_first_clip(
    extract: Extract, rank: int, first: int, clips: ClipsConfig, tmp_path: Path, opened: list[str]
) -> None:
    later = sorted(clips.path.iterdir())[NUM_TARS // 2 :]
    for tar in later:
        tar.rename(tmp_path / tar.name)
    extract(progress=Bar(stops=False))
    for tar in later:
        (tmp_path / tar.name).rename(tar)
    opened.clear()
    with pytest.raises(KeyboardInterrupt):
        extract(progress=Bar(stops=True), rank=rank, world_size=8)
    assert set(opened) == {f"{rank:05d}.tar", f"{first:05d}.tar"}


def test_the_total_becomes_known_with_the_tars(extract: Extract, clips: ClipsConfig) -> None:
    bar = Bar(stops=False)
    extract(progress=bar)
    assert bar.totals[:3] == [None, NUM_TARS, NUM_TARS * 3 // 2]
    assert bar.totals[-1] == bar.completed == sum(1 + number % 3 for number in range(NUM_TARS))


class _Clip:
    def __init__(self, *, needs_model: bool) -> None:
        self.needs_model = needs_model


def batches(needs: Sequence[bool], size: int) -> list[list[bool]]:
    clips: Any = (_Clip(needs_model=one) for one in needs)
    return [[clip.needs_model for clip in batch] for batch in _batches(clips, size)]


def test_clips_that_need_no_model_do_not_wait_for_one_that_does() -> None:
    assert batches([False] * 3, 2) == [[False]] * 3
    assert batches([False, True, False, True, False], 2) == [[False], [True, False, True], [False]]
    assert batches([True, False], 2) == [[True, False]]


def test_stores_are_opened_and_compared_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    def readers() -> Iterator[tuple[Kind, None]]:
        for kind in ("text", "latents"):
            done.append(f"open {kind}")
            yield kind, None

    monkeypatch.setattr(
        comparison, "compare_store", lambda _, kind, *__: done.append(f"compare {kind}")
    )
    found = comparison.compare(readers(), None)  # type: ignore[arg-type]
    assert list(found.kinds) == ["text", "latents"]
    assert done == ["open text", "compare text", "open latents", "compare latents"]
