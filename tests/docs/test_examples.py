"""The examples of the documentation run, on tiny data, and do what their pages say."""

# Legend: B clip, T frame or map, H W pixels or token grid, G fused channel, C colour, K neighbour.

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from cache_schema import StoreReader, StoreSettings, StoreWriter, find_store
from stages.clips import write_video
from stages.demo.build import PRETRAINED
from stages.demo.scenes import FigureClip, draw_clip
from stages.local_gram_flow import implied_motion, local_gram_flow
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.teacher_store.settings import valid_spec
from tests.fingerprints import fingerprint_of

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FRAMES, HEIGHT, WIDTH, GRID = 9, 32, 48, (2, 3)
KEYS = ("walk/0", "walk/1")


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def fused_KTHWG() -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=(len(KEYS), FRAMES, *GRID, 8))
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


@pytest.fixture(scope="module", params=["float16", "int8"])
def cache(request: pytest.FixtureRequest, fused_KTHWG: np.ndarray, tmp_path_factory: Any) -> Path:
    """A teacher store of two clips, whose last map is not valid."""
    specs = feature_arrays_spec((FRAMES, *GRID, 8), request.param)
    settings = StoreSettings(
        kind="teacher",
        arrays=specs | {"valid": valid_spec(FRAMES)},
        values={"parts": 2, "fusion": "gram_flow", "forward_weight": 0.5, "grid_source": "student"},
    )
    root: Path = tmp_path_factory.mktemp("cache")
    writer = StoreWriter.open(root, settings, provenance={})
    valid_T = np.arange(FRAMES) < FRAMES - 1
    with writer.shard("00000", source="00000.tar") as shard:
        for key, fused_THWG in zip(KEYS, fused_KTHWG, strict=True):
            arrays = encode_features(torch.from_numpy(fused_THWG), request.param)
            arrays["valid"] = valid_T.astype("uint8")
            shard.add(key, arrays, fingerprint=fingerprint_of(key))
        shard.commit()
    return root


def test_a_cache_is_read_with_numpy_and_as_a_dataset(
    cache: Path, fused_KTHWG: np.ndarray
) -> None:
    found = example("read_cache")
    if "scale" not in StoreReader(find_store(cache, "teacher")).settings.arrays:
        means = found["similarity_to_next_frame"](cache)
        for key, fused_THWG in zip(KEYS, fused_KTHWG, strict=True):
            cosines = [np.sum(fused_THWG[t] * fused_THWG[t + 1], -1).mean() for t in range(7)]
            assert means[key] == pytest.approx(np.mean(cosines), abs=1e-3)
    loader = torch.utils.data.DataLoader(found["TeacherClips"](cache), batch_size=2)
    ((keys, features_BTHWG, valid_BT),) = loader
    assert tuple(keys) == KEYS
    assert valid_BT.tolist() == [[True] * 8 + [False]] * 2
    np.testing.assert_allclose(features_BTHWG.double().numpy(), fused_KTHWG, atol=4e-3)


@pytest.mark.parametrize("cache", ["int8"], indirect=True)
def test_the_loss_in_a_plain_loop_changes_the_blocks_up_to_the_tap_alone(cache: Path) -> None:
    train = example("diffusers_loop")["train"]
    noise = torch.Generator().manual_seed(0)
    video_BCTHW = torch.rand(2, 3, FRAMES, HEIGHT, WIDTH, generator=noise) * 2 - 1
    batches = [(video_BCTHW, ["a biped walks", "a quadruped walks"], list(KEYS))]

    def blocks_after_a_step(weight: float) -> list[list[torch.Tensor]]:
        pipe = CogVideoXPipeline.from_pretrained(
            PRETRAINED / "cogvideox", local_files_only=True, torch_dtype=torch.float32
        )
        torch.manual_seed(0)
        ((diffusion, auxiliary),) = train(pipe, batches, str(cache), block=2, weight=weight)
        assert np.isfinite(diffusion) and 0 < auxiliary < np.inf
        return [list(block.parameters()) for block in pipe.transformer.transformer_blocks]

    changed = [
        any(not torch.equal(p, q) for p, q in zip(*of_block, strict=True))
        for of_block in zip(blocks_after_a_step(0.0), blocks_after_a_step(0.5), strict=True)
    ]
    assert changed == [True] * 3 + [False] * 3


@pytest.fixture(scope="module")
def figure() -> FigureClip:
    return draw_clip(4, num_frames=FRAMES, height=96, width=144, fps=16.0, post_probability=0.0)


def test_the_features_of_a_clip_follow_its_subject(figure: FigureClip, tmp_path: Path) -> None:
    rows, columns = figure.masks_THW[0].nonzero()
    box_xyxy = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    write_video(tmp_path / "walk.mp4", figure.frames_THWC, figure.fps)
    sam2 = PRETRAINED / "sam2"
    clip = example("memory_features")["features_of"](
        tmp_path / "walk.mp4", box_xyxy, str(sam2 / "tiny.safetensors"), str(sam2 / "tiny.yaml")
    )
    assert clip.valid_T.all()
    assert clip.features_THWG.shape[:3] == (FRAMES, 30, 45)
    masks_1THW = clip.track.forward.logits_THW[None] > 0
    truth_1THW = torch.from_numpy(figure.masks_THW)[None].float()
    small = torch.nn.functional.interpolate(truth_1THW, masks_1THW.shape[-2:], mode="area") > 0.5
    overlap = (masks_1THW & small).sum() / (masks_1THW | small).sum()
    assert overlap > 0.6
    assert clip.track.cycle_consistency > 0.6
    flow_BPHWK = local_gram_flow(clip.features_THWG[None], 3)
    assert implied_motion(flow_BPHWK, 0.1).isfinite().all()
