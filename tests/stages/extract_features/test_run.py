"""The driver: several stores per pass, batches, restarts, sharing, refusals before any work."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema import StoreReader, StoreWriter, verify_store
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.execution import local_engine
from stages.extract_features.run import extract_features
from stages.extract_features.summary import ExtractSummary
from stages.progress import SilentProgress

KINDS: tuple[Kind, ...] = ("text", "latents", "teacher", "masks")


def extract(
    config: ExtractConfig,
    clips: ClipsConfig,
    base: BaseModelConfig,
    cache: Path,
    progress: Any = None,
    **options: Any,
) -> ExtractSummary:
    return extract_features(
        config, clips, base, cache, provenance={}, progress=progress or SilentProgress(), **options
    )


def content(store: Path) -> dict[str, str]:
    """Hash of every file of a store that readers see."""
    return {
        file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file() and ".staging" not in file.parts
    }


def times(store: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}


@pytest.fixture
def tracked(extract_config: ExtractConfig) -> ExtractConfig:
    return extract_config.model_copy(update={"kinds": ("teacher", "masks")})


@pytest.fixture
def text_only(extract_config: ExtractConfig) -> ExtractConfig:
    return extract_config.model_copy(update={"kinds": ("text",)})


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    stub_module: Callable[[pytest.MonkeyPatch], Any],
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
) -> Iterator[ExtractSummary]:
    """An uninterrupted run over everything."""
    with pytest.MonkeyPatch.context() as patch:
        stub_module(patch)
        yield extract(extract_config, two_shards, tiny_base, tmp_path_factory.mktemp("cache"))


def test_every_kind_is_written_and_the_bad_clip_recorded(whole: ExtractSummary) -> None:
    assert tuple(kind.kind for kind in whole.kinds) == KINDS
    assert [kind.clips_written for kind in whole.kinds] == [6, 5, 5, 5]
    assert whole.kinds[0].skipped == ()
    for kind in whole.kinds[1:]:
        assert [(c.key, c.reason, c.shard) for c in kind.skipped] == [
            ("00001/clip004", "undecodable", "00001")
        ]
    assert whole.skipped_share == pytest.approx(1 / 6)
    for kind in whole.kinds:
        assert verify_store(kind.store).problems == ()
        assert kind.bytes == StoreReader(kind.store).num_bytes > 0
        assert (kind.store / "index.npz").is_file()


def test_stores_hold_what_training_expects(whole: ExtractSummary) -> None:
    text, latents = (StoreReader(kind.store) for kind in whole.kinds[:2])
    key = "00000/clip001"
    assert text.read(key)["embeds"].shape == (32, 32)
    assert text.record(key).attributes["caption"] == "an ellipse over a grey texture"
    assert latents.read(key)["mean"].shape == latents.read(key)["std"].shape
    assert latents.read(key)["mean"].shape[0::2] == (3, 8)
    assert (latents.read(key)["std"] > 0).all()


def test_a_second_run_changes_no_file_and_loads_no_model(
    whole: ExtractSummary,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    stub_tracking: Any,
) -> None:
    before = [times(kind.store) for kind in whole.kinds]
    for name in ("text.TextExtraction", "latents.LatentsExtraction"):
        monkeypatch.setattr(
            f"stages.extract_features.{name}.load_model",
            lambda *_: pytest.fail("no model is needed"),
        )
    again = extract(extract_config, two_shards, tiny_base, whole.kinds[0].store.parent)
    assert stub_tracking.batches == []
    assert [times(kind.store) for kind in again.kinds] == before
    assert [kind.clips_written for kind in again.kinds] == [0, 0, 0, 0]
    assert [kind.clips_already_there for kind in again.kinds] == [6, 5, 5, 5]
    assert again.skipped_share == whole.skipped_share


def test_one_pass_writes_two_stores_in_batches(
    tracked: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    stub_tracking: Any,
) -> None:
    summary = extract(tracked, two_shards, tiny_base, tmp_path)
    assert [[key[-3:] for key in batch] for batch in stub_tracking.batches] == [
        ["000", "001"],
        ["002"],
        ["003", "005"],
    ]
    for kind in summary.kinds:
        reader = StoreReader(kind.store)
        assert [key[-3:] for key in reader.keys] == ["000", "001", "002", "003", "005"]
        for key in reader.keys:
            assert reader.record(key).attributes == {"of": f"{kind.kind} {key}"}


def test_a_clip_skipped_by_the_model_is_recorded_in_every_store_and_disturbs_no_other(
    tracked: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    stub_tracking: Any,
) -> None:
    stub_tracking.lost = {"00000/clip000"}
    summary = extract(tracked, two_shards, tiny_base, tmp_path)
    for kind in summary.kinds:
        assert [(c.key, c.reason) for c in kind.skipped] == [
            ("00000/clip000", "subject_lost"),
            ("00001/clip004", "undecodable"),
        ]
        assert kind.clips_written == 4


def test_values_beyond_float16_are_skipped_in_the_store_that_has_them(
    tracked: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    stub_tracking: Any,
) -> None:
    stub_tracking.infinite = {"00000/clip001"}
    teacher, masks = extract(tracked, two_shards, tiny_base, tmp_path).kinds
    assert ("00000/clip001", "not_finite") in [(c.key, c.reason) for c in teacher.skipped]
    assert "00000/clip001" in StoreReader(masks.store)


def test_a_shard_finished_in_one_store_is_written_in_the_other_alone(
    whole: ExtractSummary,
    tracked: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    stub_tracking: Any,
) -> None:
    masks_alone = tracked.model_copy(update={"kinds": ("masks",)})
    extract(masks_alone, two_shards, tiny_base, tmp_path)
    (masks,) = (path for path in tmp_path.iterdir() if path.name.startswith("masks"))
    before = times(masks)
    teacher, also_masks = extract(tracked, two_shards, tiny_base, tmp_path).kinds
    assert times(masks) == before
    assert (teacher.clips_written, also_masks.clips_written) == (5, 0)
    for kind in whole.kinds[2:]:
        assert content(tmp_path / kind.store.name) == content(kind.store)


def test_a_clip_staged_in_one_store_goes_into_the_other_alone(
    whole: ExtractSummary,
    tracked: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    stub_tracking: Any,
) -> None:
    # As a kill between the two stores leaves it: the teacher has clip000, the masks have nothing.
    done = StoreReader(whole.kinds[2].store)
    writer = StoreWriter.open(tmp_path, done.settings, provenance={})
    key = "00000/clip000"
    with writer.shard("00000", source="00000.tar") as out:
        entry = done.record(key)
        out.add(key, done.read(key), entry.attributes, fingerprint=entry.fingerprint)
    teacher, masks = extract(tracked, two_shards, tiny_base, tmp_path).kinds
    assert (teacher.clips_written, masks.clips_written) == (4, 5)
    for kind in whole.kinds[2:]:
        assert content(tmp_path / kind.store.name) == content(kind.store)


def test_whichever_worker_is_alone_does_everything(
    whole: ExtractSummary,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    stub_tracking: Any,
) -> None:
    alone = extract(extract_config, two_shards, tiny_base, tmp_path, rank=1, world_size=3)
    assert [kind.clips_written for kind in alone.kinds] == [6, 5, 5, 5]
    late = extract(extract_config, two_shards, tiny_base, tmp_path, rank=0, world_size=3)
    assert [kind.clips_written for kind in late.kinds] == [0, 0, 0, 0]
    for kind in whole.kinds:
        assert content(tmp_path / kind.store.name) == content(kind.store)


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
    whole: ExtractSummary,
    text_only: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    arguments = [model.model_dump_json() for model in (text_only, two_shards, tiny_base)]
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
        summary = extract(
            text_only, two_shards, tiny_base, tmp_path, progress, rank=1, world_size=2
        )
    finally:
        holder.kill()
        holder.communicate()
    assert holder.returncode == -signal.SIGKILL
    assert ["00001" in line for line in progress.lines] == [True]
    (text,) = summary.kinds
    # Three in the finished shard, and two that the killed worker had staged.
    assert (text.clips_written, text.clips_already_there) == (1, 5)
    assert times(store / "shards" / "00000") == finished
    assert content(store) == content(expected)


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
    finishes: bool,
    whole: ExtractSummary,
    text_only: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
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
        (text,) = extract(text_only, two_shards, tiny_base, tmp_path, progress).kinds
    assert progress.lines == [
        "waiting for other processes, which are writing text 00001",
    ]
    assert (text.clips_written, text.clips_already_there) == ((3, 3) if finishes else (6, 0))
    assert verify_store(text.store).problems == ()


def test_an_error_names_the_clip_and_leaves_what_is_done(
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = extract_config.model_copy(update={"kinds": ("latents",)})
    from stages.extract_features.latents import LatentsExtraction

    original, calls = LatentsExtraction._extract, []

    def failing(self: Any, vae: Any, clip: Any) -> Any:
        calls.append(clip.key)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return original(self, vae, clip)

    monkeypatch.setattr(LatentsExtraction, "_extract", failing)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        extract(config, two_shards, tiny_base, tmp_path)
    assert caught.value.__notes__ == [
        "while extracting latents of clip '00000/clip001' in 00000.tar"
    ]
    monkeypatch.undo()
    summary = extract(config, two_shards, tiny_base, tmp_path)
    assert (summary.kinds[0].clips_written, summary.kinds[0].clips_already_there) == (4, 1)


def test_an_error_while_writing_stops_the_run_and_commits_nothing(
    tracked: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stub_tracking: Any,
) -> None:
    from cache_schema import ShardWriter

    add = ShardWriter.add

    def full(self: Any, key: str, *rest: Any, **named: Any) -> None:
        if key.endswith("001"):
            raise OSError(28, "No space left on device")
        add(self, key, *rest, **named)

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(OSError, match="No space left") as caught:
        extract(tracked, two_shards, tiny_base, tmp_path)
    assert caught.value.__notes__ == [
        "while writing teacher and masks of clip '00000/clip001' in 00000.tar"
    ]
    assert not any(tmp_path.glob("*/commits/*"))


def test_an_error_while_preparing_names_the_clip(
    tracked: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stub_tracking: Any,
) -> None:
    def failing(self: Any, record: Any) -> Any:
        raise MemoryError("no room for the frames")

    monkeypatch.setattr(stub_tracking, "prepare", failing)
    with pytest.raises(MemoryError) as caught:
        extract(tracked, two_shards, tiny_base, tmp_path)
    assert caught.value.__notes__ == ["while preparing clip '00000/clip000' of 00000.tar"]


def test_a_model_is_gone_before_the_next_is_loaded(
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stub_tracking: Any,
) -> None:
    models: list[weakref.ref[Any]] = []
    alive_at_loading: list[int] = []

    @contextmanager
    def load_model(self: Any, device: torch.device) -> Iterator[Any]:
        alive_at_loading.append(sum(model() is not None for model in models))
        model = torch.nn.Linear(1, 1)
        models.append(weakref.ref(model))
        yield lambda prepared: (model, self._extract(prepared))[1]

    monkeypatch.setattr(stub_tracking, "load_model", load_model)
    pair = [
        stub_tracking(extract_config.teacher, two_shards, gram_flow=None, kinds=(kind,))
        for kind in ("teacher", "masks")
    ]
    monkeypatch.setattr("stages.extract_features.run.make_extractions", lambda *_: pair)
    extract(extract_config, two_shards, tiny_base, tmp_path)
    assert alive_at_loading == [0, 0]
    assert [model() for model in models] == [None, None]


def test_another_dataset_under_the_same_shard_names_is_refused(
    whole: ExtractSummary,
    text_only: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    (tmp_path / "00000.mp4").write_bytes(b"no video")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "00000.mp4", "caption": "x"}\n')
    clips = two_shards.model_copy(update={"path": tmp_path})
    with pytest.raises(ValueError, match=r"of another dataset: .*use another cache folder"):
        extract(text_only, clips, tiny_base, whole.kinds[0].store.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "warp"}, "extract.device=warp is not a torch device"),
        ({"device": "cuda:97"}, "extract.device=cuda:97, but this machine has"),
        ({"teacher": "missing"}, "nowhere"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(
    change: dict[str, Any],
    message: str,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    stub_tracking: Any,
) -> None:
    if "teacher" in change:
        teacher = extract_config.teacher.model_copy(update={"checkpoint": "nowhere"})
        change = {"teacher": teacher}
    config = extract_config.model_copy(update=change)
    with pytest.raises(ValueError, match=message):
        extract(config, two_shards, tiny_base, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kinds", "order"),
    [
        (("masks", "text", "teacher"), ["masks", "teacher", "text"]),
        (("text", "text"), ["text"]),
    ],
)
def test_kinds_of_one_pass_stand_where_the_first_of_them_does(
    kinds: tuple[Kind, ...],
    order: list[Kind],
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    stub_tracking: Any,
) -> None:
    from stages.extract_features.kinds import make_extractions

    config = extract_config.model_copy(update={"kinds": kinds})
    made = make_extractions(config, two_shards.sizes, tiny_base)
    assert [kind for extraction in made for kind in extraction.settings] == order


def test_every_gpu_of_a_machine_gets_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.extract_features.kinds import resolve_device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device("auto", rank).index for rank in range(4)] == [0, 1, 0, 1]
    assert resolve_device("cuda:1", 0) == torch.device("cuda", 1)
    np.testing.assert_equal(resolve_device("cpu", 3).type, "cpu")
