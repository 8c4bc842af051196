"""Clips and models of the comparison, drawn and copied once into its folder.

OUT/
    models/base/                 the image-to-video pipeline: the demo's, or one trained here
    models/scratch-0/ …          the same with a random transformer, one per training seed
    models/sam2/tiny.safetensors, random.safetensors, tiny.yaml
    clips/train/, clips/train-full/, clips/tuning/, clips/test/     webdataset tars as in the demo
    first-frames/tuning/, first-frames/test/     NNNN.png, NNNN.mask.png, prompts.jsonl
    reconstructions/             the test clips encoded and decoded by the VAE
    training/                    runs of the models' training, if they are not the packaged ones
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from PIL import Image

from stages.clips import write_video
from stages.demo.build import PRETRAINED, copy_packaged_cogvideox, write_clip_tars
from stages.demo.scenes import FigureClip, draw_clip
from stages.demo.tiny_sam2 import build_tiny_sam2
from stages.demo.training import sam2, transformer, vae
from stages.demo.training.drawn_clips import HELD_OUT_SEEDS, NUM_FRAMES
from stages.files.tensor_files import save_tensors
from stages.progress import SilentProgress
from tests.benchmarks.evidence.sizes import BaseModels, Size

FPS = 16.0
PACE = 1.4
"""Speed of the motion relative to the clips that the base model was trained on."""
POST_PROBABILITY = 0.7
"""Fraction of clips with a post in front of the figure; 0.3 for the base model."""
_FIRST_SEEDS = {"train": 600_000, "train-full": 600_000, "tuning": 700_000, "test": 800_000}
_RANDOM_TRACKER_SEED = 0


def draw_faster_clip(seed: int, size: Size) -> FigureClip:
    """Draw a clip of the kind of motion that is learnt: faster, and more often behind a post."""
    drawn = draw_clip(
        seed,
        num_frames=NUM_FRAMES,
        height=size.height,
        width=size.width,
        fps=FPS / PACE,
        post_probability=POST_PROBABILITY,
    )
    return replace(drawn, fps=FPS)


def prepare(out: Path, size: Size) -> None:
    """Write what is missing of clips and models; each part is complete once its folder exists."""
    counts = {"train": size.train_clips, "tuning": size.tuning_clips, "test": size.test_clips}
    if size.full_steps is not None:
        counts["train-full"] = size.full_clips
    for part, count in counts.items():
        seeds = seeds_of(part, count, size)
        _once(out / "clips" / part, partial(_write_clips, seeds=seeds, size=size))
        if part in ("tuning", "test"):
            _once(out / "first-frames" / part, partial(_write_first_frames, seeds=seeds, size=size))
    base = out / "models" / "base"
    if size.models is None:
        _once(base, partial(copy_packaged_cogvideox, image_to_video=True))
        _once(out / "models" / "sam2", partial(_write_trackers, trained=PRETRAINED / "sam2"))
    else:
        _train_models(out, size, size.models)
    _once(
        out / "reconstructions",
        partial(
            _write_reconstructions,
            seeds=seeds_of("test", size.test_clips, size),
            size=size,
            model=base,
        ),
    )
    if size.scratch_steps:
        for seed in size.few_seeds:
            _once(
                out / "models" / f"scratch-{seed}",
                partial(_write_random_model, base=base, seed=seed),
            )


def _once(folder: Path, write: Callable[[Path], None]) -> None:
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    unfinished.rename(folder)


def seeds_of(part: str, count: int, size: Size) -> list[int]:
    """Seeds of a part's clips. Captions of the clips to continue differ, for they name the clip."""
    first = _FIRST_SEEDS[part]
    assert first in HELD_OUT_SEEDS
    if part in ("train", "train-full"):
        return list(range(first, first + count))
    captions: dict[str, int] = {}
    seed = first
    while len(captions) < count:
        captions.setdefault(draw_faster_clip(seed, size).caption, seed)
        seed += 1
    return list(captions.values())


def _write_clips(folder: Path, seeds: Sequence[int], size: Size) -> None:
    draw = partial(draw_faster_clip, size=size)
    with SilentProgress().task("draw clips", len(seeds)) as task:
        write_clip_tars(folder, seeds, draw, clips_per_tar=16, task=task)


def _write_first_frames(folder: Path, seeds: Sequence[int], size: Size) -> None:
    """First frames, their masks, and the prompt file; the seed of a video is its clip's number."""
    lines = []
    for number, seed in enumerate(seeds):
        clip = draw_faster_clip(seed, size)
        name = f"{number:04d}.png"
        Image.fromarray(clip.frames_THWC[0]).save(folder / name)
        Image.fromarray(clip.mask_HW).convert("L").save(folder / f"{number:04d}.mask.png")
        lines.append(json.dumps({"prompt": clip.caption, "image": name, "seed": number}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def _write_reconstructions(folder: Path, seeds: Sequence[int], size: Size, model: Path) -> None:
    """What the best of all transformers could give: videos named and recorded as sampled ones."""
    coder = AutoencoderKLCogVideoX.from_pretrained(model / "vae", torch_dtype=torch.float32)
    for number, seed in enumerate(seeds):
        clip = draw_faster_clip(seed, size)
        latents = coder.encode(vae.as_pixels(clip.frames_THWC[None])).latent_dist.mode()
        pixels_CTHW = coder.decode(latents).sample[0].clamp(-1, 1)
        frames_THWC = ((pixels_CTHW.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()
        write_video(folder / f"{number:04d}.mp4", frames_THWC, FPS)
        Image.fromarray(clip.mask_HW).convert("L").save(folder / f"{number:04d}.mask.png")
        about = json.dumps({"prompt": clip.caption, "seed": number})
        (folder / f"{number:04d}.json").write_text(about, encoding="utf-8")


def _train_models(out: Path, size: Size, models: BaseModels) -> None:
    """Train VAE, transformer and tracker, or go on where a stopped training was."""
    runs = out / "training"
    on: dict[str, Any] = {
        "device": models.device,
        "seed": 0,
        "held_out_clips": models.held_out_clips,
    }
    if not (out / "models" / "sam2").exists():
        steps = models.tracker_steps
        sam2.train(runs / "sam2", steps=steps, image_size=models.image_size, **on)
        _once(out / "models" / "sam2", partial(_write_trackers, trained=runs / "sam2"))
    if not (out / "models" / "base").exists():
        on |= {"height": size.height, "width": size.width}
        vae.train(runs / "vae", steps=models.vae_steps, **on)
        transformer.train(
            runs / "transformer",
            runs / "vae",
            image_to_video=True,
            num_clips=models.clips,
            steps=models.transformer_steps,
            **on,
        )
        _once(out / "models" / "base", partial(_copy_pipeline, trained=runs / "transformer"))


def _copy_pipeline(folder: Path, trained: Path) -> None:
    without_checkpoint = shutil.ignore_patterns("training.pt")
    shutil.copytree(trained, folder, ignore=without_checkpoint, dirs_exist_ok=True)


def _write_trackers(folder: Path, trained: Path) -> None:
    """A trained tracker, and one of random weights."""
    for name in ("tiny.yaml", "tiny.safetensors", "training.json"):
        shutil.copyfile(trained / name, folder / name)
    random = build_tiny_sam2(folder / "tiny.yaml", _RANDOM_TRACKER_SEED)
    save_tensors(random.state_dict(), folder / "random.safetensors")


def _write_random_model(folder: Path, base: Path, seed: int) -> None:
    shutil.copytree(base, folder, dirs_exist_ok=True)
    config = CogVideoXTransformer3DModel.load_config(base / "transformer")
    torch.manual_seed(seed)
    CogVideoXTransformer3DModel.from_config(config).save_pretrained(folder / "transformer")
