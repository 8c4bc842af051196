"""The command `evaluate` with VBench's networks: tiny ones of the official classes."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from stages.clips import write_video


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "lgf"
    for key in ("a dog-0", "a cat-0"):
        noise = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)
        write_video(folder / f"{key}.mp4", noise, 8.0)
    return folder


@pytest.fixture
def dino(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def evaluate(folder, out, *settings):
    words = ["evaluate", str(folder), "--out", str(out), "evaluate.scores=[vbench]", *settings]
    return CliRunner().invoke(app, [*words, "extract.device=cpu"])


def test_a_dimension_has_a_value_where_its_network_is_and_a_line_where_not(videos, dino, tmp_path):
    done = evaluate(videos, tmp_path / "out", f"evaluate.vbench.dino={dino}", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["scores"]["subject_consistency"]["means"][0]["count"] == 2
    assert answer["scores"]["dynamic_degree"]["means"][0]["count"] == 0
    (note,) = (note for note in answer["vbench"]["notes"] if "without a network" in note)
    assert "dynamic_degree (evaluate.vbench.raft)" in note
    assert answer["vbench"]["sides"][0]["protocols"] == {"VBench": 2}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["vbench"]["dino"] == str(dino)
    results = json.loads((tmp_path / "out" / "lgf_eval_results.json").read_text())
    assert results.keys() == {"subject_consistency", "temporal_flickering"}


def test_the_protocol_and_the_cautions_are_printed(videos, tmp_path):
    done = evaluate(videos, tmp_path / "out")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "VBench protocol" in text
    assert "without a network" in text


def test_a_network_of_the_wrong_kind_stops_before_any_work(videos, dino, tmp_path):
    torch.save({}, tmp_path / "amt-s.pth")
    for setting in (f"clip={dino}", f"amt={tmp_path / 'amt-s.pth'}", "raft=missing.pth"):
        done = evaluate(videos, tmp_path / "out", f"evaluate.vbench.{setting}")
        assert done.exit_code == 2, done.output
        assert f"evaluate.vbench.{setting.partition('=')[0]}" in done.output
        assert not (tmp_path / "out").exists()
