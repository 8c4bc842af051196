"""Puts trained models together as `stages/demo/pretrained` has them.

python -m stages.demo.training.sam2 SAM2
python -m stages.demo.training.vae VAE
python -m stages.demo.training.transformer T2V --vae VAE
python -m stages.demo.training.transformer I2V --vae VAE --image-to-video
python -m stages.demo.training.package SAM2 VAE T2V I2V OUT
"""

import filecmp
import shutil
from collections.abc import Iterator
from pathlib import Path

import typer

RECORD = "training.json"
_SHARED = ("text_encoder", "tokenizer", "scheduler", "vae")
"""Parts that the image-to-video pipeline takes from the text-to-video one."""


def package(sam2: Path, vae: Path, text_to_video: Path, image_to_video: Path, out: Path) -> None:
    """Copy what is packaged of the training scripts' output folders.

    Args:
        sam2: From `stages.demo.training.sam2`.
        vae: From `stages.demo.training.vae`.
        text_to_video: From `stages.demo.training.transformer` with that VAE.
        image_to_video: The same with `--image-to-video`.
        out: Folder for sam2/, cogvideox/ and cogvideox_image_to_video/; must not exist.

    Raises:
        ValueError: The pipelines differ in a part that is packaged once.
        FileNotFoundError: A run is not finished.
        FileExistsError: `out` exists.
    """
    finished = [folder / RECORD for folder in (sam2, vae, text_to_video, image_to_video)]
    if missing := [str(record) for record in finished if not record.exists()]:
        raise FileNotFoundError(f"no {', '.join(missing)}: run its training script to the end")
    for file in _files(text_to_video, _SHARED):
        if not filecmp.cmp(text_to_video / file, image_to_video / file, shallow=False):
            raise ValueError(
                f"{text_to_video} and {image_to_video} differ in {file}; "
                "train both with the same VAE, clips and seed"
            )
    out.mkdir(parents=True)
    for name in ("tiny.yaml", "tiny.safetensors", RECORD):
        _copy(sam2 / name, out / "sam2" / name)
    both, image = out / "cogvideox", out / "cogvideox_image_to_video"
    for file in _files(text_to_video, ("transformer", *_SHARED)):
        _copy(text_to_video / file, both / file)
    _copy(vae / RECORD, both / "vae" / RECORD)
    for file in _files(image_to_video, ("transformer",)):
        _copy(image_to_video / file, image / file)
    for source, target in ((text_to_video, both), (image_to_video, image)):
        for name in ("model_index.json", RECORD):
            _copy(source / name, target / name)


def _files(pipeline: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """Files of a pipeline's parts, relative to its folder."""
    for part in parts:
        for file in sorted((pipeline / part).iterdir()):
            yield file.relative_to(pipeline)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


if __name__ == "__main__":
    typer.run(package)
