"""Which neighbouring frames the Local Gram Flow compares, from features and from what is stored."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import ValidationError

from cache_schema import StoreSettings
from stages.local_gram_flow import fuse_directions, fuse_subjects
from stages.teacher_store.config import GramFlowConfig
from stages.teacher_store.encoder import GramFlowEncoder
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.teacher_store.settings import valid_spec
from stages.train_student.config import TrainConfig
from stages.train_student.model.teacher import Teacher, TeacherLayout
from stages.train_student.objectives.build import build_objectives
from tests.stages.local_gram_flow.reference import kl_by_loop, similarities_by_loop

FRAMES, GRID, RADIUS, TAU = 5, (3, 5), 1, 0.2
EVERY = ("forward", "backward", "both", "crossed")
ALL = torch.ones(1, FRAMES, dtype=torch.bool)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def tracks_of(subjects, grid=GRID):
    """(f, b) of each subject."""
    return [tuple(random(10 * s + d, FRAMES, *grid, 4) for d in range(2)) for s in range(subjects)]


def stored(tracks, share=0.5, slots=1):
    """What stage one fuses of them, of one clip."""
    fused = [fuse_directions(f, b, fusion="gram_flow", forward_weight=share) for f, b in tracks]
    return fuse_subjects(fused, num_slots=slots)


def teacher(fused_THWG, *, share=0.5, slots=1, native=False, valid_BT=ALL, arrays=None, **changes):
    return Teacher(
        arrays=arrays or {"features": fused_THWG[None]},
        valid_BT=valid_BT,
        num_frames=FRAMES,
        token_grid=GRID,
        layout=TeacherLayout(native=native, parts=2 * slots, forward_weight=share),
        **changes,
    )


def lgf(pairs, **settings):
    settings = {"radius": RADIUS, "temperature": TAU, "pairs": pairs} | settings
    (made,) = build_objectives(TrainConfig(lgf=settings))
    return made


def student_of(seed=99):
    return random(seed, 1, FRAMES, *GRID, 6)


def mean_similarities(tracks, which, share, *, backward):
    """Over the subjects, of the forward (0) or backward (1) track, or of both by their share."""
    total = 0.0
    for track in tracks:
        flows = [similarities_by_loop(x[None].numpy(), RADIUS, backward=backward)[0] for x in track]
        one = flows[which] if which != "fused" else share * flows[0] + (1 - share) * flows[1]
        total = total + one / len(tracks)
    return total


def expected_loss(student_BTHWC, tracks, pairs, share=0.5):
    """From the definition, in float64: which track says what of which pairs."""
    of = {
        "forward": {False: "fused"},
        "backward": {True: "fused"},
        "both": {False: "fused", True: "fused"},
        "crossed": {False: 1, True: 0},
    }[pairs]
    losses = []
    for backward, which in of.items():
        s, inside = similarities_by_loop(student_BTHWC.numpy(), RADIUS, backward=backward)
        taught = mean_similarities(tracks, which, share, backward=backward)
        losses.append(kl_by_loop(s, taught, inside, TAU))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("pairs", EVERY)
@pytest.mark.parametrize(("subjects", "slots"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_losses_equal_float64_loops_over_the_separate_tracks(pairs, subjects, slots, share):
    tracks = tracks_of(subjects)
    held = teacher(stored(tracks, share, slots), share=share, slots=slots)
    found = lgf(pairs)(student_of(), held)
    expected = expected_loss(student_of(), tracks, pairs, share)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_the_four_settings_differ():
    held = teacher(stored(tracks_of(1)))
    losses = sorted(lgf(pairs)(student_of(), held).item() for pairs in EVERY)
    assert np.diff(losses).min() > 1e-4


def test_forward_of_the_reversed_clip_is_backward():
    fused, student, reversed_pairs = stored(tracks_of(1)), student_of(), {}
    for pairs, other in (("forward", "backward"), ("both", "both")):
        played = lgf(pairs)(student.flip(1), teacher(fused.flip(0)))
        torch.testing.assert_close(played, lgf(other)(student, teacher(fused)), rtol=1e-12, atol=0)
    # Reversed in time, the tracks change places as well.
    (track,) = tracks_of(1)
    swapped = stored([(track[1].flip(0), track[0].flip(0))])
    reversed_pairs = lgf("crossed")(student.flip(1), teacher(swapped))
    expected = lgf("crossed")(student, teacher(fused))
    torch.testing.assert_close(reversed_pairs, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("divergence", ["kl", "l2"])
def test_both_is_the_mean_and_its_gradient_too(divergence):
    found = {}
    for pairs in ("forward", "backward", "both"):
        student = student_of().requires_grad_()
        loss = lgf(pairs, divergence=divergence)(student, teacher(stored(tracks_of(1))))
        loss.sum().backward()
        found[pairs] = torch.cat([loss.detach(), student.grad.flatten()])
    torch.testing.assert_close(
        found["both"], (found["forward"] + found["backward"]) / 2, rtol=1e-10, atol=1e-14
    )


def test_crossed_of_equal_tracks_is_both():
    ((f, _),) = tracks_of(1)
    held = teacher(stored([(f, f)]))
    crossed, both = (lgf(pairs)(student_of(), held) for pairs in ("crossed", "both"))
    torch.testing.assert_close(crossed, both, rtol=1e-12, atol=0)


def test_crossed_takes_each_track_alone():
    """Forward pairs do not know the forward track, nor backward pairs the backward one."""
    ((f, b),) = tracks_of(1)
    other = random(50, *f.shape)
    flows = [
        teacher(stored([track])).gram_flows(RADIUS, "crossed")
        for track in ((f, b), (other, b), (f, other))
    ]
    torch.testing.assert_close(flows[1]["forward"], flows[0]["forward"], rtol=0, atol=1e-12)
    torch.testing.assert_close(flows[2]["backward"], flows[0]["backward"], rtol=0, atol=1e-12)
    assert (flows[1]["backward"] - flows[0]["backward"]).abs().max() > 0.1
    assert (flows[2]["forward"] - flows[0]["forward"]).abs().max() > 0.1


def test_crossed_on_sam2s_own_grid_is_taken_before_it_is_resampled():
    tracks = tracks_of(1, (8, 8))
    found = teacher(stored(tracks), native=True).gram_flows(RADIUS, "crossed")
    for direction, track in (("forward", tracks[0][1]), ("backward", tracks[0][0])):
        alone = fuse_directions(track, None, fusion="forward", forward_weight=1.0)
        layout = TeacherLayout(native=True, parts=1)
        held = Teacher(
            arrays={"features": alone[None]},
            valid_BT=ALL,
            num_frames=FRAMES,
            token_grid=GRID,
            layout=layout,
        )
        expected = held.gram_flows(RADIUS, direction)[direction]
        torch.testing.assert_close(found[direction], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pairs", EVERY)
@pytest.mark.parametrize("content", [6e4, float("nan")])
def test_what_invalid_maps_hold_changes_neither_loss_nor_gradient(pairs, content):
    """Maps 0 to 1 and 3 to 4 are pairs; map 2 is in neither, and stands for nothing."""
    valid_BT = ALL.clone()
    valid_BT[0, 2] = False
    fused, results = stored(tracks_of(1)), []
    for value in (0.0, content):
        spoiled, student = fused.clone(), student_of()
        spoiled[2], student[:, 2] = value, value
        loss = lgf(pairs)(student.requires_grad_(), teacher(spoiled, valid_BT=valid_BT))
        loss.sum().backward()
        results.append((loss.detach(), student.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    ((f, b),) = tracks_of(1)
    apart = [
        expected_loss(student_of()[:, cut], [(f[cut], b[cut])], pairs)
        for cut in (slice(0, 2), slice(3, 5))
    ]
    assert results[0][0].item() == pytest.approx(sum(apart) / 2, abs=1e-12)


@pytest.mark.parametrize("pairs", ["forward", "backward", "both"])
def test_a_token_weighs_by_the_map_it_lies_in(pairs):
    """Of a backward pair that is the second map; the masks change from map to map."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.randint(0, 256, (1, FRAMES, *GRID), generator=generator).to(torch.uint8)
    masks = {"forward": mask, "valid": torch.ones(1, FRAMES, dtype=torch.uint8)}
    fused, student = stored(tracks_of(1)), student_of()
    found = lgf(pairs, foreground_weight=4.0)(student, teacher(fused, masks=masks))
    weights = 1 + 3 * mask.double().numpy() / 255
    losses = []
    for backward in {"forward": [False], "backward": [True]}.get(pairs, [False, True]):
        s, inside = similarities_by_loop(student.numpy(), RADIUS, backward=backward)
        g, _ = similarities_by_loop(fused[None].numpy(), RADIUS, backward=backward)
        total = over = 0.0
        for t, y, x in np.ndindex(FRAMES - 1, *GRID):
            one = np.s_[:, t : t + 1, y : y + 1, x : x + 1]
            weight = weights[0, t + backward, y, x]
            total += weight * kl_by_loop(s[one], g[one], inside[one], TAU)
            over += weight
        losses.append(total / over)
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-5)


# A cosine is off by half a step of what is stored: at temperature 0.2 that bounds the loss.
FORMS = {
    ("features", "float16"): 1e-4,
    ("features", "int8"): 3e-3,
    ("gram_flow", "float16"): 2e-3,
    ("gram_flow", "uint8"): 6e-3,
}


def arrays_of(tracks, form, dtype, share, pairs, *, native=False):
    """A clip as the stores hold it, by the way of extraction and `cache derive`."""
    fused = stored(tracks, share)
    arrays = encode_features(fused, dtype if form == "features" else "float16")
    if form == "gram_flow":
        spec = feature_arrays_spec(tuple(fused.shape), "float16") | {"valid": valid_spec(FRAMES)}
        values = {"fusion": "gram_flow", "forward_weight": share, "parts": 2}
        values |= {"grid_source": "native" if native else "student"}
        maker = GramFlowEncoder.of(
            StoreSettings(kind="teacher", arrays=spec, values=values),
            GramFlowConfig(
                radius=2, dtype=dtype, pairs="crossed" if pairs == "crossed" else "forward"
            ),
            GRID,
        )
        arrays = maker(arrays | {"valid": np.ones(FRAMES, np.uint8)}, torch.device("cpu"))
        assert {n: a.shape for n, a in arrays.items()} == {
            n: a.shape for n, a in maker.settings.arrays.items()
        }
        del arrays["valid"]
    return {name: torch.from_numpy(array)[None] for name, array in arrays.items()}


@pytest.mark.parametrize("pairs", EVERY)
@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_every_form_teaches_what_the_tracks_do_in_float64(form, dtype, pairs):
    """A stored Gram flow of each map to the next serves three settings; crossed is stored so."""
    tracks = tracks_of(1)
    held = teacher(None, arrays=arrays_of(tracks, form, dtype, 0.5, pairs))
    found = lgf(pairs)(student_of(), held)
    expected = expected_loss(student_of(), tracks, pairs)
    assert found.item() == pytest.approx(expected, abs=FORMS[form, dtype])


def test_a_crossed_flow_of_sam2s_own_grid_is_that_of_its_features():
    tracks = tracks_of(2, (8, 8))[:1]
    features, flow = (
        teacher(
            None,
            native=True,
            arrays=arrays_of(tracks, form, "float16", 0.5, "crossed", native=True),
        )
        for form in ("features", "gram_flow")
    )
    expected = features.gram_flows(RADIUS, "crossed")
    for direction, found in flow.gram_flows(RADIUS, "crossed").items():
        torch.testing.assert_close(found, expected[direction], rtol=0, atol=2**-11 + 1e-6)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_bytes_hold_the_lesser_track_more_coarsely(share):
    """One scale serves a whole token, so that the lesser track's share of it decides its steps.

    Each channel is off by half a step of the token's largest, m <= sqrt(a), over 127. Of a track
    with share w and C channels the unit token is off by sqrt(C) sqrt(a) / (254 sqrt(w)) at most,
    and a cosine by twice that.
    """
    tracks = tracks_of(1)
    exact, rounded = (
        teacher(None, share=share, arrays=arrays).gram_flows(RADIUS, "crossed")
        for arrays in (
            {"features": stored(tracks, share)[None]},
            arrays_of(tracks, "features", "int8", share, "crossed"),
        )
    )
    channels = tracks[0][0].shape[-1]
    for direction, of_track in (("forward", 1 - share), ("backward", share)):
        bound = 2 * (channels * max(share, 1 - share) / of_track) ** 0.5 / 254
        assert (rounded[direction] - exact[direction]).abs().max() < bound * 1.01


@pytest.mark.parametrize("pairs", EVERY)
def test_a_stored_flow_of_other_pairs_is_never_misread(pairs):
    other = "forward" if pairs == "crossed" else "crossed"
    held = teacher(None, arrays=arrays_of(tracks_of(1), "gram_flow", "uint8", 0.5, other))
    with pytest.raises(ValueError, match=f"with pairs {other} does not hold pairs {pairs}"):
        held.gram_flows(RADIUS, pairs)


def test_crossed_pairs_of_one_direction_are_refused():
    for directions in ("forward", "averaged"):
        with pytest.raises(ValidationError, match=f"train.lgf.directions=fused, not {directions}"):
            TrainConfig(lgf={"pairs": "crossed", "directions": directions})


def test_directions_go_with_every_other_setting():
    ((f, b),) = tracks_of(1)
    held, student = teacher(stored([(f, b)])), student_of()
    alone = F.normalize(f, dim=-1)
    for pairs in ("forward", "backward", "both"):
        found = lgf(pairs, directions="forward")(student, held)
        assert found.item() == pytest.approx(
            expected_loss(student, [(alone, alone)], pairs), abs=1e-12
        )
