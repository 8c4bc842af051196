"""The command `probe`: what it hands to the stage and prints of the results."""

import json

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from stages.probe_blocks.estimate import ProbeEstimate
from stages.probe_blocks.results import BlockLosses, ProbeResults


def results_of(num_clips):
    uniform = {f"clip/{number}": 1.0 + number / 10 for number in range(num_clips)}
    blocks = tuple(
        BlockLosses(
            block=block,
            fit_loss=0.4,
            losses={key: [scale * loss, 0.5 * scale * loss] for key, loss in uniform.items()},
        )
        for block, scale in ((0, 0.8), (1, 0.4))
    )
    return ProbeResults(
        timesteps=(100, 900),
        num_blocks=2,
        fitted_on=7,
        excluded={"walk/9": "its checksum does not match"},
        uniform=uniform,
        blocks=blocks,
    )


@pytest.fixture
def probe(minimal, tmp_path, replace_stage):
    """Runs the command with a stage that returns results of so many clips."""
    asked = {}

    def run(*words, num_clips=6, env=None):
        def probe_blocks(config, train, clips, model, cache_root, out, **others):
            asked.update(config=config, out=out)
            return results_of(num_clips)

        replace_stage("stages.probe_blocks.probe", probe_blocks=probe_blocks)
        words = ["probe", "--config", minimal, f"outputs={tmp_path}/outputs", *words]
        return CliRunner().invoke(app, words, env={"COLUMNS": "200", **(env or {})}), asked

    return run


def test_every_block_is_shown_and_the_best_is_no_promise(probe, tmp_path):
    done, asked = probe("probe.blocks=[0,1]")
    assert done.exit_code == 0, done.output
    assert asked["config"].blocks == (0, 1)
    assert asked["out"] == tmp_path / "outputs" / "probe"
    # 1 - 0.4 * 0.75 of the uniform flow's loss, over both timesteps.
    assert "agreement 0.700 [" in done.stdout
    assert "at the timesteps 0.60 0.80" in done.stdout
    assert "block 1 agrees best." in done.stdout
    assert "left out: walk/9: its checksum does not match" in done.stdout
    assert "does not show which block gains most" in done.stdout
    assert "heat_map.png" in done.stdout


def test_few_clips_give_no_interval_and_say_so(probe):
    done, _ = probe(num_clips=4)
    assert "agreement 0.700, loss" in done.stdout
    assert "there is no interval: 4 values; an interval needs 5" in done.stdout


def test_json_holds_every_number(probe, tmp_path):
    done, _ = probe("--json", "--out", str(tmp_path / "there"))
    answer = json.loads(done.stdout)
    assert answer["out"] == str(tmp_path / "there")
    assert answer["best"] == 1
    assert [block["block"] for block in answer["blocks"]] == [0, 1]
    assert answer["blocks"][1]["by_timestep"][1]["agreement"]["mean"] == pytest.approx(0.8)


def test_several_processes_are_refused(probe):
    done, asked = probe(env={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.exit_code == 2
    assert "one process" in done.output and not asked


def test_a_dry_run_prints_the_estimate_and_probes_nothing(probe, replace_stage):
    estimate = ProbeEstimate(
        blocks=(1, 5),
        num_blocks=42,
        num_blocks_passed=6,
        timesteps=(100, 900),
        clips=16,
        held_out=8,
        read_bytes=10**9,
        token_bytes=2 * 10**9,
        sample_bytes=10**9,
        block_bytes=3 * 10**8,
        activation_bytes=7 * 10**8,
        pass_flops=3e15,
        fit_flops=1e15,
        device="cuda:0",
        flops_per_second=4e14,
        assumed_peak_fraction=0.5,
    )
    replace_stage("stages.probe_blocks.estimate", estimate_probe=lambda *settings: estimate)
    done, asked = probe("--dry-run")
    assert done.exit_code == 0, done.output
    assert not asked
    shown = " ".join(done.stdout.split())
    for fact in (
        "2 of 42, passing 6",
        "16 to fit on, 8 to measure on",
        "3.0 GB (tokens 2.0 GB, samples 1.0 GB)",
        "4 PFLOP, of which fits 1 PFLOP",
        "on cuda:0 at 200 TFLOP/s",
    ):
        assert fact in shown
    assert json.loads(probe("--dry-run", "--json")[0].stdout)["seconds"] == 20.0
