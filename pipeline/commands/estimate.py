"""`extract-features --dry-run`: what stage one would take, from headers and shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.commands.assets import is_of_demo
from pipeline.commands.skipped_notes import counted_reasons, skipped_notes
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import Answer, in_bytes, in_flop, in_time
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.dry_run.extract import (
        Estimate,
        FormEstimate,
        KindEstimate,
        PassEstimate,
    )

_HOW = (
    "estimated: time from operations, at a usual share of this device's rate of matrix products "
    "(models as small as the demo's reach a tenth of it), without decoding videos; memory from "
    "shapes, without what libraries add"
)


def run(
    config: RunConfig,
    progress: Progress,
    *,
    retry_failed: bool = False,
    refresh_changed: bool = False,
) -> Answer:
    """Estimate; neither the cache nor the demo's clips and models are written.

    Args:
        config: The whole configuration.
        progress: Told of the clips.
        retry_failed: Count the clips too that earlier runs had to skip.
        refresh_changed: Count the clips too whose source has changed.

    Raises:
        ConfigError: The demo's clips are not drawn yet.
    """
    if is_of_demo(config, "clips") and not config.data.path.exists():
        raise ConfigError(
            f"there is no {config.data.path} yet: the demo's clips are drawn by the first command "
            "that works on them, such as extract-features without --dry-run"
        )
    from stages.dry_run.extract import estimate

    found = estimate(
        config.extract,
        config.data,
        config.model,
        config.cache_folder,
        progress=progress,
        retry_failed=retry_failed,
        refresh_changed=refresh_changed,
    )
    rows = _dataset_rows(found)
    for one in found.passes:
        for kind in found.kinds:
            if kind.kind in one.kinds and kind.bucket == one.bucket:
                rows += _kind_rows(kind)
        rows += _pass_rows(one)
    rows += _form_rows(found.forms)
    least = "at least " if any(one.cost is None for one in found.passes) else ""
    about = "about " if any(kind.is_compressed for kind in found.kinds) else ""
    size, free = in_bytes(found.bytes), in_bytes(found.free_bytes)
    rows += [
        ("disk", f"{least or about}{size} to be written, {free} free"),
        ("time", f"{least}{in_time(found.seconds)} on one worker like this one: {found.device}"),
    ]
    return Answer(
        title=f"estimate for {config.name}",
        rows=rows,
        data=_data(config, found),
        notes=_notes(config, found),
    )


def _dataset_rows(found: Estimate) -> list[tuple[str, str]]:
    read = "" if found.clips_probed == found.clips else f", headers of {found.clips_probed} read"
    sources = ", ".join(f"{count} {source}" for source, count in found.prompts.items())
    rows = [
        ("dataset", found.dataset),
        ("clips", f"{found.clips} in {found.shards} shards, {in_bytes(found.dataset_bytes)}{read}"),
        ("frames", f"{' or '.join(map(str, sorted(set(found.frames_per_clip))))} a clip"),
    ]
    rows += [("prompts", sources)] if sources else []
    converted = ", ".join(f"{count} {what}" for what, count in found.conversions.items())
    return [*rows, ("source videos", converted)] if converted else rows


def _kind_rows(kind: KindEstimate) -> list[tuple[str, str]]:
    there = f", {kind.clips_already_there} already there" if kind.clips_already_there else ""
    listed = counted_reasons(kind.skipped_clips)
    rows = [
        (
            kind.name,
            "not named before its weights are here" if kind.store is None else str(kind.store),
        ),
        ("  clips", f"{kind.clips} to be written{there}"),
        ("  skipped", f"{kind.skipped} ({listed})" if kind.skipped_clips else "none"),
    ]
    if kind.bytes is None or kind.bytes_per_clip is None:
        return [*rows, ("  disk", "unknown")]
    return [*rows, ("  disk", _size(kind.bytes, kind.bytes_per_clip, about=kind.is_compressed))]


def _form_rows(forms: Sequence[FormEstimate]) -> list[tuple[str, str]]:
    """The teacher's forms side by side, so that one can be chosen."""
    rows = [
        (
            f"  {form.size.kind} {form.size.dtype}{f' {form.bucket}' if form.bucket else ''}",
            _size(form.bytes, form.size.bytes_per_clip, about=form.size.is_compressed)
            + (", chosen" if form.size.is_chosen else ""),
        )
        for form in forms
    ]
    clips = sum({form.bucket: form.clips for form in forms}.values())
    return [("forms of the teacher", f"for {clips} clips"), *rows] if forms else []


def _size(total: int, per_clip: int, *, about: bool) -> str:
    compressed = ", compressed" if about else ""
    less = "about " if about else ""
    return f"{less}{in_bytes(total)}, {in_bytes(per_clip)} a clip{compressed}"


def _pass_rows(one: PassEstimate) -> list[tuple[str, str]]:
    if one.cost is None or one.flops is None or one.seconds is None:
        return [("  memory, time", "unknown")]
    cost = one.cost
    parts = f"weights {in_bytes(cost.weight_bytes)}, activations {in_bytes(cost.working_bytes)}"
    if cost.waiting_bytes:
        parts += f", frames and maps {in_bytes(cost.waiting_bytes)}"
    rate = f"{in_flop(one.flops_per_second * one.usual_share)}/s"
    together = [(", ".join(one.kinds), "from one pass")] if len(one.kinds) > 1 else []
    return [
        *together,
        ("  memory", f"{in_bytes(cost.memory_bytes)} ({parts})"),
        ("  work", f"{in_flop(one.flops)}, {in_flop(cost.flops_per_clip)} a clip"),
        ("  time", f"{in_time(one.seconds)} at {rate}, both estimated"),
    ]


def _notes(config: RunConfig, found: Estimate) -> list[str]:
    skipped = skipped_notes(
        ((kind.name, clip) for kind in found.kinds for clip in kind.skipped_clips), "would skip"
    )
    return [*skipped, *found.notes, *_warnings(config, found), _HOW]


def _warnings(config: RunConfig, found: Estimate) -> list[str]:
    warnings = []
    if found.clips_probed < found.clips:
        warnings.append(
            f"headers of {found.clips_probed} clips in evenly spread shards were read; what is "
            f"said of all {found.clips} is in proportion"
        )
    if found.bytes > found.free_bytes:
        warnings.append(
            f"warning: the disk of {config.cache} has {in_bytes(found.free_bytes)} free, and "
            f"{in_bytes(found.bytes)} are to be written; set cache to a folder on a larger one"
        )
    for one in found.passes:
        of_size = f" {one.bucket}" if one.bucket else ""
        if one.cost is not None and one.cost.memory_bytes > found.device_bytes:
            warnings.append(
                f"warning: {' and '.join(one.kinds)}{of_size} would take "
                f"{in_bytes(one.cost.memory_bytes)} of memory, and {found.device} has "
                f"{in_bytes(found.device_bytes)}"
            )
    for kind in dict.fromkeys(of_size.kind for of_size in found.kinds):
        of_kind = [of_size for of_size in found.kinds if of_size.kind == kind]
        skipped = sum(of_size.skipped for of_size in of_kind)
        total = skipped + sum(of_size.clips for of_size in of_kind)
        if total and skipped / total > config.extract.max_skipped:
            warnings.append(
                f"warning: {skipped / total:.0%} of {kind} would be skipped, more than "
                f"extract.max_skipped={config.extract.max_skipped:g} allows"
            )
    return warnings


def _data(config: RunConfig, found: Estimate) -> dict[str, Any]:
    data: dict[str, Any] = {
        "cache": config.cache,
        "clips": found.clips,
        "shards": found.shards,
        "frames_per_clip": list(found.frames_per_clip),
        "dataset_bytes": found.dataset_bytes,
        "clips_probed": found.clips_probed,
        "prompts": dict(found.prompts),
        "conversions": dict(found.conversions),
        "bytes": found.bytes,
        "free_bytes": found.free_bytes,
        "seconds": found.seconds,
        "device": found.device,
        "device_bytes": found.device_bytes,
        "warnings": [*found.notes, *_warnings(config, found)],
        "passes": [_pass_data(one) for one in found.passes],
        "forms": [_form_data(form) for form in found.forms],
    }
    return data | {kind.name: _kind_data(kind) for kind in found.kinds}


def _pass_data(one: PassEstimate) -> dict[str, Any]:
    cost = one.cost
    return {
        "kinds": list(one.kinds),
        "bucket": one.bucket,
        "clips": one.clips,
        "flops": one.flops,
        "flops_per_clip": None if cost is None else cost.flops_per_clip,
        "flops_per_second": one.flops_per_second,
        "usual_share": one.usual_share,
        "seconds": one.seconds,
        "memory_bytes": None if cost is None else cost.memory_bytes,
        "weight_bytes": None if cost is None else cost.weight_bytes,
        "working_bytes": None if cost is None else cost.working_bytes,
        "waiting_bytes": None if cost is None else cost.waiting_bytes,
    }


def _form_data(form: FormEstimate) -> dict[str, Any]:
    return {
        "kind": form.size.kind,
        "dtype": form.size.dtype,
        "bucket": form.bucket,
        "chosen": form.size.is_chosen,
        "clips": form.clips,
        "bytes_per_clip": form.size.bytes_per_clip,
        "bytes": form.bytes,
        "compressed": form.size.is_compressed,
    }


def _kind_data(kind: KindEstimate) -> dict[str, Any]:
    return {
        "store": None if kind.store is None else str(kind.store),
        "clips": kind.clips,
        "clips_already_there": kind.clips_already_there,
        "skipped_count": kind.skipped,
        "skipped": [
            {"key": clip.key, "reason": clip.reason, "detail": clip.detail}
            for clip in kind.skipped_clips
        ],
        "bytes_per_clip": kind.bytes_per_clip,
        "bytes": kind.bytes,
        "compressed": kind.is_compressed,
    }
