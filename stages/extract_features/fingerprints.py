"""Fingerprints of the inputs of each kind; see `stages.clips.fingerprints` for the format."""

from stages.clips import BadRecord, ClipRecord
from stages.clips.fingerprints import NO_CLIP, hash_parts, hash_prompts
from stages.extract_features.config import Kind, TeacherConfig
from stages.extract_features.prompts.chooser import usable_sources
from stages.extract_features.prompts.grounding import phrases_of

SOURCES: dict[Kind, str] = {
    "text": "caption",
    "latents": "video",
    "teacher": "video or prompt",
    "gram_flow": "video or prompt",
    "masks": "video or prompt",
}
"""Inputs of each kind, for messages."""


def fingerprint_of(
    record: ClipRecord | BadRecord, kind: Kind, teacher: TeacherConfig, video_hash: str
) -> str:
    """Return the fingerprint of a clip's entry of a kind; it covers only the inputs of the kind.

    Args:
        record: The clip's record in the dataset.
        kind: Kind of the store; kinds written in one pass of SAM2 have equal fingerprints.
        teacher: Sources of prompts.
        video_hash: `hash_video` of the record's video; unused for a bad record.
    """
    if isinstance(record, BadRecord):
        return hash_parts([record.reason, record.detail]) + NO_CLIP
    if kind == "text":
        return hash_parts([record.caption]) + video_hash
    if kind == "latents":
        return hash_parts([video_hash]) + video_hash
    return hash_parts([video_hash, *_prompt_parts(record, teacher)]) + video_hash


def _prompt_parts(record: ClipRecord, config: TeacherConfig) -> list[str]:
    """Return the inputs of the prompt sources that may be used for this clip."""
    sources = usable_sources(config, record)
    consulted = sources if config.prompt_fallback else sources[:1]
    parts: list[str] = []
    for source in consulted:
        parts.append(source)
        if source == "dataset":
            parts.append(hash_prompts(record.prompts))
        elif source == "grounding":
            parts += phrases_of(config.grounding, record)
    if config.backward_prompt == "dataset":
        parts.append(hash_prompts(record.last_frame_prompts))
    return parts
