"""`cache list`: the stores of a folder or URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from cache_schema import SCHEMA_VERSION, StoreReader, UnknownSchemaVersion
from cache_schema.checksummed_json import parse_json
from cache_schema.names import STORE_FILE, StoreLayout
from cache_schema.storage import open_storage
from pipeline.commands.maintenance.stores import (
    Outcome,
    PathOrUrl,
    indented,
    path_or_url,
    pluralize,
    run_on_each_store,
    stores_at,
)
from pipeline.commands.skipped_notes import count_by_reason
from pipeline.console import CommandResult, format_bytes
from pipeline.failures import error_text
from stages.progress import Progress


def run(location: str, progress: Progress) -> CommandResult:
    """List the stores of a folder or URL; unreadable ones with the error."""
    del progress  # reading the commit records takes seconds
    cache = path_or_url(location)
    result = run_on_each_store(
        stores_at(cache), _describe_store, title=lambda found: _title(found, cache)
    )
    old = sum("remedy" in store for store in result.data["stores"])
    if old:
        result.notes.append(
            f"{pluralize(old, 'store')} with an older schema version cannot be read: set another "
            "cache folder, or delete them, and run sam2vx-pipeline extract-features"
        )
    return result


def _title(found: Sequence[Outcome], cache: PathOrUrl) -> str:
    sizes = [outcome.data["bytes"] for outcome in found if "bytes" in outcome.data]
    size = f", {format_bytes(sum(sizes))}" if sizes else ""
    return f"{pluralize(len(found), 'store')}{size}: {cache}"


def _describe_store(store: PathOrUrl) -> Outcome:
    try:
        reader = StoreReader(store)
    except UnknownSchemaVersion as error:
        return _unsupported_version(store, error)
    settings, skipped = reader.settings, reader.skipped
    reasons = f" ({count_by_reason(skipped)})" if skipped else ""
    written = _written(store, reader.provenance)
    rows = [
        ("clips", f"{len(reader)}, and {len(skipped)} skipped{reasons}"),
        ("size", format_bytes(reader.num_bytes)),
        ("schema version", str(SCHEMA_VERSION)),
        ("made", _made(written, reader.provenance)),
        ("settings", settings.hash),
    ]
    data: dict[str, Any] = {
        "kind": settings.kind,
        "schema_version": SCHEMA_VERSION,
        "settings_hash": settings.hash,
        "clips": len(reader),
        "skipped": len(skipped),
        "bytes": reader.num_bytes,
        "shards": len(reader.shards),
        "made": None if written is None else written.isoformat(timespec="seconds"),
        "made_with": reader.provenance,
    }
    if isinstance(store, Path) and (quarantine := StoreLayout(store).quarantine).is_dir():
        data["quarantine_bytes"] = size = _bytes_freed(quarantine)
        rows.append(
            ("quarantine", f"files removed by repair; deleting it frees {format_bytes(size)}")
        )
    return Outcome(rows=indented(rows), data=data)


def _unsupported_version(store: PathOrUrl, error: UnknownSchemaVersion) -> Outcome:
    """Facts about a store whose schema version this package cannot read."""
    record = parse_json(open_storage(store).read(STORE_FILE))
    found, made_with = record["schema_version"], record.get("provenance") or {}
    written = _written(store, made_with)
    rows = [
        ("clips", "not read"),
        ("schema version", f"{found}; this version of the package reads {SCHEMA_VERSION}"),
        ("made", _made(written, made_with)),
        ("settings", str(record.get("settings_hash"))),
    ]
    data = {
        "kind": record.get("kind"),
        "schema_version": found,
        "settings_hash": record.get("settings_hash"),
        "made": None if written is None else written.isoformat(timespec="seconds"),
        "made_with": made_with,
    }
    if isinstance(found, int) and found < SCHEMA_VERSION:
        return Outcome(rows=indented(rows), data=data | {"remedy": error_text(error)})
    return Outcome(
        rows=indented(rows),
        data=data | {"error": error_text(error)},
        notes=[f"error: {error_text(error)}"],
        failed=True,
    )


def _written(store: PathOrUrl, made_with: Mapping[str, Any]) -> datetime | None:
    """When the store was created, from its provenance or else its oldest file.

    Several files are compared, since a repair can rewrite store.json, and dropping clips rewrites a
    shard's zarr.json.
    """
    with suppress(ValueError):
        return datetime.fromisoformat(str(made_with.get("date"))).astimezone()
    if not isinstance(store, Path):
        return None
    files = [store / STORE_FILE, *StoreLayout(store).shards.glob("*/zarr.json")]
    return datetime.fromtimestamp(min(file.stat().st_mtime for file in files)).astimezone()


def _made(written: datetime | None, made_with: Mapping[str, Any]) -> str:
    day = [] if written is None else [f"{written:%Y-%m-%d %H:%M}"]
    commit = made_with.get("commit")
    changed = " with uncommitted changes" if made_with.get("uncommitted_changes") else ""
    by = [f"by sam2videox {made_with['sam2videox']}"] if made_with.get("sam2videox") else []
    by += [f"commit {str(commit)[:10]}{changed}"] if commit else []
    return ", ".join([*day, *by]) or "unknown"


def _bytes_freed(folder: Path) -> int:
    """Bytes that deleting a folder would free; files with other hard links do not count."""
    found = (file.stat() for file in folder.rglob("*") if file.is_file())
    return sum(status.st_size for status in found if status.st_nlink == 1)
