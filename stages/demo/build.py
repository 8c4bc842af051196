"""Builds the missing inputs of the built-in demo: clips, a tiny base model, a tiny SAM2."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from pydantic import Field

from cache_schema.atomic_io import FileLock
from cache_schema.checksummed_json import parse_json
from stages.clips import ClipRecord, ClipsConfig, encode_video, open_dataset
from stages.config import Section
from stages.demo.scenes import FigureClip, draw_clip
from stages.progress import Progress, Task


class DemoConfig(Section):
    """The procedural dataset and the tiny models, built if they are missing."""

    root: Path = Path("demo")
    """Folder for everything the demo creates: clips/, models/, cache/, runs/."""
    num_clips: int = Field(default=24, ge=1)
    """Number of clips to draw; 24 is usual."""
    clips_per_tar: int = Field(default=8, ge=1)
    """Clips per webdataset tar; 8 is usual."""
    seed: int = Field(default=0, ge=0)
    """Random seed of figures, backgrounds and gaits; 0 is usual."""
    student: Literal["cogvideox", "wan"] = "cogvideox"
    """Base model: a trained tiny CogVideoX, or a tiny Wan with random weights, whose videos show
    nothing. Both use the same clips, tracker and cache."""
    image_to_video: bool = False
    """Use the image-to-video pipeline instead of the text-to-video one. Its learned positions fit
    clips of 17 frames of 128x192 only; for others its transformer is untrained."""


PRETRAINED = Path(__file__).parent / "pretrained"
"""The packaged models; `stages.demo.training` makes them."""
DemoPart = Literal["clips", "sam2", "base_model"]
_RECIPE = "made_with.json"
_IMAGE_TO_VIDEO = "cogvideox_image_to_video"
"""What the packaged image-to-video pipeline does not share with `cogvideox`."""
_FPS = 16.0
"""Frames per second of the clips if the configuration sets fps to null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoPaths:
    """Paths of the demo's parts."""

    clips: Path
    """Folder of webdataset tars."""
    base_model: Path
    """Folder of a diffusers pipeline."""
    sam2_checkpoint: Path
    sam2_config: Path


def demo_paths(root: Path, student: str = "cogvideox") -> DemoPaths:
    """Paths of the parts of a demo under `root`, whether or not they exist.

    Args:
        root: The demo's folder.
        student: As `DemoConfig.student`.
    """
    sam2 = root / "models" / "sam2"
    return DemoPaths(
        clips=root / "clips",
        base_model=root / "models" / student,
        sam2_checkpoint=sam2 / "tiny.safetensors",
        sam2_config=sam2 / "tiny.yaml",
    )


def ensure_demo(
    config: DemoConfig,
    clips: ClipsConfig,
    *,
    progress: Progress,
    parts: Collection[DemoPart] = get_args(DemoPart),
) -> DemoPaths:
    """Build the missing parts of the demo; existing ones are left unchanged.

    Each part is written atomically, by one rename. If several processes call this at once, one
    builds and the others wait.

    Args:
        config: Settings of the demo.
        clips: Size, length and rate of the clips; its `path` is ignored.
        progress: Shows a bar for the clips.
        parts: Parts to build. A base model that is not packaged (Wan, or image-to-video for clips
            of another size) also builds the clips, from whose captions its tokenizer is made.

    Raises:
        ValueError: A requested part exists but was built with different settings.
    """
    root = config.root.expanduser()
    paths = demo_paths(root, config.student)
    root.mkdir(parents=True, exist_ok=True)
    clip_recipe: dict[str, Any] = {
        "seed": config.seed,
        "num_clips": config.num_clips,
        "clips_per_tar": config.clips_per_tar,
        "num_frames": clips.num_frames,
        "height": clips.height,
        "width": clips.width,
        "fps": clips.fps or _FPS,
    }
    is_wan = config.student == "wan"
    is_packaged = not is_wan and (not config.image_to_video or _fits_packaged(clips))
    model_recipe: dict[str, Any] = {} if is_wan else _packaged("cogvideox")
    model_recipe |= {"image_to_video": config.image_to_video}
    if not is_packaged:
        model_recipe |= clip_recipe
    elif config.image_to_video:
        model_recipe |= {"image_to_video_weights": _packaged(_IMAGE_TO_VIDEO)["weights"]}
    local_clips = clips.model_copy(update={"path": paths.clips})
    with FileLock(root / ".lock", wait=True, what=f"the demo's inputs in {root}"):
        needs_captions = not is_packaged and not paths.base_model.exists()
        if "clips" in parts or ("base_model" in parts and needs_captions):
            _ensure(
                paths.clips, clip_recipe, lambda out: _build_clips(out, config, clips, progress)
            )
        if "sam2" in parts:
            _ensure(
                paths.sam2_config.parent,
                _packaged("sam2"),
                lambda out: _copy_packaged("sam2", out),
            )
        if "base_model" in parts:
            _ensure(
                paths.base_model,
                model_recipe,
                partial(copy_packaged_cogvideox, image_to_video=config.image_to_video)
                if is_packaged
                else partial(_build_untrained, config=config, clips=local_clips),
            )
    return paths


def _ensure(folder: Path, recipe: dict[str, Any], make: Callable[[Path], None]) -> None:
    if folder.exists():
        _check_recipe(folder, recipe)
        return
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    make(unfinished)
    (unfinished / _RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(folder)


def _check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    try:
        found = parse_json((folder / _RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{folder} was not made by the demo (no readable {_RECIPE} in it); "
            "move it away or set another demo.root"
        )
    differing = [
        f"{name} = {found.get(name)} (now {value})"
        for name, value in recipe.items()
        if found.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} was made with {', '.join(differing)}; "
            "remove the folder to rebuild it, or set another demo.root"
        )


def _build_clips(out: Path, config: DemoConfig, clips: ClipsConfig, progress: Progress) -> None:
    with progress.task("draw figures", config.num_clips, unit="clips") as task:
        write_clip_tars(
            out,
            # Consecutive seeds cycle through the kinds of figure.
            range(config.seed * config.num_clips, (config.seed + 1) * config.num_clips),
            partial(
                draw_clip,
                num_frames=clips.num_frames,
                height=clips.height,
                width=clips.width,
                fps=clips.fps or _FPS,
            ),
            clips_per_tar=config.clips_per_tar,
            task=task,
        )


def _packaged(model: str) -> dict[str, Any]:
    """Identify packaged weights in a recipe, so that a copy of earlier ones is not taken."""
    digest = hashlib.sha256()
    for file in sorted((PRETRAINED / model).rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return {"weights": digest.hexdigest()[:16]}


def _copy_packaged(model: str, out: Path) -> None:
    shutil.copytree(PRETRAINED / model, out, dirs_exist_ok=True)


def copy_packaged_cogvideox(out: Path, *, image_to_video: bool) -> None:
    """Copy a packaged pipeline to `out`, an existing folder."""
    if not image_to_video:
        _copy_packaged("cogvideox", out)
        return
    shutil.copytree(
        PRETRAINED / "cogvideox",
        out,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("model_index.json", "transformer"),
    )
    _copy_packaged(_IMAGE_TO_VIDEO, out)


def _build_untrained(out: Path, config: DemoConfig, clips: ClipsConfig) -> None:
    """Build a tiny Wan, or a CogVideoX for images: the packaged VAE and a random transformer."""
    captions = [record.caption or "" for record in _records(clips)]
    # Imported here, so that a complete demo does not import diffusers.
    if config.student == "wan":
        from stages.demo.tiny_wan import build_tiny_wan

        build_tiny_wan(
            out,
            captions=captions,
            seed=config.seed,
            image_to_video=config.image_to_video,
            num_layers=4,
        )
        return
    import torch

    from stages.demo.tiny_cogvideox import build_tiny_cogvideox
    from stages.files.weight_checks import load_model
    from stages.students.weights import model_class_of

    build_tiny_cogvideox(
        out,
        height=clips.height,
        width=clips.width,
        num_frames=clips.num_frames,
        captions=captions,
        seed=config.seed,
        image_to_video=True,
        vae=load_model(
            model_class_of("vae", PRETRAINED / "cogvideox"),
            PRETRAINED / "cogvideox" / "vae",
            torch_dtype=torch.float32,
        ),
    )


def _fits_packaged(clips: ClipsConfig) -> bool:
    """Whether clips have the size of the packaged image-to-video transformer's positions."""
    file = PRETRAINED / _IMAGE_TO_VIDEO / "transformer" / "config.json"
    packaged = parse_json(file.read_text(encoding="utf-8"))
    return (clips.num_frames, clips.height // 8, clips.width // 8) == tuple(
        packaged[f"sample_{side}"] for side in ("frames", "height", "width")
    )


def _records(clips: ClipsConfig) -> Iterator[ClipRecord]:
    for shard in open_dataset(clips).shards:
        for record in shard.records():
            assert isinstance(record, ClipRecord), record
            yield record


def write_clip_tars(
    out: Path,
    seeds: Sequence[int],
    draw: Callable[[int], FigureClip],
    *,
    clips_per_tar: int,
    task: Task,
) -> None:
    """Draw one clip per seed and write them as 00000.tar, 00001.tar, …

    Each clip has `<key>.mp4`, `<key>.txt` (caption), `<key>.mask.png` (the figure on frame 0) and
    `<key>.joints.json` (see `FigureClip.ground_truth`). Equal arguments give equal bytes.

    Args:
        out: Output folder; created if missing.
        seeds: One seed per clip.
        draw: Draws the clip of a seed.
        clips_per_tar: Clips per tar; the last one may have fewer.
        task: Advanced by one per clip.
    """
    # Imported here, so that a complete demo does not import torch.
    from webdataset import TarWriter

    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(seeds), clips_per_tar)):
        with (
            (out / f"{number:05d}.tar").open("wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for seed in seeds[start : start + clips_per_tar]:
                clip = draw(seed)
                tar.write({"__key__": f"{clip.kind}-{seed:06d}", **_members(clip)})
                task.advance()


def _members(clip: FigureClip) -> dict[str, bytes]:
    return {
        "joints.json": json.dumps(clip.ground_truth()).encode(),
        "mask.png": _png(clip.mask_HW),
        "mp4": encode_video(clip.frames_THWC, clip.fps),
        "txt": clip.caption.encode(),
    }


def _png(mask_HW: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(mask_HW.astype(np.uint8) * 255).save(out, format="PNG")
    return out.getvalue()
