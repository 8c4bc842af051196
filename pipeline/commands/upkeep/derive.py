"""`cache derive gram-flow`: the compact form of the teacher, from its stored features."""

from __future__ import annotations

from pathlib import Path

from cache_schema import find_store
from pipeline.commands.skipped_notes import counted_reasons
from pipeline.commands.upkeep.stores import list_failures_again
from pipeline.config import RunConfig
from pipeline.console import Answer, in_bytes, in_time
from pipeline.launch import rank
from pipeline.provenance import provenance_of_run
from stages.progress import Progress


def run(config: RunConfig, progress: Progress) -> Answer:
    """Write the Gram-flow store beside the teacher's; several processes may share the shards."""
    from stages.extract_features.make_extractions import device_named
    from stages.teacher_forms.derive import derive_gram_flow

    teacher = find_store(config.cache_folder, "teacher", folder=config.train.folder_of("teacher"))
    summary = derive_gram_flow(
        config.cache_folder,
        Path(teacher),
        config=config.extract.gram_flow,
        token_grid=config.data.token_grid,
        device=device_named(config.extract.device, rank()),
        provenance=provenance_of_run(),
        progress=progress,
    )
    there = f", {summary.clips_already_there} already there" if summary.clips_already_there else ""
    busy = f", {len(summary.busy_shards)} shards left to others" if summary.busy_shards else ""
    reasons = counted_reasons(summary.skipped)
    list_failures_again([summary.store], progress)
    return Answer(
        title=f"derived from {Path(teacher).name}",
        rows=[
            ("gram_flow", str(summary.store)),
            ("  clips", f"{summary.clips_written} written{there}{busy}"),
            ("  skipped", f"{len(summary.skipped)} ({reasons})" if summary.skipped else "none"),
            ("  size, time", f"{in_bytes(summary.bytes)}, {in_time(summary.seconds)}"),
        ],
        data={
            "teacher": str(teacher),
            "store": str(summary.store),
            "clips_written": summary.clips_written,
            "clips_already_there": summary.clips_already_there,
            "skipped": len(summary.skipped),
            "busy_shards": list(summary.busy_shards),
            "bytes": summary.bytes,
            "seconds": round(summary.seconds, 3),
        },
        notes=["train.teacher_form=gram_flow trains from it"],
    )
