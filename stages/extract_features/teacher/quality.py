"""Quality checks of a clip's tracks, and the attributes stored with them."""

from collections.abc import Sequence

from cache_schema import JSON
from stages.clips import Clip, ClipSkipped
from stages.extract_features.prompts import ChosenPrompt
from stages.extract_features.teacher.stores import valid_frames
from stages.extract_features.teacher.two_way import SubjectTrack


def refusal(tracks: Sequence[SubjectTrack], *, min_cycle_consistency: float) -> ClipSkipped | None:
    """Return why a clip is skipped, or None if its tracks are good enough.

    Returns:
        subject_lost, if no two consecutive frames are valid, so that there is no motion to learn;
        inconsistent, if the forward and backward masks overlap too little.
    """
    valid_T = valid_frames(tracks)
    if not (valid_T[:-1] & valid_T[1:]).any():
        return ClipSkipped(
            "subject_lost",
            f"every track sees its subject on {int(valid_T.sum())} of {len(valid_T)} frames, no "
            f"two of them neighbours; the forward track sees it last on frame {_last(tracks)}",
        )
    consistency = _cycle_consistency(tracks)
    if consistency is not None and consistency < min_cycle_consistency:
        return ClipSkipped(
            "inconsistent",
            f"forward and backward masks overlap by {consistency:.3f} on average; "
            f"extract.teacher.min_cycle_consistency is {min_cycle_consistency:g}",
        )
    return None


def track_attributes(
    clip: Clip, chosen: ChosenPrompt, tracks: Sequence[SubjectTrack]
) -> dict[str, JSON]:
    """Return the attributes stored with a clip's arrays.

    first_frame to last_frame is the range covered by every subject's forward track; lost_at is the
    next frame, null if the range reaches the end of the clip. quality is the mean cycle consistency
    over the subjects, null without a backward pass.
    """
    last_frame, valid_T = _last(tracks), valid_frames(tracks)
    return {
        "num_frames": len(valid_T),
        "prompt": {
            **chosen.detail,
            "source": chosen.source,
            "kinds": [subject.kind for subject in chosen.subjects],
            "frame": chosen.frame,
            "subjects": len(chosen.subjects),
            "confidence": chosen.confidence,
            "backward": tracks[0].backward_prompt,
        },
        "first_frame": max(track.first_frame for track in tracks),
        "last_frame": last_frame,
        "lost_at": last_frame + 1 if last_frame + 1 < len(valid_T) else None,
        "valid_frames": int(valid_T.sum()),
        "quality": _cycle_consistency(tracks),
        "geometry": dict(clip.geometry.as_dict()),
    }


def _last(tracks: Sequence[SubjectTrack]) -> int:
    return min(track.last_frame for track in tracks)


def _cycle_consistency(tracks: Sequence[SubjectTrack]) -> float | None:
    known = [track.cycle_consistency for track in tracks if track.cycle_consistency is not None]
    return sum(known) / len(known) if known else None
