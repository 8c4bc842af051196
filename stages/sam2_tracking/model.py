"""What the tracking loop needs from a tracker's network, one implementation per library."""

# Legend: S side of the square input, N position on a level (row-major) or point, B frame, stream or
# point of the batch, M mask of a point, C channel, H W grid.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.memory import MemoryBank


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerSpec:
    """A tracker's configuration and dimensions, known before its weights are loaded."""

    library: str
    """sam2, or the class in transformers, such as transformers.Sam2VideoModel."""
    config: dict[str, Any]
    """The configuration: with the weights and the input's size, all that determines the outputs."""
    config_name: str | None
    """The official SAM2 configuration's name, or the YAML file's path; None for transformers, whose
    configuration is in the checkpoint's folder."""
    hidden_dim: int
    """Channels of `memory_attention` and `image_encoder`."""
    mem_dim: int
    """Channels of `memory_encoder`."""
    stride: int
    """Pixels of the square input per token of the features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImages:
    """Outputs of the image encoder for a batch of frames."""

    levels_NBC: Sequence[torch.Tensor]
    """Feature levels, highest resolution first."""
    positions_NBC: torch.Tensor
    """Position encoding of the last level; the same for every frame."""
    sizes: Sequence[tuple[int, int]]
    """Height and width of each level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameStep:
    """The frame that each stream visits at one step."""

    levels_NBC: list[torch.Tensor]
    """Image encoder levels, highest resolution first."""
    positions_NBC: torch.Tensor
    """Position encoding of the last level."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each level."""
    step: int
    """Number of the visit; 0 is the prompted one."""
    num_steps: int
    """Number of visits; passed to the network as the number of frames."""

    def stream(self, b: int) -> "FrameStep":
        """Return the part of one stream."""
        return FrameStep(
            levels_NBC=[level_NBC[:, b : b + 1] for level_NBC in self.levels_NBC],
            positions_NBC=self.positions_NBC[:, :1],
            sizes=self.sizes,
            step=self.step,
            num_steps=self.num_steps,
        )

    def maps(self) -> list[torch.Tensor]:
        """Return the levels as maps [B, C, H, W]."""
        return [
            level_NBC.permute(1, 2, 0).unflatten(2, size)
            for level_NBC, size in zip(self.levels_NBC, self.sizes, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedMasks:
    """The mask decoder's outputs for one frame of each stream."""

    logits_B1HW: torch.Tensor
    """H and W are four times those of the tokens; -1024 if the subject is not visible."""
    pointer_BC: torch.Tensor
    """Object pointers."""
    score_B1: torch.Tensor
    """Logits of the subject being visible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewMemory:
    """The memory of one frame of each stream."""

    stored: torch.Tensor
    """What later frames attend to, [B, ...], in the storage dtype."""
    positions: torch.Tensor
    """Its position encoding, of the same shape or with a batch of 1."""
    features_BCHW: torch.Tensor
    """The memory encoder's output: features and mask of the frame on the grid of its tokens."""


class TrackerModel(Protocol):
    """A network that tracks by memory: SAM2 and its relatives.

    Streams of a batch are independent, and a track starts with a prompt at step 0.
    """

    pixel_mean: tuple[float, float, float]
    """Of the RGB values that the network was trained on, 0 to 1."""
    pixel_std: tuple[float, float, float]

    @property
    def image_encoder(self) -> torch.nn.Module:
        """The part that `extract.teacher.compile` compiles."""

    def new_bank(self) -> MemoryBank:
        """Return an empty bank that keeps as much as the network reads."""

    def encode_images(self, images_B3SS: torch.Tensor) -> EncodedImages:
        """Encode normalised frames."""

    def decode_prompt(self, frames: FrameStep, prompt: Sam2Prompt) -> DecodedMasks:
        """Decode a prompt's mask on a single frame, B = 1, without memories.

        A mask prompt is returned as it is, with the object pointer of a single decoded mask.
        """

    def track(
        self, frames: FrameStep, bank: MemoryBank
    ) -> tuple[DecodedMasks, torch.Tensor, torch.Tensor]:
        """Decode the masks of frames after the prompted one.

        Returns:
            The masks; their logits at full size, [B, 1, S, S]; the output of memory attention,
            [B, C, H, W].
        """

    def attend(self, frames: FrameStep, bank: MemoryBank) -> torch.Tensor:
        """Apply memory attention: [B, C, H, W]. On the prompted frame to its own memory."""

    def encode_memory(
        self,
        frames: FrameStep,
        mask_B1SS: torch.Tensor,
        score_B1: torch.Tensor,
        *,
        dtype: torch.dtype,
    ) -> NewMemory:
        """Encode a frame and its mask's logits.

        Args:
            frames: The frame of each stream.
            mask_B1SS: Mask logits at full size; at step 0 only their sign counts.
            score_B1: Object scores.
            dtype: Storage dtype, where the library does not fix one.
        """

    def propose_masks(
        self, frames: FrameStep, points_B2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode three masks for every point on a single frame, regardless of object scores.

        Args:
            frames: One frame.
            points_B2: x, y in pixels of the square.

        Returns:
            Mask logits [B, M, H, W], and predicted IoUs [B, M].
        """
