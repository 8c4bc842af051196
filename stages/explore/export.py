"""A chosen handful of clips as one HTML page without a server or network."""

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from cache_schema import CacheError
from stages.explore.descriptions import shown
from stages.explore.explorer import Explorer, NoSuchClip
from stages.explore.layers import ClipLayers
from stages.explore.server import PAGE_FOLDER
from stages.explore.table import LABELS, NUMBERS
from stages.local_gram_flow import flow_probability
from stages.progress import Progress

MAX_CLIPS = 24
"""Clips of an export; each takes some megabytes at full size."""

_SCRIPTS = ("source.js", "list.js", "clip.js", "main.js")
_PROBABILITY_MAX = 255


def saved_page(explorer: Explorer, keys: Sequence[str], progress: Progress) -> str:
    """Make the page: pictures, probabilities at the configured temperature, implied flow.

    Args:
        explorer: Of the cache; its table has been read.
        keys: Keys of the clips, in the page's order.
        progress: Advanced once per clip.

    Raises:
        ValueError: A key that the cache does not have, none, or too many.
    """
    rows = rows_of(explorer, keys)
    temperature = explorer.sources.lgf.temperature
    clips = []
    with progress.task("export", len(rows), unit="clips") as task:
        for number, row in enumerate(rows):
            clips.append(_saved_clip(explorer, row, number, temperature))
            task.advance()
    state = {
        "cache": shown(explorer.sources.cache),
        "stores": [],
        "stored": len(rows),
        "skipped": 0,
        "read": len(rows),
        "finished": True,
        "index_command": "",
        "problems": [],
        "no_dataset": "",
        "columns": {"numbers": NUMBERS, "labels": LABELS},
        "student": None,
        "temperature": temperature,
        "mask_colours": explorer.state()["mask_colours"],
        "left_out": 0,
        "leave_out_commands": ["", ""],
    }
    # "<" is escaped, so that a caption cannot end the script element.
    data = json.dumps({"state": state, "clips": clips}, allow_nan=False).replace("<", "\\u003c")
    return _inlined(data)


def rows_of(explorer: Explorer, keys: Sequence[str]) -> list[int]:
    """Rows of the clips of an export.

    Raises:
        ValueError: A key that the cache does not have, none, or too many.
    """
    if not 1 <= len(keys) <= MAX_CLIPS:
        raise ValueError(f"an export shows 1 to {MAX_CLIPS} clips, got {len(keys)}")
    rows = []
    for key in keys:
        row = explorer.table.row_of(key)
        if row is None:
            raise ValueError(
                f"no clip {key!r} in {explorer.sources.cache}; inspect --list prints every clip"
            )
        rows.append(row)
    return rows


def _saved_clip(explorer: Explorer, row: int, number: int, temperature: float) -> dict[str, Any]:
    layers = explorer.layers(row)
    facts = explorer.clip(row)
    # The page counts its own clips.
    facts |= {"row": number, "left_out": False}
    try:
        still, loop = explorer.thumbnail(row)
    except (NoSuchClip, CacheError, ValueError):
        still = loop = b""
    return {
        "facts": facts,
        "still": _data_url(still, "image/webp"),
        "loop": _data_url(loop, "image/webp"),
        "sheets": {
            name: _data_url(layer.sheet.data, layer.sheet.media_type)
            for name, layer in layers.layers.items()
        },
        "arrays": _arrays(layers, temperature),
    }


def _arrays(layers: ClipLayers, temperature: float) -> dict[str, str]:
    """Base64 of each direction's probabilities, uint8 in steps of 1/255, and motion, float32."""
    found = {}
    if layers.flow is None:
        return {}
    for direction, flow_PHWK in layers.flow.by_direction.items():
        probability = flow_probability(flow_PHWK[None], temperature)[0]
        steps = (probability * _PROBABILITY_MAX).round().to(torch.uint8)
        found[f"probability_{direction}"] = _base64(steps.numpy().tobytes())
        motion = layers.flow.motion(direction, temperature)
        found[f"motion_{direction}"] = _base64(motion.astype("<f4").tobytes())
    return found


def _inlined(data: str) -> str:
    """The page with style, data and scripts inside; its policy admits nothing else."""
    page = (PAGE_FOLDER / "index.html").read_text(encoding="utf-8")
    style = (PAGE_FOLDER / "style.css").read_text(encoding="utf-8")
    page = page.replace('<link rel="stylesheet" href="style.css">', f"<style>{style}</style>")
    hashes = []
    for name in _SCRIPTS:
        script = (PAGE_FOLDER / name).read_text(encoding="utf-8")
        hashes.append(f"'sha256-{_hash(script)}'")
        page = page.replace(f'<script src="{name}"></script>', f"<script>{script}</script>")
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'sha256-{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = page.replace(
        "<title>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>',
    )
    # Last: the data may contain any of the texts replaced above.
    first, main, rest = page.partition("</main>")
    return f'{first}{main}\n<script type="application/json" id="data">{data}</script>{rest}'


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{_base64(data)}"
