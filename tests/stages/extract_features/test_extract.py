"""The driver: two shards with a bad clip, restarts, refusals before any work."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import SettingsMismatch, StoreReader, StoreWriter, verify_store
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig
from stages.extract_features.extract import extract_features
from stages.extract_features.summary import ExtractSummary
from stages.progress import SilentProgress

KINDS = ("text", "latents", "teacher")


def extract(
    config: ExtractConfig, clips: ClipsConfig, base: BaseModelConfig, cache: Path, **ranks: int
) -> ExtractSummary:
    return extract_features(
        config, clips, base, cache, provenance={}, progress=SilentProgress(), **ranks
    )


def with_teacher(whole: ExtractConfig, /, **changes: Any) -> ExtractConfig:
    return whole.model_copy(update={"teacher": whole.teacher.model_copy(update=changes)})


def content(store: Path) -> dict[str, str]:
    """Hash of every file of a store that readers see."""
    return {
        file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file() and ".staging" not in file.parts
    }


def times(store: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
) -> ExtractSummary:
    """An uninterrupted run over everything."""
    return extract(extract_config, two_shards, tiny_base, tmp_path_factory.mktemp("cache"))


def test_every_kind_is_written_and_the_bad_clip_recorded(whole: ExtractSummary) -> None:
    assert [kind.kind for kind in whole.kinds] == list(KINDS)
    text, latents, teacher = whole.kinds
    assert (text.clips_written, latents.clips_written, teacher.clips_written) == (6, 5, 5)
    assert text.skipped == ()
    for kind in (latents, teacher):
        assert [(c.key, c.reason, c.shard) for c in kind.skipped] == [
            ("00001/clip004", "undecodable", "00001")
        ]
    assert whole.skipped_share == pytest.approx(1 / 6)
    for kind in whole.kinds:
        assert verify_store(kind.store).problems == ()
        assert kind.bytes > 0


def test_stores_hold_what_training_expects(whole: ExtractSummary) -> None:
    text, latents, teacher = (StoreReader(kind.store) for kind in whole.kinds)
    key = "00000/clip001"
    assert text.read(key)["embeds"].shape == (32, 32)
    assert text.record(key).attributes["caption"] == "an ellipse over a grey texture"
    assert latents.read(key)["mean"].shape == latents.read(key)["std"].shape
    assert latents.read(key)["mean"].shape[0::2] == (3, 8)
    assert (latents.read(key)["std"] > 0).all()
    features = teacher.read(key)["features"]
    assert features.shape == (9, 4, 6, 64)
    np.testing.assert_allclose(np.linalg.norm(features.astype(float), axis=-1), 1, atol=2e-3)
    assert teacher.record(key).attributes["prompt"] == "mask"
    assert teacher.settings.values["clips"] == latents.settings.values["clips"]
    assert len(str(teacher.settings.values["checkpoint_sha256"])) == 64


def test_a_second_run_changes_no_file(
    whole: ExtractSummary,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = [times(kind.store) for kind in whole.kinds]
    monkeypatch.setattr(
        "stages.extract_features.teacher.TeacherExtraction.opened",
        lambda *_: pytest.fail("a finished store needs no model"),
    )
    again = extract(extract_config, two_shards, tiny_base, whole.kinds[0].store.parent)
    assert [times(kind.store) for kind in again.kinds] == before
    assert [kind.clips_written for kind in again.kinds] == [0, 0, 0]
    assert [kind.clips_already_there for kind in again.kinds] == [6, 5, 5]
    assert again.skipped_share == whole.skipped_share


def test_two_ranks_write_the_same_stores_as_one(
    whole: ExtractSummary,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    config = extract_config.model_copy(update={"kinds": ("text", "teacher")})
    for rank in range(2):
        part = extract(config, two_shards, tiny_base, tmp_path, rank=rank, world_size=2)
        assert part.kinds[0].clips_written == 3
        assert len(part.kinds[1].skipped) == rank
    for kind in (whole.kinds[0], whole.kinds[2]):
        assert content(tmp_path / kind.store.name) == content(kind.store)


KILLED = """
import os, signal, sys
from pathlib import Path
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig
from stages.extract_features.extract import extract_features
from stages.progress import SilentProgress
import cache_schema

config, clips, base, cache, kind, stop_after = sys.argv[1:]
add, seen = cache_schema.ShardWriter.add, []

def counting_add(self, *arguments):
    add(self, *arguments)
    seen.append(self._settings.kind == kind)
    if sum(seen) == int(stop_after):
        os.kill(os.getpid(), signal.SIGKILL)

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


def test_a_killed_run_goes_on_to_the_same_bytes(
    whole: ExtractSummary,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    # The fourth clip of the teacher is the first of the second shard: one shard is finished, one
    # is half-way.
    config = extract_config.model_copy(update={"kinds": ("text", "teacher")})
    arguments = [model.model_dump_json() for model in (config, two_shards, tiny_base)]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, str(tmp_path), "teacher", "4"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        timeout=200,
    )
    assert process.returncode == -signal.SIGKILL
    expected = whole.kinds[0].store, whole.kinds[2].store
    text, teacher = (tmp_path / store.name for store in expected)
    assert [path.stem for path in (teacher / "commits").iterdir()] == ["00000"]
    finished = {**times(text), **times(teacher / "shards" / "00000")}

    resumed = extract(config, two_shards, tiny_base, tmp_path)

    after = {**times(text), **times(teacher)}
    assert {name: after[name] for name in finished} == finished
    assert resumed.kinds[1].clips_written == 1
    assert resumed.kinds[1].clips_already_there == 4
    for store in expected:
        assert content(tmp_path / store.name) == content(store)


def test_a_shard_that_another_process_writes_is_left_alone(
    whole: ExtractSummary,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    config = extract_config.model_copy(update={"kinds": ("text",)})
    settings = StoreReader(whole.kinds[0].store).settings
    other = StoreWriter.open(tmp_path, settings, provenance={})
    with other.shard("00001", source="00001.tar"):
        summary = extract(config, two_shards, tiny_base, tmp_path)
    assert summary.kinds[0].busy_shards == ("00001",)
    assert summary.kinds[0].clips_written == 3


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


def test_values_beyond_float16_are_skipped_with_a_reason(
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from stages.extract_features import text

    monkeypatch.setattr(text, "to_float16", lambda t: (t * torch.inf).half().numpy())
    config = extract_config.model_copy(update={"kinds": ("text",)})
    summary = extract(config, two_shards, tiny_base, tmp_path)
    assert {clip.reason for clip in summary.kinds[0].skipped} == {"not_finite"}
    assert summary.skipped_share == 1


def test_another_dataset_under_the_same_shard_names_is_refused(
    whole: ExtractSummary,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    (tmp_path / "00000.mp4").write_bytes(b"no video")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "00000.mp4", "caption": "x"}\n')
    clips = two_shards.model_copy(update={"path": tmp_path})
    with pytest.raises(SettingsMismatch, match="another cache folder"):
        extract(extract_config, clips, tiny_base, whole.kinds[0].store.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "warp"}, "extract.device=warp is no torch device"),
        ({"device": "cuda:97"}, "extract.device=cuda:97, but this machine has"),
    ],
)
def test_a_wrong_device_is_refused_before_any_work(
    change: dict[str, Any],
    message: str,
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    config = extract_config.model_copy(update=change)
    with pytest.raises(ValueError, match=message):
        extract(config, two_shards, tiny_base, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_refused_before_any_work(
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    config = with_teacher(extract_config, config="sam2.1_hiera_t")
    with pytest.raises(ValueError, match=r"does not fit the SAM2 configuration sam2\.1_hiera_t"):
        extract(config, two_shards, tiny_base, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"features": "memory_encoder"},
        {"fusion": "average"},
        {"fusion": "forward"},
        {"forward_weight": 0.25},
        {"time_rate": "latent"},
        {"image_size": 64},
        {"precision": "bf16"},
    ],
)
def test_every_teacher_setting_that_changes_values_names_another_store(
    change: dict[str, Any], extract_config: ExtractConfig, two_shards: ClipsConfig
) -> None:
    from stages.extract_features.teacher import TeacherExtraction

    changed = with_teacher(extract_config, **change).teacher
    plain = TeacherExtraction(extract_config.teacher, two_shards).settings
    assert TeacherExtraction(changed, two_shards).settings.hash != plain.hash


def test_the_forward_share_is_no_setting_of_a_forward_teacher(
    extract_config: ExtractConfig, two_shards: ClipsConfig
) -> None:
    from stages.extract_features.teacher import TeacherExtraction

    hashes = {
        TeacherExtraction(
            with_teacher(extract_config, fusion="forward", forward_weight=share).teacher,
            two_shards,
        ).settings.hash
        for share in (0.5, 0.25)
    }
    assert len(hashes) == 1
