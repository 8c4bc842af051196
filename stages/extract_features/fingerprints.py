"""What each kind's entry of a clip is made from; see `stages.clips.fingerprints` for the format."""

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
"""In words."""


def fingerprint_of(
    record: ClipRecord | BadRecord, kind: Kind, teacher: TeacherConfig, video_hash: str
) -> str:
    """The fingerprint of a clip's entry of a kind; what the kind does not read does not change it.

    Args:
        record: The clip as the dataset has it.
        kind: Of the store; those of one pass of SAM2 have the same one.
        teacher: Which sources prompts come from.
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
    """Of the sources that may be asked for this clip's prompt, what they go by."""
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
