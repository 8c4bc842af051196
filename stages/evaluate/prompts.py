"""Prompts to evaluate a run with: captions and first frames of the clips it was not trained on."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from cache_schema import StoreReader
from cache_schema.atomic_io import make_directories, write_atomic
from cache_schema.shown_text import first_few
from stages.clips import ClipRecord, ClipsConfig, ClipSkipped, VideoError, load_clip, open_dataset
from stages.evaluate.first_frame_masks import write_subjects
from stages.sample_videos.requests import PromptRow


def held_out_prompts(keys: Sequence[str], text: StoreReader) -> list[PromptRow]:
    """The captions of clips, from the text store.

    Args:
        keys: The clips.
        text: The text store that the run was trained with.

    Raises:
        ValueError: A clip is not in the store, or has no caption there.
        CacheError: The store cannot be read.
    """
    rows = []
    for key in keys:
        caption = text.record(key).attributes.get("caption") if key in text else None
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{text.name} holds no caption of the held-out clip {key!r}")
        rows.append(PromptRow(prompt=caption))
    return rows


def write_first_frames(keys: Sequence[str], clips: ClipsConfig, folder: Path) -> list[Path]:
    """Write the first training frame of each clip as a PNG image: `<folder>/<number>.png`.

    The masks of its subjects stand beside it, if the dataset has masks (`first_frame_masks`).

    Args:
        keys: The clips.
        clips: The dataset, and the size of the frames.
        folder: Created if missing.

    Raises:
        ValueError: A clip is not in the dataset, or cannot be decoded.
    """
    make_directories(folder)
    size = clips.sizes[0]
    missing = dict.fromkeys(keys, "it is not in the dataset")
    for shard in open_dataset(clips).shards:
        for record in shard.records():
            if record.key not in missing or not isinstance(record, ClipRecord):
                continue
            try:
                clip = load_clip(record, size)
            except (ClipSkipped, VideoError) as error:
                missing[record.key] = str(error)
                continue
            png = io.BytesIO()
            Image.fromarray(clip.frames_THWC[0]).save(png, format="PNG")
            image = _image(folder, keys, record.key)
            write_atomic(image, png.getvalue())
            write_subjects(image, clip.prompts)
            del missing[record.key]
        if not missing:
            break
    if missing:
        reasons = [f"{key!r}: {why}" for key, why in missing.items()]
        raise ValueError(
            f"{len(missing)} of {len(keys)} held-out clips of {clips.path} give no first frame "
            f"({first_few(reasons, 3)})"
        )
    return [_image(folder, keys, key) for key in keys]


def _image(folder: Path, keys: Sequence[str], key: str) -> Path:
    return folder / f"{keys.index(key):04d}.png"


def with_seeds_of_their_own(rows: Sequence[PromptRow], seed: int, num: int) -> list[PromptRow]:
    """Give clips of one caption different seeds: videos are told apart by prompt and seed.

    Args:
        rows: Prompts, some of which may be equal.
        seed: Seed of the first clip of each caption.
        num: Videos per clip, with consecutive seeds.
    """
    earlier: Counter[str] = Counter()
    numbered = []
    for row in rows:
        numbered.append(replace(row, seed=seed + num * earlier[row.prompt]))
        earlier[row.prompt] += 1
    return numbered
