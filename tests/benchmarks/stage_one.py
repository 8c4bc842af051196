"""How much faster stage one tracks both ways than sam2's own predictor run twice.

    python tests/benchmarks/stage_one.py --architecture sam2.1_hiera_l --image-size 1024

Both sides have the same random weights, frames and prompt, take turns in one process, and must
agree before a time counts. The stock side loads a folder of images, as its users have it; ours is
given the decoded frames, as the pipeline has them; loading is not timed on either side.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sam2.build_sam import build_sam2_video_predictor

from stages.clips import SubjectPrompt
from stages.extract_features.sam2_inputs import prompt_for_sam2, resize_for_sam2
from stages.extract_features.sam2_tracker import build_sam2, official_configs
from stages.extract_features.two_way_tracking import TwoWayTracker

# Legend: T frame, C channel, H W pixels or grid, S side of SAM2's square input.

TOLERANCE = 5e-6
HEIGHT, WIDTH = 480, 720
TARGETS = {"cpu": 1.6, "cuda": 2.5}


def make_frames(num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 clip of an ellipse drifting over noise, and the mask of its first frame."""
    texture = np.random.default_rng(0).integers(0, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    masks = [
        ((x / WIDTH - 0.3 - 0.005 * t) / 0.15) ** 2 + ((y / HEIGHT - 0.5) / 0.25) ** 2 < 1
        for t in range(num_frames)
    ]
    frames = [np.where(mask[..., None], np.uint8(230), texture) for mask in masks]
    return np.stack(frames), masks[0]


def random_checkpoint(name: str, image_size: int, file: Path) -> None:
    """Weights with no idle path: layer scales are not zero and the subject stays visible."""
    torch.manual_seed(0)
    model = build_sam2(name, None, image_size=image_size)
    for key, weight in model.named_parameters():
        if key.endswith("gamma"):
            weight.normal_(std=0.1)
        elif "pos_embed" in key or (key.endswith("bias") and not weight.any()):
            weight.normal_(std=0.02)
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
    torch.save({"model": model.state_dict()}, file)


class Stock:
    """The stock predictor over the clip and over its reverse."""

    def __init__(self, options: argparse.Namespace, checkpoint: Path, frames: np.ndarray) -> None:
        file = official_configs()[options.architecture]
        self.predictor = build_sam2_video_predictor(
            f"configs/{file.parent.name}/{file.name}",
            str(checkpoint),
            device=options.device,
            hydra_overrides_extra=[f"++model.image_size={options.image_size}"],
        )
        self.predictor.fill_hole_area = 0
        self.folders = []
        for name, order in (("forward", frames), ("backward", frames[::-1])):
            folder = checkpoint.parent / name
            folder.mkdir()
            for number, frame in enumerate(order):
                Image.fromarray(frame).save(folder / f"{number:05d}.jpg", format="PNG")
            self.folders.append(folder)

    def run(self, mask_HW: np.ndarray) -> tuple[float, list[torch.Tensor]]:
        """Seconds without loading, and the features of each direction."""
        seconds, features, mask = 0.0, [], mask_HW
        for folder in self.folders:
            with torch.inference_mode():
                state = self.predictor.init_state(str(folder))
            # It loads the images and encodes frame 0, untimed: a small favour to the stock side.
            captured: dict[int, torch.Tensor] = {}
            original = self.predictor._prepare_memory_conditioned_features

            def capture(original: Any = original, captured: Any = captured, **k: Any) -> Any:
                captured[k["frame_idx"]] = original(**k)
                return captured[k["frame_idx"]]

            self.predictor._prepare_memory_conditioned_features = capture
            started = now(self.predictor.device)
            self.predictor.add_new_mask(state, 0, 1, mask)
            for _, _, logits_1HW in self.predictor.propagate_in_video(state):
                last = logits_1HW
            seconds += now(self.predictor.device) - started
            del self.predictor._prepare_memory_conditioned_features
            features.append(torch.cat([captured[t] for t in sorted(captured) if t > 0]))
            low = state["output_dict_per_obj"][0]["non_cond_frame_outputs"]
            mask = self._square_mask(low[max(low)]["pred_masks"], last.device)
        return seconds, features

    def _square_mask(self, low_11HW: torch.Tensor, device: torch.device) -> np.ndarray:
        side = self.predictor.image_size
        high = torch.nn.functional.interpolate(low_11HW.to(device), (side, side), mode="bilinear")
        return (high[0, 0] > 0).cpu().numpy()


class Ours:
    """Both directions from one encoding."""

    def __init__(self, options: argparse.Namespace, checkpoint: Path, frames: np.ndarray) -> None:
        model = build_sam2(
            options.architecture,
            checkpoint,
            image_size=options.image_size,
            device=options.device,
        )
        self.tracker = TwoWayTracker(
            model, precision="fp32", frames_per_batch=options.frames_per_batch
        )
        self.frames_TSS3 = resize_for_sam2(frames, options.image_size)

    def run(self, mask_HW: np.ndarray) -> tuple[float, list[torch.Tensor]]:
        """Seconds, and the features of each direction in the order of its visits."""
        tracker = self.tracker
        prompt = prompt_for_sam2(
            SubjectPrompt(mask_HW=mask_HW),
            height=HEIGHT,
            width=WIDTH,
            image_size=tracker.model.image_size,
            device=tracker.model.device,
        )
        started = now(tracker.model.device)
        encoded = tracker.encode(self.frames_TSS3)
        forward = list(tracker.track(encoded, prompt))
        prompt = tracker.prompt_from_track(forward[-1])
        backward = list(tracker.track(encoded, prompt, backward=True))
        seconds = now(tracker.model.device) - started
        return seconds, [
            torch.stack([frame.features["memory_attention"] for frame in track[1:]])
            for track in (forward, backward)
        ]


def now(device: torch.device) -> float:
    """Seconds, after all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="sam2.1_hiera_l")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--frames-per-batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    frames_THWC, mask_HW = make_frames(options.frames)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "weights.pt"
        random_checkpoint(options.architecture, options.image_size, checkpoint)
        sides: dict[str, Callable[..., Any]] = {
            "stock twice": Stock(options, checkpoint, frames_THWC).run,
            "ours": Ours(options, checkpoint, frames_THWC).run,
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        largest = 0.0
        for _ in range(options.repeats):
            features = {}
            for name, run in sides.items():
                taken, features[name] = run(mask_HW)
                seconds[name].append(taken)
            for theirs, ours in zip(features["stock twice"], features["ours"], strict=True):
                largest = max(largest, (theirs - ours).abs().max().item())
    if largest > TOLERANCE and options.frames_per_batch == 1:
        raise SystemExit(f"the features differ by {largest:.2e}, more than {TOLERANCE:.0e}")
    for name, times in seconds.items():
        print(f"{name:12} {statistics.median(times):8.2f} s  {[round(t, 2) for t in times]}")
    ratios = [a / b for a, b in zip(seconds["stock twice"], seconds["ours"], strict=True)]
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    print(
        json.dumps(
            {
                "name": "stage_one",
                "ratio": round(statistics.median(ratios), 3),
                "target": TARGETS[device.type],
                "spread": [round(min(ratios), 3), round(max(ratios), 3)],
                "largest_difference": largest,
                "machine": f"{machine or platform.machine()}, {torch.get_num_threads()} threads",
                "settings": {key: str(value) for key, value in vars(options).items()},
            }
        )
    )


if __name__ == "__main__":
    main()
