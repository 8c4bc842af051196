"""Workers on a local Ray cluster: one dies within a shard, and the stores are unaffected."""

import builtins
import contextlib
import functools
import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache_schema import ShardWriter, StoreReader, StoreWriter, verify_store
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig, RayConfig
from stages.extract_features.execution import ray_engine
from stages.extract_features.execution.jobs import ShardJob
from stages.extract_features.execution.ray_worker import RayWorker, WorkReport
from stages.extract_features.kinds import make_extractions
from stages.progress import SilentProgress
from tests.stages.extract_features.changing_dataset import Dataset
from tests.stages.extract_features.conftest import Extract, files_of

WORKERS = RayConfig(workers=2)


class Lines(SilentProgress):
    """Keeps what is said, and how far the bar went."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def config(extract_config: ExtractConfig) -> ExtractConfig:
    return extract_config.model_copy(update={"kinds": ("text",), "engine": "ray", "ray": WORKERS})


@pytest.fixture
def extract(extract: Extract) -> Extract:
    return functools.partial(extract, kinds=("text",), engine="ray", ray=WORKERS)


def test_without_ray_the_command_that_installs_it_is_named(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_ray(name: str, *rest: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ValueError, match=r'pip install "sam2videox\[ray\]"'):
        extract()
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_and_ray_together_are_refused(extract: Extract) -> None:
    with pytest.raises(ValueError, match="without torchrun"):
        extract(rank=1, world_size=2)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "extract.device=cuda, but the Ray cluster has no GPU"),
        ("warp", "extract.device=warp is not a torch device"),
    ],
)
def test_a_device_that_the_cluster_lacks_is_refused_before_any_work(
    extract: Extract, device: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def cluster_without_gpu(_: RayConfig) -> Iterator[Any]:
        yield types.SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0})

    monkeypatch.setattr(ray_engine, "ray_cluster", cluster_without_gpu)
    with pytest.raises(ValueError, match=message):
        extract(device=device)
    assert list(tmp_path.iterdir()) == []


class DiesOnce(RayWorker):
    """The first worker of all to stage its second clip is killed at that moment."""

    def work(self, job: ShardJob) -> WorkReport:
        add, mark, staged = ShardWriter.add, self._setup.cache_root / "died", []

        def counting_add(out: ShardWriter, *arguments: Any, **named: Any) -> None:
            add(out, *arguments, **named)
            staged.append(arguments[0])
            if len(staged) == 2:
                with contextlib.suppress(FileExistsError), mark.open("x") as file:
                    file.write(job.name)
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)

        replacement: Any = counting_add
        ShardWriter.add = replacement  # type: ignore[method-assign]
        try:
            return super().work(job)
        finally:
            ShardWriter.add = add  # type: ignore[method-assign]


class StopsOnce(RayWorker):
    """The first worker of all is stopped in its first shard, and does not go on."""

    def work(self, job: ShardJob) -> WorkReport:
        with contextlib.suppress(FileExistsError):
            (self._setup.cache_root / "stopped").open("x").close()
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().work(job)


class AlwaysDies(RayWorker):
    """Never survives a shard."""

    def work(self, job: ShardJob) -> WorkReport:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Breaks(RayWorker):
    """Fails at a clip."""

    def work(self, job: ShardJob) -> WorkReport:
        error = RuntimeError("out of memory")
        error.add_note("while extracting text of clip 'a'")
        raise error


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, as the engine starts it: seconds, so one for all tests."""
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'sam2videox[ray]'")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with ray_engine.ray_cluster(WORKERS):
        yield
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_killed_workers_shard_is_done_by_another_to_the_same_bytes(
    cluster: None, extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "RayWorker", DiesOnce)
    progress = Lines()
    expected = extract(tmp_path / "local", engine="local").kinds[0]
    (tmp_path / "ray").mkdir()

    found = extract(tmp_path / "ray", progress=progress).kinds[0]

    shard = (tmp_path / "ray" / "died").read_text()
    assert [line for line in progress.lines if f"a worker died on shard '{shard}'" in line]
    assert sum("is ready" in line for line in progress.lines) >= 2
    assert files_of(found.store) == files_of(expected.store)
    assert len(StoreReader(found.store)) == 6
    assert verify_store(found.store).problems == ()
    # The two clips that the dead worker had staged were adopted, not made again.
    assert (found.clips_written, found.clips_already_there) == (4, 2)


@pytest.mark.slow
def test_a_worker_that_does_not_answer_is_replaced(
    cluster: None, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "RayWorker", StopsOnce)
    monkeypatch.setattr(ray_engine, "REPORT_TIMEOUT_S", 5.0)
    progress = Lines()
    found = extract(progress=progress).kinds[0]
    assert [line for line in progress.lines if "has not responded for 5 s" in line]
    assert found.clips_written == 6


@pytest.mark.slow
def test_a_shard_that_another_process_writes_is_waited_for_and_taken_over(
    cluster: None,
    extract: Extract,
    config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    class Releases(Lines):
        def log(self, text: str) -> None:
            super().log(text)
            if "waiting" in text:
                held.close()

    settings = make_extractions(config, two_shards.sizes, tiny_base)[0].settings["text"]
    other = StoreWriter.open(tmp_path, settings, provenance={})
    progress = Releases()
    with contextlib.ExitStack() as held:
        held.enter_context(other.shard("00001", source="00001.tar"))
        found = extract(progress=progress).kinds[0]
    assert found.clips_written == 6
    assert sum("waiting" in line for line in progress.lines) == 1


@pytest.mark.slow
def test_workers_that_keep_dying_stop_the_run(
    cluster: None, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "RayWorker", AlwaysDies)
    with pytest.raises(RuntimeError, match="1 workers in a row died on shard '00000'"):
        extract(ray=RayConfig(workers=1, restarts=0))


@pytest.mark.slow
def test_an_error_in_a_worker_stops_the_run_with_its_note(
    cluster: None, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "RayWorker", Breaks)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        extract()
    assert caught.value.__notes__ == ["while extracting text of clip 'a'"]


@pytest.mark.slow
def test_clips_that_are_in_other_shards_are_compared_by_the_workers(
    cluster: None, config: ExtractConfig, tiny_base: BaseModelConfig, tmp_path: Path
) -> None:
    local = config.model_copy(update={"engine": "local"})
    dataset = Dataset(tmp_path, [b"no video, which text does without"], local, tiny_base)
    dataset.extract()
    dataset.config = config
    moved = dataset.rows.pop()
    for number in (8, 9, 10):
        dataset.append(number)
    dataset.rows.append(moved | {"caption": "a square stands still"})
    dataset.write()
    with pytest.raises(ValueError, match=r"text of 1 .*'clip7'.*--refresh-changed"):
        dataset.extract()
    assert dataset.reader("text").shard_of("clip10") == "00003"
    assert dataset.extract(refresh_changed=True).kinds[0].clips_written == 3
    text = dataset.reader("text")
    assert len(text) == 11
    assert text.record("clip7").attributes["caption"] == "a square stands still"
