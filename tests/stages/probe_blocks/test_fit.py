"""Losses of a linear map against loops in float64, and what the map can learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stages.local_gram_flow import local_gram_flow
from stages.probe_blocks.blockwise import TokenState
from stages.probe_blocks.config import ProbeConfig
from stages.probe_blocks.fit import LinearProbe, ProbeItem
from stages.probe_blocks.probe import linear_heads
from stages.probe_blocks.results import BlockLosses, ProbeResults
from stages.students.registry import read_configs
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch
from stages.train_student.objectives.config import LgfConfig
from stages.train_student.objectives.lgf import LocalGramFlow
from stages.train_student.step import TrainingStep
from tests.stages.local_gram_flow.reference import kl_by_loop, similarities_by_loop
from tests.stages.train_student.conftest import FRAMES, GRID, LATENT, TEXT

WIDTH, CHANNELS, TEMPERATURE = 32, 10, 0.2
CPU = torch.device("cpu")
TRAIN = TrainConfig(
    objectives=("lgf",),
    lgf=LgfConfig(radius=1, temperature=TEMPERATURE, projector_widths=(16, 12, 12)),
)


@pytest.fixture(scope="module")
def probe(base_model):
    def make(*, frame_rate, **settings):
        configs = read_configs(base_model)
        objective = LocalGramFlow(name="lgf", settings=TRAIN.lgf, steps=1)
        return LinearProbe(
            ProbeConfig(**settings),
            objective,
            TrainingStep(configs, (objective,), device=CPU, dtype=torch.float32),
            heads=lambda: linear_heads(TRAIN, configs, frame_rate=frame_rate),
            seed=0,
            device=CPU,
        )

    return make


def item(key, teacher_THWC, tokens_JHWC, valid_T=None):
    maps = len(teacher_THWC)
    valid_T = torch.ones(maps, dtype=torch.bool) if valid_T is None else valid_T
    batch = Batch(
        keys=(key,),
        clean_BFCHW=torch.zeros(1, *LATENT),
        noise_BFCHW=torch.zeros(1, *LATENT),
        timestep_B=torch.tensor([500]),
        text_BLD=torch.zeros(1, *TEXT),
        image_BFCHW=None,
        teacher={"features": F.normalize(teacher_THWC, dim=-1)[None]},
        teacher_valid_BT=valid_T[None],
        num_frames=FRAMES,
    )
    state = TokenState(
        tokens_BND=tokens_JHWC.flatten(0, 2)[None], text_BLD=torch.zeros(()), constants={}
    )
    return ProbeItem(key=key, batch=batch, state=state)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_losses_are_those_of_a_loop_in_float64(probe):
    """Tokens of 3 latent frames against 9 teacher frames, of which the last is invalid."""
    valid_T = torch.arange(FRAMES) < FRAMES - 1
    one = item("a", random(0, FRAMES, *GRID, CHANNELS), random(1, LATENT[0], *GRID, WIDTH), valid_T)
    made = probe(frame_rate=True, fit_steps=3)
    head, _ = made.fit([one], lambda: None)

    # Layer norm and both linear layers, then interpolation between frames 0, 2.5 and 6.5.
    weights = {name: value.double().numpy() for name, value in head.state_dict().items()}
    tokens_JHWC = one.state.tokens_BND[0].double().numpy().reshape(LATENT[0], *GRID, WIDTH)
    centred = tokens_JHWC - tokens_JHWC.mean(-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
    normed = normed * weights["norm.weight"] + weights["norm.bias"]
    matrix = weights["layers.0.weight"] + weights["skip.weight"]
    projected_JHWC = normed @ matrix.T + weights["layers.0.bias"]
    frames = np.arange(FRAMES)
    between_TJ = np.stack([np.interp(frames, [0, 2.5, 6.5], row) for row in np.eye(3)], axis=1)
    features_THWC = np.tensordot(between_TJ, projected_JHWC, axes=1)
    around = np.pad(features_THWC, ((1, 1), (0, 0), (0, 0), (0, 0)), mode="edge")
    taps = weights["smooth.taps_3C"]
    smooth_THWC = sum(taps[k] * around[k : k + FRAMES] for k in range(3))

    teacher_BTHWC = one.batch.teacher["features"].double().numpy()
    teacher, inside = (a[:, :-1] for a in similarities_by_loop(teacher_BTHWC, 1))
    student = similarities_by_loop(smooth_THWC[None], 1)[0][:, :-1]
    expected = kl_by_loop(student, teacher, inside, TEMPERATURE)
    np.testing.assert_allclose(made.measure(head, one), expected, rtol=1e-4)
    uniform = kl_by_loop(np.zeros_like(teacher), teacher, inside, TEMPERATURE)
    np.testing.assert_allclose(made.uniform_loss(one.batch), uniform, rtol=1e-5)


def test_tokens_that_are_linear_in_the_teacher_win_with_almost_no_loss(probe):
    """Planted tokens against unrelated ones, on clips that the maps have not seen."""
    plant_WC = torch.linalg.qr(random(7, WIDTH, CHANNELS))[0]
    teachers = [random(10 + clip, LATENT[0], *GRID, CHANNELS) for clip in range(8)]
    unrelated = [random(50 + clip, LATENT[0], *GRID, WIDTH) for clip in range(8)]
    planted = [teacher_THWC @ plant_WC.T for teacher_THWC in teachers]
    made = probe(frame_rate=False, fit_steps=200, fit_learning_rate=3e-2)
    blocks = []
    for number, tokens in enumerate((unrelated, planted)):
        items = [item(str(n), *pair) for n, pair in enumerate(zip(teachers, tokens, strict=True))]
        head, fit_loss = made.fit(items[:6], lambda: None)
        losses = {one.key: [made.measure(head, one)] for one in items[6:]}
        blocks.append(BlockLosses(block=number, fit_loss=fit_loss, losses=losses))
    results = ProbeResults(
        timesteps=(500,),
        num_blocks=2,
        fitted_on=6,
        excluded={},
        uniform={one.key: made.uniform_loss(one.batch) for one in items[6:]},
        blocks=tuple(blocks),
    )
    assert results.best is blocks[1]
    assert results.agreement(blocks[1]).mean > 0.95
    assert results.agreement(blocks[0]).mean < 0.1


def test_every_block_gets_the_same_start_and_order(probe):
    items = [
        item(str(n), random(n, LATENT[0], *GRID, CHANNELS), random(20 + n, LATENT[0], *GRID, WIDTH))
        for n in range(3)
    ]
    made = probe(frame_rate=False, fit_steps=5)
    torch.manual_seed(3)
    first, loss = made.fit(items, lambda: None)
    torch.manual_seed(4)
    second, again = made.fit(items, lambda: None)
    assert loss == again
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_a_loss_that_is_not_finite_is_nan(probe):
    tokens_JHWC = random(1, LATENT[0], *GRID, WIDTH)
    tokens_JHWC[0, 0, 0] = torch.inf
    one = item("a", random(0, LATENT[0], *GRID, CHANNELS), tokens_JHWC)
    made = probe(frame_rate=False, fit_steps=4)
    head, fit_loss = made.fit([one], lambda: None)
    assert np.isnan(fit_loss)
    assert np.isnan(made.measure(head, one))


def test_a_uniform_flow_is_what_equal_tokens_give():
    """The lower bound's premise: cosines of equal tokens are 1 everywhere inside the grid."""
    flow_BPHWK = local_gram_flow(torch.ones(1, 2, *GRID, 1), 1)
    inside = similarities_by_loop(np.ones((1, 2, *GRID, 1)), 1)[1]
    assert torch.equal(flow_BPHWK[torch.from_numpy(inside)], torch.ones(int(inside.sum())))
