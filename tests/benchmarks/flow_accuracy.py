"""How much of the true motion a teacher's Local Gram Flow holds, on drawn clips.

    python -m tests.benchmarks.flow_accuracy --write tests/benchmarks/flow_accuracy.md

Points on the limbs of drawn figures have known places on the next map. A teacher's Gram flow gives
the token of such a point a probability for each token of its window; the negative log-likelihood of
the true one, in nats, says how much of the motion the loss can teach, and at which temperature.
Beside the packaged tracker's features stand those of random weights, those of a tracker without
errors (`evidence/limb_features.py`), and what needs no teacher: a uniform choice, and how often
points move so far and there at all (the prior). The motion is that of the comparison in
`evidence/`.
"""

# Legend: T frame, M map, N point, H W token grid, K neighbour, G channel, 2 x and y.

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.clips import ClipSkipped, SubjectPrompt
from stages.config import FeatureKind
from stages.demo.build import PRETRAINED
from stages.demo.figures import BODY_PLANS
from stages.demo.scenes import FigureClip
from stages.demo.tiny_sam2 import build_tiny_sam2
from stages.extract_features.teacher.clip_features import fused_features
from stages.local_gram_flow import local_gram_flow
from stages.local_gram_flow.alignment import frames_to_latents, latent_frame_of_frame
from stages.local_gram_flow.windows import neighbour_mask, neighbour_offsets
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.tracker import Tracker
from stages.video_scores.limb_labels import label_limbs
from tests.benchmarks.evidence.data import draw_faster_clip
from tests.benchmarks.evidence.limb_features import limb_features
from tests.benchmarks.evidence.sizes import SIZES
from tests.benchmarks.report import finish, machine, table

PATCH = 16
"""Pixels per token."""
RADIUS = 2
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.5)
FEATURES: tuple[FeatureKind, ...] = ("memory_attention", "memory_encoder", "image_encoder")
RATES = ("frame", "latent")
_FIRST_SEED = 700_000
_ALONG = np.linspace(0.1, 0.9, 9)
"""Places of the points between a limb's joints."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moves:
    """Where the points of a clip's limbs go from each map to the next."""

    map_N: np.ndarray
    row_N: np.ndarray
    column_N: np.ndarray
    """Token of the point."""
    neighbour_N: np.ndarray
    """Number of its next token in the window."""


def true_moves(clip: FigureClip, rate: str) -> Moves:
    """The moves of all points that are seen on both maps and stay within the window.

    At latent rate a point is at its mean place over the latent's frames, and seen if it is on the
    middle one.
    """
    frames_T = np.arange(len(clip.frames_THWC))
    if rate == "latent":
        latent_T = latent_frame_of_frame(len(frames_T)).numpy()
        groups = [np.flatnonzero(latent_T == latent) for latent in range(latent_T[-1] + 1)]
    else:
        groups = [frames_T[[frame]] for frame in frames_T]
    labels_THW = label_limbs(clip.frames_THWC, BODY_PLANS[clip.kind])
    _, height, width = labels_THW.shape
    names = list(clip.joint_names)
    found: list[tuple[int, int, int, int]] = []
    for number, limb in enumerate(clip.limbs):
        start_T2, end_T2 = (clip.joints_TJ2[:, names.index(one)] for one in (limb.start, limb.end))
        for along in _ALONG:
            place_T2 = (1 - along) * start_T2 + along * end_T2
            place_M2 = np.stack([place_T2[group].mean(0) for group in groups])
            seen_M = []
            for group in groups:
                frame = group[len(group) // 2]
                x, y = np.floor(place_T2[frame]).astype(int)
                inside = 0 <= x < width and 0 <= y < height
                seen_M.append(inside and labels_THW[frame, y, x] == number)
            token_M2 = np.floor(place_M2 / PATCH).astype(int)
            for step in range(len(groups) - 1):
                dx, dy = token_M2[step + 1] - token_M2[step]
                if seen_M[step] and seen_M[step + 1] and max(abs(dx), abs(dy)) <= RADIUS:
                    neighbour = (dy + RADIUS) * (2 * RADIUS + 1) + dx + RADIUS
                    found.append((step, token_M2[step, 1], token_M2[step, 0], neighbour))
    columns = np.array(found, dtype=int).reshape(-1, 4).T
    return Moves(map_N=columns[0], row_N=columns[1], column_N=columns[2], neighbour_N=columns[3])


def rows_of_points(features_THWG: Tensor, moves: Moves, rate: str) -> tuple[Tensor, Tensor]:
    """Similarities of the points' tokens to their windows [N, K], and which are in the grid."""
    maps = features_THWG if rate == "frame" else frames_to_latents(features_THWG)
    similarities_MHWK = local_gram_flow(maps[None], RADIUS)[0]
    height, width = maps.shape[1:3]
    inside_HWK = neighbour_mask(height, width, RADIUS)
    at = moves.row_N, moves.column_N
    return similarities_MHWK[moves.map_N, *at], inside_HWK[at]


def likelihood(scores_NK: Tensor, inside_NK: Tensor, neighbour_N: Tensor) -> Tensor:
    """Negative log-likelihood of the true neighbours, nats: [N]."""
    log_NK = scores_NK.masked_fill(~inside_NK, -torch.inf).log_softmax(-1)
    return -log_NK.gather(1, neighbour_N[:, None])[:, 0]


def prior_of(neighbour_N: Tensor) -> Tensor:
    """Logarithm of how often points move to each neighbour, with one more of each: [K]."""
    counts_K = torch.bincount(neighbour_N, minlength=(2 * RADIUS + 1) ** 2) + 1.0
    return (counts_K / counts_K.sum()).log()


def features_of(clips: list[FigureClip], kind: FeatureKind, tracker: Tracker) -> Iterator[Tensor]:
    """Fused features of each clip, in order; raises ClipSkipped if the subject is lost."""
    for clip in clips:
        height, width = clip.mask_HW.shape
        yield fused_features(
            tracker,
            clip.frames_THWC,
            SubjectPrompt(mask_HW=clip.mask_HW),
            token_grid=(height // PATCH, width // PATCH),
            features=kind,
        ).features_THWG


def tracked(clips: list[FigureClip], tracker: Tracker) -> list[FigureClip]:
    """The clips whose subject the tracker keeps."""
    kept = []
    for clip in clips:
        try:
            next(features_of([clip], "memory_encoder", tracker))
        except ClipSkipped:
            continue
        kept.append(clip)
    return kept


def measure(num_clips: int) -> tuple[list[list[str]], dict[str, float]]:
    """Lines of the table, and by line how many nats the teacher says beyond the prior."""
    folder = PRETRAINED / "sam2"
    config = str(folder / "tiny.yaml")
    packaged = build_sam2(config, folder / "tiny.safetensors", device="cpu")
    trained = Tracker(packaged, precision="fp32")
    random = Tracker(build_tiny_sam2(folder / "tiny.yaml", 0), precision="fp32")
    size = SIZES["default"]
    drawn = [draw_faster_clip(_FIRST_SEED + number, size) for number in range(num_clips)]
    clips = tracked(drawn, trained)
    sides = [("trained", trained, kind) for kind in FEATURES]
    sides += [("random", random, kind) for kind in FEATURES]
    features = {
        f"{name}, {kind}": list(features_of(clips, kind, tracker)) for name, tracker, kind in sides
    }
    features["no errors: limbs of the drawing"] = [
        limb_features(clip, (size.height // PATCH, size.width // PATCH)) for clip in clips
    ]
    lines, gains = [], {}
    for rate in RATES:
        moves = [true_moves(clip, rate) for clip in clips]
        neighbour_N = torch.from_numpy(np.concatenate([one.neighbour_N for one in moves]))
        prior_K = prior_of(neighbour_N)
        leaves_N = (neighbour_offsets(RADIUS)[neighbour_N] != 0).any(-1)
        for name, of_clips in features.items():
            points = [
                rows_of_points(one, move, rate) for one, move in zip(of_clips, moves, strict=True)
            ]
            similar_NK, inside_NK = (torch.cat(one) for one in zip(*points, strict=True))

            def nats(
                scores_NK: Tensor, inside_NK: Tensor = inside_NK, true_N: Tensor = neighbour_N
            ) -> float:
                return likelihood(scores_NK, inside_NK, true_N).mean().item()

            prior = nats(prior_K.expand_as(similar_NK))
            if name == next(iter(features)):
                moving = f"{leaves_N.float().mean():.0%} of {len(leaves_N)} points change token"
                uniform = f"{nats(torch.zeros_like(similar_NK)):.2f} (uniform)"
                lines.append([rate, f"none: {moving}", "", uniform, f"{prior:.2f} (prior)", ""])
            alone = {t: nats(similar_NK / t) for t in TEMPERATURES}
            beside = {t: nats(similar_NK / t + prior_K) for t in TEMPERATURES}
            best, best_beside = (
                min(alone, key=alone.__getitem__),
                min(beside, key=beside.__getitem__),
            )
            top_N = similar_NK.masked_fill(~inside_NK, -torch.inf).argmax(-1) == neighbour_N
            lines.append(
                [
                    rate,
                    name,
                    f"{alone[0.1]:.2f}",
                    f"{alone[best]:.2f} at {best:g}",
                    f"{beside[best_beside]:.2f} at {best_beside:g}",
                    f"{top_N.float().mean():.0%}, {top_N[leaves_N].float().mean():.0%}",
                ]
            )
            gains[f"{rate} rate, {name}"] = round(prior - beside[best_beside], 3)
    return lines, gains


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    options = parser.parse_args()
    lines, gains = measure(options.clips)
    header = ["rate", "teacher", "nats at temperature 0.1", "at its best", "with the prior"]
    finish(
        "flow_accuracy",
        table([*header, "most similar token is true: of all, of those that change token"], lines),
        {
            "value": max(gains.values()),
            "target": None,
            "spread": [min(gains.values()), max(gains.values())],
            "nats_beyond_the_prior": gains,
            "machine": machine(torch.device("cpu")),
            "settings": {"clips": str(options.clips), "radius": str(RADIUS)},
        },
        options.write,
    )


if __name__ == "__main__":
    main()
