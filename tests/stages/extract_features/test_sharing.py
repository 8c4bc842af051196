"""Processes that share shards: alone, killed within a shard, and waited for."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_schema import StoreReader, StoreWriter, verify_store
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig
from stages.extract_features.execution import local_engine
from stages.extract_features.summary import ExtractSummary
from stages.progress import SilentProgress
from tests.stages.extract_features.conftest import Extract, files_of, times


def test_whichever_worker_is_alone_does_everything(
    extract: Extract, whole: ExtractSummary, tmp_path: Path, stub_tracking: Any
) -> None:
    alone = extract(rank=1, world_size=3)
    assert [kind.clips_written for kind in alone.kinds] == [6, 5, 5, 5]
    late = extract(rank=0, world_size=3)
    assert [kind.clips_written for kind in late.kinds] == [0, 0, 0, 0]
    for kind in whole.kinds:
        assert files_of(tmp_path / kind.store.name) == files_of(kind.store)


HOLDS_THE_SECOND_SHARD = """
import sys, time
from pathlib import Path
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig
from stages.extract_features.run import extract_features
from stages.progress import SilentProgress
import cache_schema

config, clips, base, cache = sys.argv[1:]
add, staged = cache_schema.ShardWriter.add, []

def counting_add(self, *arguments, **named):
    add(self, *arguments, **named)
    staged.append(self.name)
    if staged.count("00001") == 2:
        print("holding", flush=True)
        time.sleep(600)

cache_schema.ShardWriter.add = counting_add
extract_features(
    ExtractConfig.model_validate_json(config),
    ClipsConfig.model_validate_json(clips),
    BaseModelConfig.model_validate_json(base),
    Path(cache),
    provenance={},
    progress=SilentProgress(),
)
"""


class KillsWhoHolds(SilentProgress):
    """When told that another process holds a shard, kills that process."""

    def __init__(self, holder: subprocess.Popen[str]) -> None:
        self.holder = holder
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)
        if "waiting for other processes" in text:
            self.holder.kill()
            self.holder.wait()


def test_a_shard_whose_worker_is_killed_is_taken_over_in_the_same_run_to_the_same_bytes(
    extract: Extract,
    extract_config: ExtractConfig,
    whole: ExtractSummary,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    config = extract_config.model_copy(update={"kinds": ("text",)})
    arguments = [model.model_dump_json() for model in (config, two_shards, tiny_base)]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_SECOND_SHARD, *arguments, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    expected = whole.kinds[0].store
    store = tmp_path / expected.name
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        finished = times(store / "shards" / "00000")
        progress = KillsWhoHolds(holder)
        summary = extract(kinds=("text",), progress=progress, rank=1, world_size=2)
    finally:
        holder.kill()
        holder.communicate()
    assert holder.returncode == -signal.SIGKILL
    assert ["00001" in line for line in progress.lines] == [True]
    (text,) = summary.kinds
    # Three in the finished shard, and two that the killed worker had staged.
    assert (text.clips_written, text.clips_already_there) == (1, 5)
    assert times(store / "shards" / "00000") == finished
    assert files_of(store) == files_of(expected)


class ActsWhenWaiting(SilentProgress):
    """When told that other processes are waited for, does something, once."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        if "waiting" in text:
            self.lines.append(text)
            if len(self.lines) == 1:
                self._act()


@pytest.mark.parametrize("finishes", [True, False])
def test_a_shard_that_another_process_writes_is_waited_for(
    extract: Extract,
    finishes: bool,
    whole: ExtractSummary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_engine, "POLL_INTERVAL_S", 0.0)
    reader = StoreReader(whole.kinds[0].store)
    other = StoreWriter.open(tmp_path, reader.settings, provenance={})
    with contextlib.ExitStack() as held:
        out = held.enter_context(other.shard("00001", source="00001.tar"))

        def end() -> None:
            if finishes:
                for clip in reader.records("00001"):
                    arrays = reader.read(clip.key)
                    out.add(clip.key, arrays, clip.attributes, fingerprint=clip.fingerprint)
                out.commit()
            held.close()

        progress = ActsWhenWaiting(end)
        (text,) = extract(kinds=("text",), progress=progress).kinds
    assert progress.lines == [
        "waiting for other processes, which are writing text 00001",
    ]
    assert (text.clips_written, text.clips_already_there) == ((3, 3) if finishes else (6, 0))
    assert verify_store(text.store).problems == ()
