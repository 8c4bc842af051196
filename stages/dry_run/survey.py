"""What a dataset's headers tell before any work: how many clips, and which would be skipped.

`estimate` adds up from here. Nothing is decoded, so that damage inside a video, a subject outside
the crop and a subject that gets lost show in the run alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cache_schema import SkippedClip
from stages.clips import (
    BadRecord,
    ClipRecord,
    ClipsConfig,
    ClipSkipped,
    InputShard,
    bucket_of,
    probe_clip,
)
from stages.extract_features.config import ExtractConfig, Kind, PromptSource, TeacherConfig
from stages.extract_features.kinds import TRACKED_KINDS
from stages.extract_features.prompts import check_prompt, usable_sources
from stages.extract_features.teacher.prompts import too_many_subjects
from stages.progress import Progress

MAX_PROBED = 10_000
"""Clips whose headers are read, at most; of a larger dataset, evenly spread shards speak for it."""


@dataclass(kw_only=True, slots=True)
class ShardSurvey:
    """One shard of the dataset."""

    name: str
    num_clips: int
    """Records of every size, bad ones included."""
    num_bytes: int
    probed: bool = False
    """Whether its clips' headers were read; what follows is empty otherwise."""
    skipped: dict[Kind, list[SkippedClip]] = field(default_factory=dict)
    """By kind: the clips that would be left out."""
    prompts: Counter[PromptSource] = field(default_factory=Counter)
    """How many clips would be prompted by each source."""
    conversions: Counter[str] = field(default_factory=Counter)
    """How many clips' frames would be deinterlaced, tone-mapped, …; or come from one of several
    video streams."""
    subjects: dict[str, int] = field(default_factory=dict)
    """Of the clips that are tracked, by key."""
    other_size: set[str] = field(default_factory=set)
    """Keys of clips that go to another size than this survey's."""


Surveys = dict[str | None, list[ShardSurvey]]
"""Of every shard, by size; under None of what has no size, or of everything without buckets."""


def survey_shards(
    shards: Sequence[InputShard],
    config: ExtractConfig,
    clips: ClipsConfig,
    progress: Progress,
    *,
    max_probed: int = MAX_PROBED,
) -> Surveys:
    """Count every shard's clips and read the headers of all of them, or of evenly spread shards.

    Args:
        shards: Of the dataset, in order.
        config: Which kinds, and where prompts come from.
        clips: The sizes and the rate that clips are brought to.
        progress: Gets a bar for each of the two.
        max_probed: Read the headers of about as many clips, at most; one shard at least.
    """
    counted = []
    with progress.task("count", len(shards), unit="shards") as task:
        for shard in shards:
            counted.append((shard.name, shard.num_clips(), shard.num_bytes()))
            task.advance()
    chosen = _evenly_spread([num_clips for _, num_clips, _ in counted], max_probed)
    total = sum(counted[place][1] for place in chosen)
    surveys: Surveys = {
        size: [
            ShardSurvey(name=name, num_clips=num_clips, num_bytes=num_bytes)
            for name, num_clips, num_bytes in counted
        ]
        for size in (None, *clips.buckets)
    }
    for of_size in surveys.values():
        for place in chosen:
            of_size[place].probed = True
    with progress.task("headers", total, unit="clips") as task:
        for place in chosen:
            here = {size: of_size[place] for size, of_size in surveys.items()}
            for record in shards[place].records():
                _survey_all_sizes(record, here, config, clips)
                task.advance()
    return surveys


def _survey_all_sizes(
    record: ClipRecord | BadRecord,
    surveys: Mapping[str | None, ShardSurvey],
    config: ExtractConfig,
    clips: ClipsConfig,
) -> None:
    if not clips.buckets:
        _survey_record(record, surveys[None], config, clips)
        return
    without_size: tuple[Kind, ...] = tuple(kind for kind in config.kinds if kind == "text")
    sized = tuple(kind for kind in config.kinds if kind != "text")
    _survey_record(record, surveys[None], config.model_copy(update={"kinds": without_size}), clips)
    chosen = bucket_of(record, clips)
    for size, survey in surveys.items():
        if size == chosen.size_name:
            _survey_record(record, survey, config.model_copy(update={"kinds": sized}), chosen)
        elif size is not None:
            survey.other_size.add(record.key)


def _evenly_spread(num_clips: Sequence[int], max_probed: int) -> list[int]:
    """Places of shards that hold about `max_probed` clips together, from all over the dataset."""
    total = sum(num_clips)
    if total <= max_probed:
        return list(range(len(num_clips)))
    count = max(1, len(num_clips) * max_probed // total)
    return [place * len(num_clips) // count for place in range(count)]


def _survey_record(
    record: ClipRecord | BadRecord, survey: ShardSurvey, config: ExtractConfig, clips: ClipsConfig
) -> None:
    problems, conversions = find_problems(record, config, clips)
    survey.conversions.update(conversions)
    for kind, problem in problems.items():
        survey.skipped.setdefault(kind, []).append(
            SkippedClip(
                key=record.key,
                reason=problem.reason,
                detail=problem.detail,
                fingerprint="",
                shard=survey.name,
            )
        )
    tracked = [kind for kind in config.kinds if kind in TRACKED_KINDS]
    if isinstance(record, ClipRecord) and tracked and tracked[0] not in problems:
        source = usable_sources(config.teacher, record)[0]
        survey.prompts[source] += 1
        several = config.teacher.subjects == "each" and source == "dataset"
        survey.subjects[record.key] = len(record.prompts) if several else 1


def find_problems(
    record: ClipRecord | BadRecord, config: ExtractConfig, clips: ClipsConfig
) -> tuple[Mapping[Kind, ClipSkipped], Sequence[str]]:
    """Why each kind would leave a clip out, and what would be done to its frames.

    The former has nothing for the kinds that take it; the latter is `ClipProbe.conversions`.
    """
    if isinstance(record, BadRecord):
        return {kind: ClipSkipped(record.reason, record.detail) for kind in config.kinds}, ()
    problems: dict[Kind, ClipSkipped] = {}
    if "text" in config.kinds and record.caption is None:
        problems["text"] = ClipSkipped("no_caption", "the dataset gives no caption for this clip")
    tracked: list[Kind] = [kind for kind in config.kinds if kind in TRACKED_KINDS]
    try:
        if tracked:
            check_prompt(config.teacher, record)
    except ClipSkipped as skipped:
        problems |= dict.fromkeys(tracked, skipped)
    decoded = [kind for kind in config.kinds if kind != "text" and kind not in problems]
    conversions: Sequence[str] = ()
    try:
        if decoded:
            conversions = probe_clip(record, clips).conversions
    except ClipSkipped as skipped:
        problems |= dict.fromkeys(decoded, skipped)
    too_many = _too_many_subjects(record, config.teacher)
    if too_many is not None:
        problems |= {kind: too_many for kind in tracked if kind not in problems}
    return problems, conversions


def _too_many_subjects(record: ClipRecord, config: TeacherConfig) -> ClipSkipped | None:
    several = config.subjects == "each" and usable_sources(config, record)[:1] == ("dataset",)
    if several and len(record.prompts) > config.max_subjects:
        return too_many_subjects(len(record.prompts), config)
    return None
