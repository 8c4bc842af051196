"""Whole trainings with every auxiliary loss, alone and together."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from stages.extract_features.derive import derive_gram_flow
from stages.local_gram_flow import fuse_directions
from stages.progress import SilentProgress
from stages.teacher_store.config import GramFlowConfig
from stages.teacher_store.features import encode_features, feature_arrays_spec
from tests.fingerprints import fingerprint_of

FUSED = {"fusion": "gram_flow", "forward_weight": 0.5, "parts": 2}
NATIVE = {"grid_source": "native", **FUSED}


def _write(root, kind, specs, made, values):
    writer = StoreWriter.open(
        root, StoreSettings(kind=kind, arrays=specs, values=values), provenance={}
    )
    with writer.shard("00000", source="made up") as shard:
        for key, arrays in made.items():
            shard.add(key, arrays, fingerprint=fingerprint_of(key))
        shard.commit()
    return writer.path


def write_fused(tiny, root, dtype="float16", *, native=False, maps=None):
    """Features of two directions fused in Gram-flow space, on the token grid or SAM2's own."""
    maps, grid = maps or tiny.FRAMES, (4, 4) if native else tiny.GRID
    made = {}
    for key in tiny.KEYS:
        digest = hashlib.sha256(f"fused/{key}".encode()).digest()
        numbers = np.random.default_rng(list(digest))
        still, moving = (numbers.standard_normal((2, maps, *grid, 5)) for _ in range(2))
        forward, backward = torch.from_numpy(still[:, :1] + 0.3 * moving)
        fused = fuse_directions(forward, backward, fusion="gram_flow", forward_weight=0.5)
        made[key] = encode_features(fused, dtype) | {"valid": np.ones(maps, np.uint8)}
    valid = ArraySpec(dtype="uint8", shape=(maps,), dimension_names=("t",))
    specs = feature_arrays_spec((maps, *grid, 10), dtype) | {"valid": valid}
    return _write(root, "teacher", specs, made, NATIVE if native else FUSED)


def write_masks(tiny, root):
    """A disc that moves; the last two frames do not see it."""
    shape = (tiny.FRAMES, tiny.HEIGHT // 4, tiny.WIDTH // 4)
    mask = ArraySpec(dtype="uint8", shape=shape, dimension_names=("t", "h", "w"))
    valid = ArraySpec(dtype="uint8", shape=shape[:1], dimension_names=("t",))
    made = {}
    for number, key in enumerate(tiny.KEYS):
        t, y, x = np.mgrid[: shape[0], : shape[1], : shape[2]]
        inside = (y - 4) ** 2 + (x - number - t / 2) ** 2 < 9
        seen = (np.arange(shape[0]) < shape[0] - 2).astype(np.uint8)
        discs = (255 * inside).astype(np.uint8)
        made[key] = {"forward": discs, "backward": discs // 2, "valid": seen}
    specs = {"forward": mask, "backward": mask, "valid": valid}
    return _write(root, "masks", specs, made, {})


@pytest.fixture(scope="module")
def forms(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    for kind, shapes in (("text", {"embeds": tiny.TEXT}), ("latents", tiny.LATENT_SHAPES)):
        tiny.write_store(root, kind, shapes)
    stores = {
        "float16": write_fused(tiny, root),
        "int8": write_fused(tiny, root, "int8"),
        "native": write_fused(tiny, root, native=True),
        "latent": write_fused(tiny, root, maps=3),
    }
    tiny.write_gram_flow(root)
    write_masks(tiny, root)
    return root, {form: path.name for form, path in stores.items()}


@pytest.fixture
def run(train, forms):
    root, names = forms

    def start(run_dir, form="float16", **changes):
        stores = {"teacher": names[form]} if form in names else {}
        if form == "gram_flow":
            changes["teacher_form"] = "gram_flow"
        small = {
            "repa": {"projector_widths": (8, 8)},
            "token_relation": {"projector_widths": (8, 8, 8)},
            "mask": {"projector_widths": (8, 8)},
        }
        settings = {"cache_root": root, "checkpoint_every": 99, "stores": stores} | small
        train(run_dir, **settings | changes)
        return (run_dir / "losses.jsonl").read_text()

    return start


def rows(losses):
    return [json.loads(line) for line in losses.splitlines()]


ALL = ["lgf", "repa", "token-relation", "mask"]
EVERY = {
    "all": ("float16", {"objectives": ALL}),
    "all from bytes": ("int8", {"objectives": ALL}),
    "all from SAM2's grid": ("native", {"objectives": ALL}),
    "all at the latent rate": ("latent", {"objectives": ALL}),
    "VideoREPA's tokens": (
        "float16",
        {
            "objectives": ["token-relation"],
            "token_relation": {
                "downsampler": "learned",
                "skip_first_latent": True,
                "projector_widths": (8, 8, 8),
            },
            "deepspeed": {"zero_stage": 3},
        },
    ),
    "masks alone": ("none", {"objectives": ["mask"]}),
    "forward, foreground": (
        "native",
        {"lgf": {"directions": "forward", "foreground_weight": 4.0}},
    ),
    "averaged": ("int8", {"lgf": {"directions": "averaged", "divergence": "l2"}}),
    "crossed pairs": ("native", {"lgf": {"pairs": "crossed", "foreground_weight": 4.0}}),
    "a Gram flow and masks": (
        "gram_flow",
        {"objectives": ["lgf", "mask"], "lgf": {"foreground_weight": 4.0}},
    ),
    "all in shards": ("float16", {"objectives": ALL, "deepspeed": {"zero_stage": 3}}),
}


@pytest.mark.parametrize(
    "name",
    ["all", *(pytest.param(name, marks=pytest.mark.slow) for name in EVERY if name != "all")],
)
def test_every_combination_trains_and_resumes_to_the_last_bit(run, tmp_path, name):
    form, changes = EVERY[name]
    whole = run(tmp_path / "whole", form, steps=2, **changes)
    run(tmp_path / "parts", form, steps=1, **changes)
    assert run(tmp_path / "parts", form, steps=2, **changes) == whole
    names = changes.get("objectives", ["lgf"])
    for row in rows(whole):
        assert list(row["auxiliary"]) == names
        weights = {"mask": 0.1}
        total = row["diffusion"] + sum(
            weights.get(objective, 0.5) * loss for objective, loss in row["auxiliary"].items()
        )
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert min(row["auxiliary"].values()) > 0
    heads = load_file(tmp_path / "whole" / "heads.safetensors")
    assert {key.split(".")[0] for key in heads} == set(names)


@pytest.mark.parametrize("pairs", ["crossed", pytest.param("both", marks=pytest.mark.slow)])
def test_a_derived_gram_flow_trains_as_its_features_do(tiny, forms, run, tmp_path, pairs):
    root, names = forms
    tiny.write_inputs(tmp_path)
    stored = "crossed" if pairs == "crossed" else "forward"
    derive_gram_flow(
        tmp_path,
        root / names["float16"],
        config=GramFlowConfig(radius=2, pairs=stored),
        token_grid=tiny.GRID,
        device=torch.device("cpu"),
        provenance={},
        progress=SilentProgress(),
    )
    changes = {"steps": 1, "lgf": {"radius": 1, "pairs": pairs, "projector_widths": (8, 8, 8)}}
    (by_features,) = rows(run(tmp_path / "features", **changes))
    (by_flow,) = rows(run(tmp_path / "flow", "gram_flow", cache_root=tmp_path, **changes))
    assert by_flow["auxiliary"]["lgf"] == pytest.approx(by_features["auxiliary"]["lgf"], rel=1e-3)


@pytest.mark.slow
def test_the_weight_follows_its_schedule_and_micro_batches_change_nothing(run, tmp_path):
    changes = {
        "steps": 4,
        "objectives": ["lgf", "mask"],
        "lgf": {"warmup_steps": 2, "schedule": "linear", "final_weight": 0.1},
    }
    apart = rows(run(tmp_path / "apart", **changes))
    together = rows(run(tmp_path / "together", micro_batch_size=2, **changes))
    for row, weight in zip(apart, (0.0, 0.25, 0.5, 0.1), strict=True):
        parts = weight * row["auxiliary"]["lgf"] + 0.1 * row["auxiliary"]["mask"]
        assert row["loss"] - row["diffusion"] == pytest.approx(parts, abs=1e-5)
    for left, right in zip(apart, together, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


def test_a_teacher_that_cannot_serve_is_refused_before_anything_is_loaded(
    run, monkeypatch, tiny, tmp_path
):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("stages.train_student.model.loading.load_transformer", never)
    with pytest.raises(ValueError, match=r"train.objectives=repa cannot"):
        run(tmp_path / "a", "gram_flow", objectives=["repa"])
    with pytest.raises(ValueError, match=r"gram_flow-.* with pairs forward; train.lgf.pairs=cross"):
        run(tmp_path / "a", "gram_flow", lgf={"pairs": "crossed"})
    root = tmp_path / "plain"
    tiny.write_cache(root)
    with pytest.raises(ValueError, match=r"directions=forward needs features fused"):
        run(tmp_path / "b", "none", lgf={"directions": "forward"}, cache_root=root)
    with pytest.raises(Exception, match="masks"):
        run(tmp_path / "c", "none", objectives=["mask"], cache_root=root)
