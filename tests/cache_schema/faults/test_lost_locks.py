"""Writers that lose their lock unnoticed: the later writer continues, committed data is unchanged.

A zombie is paused at one of its file operations; its lock is deleted; another process takes the
shard over and writes all of it, or half; then the zombie goes on.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from cache_schema import (
    AlreadyCommitted,
    LockLost,
    ShardBusy,
    StoreReader,
    StoreWriter,
    verify_store,
)
from cache_schema.commit import clean_up_store
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.merge import merge_stores
from cache_schema.maintenance.repair import repair_store
from cache_schema.names import StoreLayout
from tests.cache_schema.faults.operations import OPERATIONS, exit_code
from tests.cache_schema.faults.small_store import (
    SETTINGS,
    SHARDS,
    SKIPPED,
    assert_reads_what_is_committed,
    clip_of,
    finished_files,
    write_all,
    write_shard,
)
from tests.cache_schema.made_stores import files_of
from tests.fingerprints import fingerprint_of

Step = Callable[[str, tuple[Any, ...]], bool]

SHARD = "00000"
DONE, LOST, COMMITTED = 0, 200, 201


def _told(body: Callable[[], object]) -> int:
    try:
        body()
    except LockLost as error:
        assert "run the same command again" in str(error)
        return LOST
    except AlreadyCommitted:
        return COMMITTED
    return DONE


def _ends_as_told(body: Callable[[], object]) -> None:
    os._exit(_told(body))


class _PausedAt:
    """An audit hook: at one operation it has the other process work, and waits for it."""

    def __init__(self, step: Step, other: Connection) -> None:
        self._step = step
        self._other = other
        self._is_past = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_past and event in OPERATIONS and self._step(event, args):
            self._is_past = True
            self._other.send("go")
            self._other.recv()


def _zombie_and_other(
    zombie: Callable[[], object], step: Step, other: Callable[[Connection], object]
) -> tuple[int, int]:
    """How both end; `other` is handed a pipe, of which it has heard once, and answers."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def work() -> None:
        there.recv()
        code = _told(lambda: other(there))
        there.send("done")
        os._exit(code)

    process = fork.Process(target=work)
    process.start()
    try:
        ended = exit_code(lambda: _ends_as_told(zombie), _PausedAt(step, here))
        here.send("go on")
        process.join()
    finally:
        process.kill()
    assert process.exitcode is not None
    return ended, process.exitcode


def _write(root: Path) -> None:
    write_shard(StoreWriter.open(root, SETTINGS, provenance={"version": "1.2.3"}), SHARD)


def _take_over(root: Path, pipe: Connection, *, whole: bool) -> None:
    """Delete the lock and write the shard; half of it, and the rest when told to go on."""
    (root / SETTINGS.folder_name / ".staging" / f"{SHARD}.lock").unlink(missing_ok=True)
    writer = StoreWriter.open(root, SETTINGS, provenance={"version": "1.2.3"})
    if whole:
        write_shard(writer, SHARD)
        return
    with writer.shard(SHARD, source=f"{SHARD}.tar") as shard:
        for number, key in enumerate(SHARDS[SHARD]):
            if not shard.has(key):
                shard.add(key, clip_of(key), {"source_fps": 29.97}, fingerprint=fingerprint_of(key))
            if number == 1:
                pipe.send("half")
                pipe.recv()
        for key in SKIPPED[SHARD]:
            if not shard.has(key):
                shard.skip(
                    key, "too_short", "12 frames, 49 needed", fingerprint=fingerprint_of(key)
                )
        shard.commit()


def _renames_to(ending: str) -> Step:
    return lambda event, args: event == "os.rename" and str(args[1]).endswith(ending)


class _After:
    """The first operation after a step."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._is_near = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> bool:
        if self._is_near:
            return True
        self._is_near = self._step(event, args)
        return False


class _Nth:
    """An operation by its number, from 1 on, after the shard's lock file was opened."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._is_locked = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> bool:
        self._is_locked |= event == "open" and str(args[0]).endswith(f"{SHARD}.lock")
        self._left -= self._is_locked
        return self._is_locked and self._left == 0


STEPS: dict[str, Callable[[], Step]] = {
    "before the first record": lambda: _renames_to("records/00000000.json"),
    "before the second record": lambda: _renames_to("records/00000001.json"),
    "after the last record": lambda: _After(_renames_to("records/00000003.json")),
    "before the group is renamed": lambda: _renames_to(f"shards/{SHARD}"),
    "after the group is renamed": lambda: _After(_renames_to(f"shards/{SHARD}")),
    "before the commit record": lambda: _renames_to(f"commits/{SHARD}.json"),
}

CHANGES: dict[str, Callable[[], Step]] = {
    "before the new group": lambda: _renames_to(f"shards/{SHARD}~1"),
    "before the commit record": STEPS["before the commit record"],
    "after the commit record": lambda: _After(_renames_to(f"commits/{SHARD}.json")),
    "before the old group": lambda: _renames_to(f"quarantine/1/shards/{SHARD}"),
    "before something is removed": lambda: _renames_to("discarded-0"),
}
"""Of a finished shard, by a drop or a repair."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("expected")
    write_all(root)
    return root / SETTINGS.folder_name


def _assert_finishes(root: Path, expected: Path) -> None:
    store = root / SETTINGS.folder_name
    assert_reads_what_is_committed(store)
    finished = finished_files(store)
    write_all(root)
    assert finished.items() <= finished_files(store).items()
    assert verify_store(store).problems == ()
    assert files_of(store) == files_of(expected)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_a_writer_that_lost_its_lock_fails_and_harms_nothing(
    step: str, whole: bool, tmp_path: Path, expected: Path
) -> None:
    other = functools.partial(_take_over, tmp_path, whole=whole)
    ended = _zombie_and_other(lambda: _write(tmp_path), STEPS[step](), other)
    assert ended == (LOST, DONE)
    _assert_finishes(tmp_path, expected)


def test_a_writer_that_lost_its_lock_after_the_commit_record_is_done(
    tmp_path: Path, expected: Path
) -> None:
    step = _After(_renames_to(f"commits/{SHARD}.json"))
    other = functools.partial(_take_over, tmp_path, whole=True)
    assert _zombie_and_other(lambda: _write(tmp_path), step, other) == (DONE, COMMITTED)
    _assert_finishes(tmp_path, expected)


def test_a_lock_lost_at_any_operation_gives_one_shard_and_no_other(
    lost_lock: int, tmp_path: Path, expected: Path
) -> None:
    other = functools.partial(_take_over, tmp_path, whole=lost_lock % 2 == 0)
    ended = _zombie_and_other(lambda: _write(tmp_path), _Nth(1 + 31 * lost_lock % 150), other)
    assert ended.count(DONE) <= 1
    assert set(ended) <= {DONE, LOST, COMMITTED}
    _assert_finishes(tmp_path, expected)


def _take_over_and_drop(store: Path, key: str) -> None:
    (store / ".staging" / f"{SHARD}.lock").unlink()
    drop_clips(store, [key], detail="")


@pytest.mark.parametrize(
    ("step", "ended"),
    [
        ("before the commit record", LOST),
        ("after the commit record", DONE),
        ("before something is removed", DONE),
    ],
)
def test_a_drop_that_lost_its_lock_undoes_nothing(step: str, ended: int, tmp_path: Path) -> None:
    store = write_all(tmp_path)
    found = _zombie_and_other(
        lambda: drop_clips(store, ["a0"], detail=""),
        CHANGES[step](),
        lambda _: _take_over_and_drop(store, "a1"),
    )
    assert found == (ended, DONE)
    remaining = ("a2", "b0", "b1") if ended == DONE else ("a0", "a2", "b0", "b1")
    assert StoreReader(store).keys == remaining
    assert verify_store(store).problems == ()
    drop_clips(store, ["a0"], detail="")
    assert StoreReader(store).keys == ("a2", "b0", "b1")
    assert verify_store(store).problems == ()


@pytest.mark.parametrize(
    ("step", "ended"),
    [
        ("before the new group", LOST),
        ("before the commit record", LOST),
        ("after the commit record", DONE),
        ("before the old group", DONE),
    ],
)
def test_a_repair_that_lost_its_lock_says_so_and_goes_on_with_other_shards(
    step: str, ended: int, tmp_path: Path
) -> None:
    store = write_all(tmp_path)
    for shard in SHARDS:
        (store / "shards" / shard / "flow" / "c.1.0.0.0").write_bytes(b"")

    def repair() -> None:
        report = repair_store(store)
        out = [clip.key for clip in report.clips]
        if ended == DONE:
            assert out == ["a1", "b1"]
            assert report.remaining == ()
            return
        assert out == ["b1"]
        first, *others = report.remaining
        assert (first.shard, first.remedy) == (SHARD, "repair")
        assert [(problem.shard, problem.key) for problem in others] == [(SHARD, "a1")]
        raise LockLost(first.what)

    found = _zombie_and_other(repair, CHANGES[step](), lambda _: _take_over_and_drop(store, "a2"))
    assert found == (ended, DONE)
    assert [clip.key for clip in repair_store(store).clips] == (["a1"] if ended == LOST else [])
    assert StoreReader(store).keys == ("a0", "b0")
    assert verify_store(store).problems == ()


def test_a_sweep_leaves_a_shard_that_another_process_takes_over(tmp_path: Path) -> None:
    store = write_all(tmp_path)
    for shard in SHARDS:
        (store / "shards" / f"{shard}~1").mkdir()
    layout = StoreLayout(store)
    ended = _zombie_and_other(
        lambda: clean_up_store(layout, SETTINGS),
        CHANGES["before something is removed"](),
        lambda _: _take_over_and_drop(store, "a2"),
    )
    assert ended == (DONE, DONE)
    assert StoreReader(store).keys == ("a0", "a1", "b0", "b1")
    assert verify_store(store).problems == ()


def test_a_merge_that_lost_its_lock_fails_and_harms_nothing(tmp_path: Path) -> None:
    source = write_all(tmp_path / "source")
    target = tmp_path / "target" / source.name

    def merge_too(pipe: Connection) -> None:
        (target / ".staging" / f"{SHARD}.lock").unlink()
        merge_stores(target, [source])

    step = _renames_to(f"shards/{SHARD}")
    assert _zombie_and_other(lambda: merge_stores(target, [source]), step, merge_too) == (
        LOST,
        DONE,
    )
    assert files_of(target) == files_of(source)
    assert verify_store(target).problems == ()


def test_the_lock_of_the_later_writer_outlives_the_zombie(tmp_path: Path) -> None:
    zombie, later, third = (StoreWriter.open(tmp_path, SETTINGS, provenance={}) for _ in range(3))
    lock = zombie.path / ".staging" / f"{SHARD}.lock"
    lost = zombie.shard(SHARD, source="x")
    lost.__enter__()
    lock.unlink()
    with later.shard(SHARD, source="x"):
        with pytest.raises(LockLost, match=str(lock)):
            lost.commit()
        lost.__exit__(None, None, None)
        with pytest.raises(ShardBusy), third.shard(SHARD, source="x"):
            pass
