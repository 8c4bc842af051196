"""The examples of the documentation run, on tiny data, and do what their pages say."""

# Legend: B clip, T frame or map, H W pixels or token grid, G fused channel, C colour, K neighbour.

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter, find_store
from stages.clips import write_video
from stages.demo.build import PRETRAINED
from stages.demo.scenes import FigureClip, draw_clip
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.teacher_store.settings import valid_spec
from stages.train_student.model.teacher import Teacher
from tests.fingerprints import fingerprint_of

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FRAMES, HEIGHT, WIDTH, GRID = 9, 32, 48, (2, 3)
KEYS = ("walk/0", "walk/1")


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def python_of(page: str) -> str:
    """The block of Python that stands on a page itself."""
    text = (EXAMPLES.parent / f"{page}.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return str(code)


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
    root: Path = tmp_path_factory.mktemp("root") / "cache"
    writer = StoreWriter.open(root, settings, provenance={})
    valid_T = np.arange(FRAMES) < FRAMES - 1
    with writer.shard("00000", source="00000.tar") as shard:
        for key, fused_THWG in zip(KEYS, fused_KTHWG, strict=True):
            arrays = encode_features(torch.from_numpy(fused_THWG), request.param)
            arrays["valid"] = valid_T.astype("uint8")
            shard.add(key, arrays, fingerprint=fingerprint_of(key))
        shard.commit()
    latents = ArraySpec(dtype="float16", shape=(3, 4), dimension_names=("f", "c"))
    settings = StoreSettings(kind="latents", arrays={"mean": latents}, values={})
    with StoreWriter.open(root, settings, provenance={}).shard("0", source="0") as shard:
        mean = np.zeros(latents.shape, "float16")
        shard.add(KEYS[0], {"mean": mean}, fingerprint=fingerprint_of(KEYS[0]))
        shard.commit()
    return root


def test_a_cache_is_read_with_numpy_and_as_a_dataset(
    cache: Path, fused_KTHWG: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache.parent)
    means = example("read_cache")["similarity_to_next_frame"](cache)
    for key, fused_THWG in zip(KEYS, fused_KTHWG, strict=True):
        cosines = [np.sum(fused_THWG[t] * fused_THWG[t + 1], -1).mean() for t in range(7)]
        assert means[key] == pytest.approx(np.mean(cosines), abs=2e-3)
    exec(python_of("read-cache"), {"StoreReader": StoreReader, "find_store": find_store})
    loader = torch.utils.data.DataLoader(
        example("teacher_dataset")["TeacherClips"](cache), batch_size=2
    )
    ((keys, features_BTHWG, valid_BT),) = loader
    assert tuple(keys) == KEYS
    assert valid_BT.tolist() == [[True] * 8 + [False]] * 2
    np.testing.assert_allclose(features_BTHWG.double().numpy(), fused_KTHWG, atol=4e-3)


def test_a_teacher_is_read_by_key_and_from_no_other_kind_of_store(
    cache: Path, fused_KTHWG: np.ndarray
) -> None:
    size: Any = {"num_frames": FRAMES, "token_grid": GRID}
    reader = StoreReader(find_store(cache, "teacher"))
    teacher = Teacher.read(reader, KEYS[::-1], **size)
    assert teacher.valid_BT is not None and teacher.valid_BT.tolist() == [[True] * 8 + [False]] * 2
    expected = fused_KTHWG[::-1] * (np.arange(FRAMES) < FRAMES - 1)[None, :, None, None, None]
    np.testing.assert_allclose(teacher.features_BTHWG.double().numpy(), expected, atol=4e-3)
    with pytest.raises(ValueError, match="is a store of kind 'latents'"):
        Teacher.read(StoreReader(find_store(cache, "latents")), KEYS[:1], **size)


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
    names = {"clip": clip}
    exec(python_of("memory-features"), names)
    assert names["motion_BPHW2"].shape == (1, FRAMES - 1, 30, 45, 2)
    assert names["motion_BPHW2"].isfinite().all()


def test_the_loss_of_two_feature_maps_has_a_gradient() -> None:
    names: dict[str, Any] = {}
    exec(python_of("gram-flow-loss").replace("256", "8"), names)
    assert names["loss"].item() > 0
    assert names["student"].grad.isfinite().all()
