"""Short facts about a store and a clip, and suggestions for a mistyped key."""

import difflib
from collections.abc import Sequence
from typing import Any

from cache_schema import ClipEntry, StoreReader
from pipeline.commands.skipped_notes import count_by_reason
from pipeline.console import format_bytes

_MAX_COMPARED_KEYS = 20_000
"""Largest number of keys for fuzzy matching, which takes about a second for as many."""


def store_facts(reader: StoreReader) -> list[tuple[str, str]]:
    """Rows about a store: clips, size, arrays of a clip, date and version of the writer."""
    reasons = f" ({count_by_reason(reader.skipped)})" if reader.skipped else ""
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
        ("on disk", format_bytes(reader.num_bytes)),
        ("each clip", ", ".join(arrays)),
    ]
    return [*rows, ("made", ", ".join(filter(None, (date, version))))] if date or version else rows


def clip_facts(entry: ClipEntry) -> list[tuple[str, str]]:
    """Rows about a clip: prompt and track, caption, size of its source."""
    from stages.inspect_cache.clip_facts import describe_track

    known: dict[str, Any] = dict(entry.attributes)
    rows = [("clip", entry.key)]
    if "prompt" in known:
        rows.append(("  track", ", ".join(describe_track(known, known["num_frames"]))))
    if "caption" in known:
        rows.append(("  caption", str(known["caption"])))
    if known.get("tokens_cut"):
        rows.append(("  truncated", f"{known['tokens_cut']} tokens of the caption"))
    if geometry := known.get("geometry"):
        size = f"{geometry['source_width']}x{geometry['source_height']}"
        rows.append(("  source", f"{size} at {geometry['source_fps']:g} frames/s"))
    return rows


def similar_keys(wanted: str, keys: Sequence[str]) -> list[str]:
    """Up to three keys that contain `wanted`, or else are spelled similarly."""
    within: list[str] = []
    for key in keys:
        if wanted and wanted.lower() in key.lower():
            within.append(key)
            if len(within) == 3:
                break
    if within or len(keys) > _MAX_COMPARED_KEYS:
        return within
    return difflib.get_close_matches(wanted, list(keys), n=3, cutoff=0.7)
