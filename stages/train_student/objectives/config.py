"""Settings of the auxiliary losses: what each of them needs, and what they have in common."""

from typing import Literal

from pydantic import Field, model_validator

from stages.config import Pairs, Section

ObjectiveName = Literal["lgf", "repa", "token-relation", "mask"]
"""Local Gram Flow; cosine to the features (REPA); relations among all tokens (VideoREPA); the
subject's mask."""


class AuxiliaryConfig(Section):
    """What every auxiliary loss has: how much it counts, when, and at which noise."""

    weight: float = Field(default=0.5, ge=0.0)
    """Lambda: total = diffusion + weight * auxiliary; 0.5 is REPA's and VideoREPA's, and for lgf a
    public re-implementation's."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the weight rises from zero; 0 is usual."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to final_weight over the remaining steps."""
    final_weight: float = Field(default=0.0, ge=0.0)
    """Where a falling weight ends; 0 is usual."""
    timesteps: tuple[int, int] = (0, 999)
    """First and last timestep at which the loss counts; (0, 999) is all of them."""
    timestep_weighting: Literal["uniform", "signal"] = "uniform"
    """uniform counts every timestep alike; signal by abar, the share of the picture in the noisy
    latents, so that what cannot be seen is not taught."""

    @model_validator(mode="after")
    def _timesteps_in_order(self) -> "AuxiliaryConfig":
        first, last = self.timesteps
        if not 0 <= first <= last <= 999:
            raise ValueError(
                f"timesteps must be 0 <= first <= last <= 999, got {first} and {last}; 0 and 999 "
                "are usual"
            )
        return self


class LgfConfig(AuxiliaryConfig):
    """Local Gram Flow: how each token relates to its window in the next frame."""

    radius: int = Field(default=3, ge=1)
    """Half the window; 3 gives the 7x7 window of a public re-implementation."""
    temperature: float = Field(default=0.1, gt=0.0)
    """Temperature of the softmax over neighbours; 0.1 is a public re-implementation's."""
    divergence: Literal["kl", "l2"] = "kl"
    """KL of the distributions, from teacher to student as in a public re-implementation; or squared
    error of the similarities (ablation)."""
    directions: Literal["fused", "forward", "averaged"] = "fused"
    """What of the teacher is compared: both tracks' similarities fused (the paper); the forward
    track's alone, or those of averaged features (ablations, from stored features only)."""
    pairs: Pairs = "forward"
    """Which neighbouring frames are compared: forward, t -> t+1; backward, t+1 -> t; both, the mean
    of the two losses; or crossed, both ways, t -> t+1 from the backward track alone and t+1 -> t
    from the forward track alone, as the paper's figure draws it."""
    foreground_weight: float = Field(default=1.0, ge=0.0)
    """How much a token of the subject counts against one of the background, by the tracked masks; 1
    counts all alike and reads no masks."""
    kernel: Literal["torch", "triton"] = "torch"
    """What computes the student's similarities on a GPU: torch's matrix products, or one Triton
    kernel, which reads bfloat16 features as they are."""
    projector_widths: tuple[int, int, int] = (512, 256, 256)
    """Widths of the projector's layers; these are a public re-implementation's."""

    @model_validator(mode="after")
    def _crossed_pairs_take_both_tracks(self) -> "LgfConfig":
        if self.pairs == "crossed" and self.directions != "fused":
            raise ValueError(
                "train.lgf.pairs=crossed takes each direction from a track of its own; it goes "
                f"with train.lgf.directions=fused, not {self.directions}"
            )
        return self


class RepaConfig(AuxiliaryConfig):
    """REPA: cosine of each projected token to the teacher's features."""

    projector_widths: tuple[int, int] = (512, 256)
    """Widths of the projector's hidden layers; its output is as wide as the teacher. REPA's are
    2048 and 2048."""


class TokenRelationConfig(AuxiliaryConfig):
    """Token-relation distillation, after VideoREPA: similarities of all tokens, in and across
    frames."""

    margin: float = Field(default=0.1, ge=0.0)
    """Differences of similarity up to this do not count; 0.1 is VideoREPA's."""
    pool: int = Field(default=2, ge=1)
    """Tokens are averaged over squares of this side first: relations are quadratic in them; 3
    leaves VideoREPA's 10x15 of 30x45."""
    projector_widths: tuple[int, int, int] = (512, 256, 256)
    """Widths of the projector's layers; VideoREPA's are 2048, 2048 and 768."""


class MaskConfig(AuxiliaryConfig):
    """Mask supervision: predict where the subject is, from the block's tokens."""

    weight: float = Field(default=0.1, ge=0.0)
    """Lambda: total = diffusion + weight * auxiliary; 0.1 is this project's."""
    projector_widths: tuple[int, int] = (256, 128)
    """Widths of the projector's hidden layers; its output is one logit a token."""
