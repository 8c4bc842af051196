"""Means, intervals and comparisons of blocks against a closed form, and damaged files."""

import csv
import math

import numpy as np
import pytest

from stages.probe_blocks.heat_map import draw_heat_map
from stages.probe_blocks.results import (
    BlockLosses,
    ProbeResults,
    read_block,
    write_block,
    write_results,
)

TIMESTEPS = (900, 100)


def results_of(losses_BKS, uniform_K, **changes):
    """Results of arrays: losses by block, clip and timestep; NaN is written as None."""
    keys = [f"clip {k}" for k in range(len(uniform_K))]
    blocks = tuple(
        BlockLosses(
            block=number,
            fit_loss=0.5,
            losses={
                key: [None if math.isnan(v) else float(v) for v in row]
                for key, row in zip(keys, losses_KS, strict=True)
            },
        )
        for number, losses_KS in enumerate(losses_BKS)
    )
    facts = {"timesteps": TIMESTEPS, "num_blocks": 4, "fitted_on": 9, "excluded": {}}
    uniform = dict(zip(keys, map(float, uniform_K), strict=True))
    return ProbeResults(**facts | changes, uniform=uniform, blocks=blocks)


@pytest.fixture
def losses_BKS():
    """Of 3 blocks, 6 clips, 2 timesteps: block 1 is the best, block 2 hardly worse."""
    noise = np.random.default_rng(0)
    of_clip_K = noise.uniform(0.4, 0.8, 6)
    base = np.stack([of_clip_K, 0.5 * of_clip_K], axis=1)
    near = base * 0.5 + noise.normal(0, 0.05, base.shape)
    return np.stack([base, base * 0.5, near])


UNIFORM = np.array([1.0, 0.9, 1.2, 1.1, 0.8, 1.3])


def test_agreement_is_one_minus_the_ratio_of_the_mean_losses(losses_BKS):
    results = results_of(losses_BKS, UNIFORM)
    for block, losses_KS in zip(results.blocks, losses_BKS, strict=True):
        found = results.agreement(block)
        assert found.mean == pytest.approx(1 - losses_KS.mean() / UNIFORM.mean())
        assert found.low is not None and found.low < found.mean < found.high
        assert results.agreement(block, 100).mean == pytest.approx(
            1 - losses_KS[:, 1].mean() / UNIFORM.mean()
        )
    uniform = results_of([UNIFORM[:, None].repeat(2, axis=1)], UNIFORM)
    assert uniform.agreement(uniform.blocks[0]).mean == 0


def test_the_best_has_the_lowest_loss_and_close_ones_are_named(losses_BKS):
    results = results_of(losses_BKS, UNIFORM)
    assert results.best is results.blocks[int(losses_BKS.mean((1, 2)).argmin())]
    others = [number for number in range(3) if results.blocks[number] is not results.best]
    for number in others:
        behind = results.behind_best(results.blocks[number])
        expected = losses_BKS[number].mean() - losses_BKS[results.best.block].mean()
        assert behind.mean == pytest.approx(expected)
        assert (behind.low <= 0) == (number in results.close_to_best)
    assert 0 not in results.close_to_best and len(results.close_to_best) == 1


def test_fewer_than_five_clips_have_no_interval(losses_BKS):
    results = results_of(losses_BKS[:, :4], UNIFORM[:4])
    assert results.agreement(results.blocks[0]).low is None
    assert results.close_to_best == ()
    assert "an interval needs 5" in results.uniform_loss.note


def test_a_loss_that_is_missing_is_counted_and_its_block_is_not_the_best(losses_BKS, tmp_path):
    losses_BKS[1, 2, 0] = math.nan
    results = results_of(losses_BKS, UNIFORM)
    broken = results.blocks[1]
    assert math.isnan(results.loss(broken)) and math.isnan(results.loss(broken, 900))
    assert results.loss(broken, 100) == pytest.approx(losses_BKS[1, :, 1].mean())
    assert (results.agreement(broken).missing, results.agreement(broken).count) == (1, 5)
    assert results.best is results.blocks[2]
    write_results(tmp_path, results, draw_heat_map(results), {})
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == losses_BKS.size
    assert [row["loss"] for row in rows].count("") == 1
    for row in rows:
        clip, column = int(row["clip"].split()[1]), TIMESTEPS.index(int(row["timestep"]))
        expected = losses_BKS[int(row["block"]), clip, column]
        assert row["loss"] == "" or float(row["loss"]) == expected
        assert float(row["uniform_loss"]) == UNIFORM[clip]
    assert (tmp_path / "heat_map.png").read_bytes().startswith(b"\x89PNG")


def test_without_any_loss_no_block_is_the_best():
    results = results_of(np.full((2, 6, 2), math.nan), UNIFORM)
    assert results.best is None
    assert results.as_dict()["best"] is None
    assert math.isnan(results.agreement(results.blocks[0]).mean)
    assert draw_heat_map(results).startswith(b"\x89PNG")


def test_a_picture_of_many_blocks_has_no_numbers_and_stays_readable():
    losses = np.random.default_rng(1).uniform(0.2, 1.0, (42, 4, 2))
    picture = draw_heat_map(results_of(losses, UNIFORM[:4]))
    width = int.from_bytes(picture[16:20], "big")
    assert 1500 < width < 3000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "damaged"),
        (lambda text: text.replace('"block": 1', '"block": 2'), "another block"),
        (lambda text: text.replace("clip 0", "clip 9"), "other clips"),
        (lambda text: text.replace("0.25,", ""), "2 losses"),
        (lambda text: text.replace("0.25", '"low"'), "damaged"),
    ],
)
def test_a_damaged_block_is_refused(tmp_path, change, message):
    block = BlockLosses(block=1, fit_loss=None, losses={"clip 0": [0.25, None]})
    assert read_block(tmp_path, 1, ["clip 0"], 2) is None
    write_block(tmp_path, block)
    assert read_block(tmp_path, 1, ["clip 0"], 2) == block
    file = tmp_path / "block-01.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=message):
        read_block(tmp_path, 1, ["clip 0"], 2)
