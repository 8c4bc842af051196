"""`inspect`: a summary of a store, and images of its clips."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cache_schema import SCHEMA_VERSION, ClipEntry, ClipMissing, StoreReader, find_store
from cache_schema.names import STORE_FILE
from cache_schema.storage import is_url
from pipeline.commands.skipped_notes import count_by_reason, skipped_notes
from pipeline.config.load import NOT_GIVEN, ConfigError, RunConfig
from pipeline.console import CommandResult, format_bytes
from stages.extract_features.config import Kind
from stages.progress import Progress
from stages.train_student.config import KIND_OF_FORM

if TYPE_CHECKING:
    from stages.inspect_cache.drawing import Drawing

_MAX_COMPARED_KEYS = 20_000
"""Largest number of keys for fuzzy matching, which takes about a second for as many."""


def run(
    config: RunConfig,
    progress: Progress,
    *,
    store: str | None = None,
    clip: str | None = None,
    every_clip: bool = False,
    overlay: bool = False,
    verbose: bool = False,
    out: Path | None = None,
) -> CommandResult:
    """Summarise a store, and draw one of its clips or all of them.

    Args:
        config: The whole configuration.
        progress: Advanced once per clip.
        store: A kind, a store's folder in the cache, or the path or URL of a store; None uses the
            masks for an overlay, else the form of the teacher that training reads.
        clip: The clip's key; None uses the first clip.
        every_clip: Draw all clips of the store; the printed facts are those of the first.
        overlay: Draw the masks of a masks store over the clip's frames.
        verbose: Show every setting of the store and the clip's whole record.
        out: Folder of the images; None uses one named after the store in `config.outputs`.
    """
    reader = open_store(config, store, overlay=overlay)
    kind = reader.settings.kind
    if overlay and kind != "masks":
        raise ConfigError(
            f"--overlay draws a masks store, but {reader.name} is a {kind} store; leave the store "
            "out to draw the masks"
        )
    if clip is None and len(reader):
        clip = reader.keys[0]
    entry = None if clip is None else _record(reader, clip)
    data = _store_data(reader)
    if entry is not None:
        data["clip"] = {"shard": entry.shard, "source": entry.source, **entry.as_dict()}
    if verbose:
        rows = _all_rows(data)
        notes = skipped_notes((kind, clip) for clip in reader.skipped)
    else:
        rows = [*_store_facts(reader), *([] if entry is None else _clip_facts(entry))]
        notes = ["--verbose prints every setting, --list every clip"]
    if entry is not None:
        keys = reader.keys if every_clip else (entry.key,)
        draw = _overlays if overlay else _pictures
        drawn = draw(config, progress, reader, keys, out or config.outputs / reader.name)
        notes += _record_drawings(drawn, data)
    title = f"{kind} store"
    return CommandResult(title=title, rows=rows, data=data, notes=notes)


def open_store(config: RunConfig, store: str | None, *, overlay: bool = False) -> StoreReader:
    """Open a store by kind, folder in the cache, path or URL.

    Raises:
        ConfigError: it is none of these.
        CacheError: no store matches, or several do.
    """
    if store is None:
        store = "masks" if overlay else KIND_OF_FORM[config.train.teacher_form]
    root = config.cache_root
    if is_url(store):
        return StoreReader(store)
    for folder in (Path(store), root / store if isinstance(root, Path) else None):
        if folder is not None and (folder / STORE_FILE).is_file():
            return StoreReader(folder)
    kinds = get_args(Kind)
    if store in kinds:
        return StoreReader(find_store(root, store, folder=config.train.folder_of(store)))
    if isinstance(root, str):
        return StoreReader(f"{root.rstrip('/')}/{store}")
    raise ConfigError(
        f"{store} is neither a kind of store ({', '.join(kinds)}) nor a store's folder"
    )


def _store_data(reader: StoreReader) -> dict[str, Any]:
    settings = reader.settings
    return {
        "store": str(reader.path),
        "kind": settings.kind,
        "schema_version": SCHEMA_VERSION,
        "settings_hash": settings.hash,
        "clips": len(reader),
        "bytes": reader.num_bytes,
        "arrays": {
            name: {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "dimension_names": list(spec.dimension_names),
                "compression": spec.compression,
            }
            for name, spec in settings.arrays.items()
        },
        "values": settings.values,
        "made_with": reader.provenance,
        "keys": list(reader.keys),
        "skipped": [
            {"key": s.key, "reason": s.reason, "detail": s.detail, "shard": s.shard}
            for s in reader.skipped
        ],
    }


def _record(reader: StoreReader, clip: str) -> ClipEntry:
    try:
        return reader.record(clip)
    except ClipMissing as error:
        similar = similar_keys(clip, reader.keys)
        hint = f"did you mean {' or '.join(similar)}? " if similar else ""
        error.add_note(f"{hint}inspect --list prints every clip")
        raise


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


def _store_facts(reader: StoreReader) -> list[tuple[str, str]]:
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


def _clip_facts(entry: ClipEntry) -> list[tuple[str, str]]:
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


def _all_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("store", data["store"]),
        ("schema version", str(data["schema_version"])),
        ("clips", f"{data['clips']}, and {len(data['skipped'])} skipped"),
        ("on disk", format_bytes(data["bytes"])),
    ]
    for name, array in data["arrays"].items():
        axes = zip(array["dimension_names"], array["shape"], strict=True)
        sizes = ", ".join(f"{axis} {size}" for axis, size in axes)
        compression = "" if array["compression"] == "none" else f", {array['compression']}"
        rows.append((f"array {name}", f"{array['dtype']} [{sizes}]{compression}"))
    rows.append(("settings", data["settings_hash"]))
    rows += [(f"  {name}", _inline(value)) for name, value in data["values"].items()]
    rows.append(("made with", _inline(data["made_with"])))
    if clip := data.get("clip"):
        rows.append(("clip", clip["key"]))
        rows += [(f"  {name}", _inline(value)) for name, value in clip.items() if name != "key"]
    return rows


def _inline(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _record_drawings(drawn: Sequence[Drawing], data: dict[str, Any]) -> list[str]:
    """Add the drawings to `data`, and return the lines to print under the table."""
    if not drawn:
        remedy = "; --overlay draws its masks over their frames" if data["kind"] == "masks" else ""
        return [f"a {data['kind']} store cannot be drawn by itself{remedy}"]
    data["drawings"] = [
        {"key": one.key, "picture": str(one.picture), "video": str(one.video)} for one in drawn
    ]
    data["picture"], data["video"] = str(drawn[0].picture), str(drawn[0].video)
    return [line for one in drawn for line in (*one.notes, str(one.picture), str(one.video))]


def _pictures(
    config: RunConfig, progress: Progress, reader: StoreReader, keys: Sequence[str], out: Path
) -> list[Drawing]:
    """Draw what the store itself holds; nothing for kinds that cannot be drawn."""
    from stages.clips import open_dataset
    from stages.inspect_cache.clip_view import stored_clips
    from stages.inspect_cache.draw_store import DRAWN_KINDS, draw_store

    if reader.settings.kind not in DRAWN_KINDS:
        return []
    try:
        dataset = open_dataset(config.data)
    except ValueError:
        dataset = None
    drawings = draw_store(
        reader,
        keys,
        out_dir=out,
        clips=stored_clips(reader, config.data),
        dataset=dataset,
        radius=config.train.lgf.radius,
        temperature=config.train.lgf.temperature,
        progress=progress,
    )
    return list(drawings)


def _overlays(
    config: RunConfig, progress: Progress, reader: StoreReader, keys: Sequence[str], out: Path
) -> list[Drawing]:
    """Draw the masks over the clips' frames, read from the dataset."""
    from stages.clips import open_dataset
    from stages.inspect_cache.clip_view import stored_clips
    from stages.inspect_cache.overlay import draw_overlay

    if config.data.path == Path(NOT_GIVEN):
        raise ConfigError("--overlay draws over the dataset's frames; set data.path=… or --config")
    dataset = open_dataset(config.data)
    clips = stored_clips(reader, config.data)
    drawings = draw_overlay(
        reader, keys, out_dir=out, clips=clips, dataset=dataset, progress=progress
    )
    return list(drawings)
