"""Encoding in chunks, against the whole clip in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from cache_schema import StoreSettings
from stages.local_gram_flow import (
    local_gram_flow,
    part_norms,
    regrid_fused,
    reverse_pairs,
    take_directions,
)
from stages.teacher_store.config import GramFlowConfig
from stages.teacher_store.encoder import GramFlowEncoder
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.teacher_store.settings import valid_spec

CPU = torch.device("cpu")


def fused(maps: int, side: int) -> torch.Tensor:
    """Two parts of weights that differ from map to map, as rounding makes them; one map empty."""
    noise = torch.Generator().manual_seed(maps)
    drawn = torch.randn((maps, side, side, 2, 6), generator=noise)
    weights = torch.tensor([0.6, 0.8]) + 0.01 * torch.randn((maps, 1, 1, 2), generator=noise)
    features = (torch.nn.functional.normalize(drawn, dim=-1) * weights[..., None]).flatten(-2)
    features[1] = 0.0
    return features


@pytest.mark.parametrize("maps", [2, 8, 9, 10, 16, 17, 29])
@pytest.mark.parametrize("native", [False, True])
def test_long_clips_have_the_flow_of_the_whole(maps: int, native: bool) -> None:
    features, grid = fused(maps, 6), (4, 5) if native else (6, 6)
    values: dict[str, Any] = {"grid_source": "native" if native else "student", "parts": 2}
    arrays = feature_arrays_spec((maps, 6, 6, 12), "float16") | {"valid": valid_spec(maps)}
    teacher = StoreSettings(kind="teacher", arrays=arrays, values=values)
    maker = GramFlowEncoder.of(teacher, GramFlowConfig(radius=2), grid)
    valid = np.arange(maps, dtype=np.uint8)
    found = maker(encode_features(features, "float16") | {"valid": valid}, CPU)
    stored = features.half().double()
    whole = regrid_fused(stored, *grid, 2) if native else stored
    expected = local_gram_flow(whole[None], 2)[0].numpy()
    assert found["gram_flow"].shape == maker.settings.arrays["gram_flow"].shape
    assert np.abs(found["gram_flow"] - expected).max() < 2**-11 + 1e-6
    np.testing.assert_array_equal(found["valid"], valid)


@pytest.mark.parametrize("maps", [2, 9, 17])
@pytest.mark.parametrize("native", [False, True])
def test_a_crossed_flow_of_long_clips_is_that_of_each_track(maps: int, native: bool) -> None:
    features, grid = fused(maps, 6), (4, 5) if native else (6, 6)
    values: dict[str, Any] = {
        "grid_source": "native" if native else "student",
        "parts": 2,
        "fusion": "gram_flow",
        "forward_weight": 0.36,
    }
    arrays = feature_arrays_spec((maps, 6, 6, 12), "float16") | {"valid": valid_spec(maps)}
    teacher = StoreSettings(kind="teacher", arrays=arrays, values=values)
    maker = GramFlowEncoder.of(teacher, GramFlowConfig(radius=2, pairs="crossed"), grid)
    valid = np.ones(maps, dtype=np.uint8)
    found = maker(encode_features(features, "float16") | {"valid": valid}, CPU)
    assert found.keys() == maker.settings.arrays.keys() == {"gram_flow", "gram_flow_back", "valid"}
    stored = features.half().double()
    flows = {}
    for directions in ("forward", "backward"):
        track = take_directions(stored, 2, directions, forward_weight=0.36)
        track = regrid_fused(track, *grid, 1) if native else track
        flows[directions] = local_gram_flow(track[None], 2)
    assert np.abs(found["gram_flow"] - flows["backward"][0].numpy()).max() < 2**-11 + 1e-6
    expected = reverse_pairs(flows["forward"])[0].numpy()
    assert np.abs(found["gram_flow_back"] - expected).max() < 2**-11 + 1e-6


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"fusion": "average", "parts": 1, "forward_weight": 0.5}, "the fusion average"),
        ({"fusion": "forward", "parts": 1, "forward_weight": None}, "the fusion forward"),
        ({"fusion": "gram_flow", "parts": 2, "forward_weight": 1.0}, "a forward share of 1,"),
        ({"fusion": "gram_flow", "parts": 2, "forward_weight": 0.0}, "a forward share of 0,"),
    ],
)
def test_a_crossed_flow_of_features_without_both_tracks_is_refused(
    values: dict[str, Any], told: str
) -> None:
    arrays = feature_arrays_spec((3, 6, 6, 12), "float16") | {"valid": valid_spec(3)}
    teacher = StoreSettings(kind="teacher", arrays=arrays, values=values)
    GramFlowEncoder.of(teacher, GramFlowConfig(radius=2), (6, 6))
    with pytest.raises(ValueError, match=rf"{told}.*extract.teacher.fusion=gram_flow"):
        GramFlowEncoder.of(teacher, GramFlowConfig(radius=2, pairs="crossed"), (6, 6))


def test_the_norms_of_parts_are_those_of_the_clip_in_whatever_pieces() -> None:
    features = fused(11, 5).double()
    tokens = features.unflatten(-1, (2, 6)).numpy().reshape(-1, 2, 6)
    norms = np.linalg.norm(tokens, axis=-1)
    expected = [norms[norms[:, part] > 0, part].mean() for part in range(2)]
    for size in (1, 4, 11):
        pieces = (features[start : start + size] for start in range(0, 11, size))
        np.testing.assert_allclose(part_norms(pieces, 2).numpy(), expected, rtol=1e-12)
