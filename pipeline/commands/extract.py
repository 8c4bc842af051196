"""`extract-features`: stage one."""

from typing import Any

from pipeline.commands.assets import PARTS_OF_KIND, make_missing_assets
from pipeline.commands.skipped_notes import skipped_notes, store_rows
from pipeline.config.load import RunConfig
from pipeline.console import CommandResult, json_values
from pipeline.environment import provenance_of_run, rank, world_size
from pipeline.failures import TOO_MANY_SKIPPED
from stages.progress import Progress


def run(
    config: RunConfig,
    progress: Progress,
    *,
    retry_failed: bool = False,
    refresh_changed: bool = False,
) -> CommandResult:
    """Write the stores; with a launcher, this process's part of the shards.

    Args:
        config: The whole configuration.
        progress: Advanced once per clip.
        retry_failed: Retry clips that earlier runs skipped.
        refresh_changed: Recompute clips whose source has changed.
    """
    from stages.extract_features.run import extract_features

    models = {PARTS_OF_KIND[kind] for kind in config.extract.kinds if kind in PARTS_OF_KIND}
    make_missing_assets(config, progress, reads=("clips", *sorted(models)))
    summary = extract_features(
        config.extract,
        config.data,
        config.model,
        config.cache_folder,
        provenance=provenance_of_run(),
        progress=progress,
        rank=rank(),
        world_size=world_size(),
        retry_failed=retry_failed,
        refresh_changed=refresh_changed,
    )
    rows = [("dataset", summary.dataset)]
    notes = skipped_notes((kind.name, clip) for kind in summary.kinds for clip in kind.skipped)
    data: dict[str, Any] = {
        "dataset": summary.dataset,
        "cache": config.cache,
        "skipped_share": summary.skipped_share,
    }
    for kind in summary.kinds:
        rows += store_rows(kind.name, kind)
        if kind.captions_cut:
            notes.append(
                f"captions truncated to the text encoder's length: {kind.captions_cut} "
                "(tokens_cut in each clip's attributes)"
            )
        data[kind.name] = json_values(kind, leave_out=("kind", "bucket", "name", "clips"))
        data[kind.name]["seconds"] = round(kind.seconds, 3)
    if notes and summary.failures is not None:
        data["failures"] = str(summary.failures)
        notes.append(f"all skipped clips, one per line: {summary.failures}")
    notes += summary.notes
    data["notes"] = list(summary.notes)
    too_many = summary.skipped_share > config.extract.max_skipped
    if too_many:
        notes.append(
            f"{summary.skipped_share:.0%} of the clips were skipped, more than "
            f"extract.max_skipped={config.extract.max_skipped:g} allows"
        )
    return CommandResult(
        title=f"extracted with {config.name}",
        rows=rows,
        data=data,
        notes=notes,
        exit_code=TOO_MANY_SKIPPED if too_many else 0,
    )
