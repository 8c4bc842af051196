"""The two sides of the stage-one benchmarks: sam2's own predictor run twice, and this project.

Both have the same random weights, frames and prompt. The stock side loads a folder of images, as
its users have it; ours is given decoded frames, as the pipeline has them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from report import now
from sam2.build_sam import build_sam2_video_predictor

from stages.clips import SubjectPrompt
from stages.config import Precision
from stages.precision import DTYPES
from stages.sam2_tracking.build import build_sam2, official_configs
from stages.sam2_tracking.inputs import prompt_for_sam2, resize_for_sam2
from stages.sam2_tracking.tracker import Tracker, TrackRequest

# Legend: T frame, C channel, H W pixels or grid, S side of SAM2's square input.

HEIGHT, WIDTH = 480, 720
Keep = Callable[[torch.Tensor], torch.Tensor]
"""What is kept of a frame's features [1, C, h, w]."""


def everything(features_1CHW: torch.Tensor) -> torch.Tensor:
    """Keep the features as they are."""
    return features_1CHW


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
    """The stock predictor over the clip and over its reverse, a fresh state each.

    Below float32 it runs under autocast, as in sam2's own examples.
    """

    def __init__(
        self,
        architecture: str,
        image_size: int,
        device: str,
        checkpoint: Path,
        frames: np.ndarray,
        *,
        precision: Precision = "fp32",
    ) -> None:
        self._autocast = torch.autocast(
            torch.device(device).type, DTYPES[precision], enabled=precision != "fp32"
        )
        file = official_configs()[architecture]
        self.model = build_sam2_video_predictor(
            f"configs/{file.parent.name}/{file.name}",
            str(checkpoint),
            device=device,
            hydra_overrides_extra=[f"++model.image_size={image_size}"],
        )
        self.model.fill_hole_area = 0
        self.folders = []
        for name, order in (("forward", frames), ("backward", frames[::-1])):
            folder = checkpoint.parent / name
            folder.mkdir()
            for number, frame in enumerate(order):
                # sam2 lists *.jpg alone; the pixels must not be lossy, and PIL goes by content.
                Image.fromarray(frame).save(folder / f"{number:05d}.jpg", format="PNG")
            self.folders.append(folder)

    def run(
        self, mask_HW: np.ndarray, *, keep: Keep = everything, directions: int = 2
    ) -> tuple[float, list[torch.Tensor]]:
        """Seconds without loading, and the features of each direction.

        Loading encodes frame 0, untimed: a small favour to this side.
        """
        seconds, features, mask = 0.0, [], mask_HW
        for folder in self.folders[:directions]:
            with self._autocast:
                taken, kept, mask = self._track(folder, mask, keep)
            seconds += taken
            features.append(kept)
        return seconds, features

    def _track(
        self, folder: Path, mask_HW: np.ndarray, keep: Keep
    ) -> tuple[float, torch.Tensor, np.ndarray]:
        """Seconds, features, and the last mask; the state goes when it returns."""
        predictor = self.model
        with torch.inference_mode():
            state = predictor.init_state(str(folder))
        captured: dict[int, torch.Tensor] = {}
        original = predictor._prepare_memory_conditioned_features

        def capture(**arguments: Any) -> torch.Tensor:
            features_1CHW: torch.Tensor = original(**arguments)
            captured[arguments["frame_idx"]] = keep(features_1CHW)
            return features_1CHW

        predictor._prepare_memory_conditioned_features = capture
        started = now(predictor.device)
        predictor.add_new_mask(state, 0, 1, mask_HW)
        for _, _, logits_1HW in predictor.propagate_in_video(state):
            device = logits_1HW.device
        seconds = now(predictor.device) - started
        del predictor._prepare_memory_conditioned_features
        low = state["output_dict_per_obj"][0]["non_cond_frame_outputs"]
        mask = self._square_mask(low[max(low)]["pred_masks"], device)
        return seconds, torch.cat([captured[t] for t in sorted(captured) if t > 0]), mask

    def _square_mask(self, low_11HW: torch.Tensor, device: torch.device) -> np.ndarray:
        side = self.model.image_size
        low_11HW = low_11HW.to(device).float()
        high = torch.nn.functional.interpolate(low_11HW, (side, side), mode="bilinear")
        return (high[0, 0] > 0).cpu().numpy()


class Ours:
    """Both directions from one encoding, of one clip or of several alike in lockstep."""

    def __init__(
        self,
        architecture: str,
        image_size: int,
        device: str,
        checkpoint: Path,
        frames: np.ndarray,
        clips: int = 1,
        **settings: Any,
    ) -> None:
        self.clips = clips
        self.model = build_sam2(architecture, checkpoint, image_size=image_size, device=device)
        self.tracker = Tracker(self.model, **{"precision": "fp32", **settings})
        self.set_frames(frames)

    def set_frames(self, frames: np.ndarray) -> None:
        """Take the frames of another clip."""
        self.frames_TSS3: np.ndarray | None = resize_for_sam2(frames, self.model.image_size)

    def run(
        self,
        mask_HW: np.ndarray,
        *,
        keep: Keep = everything,
        directions: int = 2,
        once: bool = False,
    ) -> tuple[float, list[torch.Tensor]]:
        """Seconds of all clips, and the first's features by direction, in the order of visits.

        With `once`, the frames are let go of after they are encoded, as the pipeline does.
        """
        tracker = self.tracker
        assert self.frames_TSS3 is not None, "the frames were let go of in an earlier run"
        prompt = prompt_for_sam2(
            SubjectPrompt(mask_HW=mask_HW),
            height=HEIGHT,
            width=WIDTH,
            image_size=self.model.image_size,
            device=self.model.device,
        )
        prompts = [prompt] * self.clips
        order = range(len(self.frames_TSS3))
        features: list[torch.Tensor] = []
        started = now(self.model.device)
        with ExitStack() as stack:
            encoded = [
                stack.enter_context(tracker.encode(self.frames_TSS3)) for _ in range(self.clips)
            ]
            if once:
                self.frames_TSS3 = None
            for visited in (order, order[::-1])[:directions]:
                maps = []
                requests = [
                    TrackRequest(encoded=clip, prompt=prompt, order=visited)
                    for clip, prompt in zip(encoded, prompts, strict=True)
                ]
                for frames in tracker.track(requests):
                    # Every clip's, as the pipeline keeps them.
                    maps.append([keep(one.features["memory_attention"][None]) for one in frames])
                prompts = [tracker.prompt_from_logits(one.mask_logits_HW) for one in frames]
                features.append(torch.cat([kept[0] for kept in maps[1:]]))
        return now(self.model.device) - started, features
