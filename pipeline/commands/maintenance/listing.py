"""`cache list`: what stores there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from cache_schema import SCHEMA_VERSION, StoreReader, UnknownSchemaVersion
from cache_schema.checksummed_json import parse_json
from cache_schema.names import STORE_FILE, StoreLayout
from cache_schema.storage import open_place
from pipeline.commands.maintenance.stores import (
    Outcome,
    Where,
    counted,
    each_store,
    indented,
    place_of,
    stores_at,
)
from pipeline.commands.skipped_notes import counted_reasons
from pipeline.console import Answer, in_bytes
from stages.progress import Progress


def run(where: str, progress: Progress) -> Answer:
    """List the stores of a folder or URL; one that cannot be read is told with what is wrong."""
    del progress  # commit records are read in seconds
    cache = place_of(where)
    answer = each_store(stores_at(cache), _look, title=lambda found: _title(found, cache))
    old = sum("remedy" in store for store in answer.data["stores"])
    if old:
        answer.notes.append(
            f"{counted(old, 'store')} of an older schema version, which cannot be read: set "
            "another cache folder, or remove them, and run sam2vx-pipeline extract-features"
        )
    return answer


def _title(found: Sequence[Outcome], cache: Where) -> str:
    sizes = [outcome.data["bytes"] for outcome in found if "bytes" in outcome.data]
    size = f", {in_bytes(sum(sizes))}" if sizes else ""
    return f"{counted(len(found), 'store')}{size}: {cache}"


def _look(store: Where) -> Outcome:
    try:
        reader = StoreReader(store)
    except UnknownSchemaVersion as error:
        return _of_another_version(store, error)
    settings, skipped = reader.settings, reader.skipped
    reasons = f" ({counted_reasons(skipped)})" if skipped else ""
    written = _written(store, reader.provenance)
    rows = [
        ("clips", f"{len(reader)}, and {len(skipped)} skipped{reasons}"),
        ("size", in_bytes(reader.num_bytes)),
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
        data["quarantine_bytes"] = size = _bytes_of_its_own(quarantine)
        rows.append(("quarantine", f"what repair took out; deleting it frees {in_bytes(size)}"))
    return Outcome(rows=indented(rows), data=data)


def _of_another_version(store: Where, error: UnknownSchemaVersion) -> Outcome:
    """What can be said of a store that is older or newer than this package."""
    record = parse_json(open_place(store).read(STORE_FILE))
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
        return Outcome(rows=indented(rows), data=data | {"remedy": str(error)})
    return Outcome(
        rows=indented(rows),
        data=data | {"error": str(error)},
        notes=[f"error: {error}"],
        failed=True,
    )


def _written(store: Where, made_with: Mapping[str, Any]) -> datetime | None:
    """When the store was begun; where it does not say, the date of the oldest file written once.

    Repairing can have store.json written again, dropping clips a shard's group.
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


def _bytes_of_its_own(folder: Path) -> int:
    """What deleting a folder would free: a file that is linked elsewhere too stays there."""
    found = (file.stat() for file in folder.rglob("*") if file.is_file())
    return sum(status.st_size for status in found if status.st_nlink == 1)
