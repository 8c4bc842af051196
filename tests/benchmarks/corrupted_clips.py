"""Which scores see which corruption of clips.

    python tests/benchmarks/corrupted_clips.py --clips folder/of/clips --work work
    python tests/benchmarks/corrupted_clips.py --clips demo/clips --work work --config demo \\
        evaluate.scores=[structure,figures]

Each clip is scored as it is and with its motion or its structure broken. The table shows the mean
of the scores of the clips as they are, and how much each corruption changes them: the mean
difference over the clips with its 95% interval. A corruption is seen, and the difference bold,
where the interval leaves out 0 and the change is a twentieth of the mean at least. Structure is
tracked with the configuration's SAM2 from automatic prompts: generated videos have no others.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from report import finish, machine, table

from pipeline.config.load import load_config
from stages.clips import ClipRecord, ClipsConfig, load_clip, open_dataset, write_video

# Legend: T frame, H W pixels, C colour (RGB).

AS_IT_IS = "as it is"
SEEN = 0.05
"""Smallest change of a score that counts, relative to its mean."""


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


_DEFAULTS = (
    "data.path=unused",
    "model.path=unused",
    "data.num_frames=33",
    "data.height=240",
    "data.width=368",
    "evaluate.scores=[appearance,vbench]",
)
"""Settings without --config."""


def main() -> None:
    """Score every clip and its corrupted copies, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, required=True, help="a dataset of clips")
    parser.add_argument("--work", type=Path, required=True, help="folder of videos and tracks")
    parser.add_argument("--config", help="a preset or a YAML file with SAM2 and the clips' size")
    parser.add_argument("--write-to", type=Path, help="a Markdown file to add the report to")
    parser.add_argument("overrides", nargs="*", help="settings, such as evaluate.scores=[figures]")
    arguments = parser.parse_args()
    overrides = [*arguments.overrides, "extract.teacher.prompts=[automatic]"]
    if arguments.config is None:
        overrides = [*_DEFAULTS, *overrides]
    config = load_config(arguments.config, overrides)
    clips = write_copies(config.data.model_copy(update={"path": arguments.clips}), arguments.work)
    settings = [*overrides, *([] if arguments.config is None else ["--config", arguments.config])]
    found = {name: _evaluate(name, arguments.work, settings) for name in CORRUPTIONS}
    means = {
        score: values["means"][1]
        for score, values in next(iter(found.values())).items()
        if values["means"][1]["count"]
    }
    rows = [[AS_IT_IS, *map(_number, means.values())]]
    rows += [
        [name, *(_difference(scores[score], mean) for score, mean in means.items())]
        for name, scores in found.items()
    ]
    finish(
        "corrupted_clips",
        table(["clips", *means], rows),
        {
            "value": {
                name: [score for score, mean in means.items() if _is_seen(scores[score], mean)]
                for name, scores in found.items()
            },
            "target": "every corruption is seen",
            "spread": "95% bootstrap interval over the clips, in the table",
            "machine": machine(torch.device("cpu")),
            "settings": {
                "clips": clips,
                "size": config.data.size_name,
                "scores": "+".join(config.evaluate.scores),
                **({} if arguments.config is None else {"SAM2": config.extract.teacher.checkpoint}),
            },
        },
        arguments.write_to,
    )


def write_copies(clips: ClipsConfig, work: Path) -> int:
    """Write each clip as it is and with each corruption, to a folder each; returns their number."""
    count = 0
    for shard in open_dataset(clips).shards:
        for record in shard.records():
            assert isinstance(record, ClipRecord)
            clip = load_clip(record, clips)
            for name, corrupt in {AS_IT_IS: lambda same: same, **CORRUPTIONS}.items():
                # The caption names the kind of figure, the number tells equal captions apart.
                file = work / _folder(name) / f"{count}.mp4"
                write_video(file, corrupt(clip.frames_THWC), clip.geometry.source_fps)
                record_file = file.with_suffix(".json")
                record_file.write_text(json.dumps({"prompt": record.caption, "seed": count}))
            count += 1
    return count


def _evaluate(name: str, work: Path, settings: list[str]) -> dict[str, Any]:
    """The scores of a corruption's copies against the clips as they are."""
    sides = [str(work / _folder(name)), "--against", str(work / _folder(AS_IT_IS))]
    command = [sys.executable, "-m", "pipeline", "evaluate", *sides, *settings]
    # One output folder: the tracks of the clips as they are serve every corruption.
    done = subprocess.run(
        [*command, "--out", str(work / "evaluation"), "--json"], stdout=subprocess.PIPE, check=False
    )
    if done.returncode not in (0, 3):  # 3: many copies lack scores, which the counts say
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}")
    scores: dict[str, Any] = json.loads(done.stdout)["scores"]
    return scores


def _folder(name: str) -> str:
    return name.replace(" ", "-")


def _number(mean: dict[str, Any]) -> str:
    """A mean with its interval, and the number of clips if some have no value."""
    if mean["mean"] is None:
        return "no value"
    text = f"{mean['mean']:.3g}"
    if mean["low"] is not None:
        text += f" [{mean['low']:.2g}, {mean['high']:.2g}]"
    return f"{text}, n={mean['count']}" if mean["missing"] else text


def _difference(of_score: dict[str, Any], mean: dict[str, Any]) -> str:
    text = _number(of_score["difference"]["difference"])
    return f"**{text}**" if _is_seen(of_score, mean) else text


def _is_seen(of_score: dict[str, Any], mean: dict[str, Any]) -> bool:
    found = of_score["difference"]["difference"]
    if found["low"] is None or found["low"] <= 0 <= found["high"]:
        return False
    return abs(found["mean"]) >= SEEN * abs(mean["mean"])


if __name__ == "__main__":
    main()
