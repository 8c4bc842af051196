"""What extraction and training make of Wan's inputs, against diffusers' pipelines."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import CLIPVisionModel

from stages.clips import ClipsConfig
from stages.students.latents import encode_posterior
from stages.students.registry import read_configs
from stages.students.wan.first_frames import ImageEncoder
from stages.students.weights import load_tokenizer
from stages.train_student.data.dataset import Batch
from stages.train_student.model.student import Student
from stages.train_student.step import TrainingStep

CPU = torch.device("cpu")
FRAMES, HEIGHT, WIDTH = 9, 32, 48
LATENT = (3, 4, 4, 6)  # frames, channels, height, width
LAST = 999  # there sigma is 1, so that the noisy latents are the noise
CAPTION = "  an ellipse &amp; a texture\n\n drifts   over grey "


@pytest.fixture(scope="module")
def pipelines(wan_bases):
    made = {}
    for name, folder in wan_bases.items():
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        # Its only step is at pure noise, as training's last timestep.
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline.set_progress_bar_config(disable=True)
        made[name] = pipeline
    return made


@pytest.fixture
def pipeline(wan_configs, pipelines):
    return pipelines[wan_configs.folder.name]


def picture():
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels_of(image):
    """The clip whose first frame is the image; what follows must not matter."""
    clip_BCTHW = torch.randn(1, 3, FRAMES, HEIGHT, WIDTH)
    values_HWC = torch.from_numpy(np.asarray(image).copy()).float()
    clip_BCTHW[0, :, 0] = (values_HWC / 255 * 2 - 1).permute(2, 0, 1)
    return clip_BCTHW


def call(pipeline, **inputs):
    """The keyword arguments and the output of the transformer in the pipeline's only step."""
    seen = []

    def keep(module, args, kwargs, output):
        seen.append((kwargs, output[0]))

    hook = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    pipeline(
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        guidance_scale=1.0,
        num_inference_steps=1,
        output_type="latent",
        **inputs,
    )
    hook.remove()
    (found,) = seen
    return found


def test_a_caption_is_encoded_as_the_pipeline_encodes_it(wan_configs, pipeline):
    tokenizer = load_tokenizer(wan_configs.folder)
    with torch.no_grad():
        embeds_LD, tokens = wan_configs.embed_caption(tokenizer, pipeline.text_encoder, CAPTION)
        expected, _ = pipeline.encode_prompt(
            CAPTION, do_classifier_free_guidance=False, max_sequence_length=512
        )
    assert torch.equal(embeds_LD, expected[0])
    assert embeds_LD.shape == wan_configs.text_shape
    assert 0 < tokens < 512 and not embeds_LD[tokens:].any() and embeds_LD[:tokens].any()


def test_prediction_equals_the_pipelines_own_transformer_call(wan_configs, pipeline):
    channels = LATENT[1]
    text_BLD = torch.randn(1, *wan_configs.text_shape)
    noise_BFCHW = torch.randn(1, *LATENT)
    arguments = {"image": picture()} if wan_configs.image_to_video else {}
    kwargs, expected = call(
        pipeline, prompt_embeds=text_BLD, latents=noise_BFCHW.transpose(1, 2), **arguments
    )
    image_BFCHW = kwargs["hidden_states"][:, channels:].transpose(1, 2)
    found = []

    def student(*inputs):
        output, features = Student(pipeline.transformer)(*inputs)
        found.append(output)
        return output, features

    batch = Batch(
        keys=("a",),
        clean_BFCHW=torch.randn_like(noise_BFCHW),
        noise_BFCHW=noise_BFCHW,
        timestep_B=torch.tensor([LAST]),
        text_BLD=text_BLD,
        image_BFCHW=image_BFCHW if wan_configs.image_to_video else None,
        image_BLD=kwargs.get("encoder_hidden_states_image"),
        teacher=None,
        teacher_valid_BT=None,
        num_frames=FRAMES,
    )
    step = TrainingStep(wan_configs, (), device=CPU, dtype=torch.float32)
    with torch.no_grad():
        losses = step(student, batch, 0)
    assert torch.equal(found[0], expected)
    target = noise_BFCHW - batch.clean_BFCHW
    by_hand = (expected.transpose(1, 2) - target).square().mean()
    torch.testing.assert_close(losses.total, by_hand)


def test_the_first_frame_is_given_as_the_pipeline_gives_it(wan_bases, pipelines):
    configs, pipeline = read_configs(wan_bases["i2v"]), pipelines["i2v"]
    text_BLD, noise = torch.randn(1, *configs.text_shape), torch.randn(1, *LATENT)
    kwargs, _ = call(
        pipeline, prompt_embeds=text_BLD, latents=noise.transpose(1, 2), image=picture()
    )
    clips = ClipsConfig(path=".", num_frames=FRAMES, height=HEIGHT, width=WIDTH)
    encode = configs.first_frame_encoder(pipeline.vae, CPU, seed=0, draws=1)
    with torch.no_grad():
        stored = encode(pixels_of(picture()), "key")
    specs = configs.first_frame_arrays(clips, draws=1)
    assert {name: array.shape for name, array in stored.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    tensors = {name: torch.from_numpy(array) for name, array in stored.items()}
    channels_FCHW, embeds_LD = configs.condition(tensors, LATENT[0], torch.Generator())
    expected = kwargs["hidden_states"][:, LATENT[1] :].transpose(1, 2)[0]
    # Stored in float16.
    torch.testing.assert_close(channels_FCHW, expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(channels_FCHW[:, :4], expected[:, :4])
    clip = kwargs["encoder_hidden_states_image"][0]
    torch.testing.assert_close(embeds_LD.float(), clip, rtol=2e-3, atol=2e-3)


def test_a_missing_image_processor_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"image_processor/preprocessor_config\.json is missing"):
        ImageEncoder(tmp_path, CLIPVisionModel, CPU)


def test_latents_are_normalised_as_the_pipeline_decodes_them(wan_configs, pipeline):
    """WanPipeline decodes latents * std + mean."""
    with torch.no_grad():
        mean, _ = encode_posterior(pipeline.vae, torch.rand(1, 3, FRAMES, HEIGHT, WIDTH))
    mean_FCHW = torch.from_numpy(mean).float()
    assert mean_FCHW.shape == LATENT
    config = pipeline.vae.config
    scaled_FCHW = wan_configs.scale_latents(mean_FCHW)
    for channel, (offset, std) in enumerate(
        zip(config.latents_mean, config.latents_std, strict=True)
    ):
        back = scaled_FCHW[:, channel] * std + offset
        torch.testing.assert_close(back, mean_FCHW[:, channel])
