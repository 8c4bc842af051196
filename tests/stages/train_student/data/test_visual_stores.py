"""Visual stores: found, checked against the model and the clips, and read for their losses."""

import pytest
import torch

from cache_schema import StoreNotFound
from stages.local_gram_flow import time_weights
from stages.students.registry import read_configs
from stages.train_student.config import TrainConfig
from stages.train_student.data.checks import check_stores
from stages.train_student.data.dataset import CachedSamples, join_batches
from stages.train_student.data.stores import join_buckets
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.objectives.build import build_heads, build_objectives, kinds_needed
from stages.train_student.step import TrainingStep
from tests.stages.train_student.data.joined import join_stores

TUBELETS = {"time_rate": "tubelet", "frames_per_map": 2, "grid_source": "native"}
FRAMES = {"time_rate": "frame", "frames_per_map": None, "grid_source": "student"}
KINDS = ("teacher", "visual")


def write_visual(tiny, root, *, maps=9, grid=(2, 3), values=FRAMES, **cut):
    clips = {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0} | cut
    shapes = {"features": (maps, *grid, 7), "valid": (maps,)}
    return tiny.write_store(root, "visual", shapes, values={"clips": clips, **values})


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """Text, latents and SAM2's features; tests add the visual store in a folder of their own."""
    root = tmp_path_factory.mktemp("inputs")
    clips = {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0}
    tiny.write_store(root, "text", {"embeds": tiny.TEXT})
    tiny.write_store(root, "latents", tiny.LATENT_SHAPES, values={"clips": clips})
    tiny.write_store(root, "teacher", tiny.teacher_shapes(), values={"clips": clips})
    return root


@pytest.fixture
def cache(inputs, tmp_path):
    for store in inputs.iterdir():
        (tmp_path / store.name).symlink_to(store)
    return tmp_path


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ({}, None),
        ({"maps": 3, "values": FRAMES | {"time_rate": "latent"}}, None),
        ({"maps": 4, "grid": (5, 5), "values": TUBELETS}, None),
        ({"grid": (3, 3)}, r"on a grid of \(3, 3\) tokens; .*train\.stores\.visual"),
        ({"maps": 8}, r"holds 8 maps per clip; clips of 9 frames"),
        ({"maps": 3, "values": TUBELETS}, r"3 maps of 2 frames .* not cover the 8 frames after"),
        ({"fps": 16.0}, r"'fps': 16\.0.*training needs both from the same frames"),
    ],
)
def test_a_store_for_another_grid_or_rate_is_refused(stored, told, tiny, cache, base_model):
    write_visual(tiny, cache, **stored)
    stores, configs = join_stores(cache, kinds=KINDS), read_configs(base_model)
    if told is None:
        check_stores(stores, configs, tiny.CLIPS, radius=1)
        return
    with pytest.raises(ValueError, match=told):
        check_stores(stores, configs, tiny.CLIPS, radius=1)


def test_a_missing_store_says_how_to_make_one(cache):
    with pytest.raises(StoreNotFound, match=r"no visual store .*extract\.visual\.checkpoint"):
        join_stores(cache, kinds=KINDS)


def test_all_sizes_need_the_same_encoder(tiny, tmp_path):
    sizes = tiny.CLIPS.model_copy(update={"buckets": ("9x32x48", "9x48x32")}).sizes
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT})
    for size, checkpoint in zip(sizes, "ab", strict=True):
        cut = {"num_frames": 9, "height": size.height, "width": size.width, "fps": 8.0}
        latents = dict.fromkeys(("mean", "std"), (3, 4, *size.latent_size))
        tiny.write_store(tmp_path, "latents", latents, values={"clips": cut})
        values = FRAMES | {"checkpoint_sha256": checkpoint}
        write_visual(tiny, tmp_path, grid=size.token_grid, values=values, **cut)
    with pytest.raises(ValueError, match=r"checkpoint_sha256 'b'.* has 'a'; all sizes"):
        join_buckets(tmp_path, sizes, {}, kinds=("visual",))


def test_each_loss_gets_the_teacher_that_it_names(tiny, cache, base_model):
    """lgf SAM2's maps of frames, repa the encoder's of tubelets, in one step."""
    store = write_visual(tiny, cache, maps=4, grid=(4, 6), values=TUBELETS)
    config = TrainConfig(
        objectives=["lgf", "repa"],
        lgf={"radius": 1, "projector_widths": (8, 8, 8)},
        repa={"teacher": "visual", "projector": "mlp", "projector_widths": (8, 8)},
    )
    assert kinds_needed(config) == KINDS
    stores, configs = join_stores(cache, kinds=KINDS), read_configs(base_model)
    samples = CachedSamples([stores], configs, seed=0, batch_size=2)
    batch = join_batches([samples[0], samples[1]])
    layout = TeacherLayout.of(stores.visual.settings)
    assert layout == TeacherLayout(native=True, visual=True, frames_per_map=2)
    assert stores.visual.path == store and batch.visual["features"].shape == (2, 4, 4, 6, 7)
    step = TrainingStep(
        configs,
        build_objectives(config),
        visual_layout=layout,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    weights = step.inputs(batch).time_weights
    assert torch.equal(weights["lgf"], time_weights(9, 9))
    assert torch.equal(weights["repa"], time_weights(4, 9, frames_per_map=2))
    torch.manual_seed(0)
    heads = build_heads(config, configs, stores.teacher.settings, visual=stores.visual.settings)
    tokens = torch.randn(2, 3, 2, 3, 32)
    features = {name: head(tokens, weights[name]) for name, head in heads.items()}
    losses = step(lambda inputs, *_: (inputs["hidden_states"], features), batch, 0)
    target = torch.nn.functional.interpolate(
        batch.visual["features"].float().flatten(0, 1).permute(0, 3, 1, 2),
        (2, 3),
        mode="bilinear",
        antialias=True,
    )
    target = target.permute(0, 2, 3, 1).unflatten(0, (2, 4))
    similarity = torch.cosine_similarity(features["repa"], target, dim=-1)
    torch.testing.assert_close(
        losses.auxiliary_B["repa"], (1 - similarity).mean((1, 2, 3)).detach()
    )
    (lgf,) = build_objectives(config.model_copy(update={"objectives": ("lgf",)}))
    torch.testing.assert_close(
        losses.auxiliary_B["lgf"], lgf(features["lgf"], step.teacher(batch)).detach()
    )
    assert losses.total.isfinite()
