"""Time and memory of each frozen model on one clip, against the estimate of `--dry-run`.

    python tests/benchmarks/frozen_models.py --part decode --tiling

Parts: the text encoder on a caption, the VAE's encoder on a clip, SAM2 over a clip in both
directions, and the VAE's decoder on a clip's latents, which no dry run estimates. Weights are
random, of the official shapes. Memory is what the GPU's tensors hold; without one, resident memory,
which the estimate of activations does not describe.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from report import (
    finish,
    held_bytes,
    machine,
    median_and_spread,
    now,
    peak_bytes,
    reset_peak,
    table,
)
from sam2_sides import HEIGHT, WIDTH, Ours, make_frames, random_checkpoint
from step_overhead import add_model_options, facts_of, size_of
from transformers import T5Config, T5EncoderModel

from stages.clips import ClipsConfig
from stages.dry_run.extract_costs import ModelCost, latents_cost, text_cost, tracker_cost
from stages.extract_features.config import LatentsConfig, TeacherConfig, TextConfig
from stages.local_gram_flow import resample_to_grid
from stages.precision import DTYPES
from stages.students.cogvideox.configs import CogVideoXConfigs

Made = tuple[Callable[[], object], Any]
"""What runs the model once, and the model."""


def text(options: argparse.Namespace, configs: CogVideoXConfigs, _: Path) -> Made:
    """The text encoder on a padded caption."""
    assert configs.text_encoder is not None
    with torch.device(options.device):
        encoder = T5EncoderModel(T5Config.from_dict(configs.text_encoder))
        length = int(configs.transformer["max_text_seq_length"])
        tokens_1L = torch.ones(1, length, dtype=torch.long)
    encoder = encoder.to(DTYPES[options.precision]).eval()
    return lambda: encoder(tokens_1L)[0], encoder


def _vae(options: argparse.Namespace, configs: CogVideoXConfigs) -> Any:
    with torch.device(options.device):
        vae = AutoencoderKLCogVideoX.from_config(dict(configs.vae))
    # Not diffusers' own `to`, which warns about float32 modules that this model does not have.
    torch.nn.Module.to(vae, DTYPES[options.precision]).eval()
    if options.tiling:
        vae.enable_slicing()
        vae.enable_tiling()
    return vae


def latents(options: argparse.Namespace, configs: CogVideoXConfigs, _: Path) -> Made:
    """The VAE's encoder on a clip."""
    vae, size = _vae(options, configs), size_of(options)
    shape = 1, int(configs.vae["in_channels"]), size.num_frames, size.height, size.width
    pixels_BCTHW = torch.rand(shape, device=options.device).mul_(2).sub_(1).to(vae.dtype)
    return lambda: vae.encode(pixels_BCTHW).latent_dist.mean, vae


def decode(options: argparse.Namespace, configs: CogVideoXConfigs, _: Path) -> Made:
    """The VAE's decoder on a clip's latents."""
    vae, size = _vae(options, configs), size_of(options)
    shape = 1, configs.latent_channels, size.num_latent_frames, *size.latent_size
    latents_BCFHW = torch.randn(shape, device=options.device, dtype=vae.dtype)
    return lambda: vae.decode(latents_BCFHW).sample, vae


def tracker(options: argparse.Namespace, _: CogVideoXConfigs, folder: Path) -> Made:
    """SAM2 over a clip in both directions; features are kept on the student's grid."""
    frames_THWC, mask_HW = make_frames(options.frames)
    checkpoint = folder / "weights.pt"
    random_checkpoint(options.sam2, options.image_size, checkpoint)
    ours = Ours(
        options.sam2,
        options.image_size,
        options.device,
        checkpoint,
        frames_THWC,
        precision=options.precision,
    )
    grid = HEIGHT // 16, WIDTH // 16
    return lambda: ours.run(mask_HW, keep=lambda maps: resample_to_grid(maps, *grid)), ours.model


PARTS: Mapping[str, Callable[[argparse.Namespace, CogVideoXConfigs, Path], Made]] = {
    "text": text,
    "latents": latents,
    "tracker": tracker,
    "decode": decode,
}


def estimate(options: argparse.Namespace, configs: CogVideoXConfigs) -> ModelCost | None:
    """What the dry run says; None of what it does not speak of."""
    precision = options.precision
    size: ClipsConfig = size_of(options)
    if options.part == "text":
        return text_cost(TextConfig(precision=precision), configs)
    if options.part == "latents":
        settings = LatentsConfig(precision=precision, tiling=options.tiling)
        return latents_cost(settings, size, configs)
    if options.part == "tracker":
        teacher = TeacherConfig(image_size=options.image_size, precision=precision)
        return tracker_cost(teacher, size, options.sam2)[0]
    return None


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    add_model_options(parser)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--precision", choices=DTYPES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--tiling", action="store_true", help="of the VAE")
    options = parser.parse_args()
    device, configs = torch.device(options.device), facts_of(options)
    cost = estimate(options, configs)
    torch.manual_seed(0)
    seconds, peaks = [], []
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        empty = held_bytes(device)
        run, model = PARTS[options.part](options, configs, Path(name))
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        run()  # loads libraries
        for _ in range(options.repeats):
            reset_peak(device)
            started = now(device)
            run()
            seconds.append(now(device) - started)
            peaks.append(peak_bytes(device) - empty)
    measured = {"weights": weights, "working": max(peaks) - weights}
    said: dict[str, int] = {}
    if cost is not None:
        said = {"weights": cost.weight_bytes, "working": cost.working_bytes + cost.waiting_bytes}
    rows = [
        [part, f"{size / 2**20:.0f}", f"{said[part] / 2**20:.0f}" if part in said else "unknown"]
        for part, size in measured.items()
    ]
    middle, spread = median_and_spread(seconds)
    flops = {} if cost is None else {"tflops": round(cost.flops_per_clip / middle / 1e12, 3)}
    finish(
        f"frozen_models, {options.part}",
        table(["part", "measured, MiB", "dry run, MiB"], rows)
        + f"\n\n{middle:.3f} seconds a clip ({spread[0]:.3f} to {spread[1]:.3f}).",
        {
            "seconds": round(middle, 4),
            "spread": [round(value, 4) for value in spread],
            **flops,
            "peak_mib": max(peaks) >> 20,
            "measured_mib": {part: size >> 20 for part, size in measured.items()},
            "estimated_mib": {part: size >> 20 for part, size in said.items()},
            "machine": machine(device),
            "settings": {
                name: str(value)
                for name, value in vars(options).items()
                if name not in ("write", "device")
            },
        },
        options.write,
    )


if __name__ == "__main__":
    main()
