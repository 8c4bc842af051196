"""Stage one end to end: several stores per pass, batches, restarts, errors, checks before work."""

import weakref
from collections.abc import Iterator
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
from stages.extract_features.summary import ExtractSummary
from tests.stages.extract_features.conftest import Extract, files_of, times

KINDS: tuple[Kind, ...] = ("text", "latents", "teacher", "masks")
TRACKED: tuple[Kind, ...] = ("teacher", "masks")


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
    extract: Extract, whole: ExtractSummary, monkeypatch: pytest.MonkeyPatch, stub_tracking: Any
) -> None:
    before = [times(kind.store) for kind in whole.kinds]
    for name in ("text.TextExtraction", "latents.LatentsExtraction"):
        monkeypatch.setattr(
            f"stages.extract_features.{name}.load_model",
            lambda *_: pytest.fail("no model is needed"),
        )
    again = extract(whole.kinds[0].store.parent)
    assert stub_tracking.batches == []
    assert [times(kind.store) for kind in again.kinds] == before
    assert [kind.clips_written for kind in again.kinds] == [0, 0, 0, 0]
    assert [kind.clips_already_there for kind in again.kinds] == [6, 5, 5, 5]
    assert again.skipped_share == whole.skipped_share


def test_one_pass_writes_two_stores_in_batches(extract: Extract, stub_tracking: Any) -> None:
    summary = extract(kinds=TRACKED)
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
    extract: Extract, stub_tracking: Any
) -> None:
    stub_tracking.lost = {"00000/clip000"}
    summary = extract(kinds=TRACKED)
    for kind in summary.kinds:
        assert [(c.key, c.reason) for c in kind.skipped] == [
            ("00000/clip000", "subject_lost"),
            ("00001/clip004", "undecodable"),
        ]
        assert kind.clips_written == 4


def test_values_beyond_float16_are_skipped_in_the_store_that_has_them(
    extract: Extract, stub_tracking: Any
) -> None:
    stub_tracking.infinite = {"00000/clip001"}
    teacher, masks = extract(kinds=TRACKED).kinds
    assert ("00000/clip001", "not_finite") in [(c.key, c.reason) for c in teacher.skipped]
    assert "00000/clip001" in StoreReader(masks.store)


def test_a_shard_finished_in_one_store_is_written_in_the_other_alone(
    extract: Extract, whole: ExtractSummary, tmp_path: Path, stub_tracking: Any
) -> None:
    extract(kinds=("masks",))
    (masks,) = (path for path in tmp_path.iterdir() if path.name.startswith("masks"))
    before = times(masks)
    teacher, also_masks = extract(kinds=TRACKED).kinds
    assert times(masks) == before
    assert (teacher.clips_written, also_masks.clips_written) == (5, 0)
    for kind in whole.kinds[2:]:
        assert files_of(tmp_path / kind.store.name) == files_of(kind.store)


def test_a_clip_staged_in_one_store_goes_into_the_other_alone(
    extract: Extract, whole: ExtractSummary, tmp_path: Path, stub_tracking: Any
) -> None:
    # As a kill between the two stores leaves it: the teacher has clip000, the masks have nothing.
    done = StoreReader(whole.kinds[2].store)
    writer = StoreWriter.open(tmp_path, done.settings, provenance={})
    key = "00000/clip000"
    with writer.shard("00000", source="00000.tar") as out:
        entry = done.record(key)
        out.add(key, done.read(key), entry.attributes, fingerprint=entry.fingerprint)
    teacher, masks = extract(kinds=TRACKED).kinds
    assert (teacher.clips_written, masks.clips_written) == (4, 5)
    for kind in whole.kinds[2:]:
        assert files_of(tmp_path / kind.store.name) == files_of(kind.store)


def test_captions_longer_than_the_text_encoder_reads_are_counted_and_marked(
    extract: Extract, two_shards: ClipsConfig, tmp_path: Path
) -> None:
    captions = {"a": "a red ellipse", "b": "a red ellipse drifts " * 20, "c": "grey " * 60}
    (tmp_path / "data").mkdir()
    for key, caption in captions.items():
        (tmp_path / "data" / f"{key}.mp4").write_bytes(b"not read for its caption")
        (tmp_path / "data" / f"{key}.txt").write_text(caption)
    clips = two_shards.model_copy(update={"path": tmp_path / "data", "clips_per_shard": 2})
    for expected in (2, 0):  # the second run writes none
        summary = extract(tmp_path / "cache", clips=clips, kinds=("text",))
        (text,) = summary.kinds
        assert text.captions_cut == expected
        assert summary.dataset == "3 videos with captions beside them"
    reader = StoreReader(text.store)
    cut: dict[str, Any] = {key: reader.record(key).attributes["tokens_cut"] for key in captions}
    assert cut["a"] == 0 and cut["b"] > 0 and cut["c"] > 0


def test_an_error_names_the_clip_and_leaves_what_is_done(
    extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.extract_features.latents import LatentsExtraction

    original, calls = LatentsExtraction._extract, []

    def failing(self: Any, vae: Any, encode_first_frame: Any, clip: Any) -> Any:
        calls.append(clip.key)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return original(self, vae, encode_first_frame, clip)

    monkeypatch.setattr(LatentsExtraction, "_extract", failing)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        extract(kinds=("latents",))
    assert caught.value.__notes__ == [
        "while extracting latents of clip '00000/clip001' in 00000.tar"
    ]
    monkeypatch.undo()
    summary = extract(kinds=("latents",))
    assert (summary.kinds[0].clips_written, summary.kinds[0].clips_already_there) == (4, 1)


def test_an_error_while_writing_stops_the_run_and_commits_nothing(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub_tracking: Any
) -> None:
    from cache_schema import ShardWriter

    add = ShardWriter.add

    def full(self: Any, key: str, *rest: Any, **named: Any) -> None:
        if key.endswith("001"):
            raise OSError(28, "No space left on device")
        add(self, key, *rest, **named)

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(OSError, match="No space left") as caught:
        extract(kinds=TRACKED)
    assert caught.value.__notes__ == [
        "while writing teacher and masks of clip '00000/clip001' in 00000.tar"
    ]
    assert not any(tmp_path.glob("*/commits/*"))


def test_an_error_while_preparing_names_the_clip(
    extract: Extract, monkeypatch: pytest.MonkeyPatch, stub_tracking: Any
) -> None:
    def failing(self: Any, record: Any) -> Any:
        raise MemoryError("no room for the frames")

    monkeypatch.setattr(stub_tracking, "prepare", failing)
    with pytest.raises(MemoryError) as caught:
        extract(kinds=TRACKED)
    assert caught.value.__notes__ == ["while preparing clip '00000/clip000' of 00000.tar"]


def test_a_model_is_gone_before_the_next_is_loaded(
    extract: Extract,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
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
    extract()
    assert alive_at_loading == [0, 0]
    assert [model() for model in models] == [None, None]


def test_another_dataset_under_the_same_shard_names_is_refused(
    extract: Extract, whole: ExtractSummary, two_shards: ClipsConfig, tmp_path: Path
) -> None:
    (tmp_path / "00000.mp4").write_bytes(b"no video")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "00000.mp4", "caption": "x"}\n')
    clips = two_shards.model_copy(update={"path": tmp_path})
    with pytest.raises(ValueError, match=r"of another dataset: .*use another cache folder"):
        extract(whole.kinds[0].store.parent, clips=clips, kinds=("text",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "warp"}, "extract.device=warp is not a torch device"),
        ({"device": "cuda:97"}, "extract.device=cuda:97, but this machine has"),
        ({"teacher": "missing"}, "nowhere"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(
    extract: Extract,
    change: dict[str, Any],
    message: str,
    extract_config: ExtractConfig,
    tmp_path: Path,
    stub_tracking: Any,
) -> None:
    if "teacher" in change:
        teacher = extract_config.teacher.model_copy(update={"checkpoint": "nowhere"})
        change = {"teacher": teacher}
    with pytest.raises(ValueError, match=message):
        extract(**change)
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
