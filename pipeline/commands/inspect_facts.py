"""The few facts that `inspect` prints of a store and a clip, and the keys near to a wrong one."""

import difflib
from collections.abc import Sequence
from typing import Any

from cache_schema import ClipEntry, StoreReader
from pipeline.commands.skipped_notes import counted_reasons
from pipeline.console import in_bytes

_MOST_COMPARED = 20_000
"""Keys that are compared letter by letter: a second's work."""


def store_facts(reader: StoreReader) -> list[tuple[str, str]]:
    """Rows about a store: what it holds of how many clips, how large it is, who made it."""
    reasons = f" ({counted_reasons(reader.skipped)})" if reader.skipped else ""
    arrays = [
        f"{name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"
        for name, spec in reader.settings.arrays.items()
    ]
    made = reader.provenance
    date = str(made.get("date") or "").replace("T", " ")[:16]
    version = f"sam2videox {made['sam2videox']}" if made.get("sam2videox") else ""
    rows = [
        ("store", str(reader.path)),
        ("clips", f"{len(reader)}, and {len(reader.skipped)} skipped{reasons}"),
        ("on disk", in_bytes(reader.num_bytes)),
        ("each clip", ", ".join(arrays)),
    ]
    return [*rows, ("made", ", ".join(filter(None, (date, version))))] if date or version else rows


def clip_facts(entry: ClipEntry) -> list[tuple[str, str]]:
    """Rows about a clip: how it was prompted and tracked, its caption, its source's size."""
    from stages.inspect_cache.clip_facts import describe_track

    known: dict[str, Any] = dict(entry.attributes)
    rows = [("clip", entry.key)]
    if "prompt" in known:
        rows.append(("  track", ", ".join(describe_track(known, known["num_frames"]))))
    if "caption" in known:
        rows.append(("  caption", str(known["caption"])))
    if known.get("tokens_cut"):
        rows.append(("  cut", f"{known['tokens_cut']} tokens of the caption"))
    if geometry := known.get("geometry"):
        size = f"{geometry['source_width']}x{geometry['source_height']}"
        rows.append(("  source", f"{size} at {geometry['source_fps']:g} frames/s"))
    return rows


def nearest_keys(wanted: str, keys: Sequence[str]) -> list[str]:
    """Up to three keys that hold the words of `wanted`, or are written nearly alike."""
    within: list[str] = []
    for key in keys:
        if wanted and wanted.lower() in key.lower():
            within.append(key)
            if len(within) == 3:
                break
    if within or len(keys) > _MOST_COMPARED:
        return within
    return difflib.get_close_matches(wanted, list(keys), n=3, cutoff=0.7)
