"""Whether a second thread helps models as small as the demo's, on an idle and on a busy machine.

    python tests/benchmarks/demo_threads.py --write tests/benchmarks/demo_threads.md

Each piece of work runs on one thread and on as many as there are cores, without other processes of
this benchmark and with one per core that computes all the time. The weights are the packaged ones.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from report import (
    Condition,
    conditions_of,
    finish,
    machine,
    median_and_spread,
    now,
    other_processes,
    paired_ratios,
    shown,
    table,
)

from stages.clips import SubjectPrompt
from stages.demo.scenes import draw_clip
from stages.local_gram_flow import local_gram_flow
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.inputs import prompt_for_sam2, resize_for_sam2
from stages.sam2_tracking.tracker import Tracker, TrackRequest

# Legend: B clip, F latent frame, T frame, C channel, H W pixels or latents, L text token.

PRETRAINED = Path("stages/demo/pretrained")
CPU = torch.device("cpu")
FRAMES, HEIGHT, WIDTH, SAM2_SIZE = 17, 128, 192, 128
Work = Callable[[], object]


def tracking() -> Work:
    """Encode a clip and track its subject forward."""
    folder = PRETRAINED / "sam2"
    model = build_sam2(str(folder / "tiny.yaml"), folder / "tiny.safetensors", image_size=SAM2_SIZE)
    tracker = Tracker(model, precision="fp32")
    clip = draw_clip(0, num_frames=FRAMES, height=HEIGHT, width=WIDTH, fps=16.0)
    frames_TSS3 = resize_for_sam2(clip.frames_THWC, SAM2_SIZE)
    prompt = prompt_for_sam2(
        SubjectPrompt(mask_HW=clip.masks_THW[0]),
        height=HEIGHT,
        width=WIDTH,
        image_size=SAM2_SIZE,
        device=CPU,
    )

    def work() -> None:
        with tracker.encode(frames_TSS3) as encoded:
            request = TrackRequest(encoded=encoded, prompt=prompt, order=range(FRAMES))
            for _ in tracker.track([request]):
                pass

    return work


def transformer(batch: int, *, train: bool) -> Work:
    """A step of training, or of sampling."""
    model = CogVideoXTransformer3DModel.from_pretrained(PRETRAINED / "cogvideox" / "transformer")
    config = model.config
    frames = (FRAMES - 1) // 4 + 1
    latents_BFCHW = torch.randn(batch, frames, config.in_channels, HEIGHT // 8, WIDTH // 8)
    text_BLC = torch.randn(batch, config.max_text_seq_length, config.text_embed_dim)
    model.requires_grad_(train)

    def work() -> None:
        with torch.set_grad_enabled(train):
            times_B = torch.full((batch,), 500)
            (predicted_BFCHW,) = model(latents_BFCHW, text_BLC, times_B, return_dict=False)
        if train:
            predicted_BFCHW.square().mean().backward()

    return work


def vae() -> Work:
    """Encode and decode the first frames of a clip."""
    model = AutoencoderKLCogVideoX.from_pretrained(PRETRAINED / "cogvideox" / "vae").float()
    pixels_BCTHW = torch.rand(1, 3, 5, HEIGHT, WIDTH)

    @torch.no_grad()
    def work() -> None:
        model.decode(model.encode(pixels_BCTHW).latent_dist.mode())

    return work


def gram_flow() -> Work:
    """Of one clip's tokens, with the gradient."""
    features = torch.randn(1, 5, HEIGHT // 16, WIDTH // 16, 64, requires_grad=True)

    return lambda: local_gram_flow(features, 2).sum().backward()


WORK: dict[str, Callable[[], Work]] = {
    "tracking a clip of 17 frames": tracking,
    "training step of 4 clips": lambda: transformer(4, train=True),
    "sampling step of a video": lambda: transformer(1, train=False),
    "VAE, 5 frames there and back": vae,
    "Local Gram Flow of a clip": gram_flow,
}


def measure(works: dict[str, Work], repeats: int) -> dict[Condition, dict[str, list[float]]]:
    """Seconds of all work under every condition, in turn, after one run that is not counted."""
    found: dict[Condition, dict[str, list[float]]]
    found = {condition: {name: [] for name in works} for condition in conditions_of(CPU)}
    for repeat in range(repeats + 1):
        for condition, seconds in found.items():
            torch.set_num_threads(condition.threads)
            with other_processes(condition.others):
                for name, work in works.items():
                    started = now(CPU)
                    work()
                    if repeat:
                        seconds[name].append(now(CPU) - started)
    return found


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    options = parser.parse_args()
    found = measure({name: make() for name, make in WORK.items()}, options.repeats)
    rows, ratios = [], {}
    for name in WORK:
        for condition in (one for one in found if one.threads > 1):
            alone, all_threads = found[replace(condition, threads=1)][name], found[condition][name]
            ratio = paired_ratios(all_threads, alone)
            ratios[f"{name}, {condition.others}"] = round(ratio[0], 2)
            times = [shown(median_and_spread(seconds), 3) for seconds in (alone, all_threads)]
            rows.append([name, condition.others, *times, shown(ratio, 2)])
    finish(
        "demo_threads",
        table(
            ["", "other processes", "one thread, s", "all threads, s", "all over one"],
            rows,
        ),
        {
            "value": max(ratios.values()),
            "target": None,
            "spread": [min(ratios.values()), max(ratios.values())],
            "ratios": ratios,
            "machine": machine(CPU),
            "settings": {"repeats": str(options.repeats)},
        },
        options.write,
    )


if __name__ == "__main__":
    main()
