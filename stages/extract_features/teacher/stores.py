"""Settings of the teacher and mask stores; quality, arrays and attributes of a clip's tracks."""

# Legend: T frame, M map of the teacher (a frame or a latent frame), H W grid or mask, C channel,
# G fused channel.

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.clips import Clip, ClipsConfig, ClipSkipped
from stages.extract_features.config import Kind, TeacherConfig
from stages.extract_features.extraction import clip_settings
from stages.extract_features.prompts import ChosenPrompt
from stages.extract_features.teacher.two_way import SubjectTrack, Track
from stages.local_gram_flow import (
    frames_to_latents,
    fuse_directions,
    fuse_subjects,
    resample_to_grid,
)
from stages.teacher_store.config import GramFlowConfig
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.teacher_store.settings import gram_flow_settings, valid_spec

MASK_STRIDE = 4
"""Pixels of the training frame per pixel of a stored mask, in each dimension."""
_PASSES = (
    "seek from the prompted frame to frame 0, forward from the earliest frame seen, backward from "
    "the last frame the forward track sees"
)
_VALID = "object score > 0 and a mask that is not empty, in every direction and for every subject"


def tracking_settings(
    config: TeacherConfig,
    clips: ClipsConfig,
    *,
    checkpoint_sha256: str,
    library: str,
    architecture: Mapping[str, Any],
    prompts: Mapping[str, JSON],
) -> dict[str, JSON]:
    """Return the settings that determine the tracks, common to all stores filled from them.

    Args:
        config: Tracker, prompts and directions.
        clips: Size and length of clips.
        checkpoint_sha256: SHA-256 of the weights.
        library: `TrackerSpec.library`.
        architecture: `TrackerSpec.config`.
        prompts: The prompt chooser's settings.
    """
    both_ways = config.fusion != "forward"
    canonical = json.dumps(architecture, sort_keys=True)
    architecture_sha256 = hashlib.sha256(canonical.encode()).hexdigest()
    tracker: dict[str, JSON] = (
        {"sam2_config_sha256": architecture_sha256}
        if library == "sam2"
        else {"tracker": library, "tracker_config_sha256": architecture_sha256}
    )
    return {
        "clips": clip_settings(clips),
        "checkpoint_sha256": checkpoint_sha256,
        **tracker,
        "image_size": config.image_size,
        "precision": config.precision,
        "prompts": dict(prompts),
        "subjects": config.subjects,
        "max_subjects": config.max_subjects if config.subjects == "each" else None,
        "directions": ["forward", "backward"] if both_ways else ["forward"],
        "backward_prompt": config.backward_prompt if both_ways else None,
        "min_cycle_consistency": config.min_cycle_consistency,
        "passes": _PASSES,
        "valid": _VALID,
    }


def subject_settings(
    config: TeacherConfig,
    clips: ClipsConfig,
    tracking: Mapping[str, JSON],
    *,
    gram_flow: GramFlowConfig,
    channels: int,
    stride: int,
) -> dict[Kind, StoreSettings]:
    """Return the settings of all stores that can be filled from tracks.

    Args:
        config: Features, fusion and storage.
        clips: Size and length of clips.
        tracking: Settings from `tracking_settings`.
        gram_flow: Window and storage of the Gram flow.
        channels: Feature channels of one direction of one subject.
        stride: Pixels of the tracker's input per token.
    """
    teacher = teacher_settings(config, clips, tracking, channels=channels, stride=stride)
    flow = gram_flow_settings(
        teacher,
        radius=gram_flow.radius,
        dtype=gram_flow.dtype,
        token_grid=clips.token_grid,
        pairs=gram_flow.pairs,
    )
    return {
        "teacher": teacher,
        "gram_flow": flow,
        "masks": masks_settings(config, clips, tracking),
    }


def teacher_settings(
    config: TeacherConfig,
    clips: ClipsConfig,
    tracking: Mapping[str, JSON],
    *,
    channels: int,
    stride: int,
) -> StoreSettings:
    """Return the settings of the teacher store; see `subject_settings`."""
    height, width = feature_grid(config, clips, stride)
    maps = clips.num_frames if config.time_rate == "frame" else clips.num_latent_frames
    parts = (2 if config.fusion == "gram_flow" else 1) * _subject_slots(config)
    values: dict[str, JSON] = {
        **tracking,
        "features": config.features,
        "fusion": config.fusion,
        "forward_weight": None if config.fusion == "forward" else config.forward_weight,
        "time_rate": config.time_rate,
        "grid": [height, width],
        "grid_source": config.grid,
        "parts": parts,
    }
    features = feature_arrays_spec((maps, height, width, channels * parts), config.dtype)
    arrays = features | {"valid": valid_spec(maps)}
    return StoreSettings(kind="teacher", arrays=arrays, values=values)


def masks_settings(
    config: TeacherConfig, clips: ClipsConfig, tracking: Mapping[str, JSON]
) -> StoreSettings:
    """Return the settings of the masks store."""
    mask = ArraySpec(
        dtype="uint8",
        shape=(clips.num_frames, *_mask_size(clips)),
        dimension_names=("t", "h", "w"),
    )
    directions = ("forward",) if config.fusion == "forward" else ("forward", "backward")
    arrays = dict.fromkeys(directions, mask) | {"valid": valid_spec(clips.num_frames)}
    values: dict[str, JSON] = {**tracking, "masks": "255 * sigmoid of the logits, bilinear"}
    return StoreSettings(kind="masks", arrays=arrays, values=values)


def feature_grid(config: TeacherConfig, clips: ClipsConfig, stride: int) -> tuple[int, int]:
    """Return the rows and columns of the stored feature maps.

    Args:
        config: Grid and image size.
        clips: Size of clips.
        stride: Pixels of the tracker's input per token.
    """
    if config.grid == "student":
        return clips.token_grid
    side = config.image_size // stride
    return side, side


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


def teacher_arrays(tracks: Sequence[SubjectTrack], config: TeacherConfig) -> dict[str, np.ndarray]:
    """Return a clip's arrays in the teacher store.

    Maps that any track has not visited are zero. Maps on which a track does not see its subject
    hold SAM2's output, but are not valid either. At the latent rate a map is valid if all its
    frames are.

    Args:
        tracks: Tracks of the clip's subjects, with features.
        config: Fusion of directions and subjects.
    """
    fused_MHWG = [_fused(track, config) for track in tracks]
    joined_MHWG = (
        fuse_subjects(fused_MHWG, num_slots=config.max_subjects)
        if config.subjects == "each"
        else fused_MHWG[0]
    )
    visited_M = _of_maps(_all(track.visited_T for track in tracks), config)
    valid_M = _of_maps(valid_frames(tracks), config)
    visited_M111 = visited_M.to(joined_MHWG.device)[:, None, None, None]
    features = encode_features(joined_MHWG * visited_M111, config.dtype)
    return features | {"valid": _as_uint8(valid_M)}


def mask_arrays(tracks: Sequence[SubjectTrack], clips: ClipsConfig) -> dict[str, np.ndarray]:
    """Return a clip's arrays in the masks store: the maximum over the subjects at each pixel."""
    directions = [track.directions for track in tracks]
    names = ("forward", "backward")[: len(directions[0])]
    return {
        **{
            name: _mask_bytes([subject[place] for subject in directions], clips)
            for place, name in enumerate(names)
        },
        "valid": _as_uint8(valid_frames(tracks)),
    }


def valid_frames(tracks: Sequence[SubjectTrack]) -> Tensor:
    """bool [T] on the host: frames on which every track sees its subject."""
    return _all(track.usable_T for track in tracks)


def _last(tracks: Sequence[SubjectTrack]) -> int:
    return min(track.last_frame for track in tracks)


def _cycle_consistency(tracks: Sequence[SubjectTrack]) -> float | None:
    known = [track.cycle_consistency for track in tracks if track.cycle_consistency is not None]
    return sum(known) / len(known) if known else None


def _fused(track: SubjectTrack, config: TeacherConfig) -> Tensor:
    maps: list[Tensor] = []
    for direction in track.directions:
        assert direction.features_THWC is not None
        features_THWC = direction.features_THWC
        at_frame_rate = config.time_rate == "frame"
        maps.append(features_THWC if at_frame_rate else frames_to_latents(features_THWC))
    return fuse_directions(
        maps[0],
        maps[1] if len(maps) == 2 else None,
        fusion=config.fusion,
        forward_weight=config.forward_weight,
    )


def _mask_bytes(tracks: Sequence[Track], clips: ClipsConfig) -> np.ndarray:
    likeliest_THW = torch.stack(
        [
            track.logits_THW.sigmoid() * track.visited_T.to(track.logits_THW.device)[:, None, None]
            for track in tracks
        ]
    ).amax(dim=0)
    resized_THW1 = resample_to_grid(likeliest_THW[:, None], *_mask_size(clips))
    return np.asarray((255 * resized_THW1[..., 0]).round().to("cpu", torch.uint8))


def _of_maps(flags_T: Tensor, config: TeacherConfig) -> Tensor:
    """bool per frame -> bool per map: true if all frames of the map are true."""
    if config.time_rate == "frame":
        return flags_T
    share_L111 = frames_to_latents(flags_T[:, None, None, None].float())
    return share_L111.flatten() == 1


def _all(flags: Any) -> Tensor:
    return torch.stack(list(flags)).all(dim=0)


def _as_uint8(flags: Tensor) -> np.ndarray:
    return flags.numpy().astype(np.uint8)


def _subject_slots(config: TeacherConfig) -> int:
    return config.max_subjects if config.subjects == "each" else 1


def _mask_size(clips: ClipsConfig) -> tuple[int, int]:
    return clips.height // MASK_STRIDE, clips.width // MASK_STRIDE
