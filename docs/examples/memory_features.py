"""Fused SAM2 memory features of one clip in memory: no dataset, no configuration, no store."""

from pathlib import Path

import torch

from stages.clips import SubjectPrompt, read_video
from stages.extract_features.teacher.clip_features import ClipFeatures, fused_features
from stages.sam2_tracking.opening import build_tracker, find_checkpoint
from stages.sam2_tracking.tracker import Tracker


def features_of(
    video: Path,
    box_xyxy: tuple[float, float, float, float],
    checkpoint: str = "facebook/sam2.1-hiera-large",
    config: str | None = None,  # found from the checkpoint, if that is an official one
) -> ClipFeatures:
    """Track the subject in the box of the first frame both ways, and fuse the tracks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = build_tracker(config, find_checkpoint(checkpoint), device=device)
    tracker = Tracker(network, precision="bf16" if device == "cuda" else "fp32")
    frames_THWC, _ = read_video(video)  # uint8; or frames of your own
    prompt = SubjectPrompt(box_xyxy=box_xyxy)  # or mask_HW=, or points_xy= with point_labels=
    return fused_features(tracker, frames_THWC, prompt, token_grid=(30, 45))


if __name__ == "__main__":
    clip = features_of(Path("lion.mp4"), (45, 205, 515, 420))
    print(f"features {tuple(clip.features_THWG.shape)} on {clip.features_THWG.device}")
    print(f"both tracks see the subject on {int(clip.valid_T.sum())} frames")
    print(f"their masks overlap by {clip.track.cycle_consistency:.2f}")
