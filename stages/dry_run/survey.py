"""Survey of a dataset from headers: number of clips, and which would be skipped.

Nothing is decoded, so damage inside a video, a subject outside the crop and a lost subject are
found in the run only.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
"""Maximum number of clips whose headers are read; larger datasets are sampled by shards."""


@dataclass(kw_only=True, slots=True)
class ShardSurvey:
    """One shard of the dataset."""

    name: str
    num_clips: int
    """Number of records of every size, including bad ones."""
    num_bytes: int
    probed: bool = False
    """Whether its clips' headers were read; otherwise the following fields are empty."""
    skipped: dict[Kind, list[SkippedClip]] = field(default_factory=dict)
    """Clips that would be skipped, by kind."""
    prompts: Counter[PromptSource] = field(default_factory=Counter)
    """Number of clips per prompt source."""
    conversions: Counter[str] = field(default_factory=Counter)
    """Number of clips whose frames would be deinterlaced, tone-mapped, …; or come from one of
    several video streams."""
    subjects: dict[str, int] = field(default_factory=dict)
    """Number of subjects of each tracked clip, by key."""
    other_size: set[str] = field(default_factory=set)
    """Keys of clips of another size than this survey's."""

    def of_clips(self, keys: frozenset[str]) -> "ShardSurvey":
        """Return the survey of some clips only, for counting skipped ones and subjects."""
        return replace(
            self,
            num_clips=len(keys),
            skipped={
                kind: [clip for clip in clips if clip.key in keys]
                for kind, clips in self.skipped.items()
            },
            subjects={key: count for key, count in self.subjects.items() if key in keys},
            other_size=self.other_size & keys,
        )


Surveys = dict[str | None, list[ShardSurvey]]
"""Surveys of every shard by size bucket; None for kinds without a size, or without buckets."""


def survey_shards(
    shards: Sequence[InputShard],
    config: ExtractConfig,
    clips: ClipsConfig,
    progress: Progress,
    *,
    max_probed: int = MAX_PROBED,
) -> Surveys:
    """Count every shard's clips, and read the headers of all or of evenly spread shards.

    Args:
        shards: Shards of the dataset, in order.
        config: Kinds to extract and sources of prompts.
        clips: Sizes and frame rate of clips.
        progress: Shows a bar for each of the two.
        max_probed: Approximate maximum number of clips whose headers are read; at least one shard
            is read.
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
    """Return indices of evenly spread shards with about `max_probed` clips in total."""
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
    """Return why each kind would skip a clip, and the conversions of its frames.

    The former has no entry for kinds that extract the clip; the latter is `ClipProbe.conversions`.
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
