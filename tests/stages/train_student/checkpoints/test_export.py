"""What is exported, against the weights in memory: the same video, the same numbers."""

import diffusers
import numpy as np
import pytest
import torch

from stages.config import BaseModelConfig
from stages.demo.tiny_cogvideox import build_tiny_cogvideox
from stages.sample_videos.config import SampleConfig
from stages.students.registry import read_configs
from stages.train_student.checkpoints.export import export_checkpoint
from tests.stages.sampling import sample_frames

PROMPT = "a person walks to the right"
QUIET = {"report_to": [], "checkpoint_every": 9}


@pytest.fixture(scope="module")
def whole_base(tiny, tmp_path_factory):
    """A pipeline that can draw, and a cache to train its transformer on."""
    root = tmp_path_factory.mktemp("whole base")
    build_tiny_cogvideox(
        root / "base",
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        num_frames=tiny.FRAMES,
        captions=[PROMPT],
        seed=0,
        num_layers=2,
        num_heads=2,
        head_width=16,
    )
    configs = read_configs(root / "base")
    frames, _, height, width = tiny.LATENT
    text = configs.transformer["max_text_seq_length"], configs.transformer["text_embed_dim"]
    latent = (frames, configs.latent_channels, height, width)
    tiny.write_store(root / "cache", "text", {"embeds": text})
    tiny.write_store(root / "cache", "latents", {"mean": latent, "std": latent})
    tiny.write_store(root / "cache", "teacher", tiny.teacher_shapes())
    return root


@pytest.fixture
def train_and_draw(whole_base, train, tiny, monkeypatch):
    """Train, and draw with the transformer as it is in memory when it is exported."""
    import stages.train_student.train as module

    def run(run_dir, precision="fp32", **changes):
        drawn = []
        export = module.export_weights

        def draw_then_export(student, *rest, **options):
            drawn.append(draw_by_hand(whole_base / "base", student.transformer, precision, tiny))
            return export(student, *rest, **options)

        with monkeypatch.context() as patches:
            patches.setattr(module, "export_weights", draw_then_export)
            train(
                run_dir,
                base=whole_base / "base",
                cache_root=whole_base / "cache",
                deepspeed={"precision": precision} | changes.pop("deepspeed", {}),
                **{"steps": 2} | QUIET | changes,
            )
        return drawn[0]

    return run


def draw_by_hand(base, transformer, precision, tiny):
    """With diffusers' pipeline around a transformer in memory; base weights with None."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    parts = {} if transformer is None else {"transformer": transformer}
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(base, torch_dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    video_THWC = pipeline(
        prompt=PROMPT,
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        num_frames=tiny.FRAMES,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).frames[0]
    return (video_THWC * 255).round().clip(0, 255).astype(np.uint8)


@pytest.fixture
def draw(whole_base, tiny):
    """As `sample` draws, in a fresh pipeline; the frames before H.264."""

    def run(run_dir, precision="fp32"):
        return sample_frames(
            SampleConfig(steps=2, guidance=3.0, seed=7, precision=precision, device="cpu"),
            BaseModelConfig(path=str(whole_base / "base")),
            tiny.CLIPS,
            run_dir=run_dir,
            prompt=PROMPT,
        )

    return run


SLOW = pytest.mark.slow
KINDS = {
    "lora": {},
    "dora": {"lora": {"dora": True}},
    "rslora": {"lora": {"rank_stabilized": True}},
    "full": {"method": "full"},
    "zero 3, dora and rslora": {
        "lora": {"dora": True, "rank_stabilized": True},
        "deepspeed": {"zero_stage": 3},
    },
    "zero 3, full": {"method": "full", "deepspeed": {"zero_stage": 3}},
    "bf16, lora": {"precision": "bf16"},
    "bf16, full": {"precision": "bf16", "method": "full"},
    "bf16, zero 3, dora": {
        "precision": "bf16",
        "lora": {"dora": True},
        "deepspeed": {"zero_stage": 3},
    },
}
DEFAULT = ("lora", "dora", "full")
STRONG = {"optimizer": {"learning_rate": 0.3, "warmup_steps": 0}}
"""Adapters of a random transformer need this to be seen in its videos."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in DEFAULT else SLOW) for kind in KINDS]
)
def test_the_export_draws_the_video_of_the_weights_in_memory(
    whole_base, train_and_draw, draw, tiny, tmp_path, kind
):
    """Also from a checkpoint, and after a resume."""
    run, changes = tmp_path / "run", ({} if "full" in kind else STRONG) | KINDS[kind]
    precision = changes.get("precision", "fp32")
    in_memory = train_and_draw(run, **changes)
    exported = draw(run, precision)
    assert np.ptp(in_memory) > 20, "the video shows something"
    untouched = draw_by_hand(whole_base / "base", None, precision, tiny)
    assert np.abs(untouched.astype(int) - in_memory).max() > 3, "training changes the video"
    # DeepSpeed's linear layers of ZeRO 3 round differently.
    most = 1 if "zero 3" in kind and precision == "fp32" else 0
    if "zero 3" in kind and precision == "bf16":
        most = 16
    assert np.abs(exported.astype(int) - in_memory).max() <= most
    summary = export_checkpoint(run, None, tmp_path / "again")
    assert (summary.step, summary.weights) == (2, "last")
    assert (draw(tmp_path / "again", precision) == exported).all()
    if kind in ("rslora", "zero 3, full"):
        resumed = train_and_draw(run, **changes | {"steps": 3})
        assert np.abs(draw(run, precision).astype(int) - resumed).max() <= most
        assert (resumed != in_memory).any()


def test_the_exported_lora_reproduces_the_trained_transformer(tiny, train, monkeypatch, tmp_path):
    trained = _output_at_the_end(tiny, train, monkeypatch, tmp_path, method="lora")
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny.tiny_vae(),
        transformer=tiny.tiny_transformer(),
        scheduler=tiny.tiny_scheduler(),
    )
    before = _output(tiny, pipeline.transformer)
    pipeline.load_lora_weights(str(tmp_path / "export"))
    assert (before - trained).abs().max() > 1e-3
    torch.testing.assert_close(_output(tiny, pipeline.transformer), trained)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_the_exported_transformer_is_the_trained_one(
    tiny, train, monkeypatch, tmp_path, zero_stage
):
    trained = _output_at_the_end(
        tiny,
        train,
        monkeypatch,
        tmp_path,
        method="full",
        deepspeed={"zero_stage": zero_stage},
        gradient_checkpointing=False,
    )
    loaded = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "export", subfolder="transformer"
    )
    torch.testing.assert_close(_output(tiny, loaded), trained)


def _output_at_the_end(tiny, train, monkeypatch, run_dir, **changes):
    """What the student's transformer says when the run exports it."""
    import stages.train_student.train as module

    outputs = []
    export = module.export_weights

    def export_and_look(student, *rest, **named):
        outputs.append(_output(tiny, student.transformer))
        return export(student, *rest, **named)

    monkeypatch.setattr(module, "export_weights", export_and_look)
    train(run_dir, steps=3, **changes)
    return outputs[0]


def _output(tiny, transformer):
    generator = torch.Generator().manual_seed(5)
    frames, channels, height, width = tiny.LATENT
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, frames, channels, height, width, generator=generator),
            encoder_hidden_states=torch.randn(1, *tiny.TEXT, generator=generator),
            timestep=torch.tensor([250]),
            image_rotary_emb=(torch.ones(18, 16), torch.zeros(18, 16)),
            return_dict=False,
        )[0]
