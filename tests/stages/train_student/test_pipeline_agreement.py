"""What training feeds the transformer, against what the diffusers pipelines feed it."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from stages.students.cogvideox.inputs import image_condition, pad_in_front
from stages.students.registry import read_configs
from stages.train_student.data.dataset import Batch
from stages.train_student.model.student import Student
from stages.train_student.step import TrainingStep

LAST = 999  # there abar is 0, so that the noisy latents are the noise

KINDS = {
    "1.0 rotary": {},
    "1.0 sin-cos": {"use_rotary_positional_embeddings": False},
    "1.0 of another size": {"sample_height": 8, "sample_width": 8, "sample_frames": 17},
    "1.0 image": {"in_channels": 8, "use_learned_positional_embeddings": True},
    "1.5": {"patch_size_t": 2, "patch_bias": False},
    "1.5 image": {"patch_size_t": 2, "patch_bias": False, "in_channels": 8, "ofs_embed_dim": 16},
}


@pytest.fixture(params=KINDS, ids=lambda name: name.replace(" ", "-"))
def pipeline(request, tiny):
    transformer = tiny.tiny_transformer(**KINDS[request.param]).eval()
    kind = CogVideoXImageToVideoPipeline if "image" in request.param else CogVideoXPipeline
    made = kind(
        tokenizer=None,
        text_encoder=None,
        vae=tiny.tiny_vae(invert_scale_latents="1.5" in request.param),
        transformer=transformer,
        scheduler=tiny.tiny_scheduler(),
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_prediction_equals_the_pipelines_own_transformer_call(pipeline, tiny, tmp_path):
    configs = read_configs(
        tiny.save_pipeline(tmp_path, transformer=pipeline.transformer, vae=pipeline.vae)
    )
    frames, channels, height, width = tiny.LATENT
    text_BLD = torch.randn(1, *tiny.TEXT)
    padded = frames + configs.padding(frames)
    noise_BFCHW = torch.randn(1, padded, channels, height, width)
    image_1CHW = torch.randn(1, channels, height, width)
    arguments = {}
    if configs.image_to_video:
        pipeline.vae.encode = lambda image: SimpleNamespace(latents=image_1CHW[:, :, None])
        arguments["image"] = Image.new("RGB", (tiny.WIDTH, tiny.HEIGHT))
    seen = []
    pipeline.transformer.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    pipeline(
        prompt_embeds=text_BLD,
        negative_prompt_embeds=text_BLD,
        latents=noise_BFCHW,
        num_frames=tiny.FRAMES,
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        guidance_scale=1.0,
        num_inference_steps=1,
        output_type="latent",
        **arguments,
    )
    velocities = []

    def student(*inputs):
        velocities.append(Student(pipeline.transformer)(*inputs)[0])
        return velocities[-1], {}

    step = TrainingStep(
        configs,
        (),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    image_FCHW = image_condition(configs.image_latent_scale * image_1CHW, padded)
    batch = Batch(
        keys=("a",),
        clean_BFCHW=torch.randn_like(noise_BFCHW),
        noise_BFCHW=noise_BFCHW,
        timestep_B=torch.tensor([LAST]),
        text_BLD=text_BLD,
        image_BFCHW=image_FCHW[None] if configs.image_to_video else None,
        teacher=None,
        teacher_valid_BT=None,
        num_frames=tiny.FRAMES,
    )
    with torch.no_grad():
        step(student, batch, 0)
    assert len(seen) == 2
    torch.testing.assert_close(velocities[0], seen[0], rtol=0, atol=0)


def test_padding_repeats_the_first_frame_in_front():
    latents_FCHW = torch.arange(3.0).view(3, 1, 1, 1)
    assert pad_in_front(latents_FCHW, 0).flatten().tolist() == [0, 1, 2]
    assert pad_in_front(latents_FCHW, 1).flatten().tolist() == [0, 0, 1, 2]


def test_image_condition_is_zero_after_the_first_frame():
    condition = image_condition(torch.ones(1, 2, 3, 4), 5)
    assert condition.shape == (5, 2, 3, 4)
    assert condition[0].min() == 1
    assert condition[1:].abs().max() == 0


def test_facts_come_from_the_configuration_files_and_the_classes_defaults(tiny, tmp_path):
    folder = tiny.save_pipeline(tmp_path, vae=tiny.tiny_vae(scaling_factor=1.15258426))
    file = folder / "vae" / "config.json"
    file.write_text(file.read_text().replace('"invert_scale_latents": false,', ""))
    configs = read_configs(folder)
    assert configs.latent_scale == configs.image_latent_scale == 1.15258426
    assert not configs.image_to_video
    assert configs.padding(3) == 0
    assert configs.token_grid(3, 4, 6) == (3, 2, 3)


def test_a_folder_without_a_scheduler_is_refused(tiny, tmp_path):
    folder = tiny.save_pipeline(tmp_path)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"scheduler_config.json is missing"):
        read_configs(folder)


def test_another_model_is_refused(tiny, tmp_path):
    folder = tiny.save_pipeline(tmp_path)
    (folder / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with pytest.raises(ValueError, match="describes a WanTransformer3DModel"):
        read_configs(folder)
