"""Which scores of a video's frames see which corruption of real clips.

    python tests/benchmarks/corrupted_clips.py --clips folder/of/clips

Each clip is scored as it is and with its motion or its structure broken. The table shows the mean
over the clips of the score after the corruption, divided by the clip's own; the spread is over the
clips. Scores of structure need a trained tracker and are not part of this.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from report import finish, machine, median_and_spread, table

from stages.clips import ClipRecord, ClipsConfig, load_clip, open_dataset
from stages.video_scores.groups import frame_scores

# Legend: T frame, H W pixels, C colour (RGB).

GROUPS = ("appearance", "vbench")
SEEN = 0.05
"""Relative change of a score from which it is said to see a corruption."""


def shuffled(frames_THWC: np.ndarray) -> np.ndarray:
    """The frames in random order."""
    order_T = np.random.default_rng(0).permutation(len(frames_THWC))
    return frames_THWC[order_T]


def frozen(frames_THWC: np.ndarray) -> np.ndarray:
    """The second half of the clip repeats the middle frame."""
    middle = len(frames_THWC) // 2
    return np.concatenate(
        [
            frames_THWC[:middle],
            np.repeat(frames_THWC[middle : middle + 1], len(frames_THWC) - middle, 0),
        ]
    )


def melted(frames_THWC: np.ndarray) -> np.ndarray:
    """Displaced by a smooth random field that changes with time, by about 6% of the size."""
    frames, height, width, _ = frames_THWC.shape
    noise = torch.randn(2, frames // 4 + 2, 6, 9, generator=torch.Generator().manual_seed(0))
    field_2THW = F.interpolate(
        noise[None], (frames, height, width), mode="trilinear", align_corners=True
    )[0]
    y_HW, x_HW = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    grid_THW2 = torch.stack([x_HW, y_HW], -1) + 0.06 * field_2THW.permute(1, 2, 3, 0)
    moved = [
        F.grid_sample(
            torch.from_numpy(frame_HWC).permute(2, 0, 1)[None].float(),
            grid_HW2[None],
            padding_mode="border",
            align_corners=True,
        )[0]
        for frame_HWC, grid_HW2 in zip(frames_THWC, grid_THW2, strict=True)
    ]
    return torch.stack(moved).permute(0, 2, 3, 1).round().clamp(0, 255).byte().numpy()


def swapped(frames_THWC: np.ndarray) -> np.ndarray:
    """The lower half is that of the frame half a clip later."""
    half = frames_THWC.shape[1] // 2
    later_THWC = np.roll(frames_THWC, -(len(frames_THWC) // 2), axis=0)
    return np.concatenate([frames_THWC[:, :half], later_THWC[:, half:]], axis=1)


def blurred(frames_THWC: np.ndarray) -> np.ndarray:
    """Averaged over 9x9 pixels: the control, which scores of appearance must see."""
    frames = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2).float()
    smooth = F.avg_pool2d(frames, 9, stride=1, padding=4, count_include_pad=False)
    return smooth.permute(0, 2, 3, 1).round().byte().numpy()


CORRUPTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "frames shuffled": shuffled,
    "second half frozen": frozen,
    "melted": melted,
    "halves of other frames": swapped,
    "blurred": blurred,
}


def main() -> None:
    """Score every clip and its corrupted copies, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, required=True, help="a dataset of clips")
    parser.add_argument("--num-frames", type=int, default=33)
    parser.add_argument("--write-to", type=Path, help="a Markdown file to add the report to")
    arguments = parser.parse_args()
    config = ClipsConfig(
        path=arguments.clips, num_frames=arguments.num_frames, height=240, width=368
    )
    ratios: dict[str, dict[str, list[float]]] = {name: {} for name in CORRUPTIONS}
    clips = 0
    for shard in open_dataset(config).shards:
        for record in shard.records():
            assert isinstance(record, ClipRecord)
            frames_THWC = load_clip(record, config).frames_THWC
            own = _scores(frames_THWC)
            clips += 1
            for name, corrupt in CORRUPTIONS.items():
                for score, value in _scores(corrupt(frames_THWC)).items():
                    ratios[name].setdefault(score, []).append(value / own[score])
    names = list(ratios["blurred"])
    rows = []
    seen: dict[str, list[str]] = {}
    for corruption, of_score in ratios.items():
        cells = []
        seen[corruption] = []
        for score in names:
            median, (least, most) = median_and_spread(of_score[score])
            cells.append(f"{median:.2f} ({least:.2f} to {most:.2f})")
            if abs(median - 1) >= SEEN:
                seen[corruption].append(score)
        rows.append([corruption, *cells])
    finish(
        "corrupted_clips",
        table(["corruption", *names], rows),
        {
            "value": seen,
            "target": {"blurred": ["contrast", "sharpness"]},
            "spread": "smallest and largest ratio, in the table",
            "machine": machine(torch.device("cpu")),
            "settings": {"clips": clips, "size": config.size_name, "seen from": SEEN},
        },
        arguments.write_to,
    )


def _scores(frames_THWC: np.ndarray) -> dict[str, float]:
    found, _ = frame_scores(frames_THWC, GROUPS, prompt=None, fps=8.0)
    return found


if __name__ == "__main__":
    main()
