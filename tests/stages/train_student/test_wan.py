"""A tiny Wan through the whole road: a cache shared with CogVideoX, training, export, a video."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from stages.config import BaseModelConfig
from stages.demo.tiny_wan import build_tiny_wan
from stages.probe_blocks.blockwise import BlockwiseTransformer
from stages.sample_videos.config import SampleConfig
from stages.sample_videos.runs import LORA_FILES
from stages.students.registry import read_configs
from stages.train_student.checkpoints.export import export_checkpoint
from stages.train_student.config import TrainConfig
from stages.train_student.model.loading import build_student
from stages.train_student.parallel.deepspeed import deepspeed_engine, describe_rounding
from stages.train_student.parallel.process_group import process_group, world_from_environment
from stages.train_student.step import StudentInputs
from tests.stages.sampling import SAMPLING, plain_video, sample_frames

PROMPT = "an ellipse drifts"
SETTINGS = {
    "steps": 2,
    "report_to": [],
    "optimizer": {"learning_rate": 0.1, "warmup_steps": 0},
    "validation": {"clips": 2, "timesteps": [500]},
    "samples": {"prompts": [PROMPT], "steps": 2, "guidance": 3.0, "every": 9, "scores": []},
}


@pytest.fixture(scope="module")
def wan_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "base"
    build_tiny_wan(folder, captions=[PROMPT], seed=0)
    return folder


@pytest.fixture(scope="module")
def both_cache(tiny, wan_base, tmp_path_factory):
    """One cache: text and latents of CogVideoX and of Wan, and one teacher."""
    root = tiny.write_cache(tmp_path_factory.mktemp("both"))
    configs = read_configs(wan_base)
    text = {"base": configs.text_settings()}
    tiny.write_store(root, "text", {"embeds": configs.text_shape}, values=text)
    latents = {"base": configs.latents_settings()}
    tiny.write_store(root, "latents", tiny.LATENT_SHAPES, values=latents)
    return root


@pytest.fixture(scope="module")
def wan_run(train, wan_base, both_cache, tmp_path_factory):
    """A run, and its transformer as it is in memory when it is exported."""
    import stages.train_student.train as module

    run_dir = tmp_path_factory.mktemp("runs") / "wan"
    found = {}
    export = module.export_weights

    def predict_then_export(student, *rest, **options):
        found["prediction"] = predict(student.transformer)
        return export(student, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "export_weights", predict_then_export)
        summary = train(run_dir, base=wan_base, cache_root=both_cache, **SETTINGS)
    return SimpleNamespace(run_dir=run_dir, summary=summary, **found)


def predict(transformer):
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 4, 3, 4, 6, generator=numbers),
            timestep=torch.tensor([637.5]),
            encoder_hidden_states=torch.randn(1, 512, 16, generator=numbers),
            return_dict=False,
        )[0]


def test_one_cache_teaches_both_students(tiny, train, wan_run, both_cache, tmp_path):
    """Each reads its own text and latents, and both the one teacher."""
    train(tmp_path / "cogvideox", cache_root=both_cache, steps=1, report_to=[])
    stores = {}
    for name, run_dir in (("wan", wan_run.run_dir), ("cogvideox", tmp_path / "cogvideox")):
        record = json.loads((run_dir / "run.json").read_text())
        stores[name] = {kind: store["folder"] for kind, store in record["stores"].items()}
    wan, cogvideox = stores["wan"], stores["cogvideox"]
    assert wan["teacher"] == cogvideox["teacher"]
    assert wan["text"] != cogvideox["text"] and wan["latents"] != cogvideox["latents"]
    assert wan_run.summary.last.auxiliary["lgf"] > 0
    assert np.isfinite(wan_run.summary.last.diffusion)


def test_validation_and_samples_are_made(wan_run):
    (losses,) = wan_run.run_dir.glob("validation*.jsonl")
    assert losses.read_text().count("\n") >= 2
    assert len(list(wan_run.run_dir.glob("samples/step-*/0.mp4"))) == 2


def test_plain_diffusers_loads_the_adapters(wan_run, wan_base, tmp_path):
    """Its own key format and ComfyUI's; each gives the prediction of the transformer in memory."""
    base = predict(WanTransformer3DModel.from_pretrained(wan_base / "transformer"))
    assert not torch.allclose(wan_run.prediction, base, atol=1e-3)
    for_comfyui = export_checkpoint(wan_run.run_dir, 2, tmp_path / "other", form="comfyui").folder
    for weights in (wan_run.run_dir / "export", load_file(for_comfyui / LORA_FILES["comfyui"])):
        pipeline = WanPipeline.from_pretrained(wan_base, text_encoder=None, vae=None)
        pipeline.load_lora_weights(weights)
        found = predict(pipeline.transformer)
        torch.testing.assert_close(found, wan_run.prediction, rtol=1e-4, atol=1e-5)


def test_a_video_is_plain_diffusers_with_the_adapters(tiny, wan_run, wan_base):
    model = BaseModelConfig(path=str(wan_base))
    frames_THWC = sample_frames(SAMPLING, model, tiny.CLIPS, run_dir=wan_run.run_dir)
    pipeline = WanPipeline.from_pretrained(wan_base)
    pipeline.load_lora_weights(wan_run.run_dir / "export")
    assert frames_THWC.shape == (tiny.FRAMES, tiny.HEIGHT, tiny.WIDTH, 3)
    assert np.array_equal(frames_THWC, plain_video(pipeline, tiny))


def test_image_to_video_trains_and_samples_as_plain_diffusers(tiny, train, tmp_path):
    base, cache = tmp_path / "base", tmp_path / "cache"
    build_tiny_wan(base, captions=[PROMPT], seed=0, image_to_video=True)
    configs = read_configs(base)
    text = {"base": configs.text_settings()}
    tiny.write_store(cache, "text", {"embeds": configs.text_shape}, values=text)
    of_image = configs.first_frame_arrays(tiny.CLIPS, draws=1)
    shapes = tiny.LATENT_SHAPES | {name: spec.shape for name, spec in of_image.items()}
    latents = {"base": configs.latents_settings()}
    tiny.write_store(cache, "latents", shapes, values=latents)
    settings = SETTINGS | {"objectives": [], "steps": 1, "validation": {}, "samples": {}}
    summary = train(tmp_path / "run", base=base, cache_root=cache, **settings)
    assert np.isfinite(summary.last.diffusion)
    image = tmp_path / "first.png"
    pixels = np.random.default_rng(0).integers(0, 256, (tiny.HEIGHT, tiny.WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    run_dir, model = tmp_path / "run", BaseModelConfig(path=str(base))
    frames_THWC = sample_frames(SAMPLING, model, tiny.CLIPS, run_dir=run_dir, image=image)
    pipeline = WanImageToVideoPipeline.from_pretrained(base)
    untrained_THWC = plain_video(pipeline, tiny, image=Image.open(image))
    pipeline.load_lora_weights(run_dir / "export")
    assert np.array_equal(frames_THWC, plain_video(pipeline, tiny, image=Image.open(image)))
    assert not np.array_equal(frames_THWC, untrained_THWC)


def test_the_probe_passes_its_blocks_one_by_one(wan_base):
    numbers = torch.Generator().manual_seed(0)
    configs = read_configs(wan_base)
    inputs = StudentInputs(
        transformer=configs.transformer_inputs(
            torch.randn(1, 3, 4, 4, 6, generator=numbers),
            torch.randn(1, 512, 16, generator=numbers),
            torch.tensor([637.5]),
        ),
        token_grid=configs.token_grid(3, 4, 6),
        time_weights={},
    )
    whole = WanTransformer3DModel.from_pretrained(wan_base / "transformer").eval()
    expected = []
    for block in whole.blocks:
        block.register_forward_hook(lambda module, given, output: expected.append(output))
    with torch.no_grad():
        whole(**inputs.transformer)
    blockwise = BlockwiseTransformer(wan_base, torch.float32, torch.device("cpu"))
    state = blockwise.embed(inputs)
    for number, tokens_BND in enumerate(expected):
        with blockwise.block(number) as block:
            blockwise.advance(block, state)
        assert torch.equal(state.tokens_BND, tokens_BND)


def test_time_and_modulation_stay_in_float32_under_bf16(tiny, wan_base, tmp_path):
    """The engine casts all weights; those that diffusers keeps in float32 keep their values."""
    settings = tiny.train_settings(tmp_path, objectives=[], deepspeed={"precision": "bf16"})
    config = TrainConfig(**settings | {"batch_size": 1})
    world = world_from_environment()
    configs = read_configs(wan_base)
    student = build_student(config, configs, torch.bfloat16, heads=lambda: None, world=world)
    assert describe_rounding(student, config) is None
    zero3 = config.deepspeed.model_copy(update={"zero_stage": 3})
    rounded = describe_rounding(student, config.model_copy(update={"deepspeed": zero3}))
    assert "time_embedder" in rounded
    stored = load_file(wan_base / "transformer" / "diffusion_pytorch_model.safetensors")
    with process_group(world), deepspeed_engine(student, config, world):
        kept = {
            name: value
            for name, value in student.transformer.named_parameters()
            if value.dtype == torch.float32
        }
        assert {name.split(".")[-1] for name in kept} >= {"scale_shift_table"}
        assert "condition_embedder.time_embedder.linear_1.weight" in kept
        assert all(torch.equal(value, stored[name]) for name, value in kept.items())
        others = student.transformer.blocks[0].attn1.to_q.base_layer.weight
        assert others.dtype == torch.bfloat16


def test_stores_of_another_family_are_refused(tiny, train, wan_base, tmp_path):
    """A cache whose latents are CogVideoX's, of the same shape; and so for its text."""
    configs = read_configs(wan_base)
    for kind, shapes, told in (
        ("text", {"embeds": configs.text_shape}, "a text encoder of another class than UMT5"),
        ("latents", tiny.LATENT_SHAPES, "a VAE of another class than AutoencoderKLWan"),
    ):
        root = tmp_path / kind
        for other, other_shapes, base in (
            ("text", {"embeds": configs.text_shape}, configs.text_settings()),
            ("latents", tiny.LATENT_SHAPES, configs.latents_settings()),
        ):
            if other != kind:
                tiny.write_store(root, other, other_shapes, values={"base": base})
        tiny.write_store(root, kind, shapes)
        with pytest.raises(ValueError, match=f"{kind}-.* was made with {told}"):
            train(tmp_path / "run", base=wan_base, cache_root=root, steps=1, objectives=[])


def test_latents_of_wan_are_refused_by_cogvideox(tiny, train, wan_base, tmp_path):
    base = read_configs(wan_base).latents_settings()
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT})
    tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES, values={"base": base})
    with pytest.raises(ValueError, match="class AutoencoderKLWan; the base model's is"):
        train(tmp_path / "run", cache_root=tmp_path, steps=1, objectives=[])


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("model_index.json", {"_class_name": "LTXPipeline"}, "CogVideoXPipeline.*WanPipeline"),
        ("model_index.json", {"expand_timesteps": True}, "TI2V-5B.* not supported yet"),
        ("vae/config.json", {"scale_factor_spatial": 16, "patch_size": 2}, "not yet the 16x VAE"),
        ("transformer/config.json", {"in_channels": 9}, "has 9 input and 4 output channels"),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "a first and a last frame"),
        ("transformer/config.json", {"patch_size": [2, 2, 2]}, r"patches of \[2, 2, 2\]"),
    ],
)
def test_models_that_are_not_supported_are_named(wan_base, tmp_path, part, changes, told):
    names = ("model_index.json", "vae/config.json", "transformer/config.json", "scheduler")
    for name in names:
        copy = shutil.copytree if name == "scheduler" else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(wan_base / name, tmp_path / name)
    file = tmp_path / part
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=told):
        read_configs(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scheduler": "ddim"}, "sample.scheduler=model"),
        ({"dynamic_cfg": True}, "sample.dynamic_cfg is for CogVideoX"),
    ],
)
def test_settings_of_cogvideox_are_refused(tiny, wan_base, changes, told):
    with pytest.raises(ValueError, match=told):
        sample_frames(
            SampleConfig(steps=1, precision="fp32", device="cpu", **changes),
            BaseModelConfig(path=str(wan_base)),
            tiny.CLIPS,
        )
