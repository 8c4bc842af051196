"""Both stages with a tiny DINOv2: clips to a visual store, and two steps that learn from it."""

import json
from pathlib import Path

import numpy as np
import torch

from cache_schema import StoreReader
from stages.clips import open_dataset
from stages.dry_run import extract as dry_run
from stages.extract_features.config import ExtractConfig, VisualConfig
from stages.extract_features.fingerprints import fingerprint_of
from stages.extract_features.run import extract_features
from stages.extract_features.visual.extraction import VisualExtraction
from stages.progress import SilentProgress
from stages.train_student.config import TrainConfig
from stages.train_student.train import train_student


def test_a_student_learns_from_an_encoder_through_the_cache(
    encoder, two_shards, tiny_base, tmp_path, monkeypatch
):
    monkeypatch.setattr(dry_run, "matmul_flops_per_second", lambda *_: 1e9)
    visual = VisualConfig(checkpoint=str(encoder("dinov2")), time_rate="latent")
    config = ExtractConfig(
        kinds=("text", "latents", "visual"), device="cpu", visual=visual, max_skipped=1
    )
    cache = tmp_path / "cache"
    planned = dry_run.estimate(config, two_shards, tiny_base, cache, progress=SilentProgress())
    (estimated,) = (kind for kind in planned.kinds if kind.kind == "visual")
    summary = extract_features(
        config, two_shards, tiny_base, cache, provenance={}, progress=SilentProgress()
    )
    (kind,) = (kind for kind in summary.kinds if kind.kind == "visual")
    reader = StoreReader(kind.store)
    assert (estimated.store, estimated.clips) == (kind.store, len(reader))
    stored = sum(array.nbytes for array in reader.read(reader.keys[0]).values())
    assert estimated.bytes_per_clip == stored == 3 * 4 * 6 * 24 * 2 + 3

    extraction = VisualExtraction(visual, two_shards)
    record = next(iter(open_dataset(two_shards).shards[0].records()))
    with extraction.load_model(torch.device("cpu")) as compute:
        alone = compute([extraction.prepare(record)])[0]["visual"].arrays
    assert np.array_equal(reader.read(record.key)["features"], alone["features"])
    assert reader.record(record.key).fingerprint == fingerprint_of(record, "visual", config.teacher)

    run_dir = tmp_path / "run"
    trained = train_student(
        TrainConfig(
            run_dir=run_dir,
            steps=2,
            batch_size=2,
            loader_workers=0,
            block=0,
            objectives=("repa",),
            repa={
                "teacher": "visual",
                "projector": "convolution",
                "spatial_norm": 0.6,
                "neighbour_distance": 1,
            },
            lora={"rank": 2, "alpha": 2},
            deepspeed={"precision": "fp32"},
            report_to=(),
        ),
        two_shards,
        tiny_base,
        cache,
        resolved_config={},
        provenance={},
        progress=SilentProgress(),
    )
    assert trained.steps_done == 2
    rows = [json.loads(line) for line in (run_dir / "losses.jsonl").read_text().splitlines()]
    assert all(0 < row["auxiliary"]["repa"] < 4 for row in rows)
    assert "visual" in json.loads(Path(run_dir / "run.json").read_text())["stores"]
