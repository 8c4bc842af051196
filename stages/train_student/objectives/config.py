"""Settings of the auxiliary losses."""

from typing import Literal

from pydantic import Field, model_validator

from stages.config import Pairs, Section

ObjectiveName = Literal["lgf", "repa", "token-relation", "mask"]
"""Local Gram Flow; cosine similarity to the features (REPA); relations between all tokens
(VideoREPA); the subject's mask."""


TeacherName = Literal["sam2", "visual"]
"""Source of features: SAM2's tracks (the teacher store), or an image or video encoder (the visual
store)."""


class AuxiliaryConfig(Section):
    """Settings common to all auxiliary losses: weight, schedule and timesteps."""

    weight: float = Field(default=0.5, ge=0.0)
    """Lambda: total = diffusion + weight * auxiliary; 0.5 is REPA's and VideoREPA's, and for lgf a
    public re-implementation's."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the weight rises from zero; 0 is usual."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay constant, or decay to final_weight over the remaining steps."""
    final_weight: float = Field(default=0.0, ge=0.0)
    """Final value of a decaying weight; 0 is usual."""
    timesteps: tuple[int, int] = (0, 999)
    """First and last timestep at which the loss applies; (0, 999) is all of them."""
    timestep_weighting: Literal["uniform", "signal"] = "uniform"
    """uniform weights every timestep equally; signal weights by abar, so that the loss vanishes
    where the latents are mostly noise."""

    @model_validator(mode="after")
    def _timesteps_in_order(self) -> "AuxiliaryConfig":
        first, last = self.timesteps
        if not 0 <= first <= last <= 999:
            raise ValueError(
                f"timesteps must be 0 <= first <= last <= 999, got {first} and {last}; 0 and 999 "
                "are usual"
            )
        return self

    @property
    def reads_visual(self) -> bool:
        """Whether the loss reads the visual store."""
        return False


class FeatureTargetConfig(AuxiliaryConfig):
    """Settings common to the losses whose target are features of either teacher."""

    teacher: TeacherName = "sam2"
    """Features to compare with: SAM2's, from the teacher store, or an image or video encoder's,
    from the visual store that extract.visual describes."""

    @property
    def reads_visual(self) -> bool:
        """Whether the loss reads the visual store."""
        return self.teacher == "visual"


class LgfConfig(AuxiliaryConfig):
    """Local Gram Flow: similarities of each token to its window in the next frame."""

    radius: int = Field(default=3, ge=1)
    """Half the window; 3 gives the 7x7 window of a public re-implementation."""
    temperature: float = Field(default=0.1, gt=0.0)
    """Temperature of the softmax over neighbours; 0.1 is a public re-implementation's."""
    divergence: Literal["kl", "l2"] = "kl"
    """KL(teacher || student) of the distributions, as in a public re-implementation; or squared
    error of the similarities (ablation)."""
    directions: Literal["fused", "forward", "averaged"] = "fused"
    """Teacher similarities to compare: both tracks' fused (the paper); the forward track's only, or
    those of averaged features (ablations, from stored features only)."""
    pairs: Pairs = "forward"
    """Frame pairs to compare: forward, t -> t+1; backward, t+1 -> t; both, the mean of the two
    losses; or crossed, both directions, t -> t+1 from the backward track only and t+1 -> t from the
    forward track only, as in the paper's figure."""
    foreground_weight: float = Field(default=1.0, ge=0.0)
    """Weight of a token of the subject relative to the background, by the tracked masks; 1 weights
    all equally and reads no masks."""
    kernel: Literal["torch", "triton"] = "torch"
    """Implementation of the student's similarities on a GPU: torch's matrix products, or a fused
    Triton kernel, which reads bfloat16 features directly."""
    projector_widths: tuple[int, int, int] = (512, 256, 256)
    """Widths of the projector's layers; these are a public re-implementation's."""

    @model_validator(mode="after")
    def _crossed_pairs_take_both_tracks(self) -> "LgfConfig":
        if self.pairs == "crossed" and self.directions != "fused":
            raise ValueError(
                "train.lgf.pairs=crossed uses a separate track for each direction; it needs "
                f"train.lgf.directions=fused, not {self.directions}"
            )
        return self


class RepaConfig(FeatureTargetConfig):
    """REPA: cosine similarity of each projected token to the teacher's features; with
    neighbour_distance CREPA's, with spatial_norm and projector=convolution iREPA's."""

    projector: Literal["residual", "mlp", "convolution"] = "residual"
    """residual: an MLP with norms and a linear skip, as lgf's. mlp: linear layers and SiLU, as
    REPA's. convolution: one 3x3 convolution over each map's tokens, as iREPA's."""
    projector_widths: tuple[int, int] = (512, 256)
    """Widths of the projector's hidden layers; its output has the teacher's width. REPA's are 2048
    and 2048; a convolution has none."""
    spatial_norm: float | None = Field(default=None, ge=0.0, le=1.0)
    """gamma of iREPA's norm of the teacher's tokens, (x - gamma * mean) / std over each map's
    tokens; 0.6 is usual, null leaves them as they are."""
    neighbour_distance: int = Field(default=0, ge=0)
    """Maps before and after, up to this distance, whose features each token is also compared with,
    as in CREPA; 1 is usual there, 0 is REPA."""
    neighbour_decay: float = Field(default=1.0, gt=0.0)
    """tau: a map at distance n counts exp(-n / tau); 1 is usual."""


class TokenRelationConfig(FeatureTargetConfig):
    """Token-relation distillation, after VideoREPA: similarities of all tokens, within and across
    frames."""

    projector: Literal["residual", "mlp"] = "residual"
    """residual: an MLP with norms and a linear skip, as lgf's. mlp: linear layers and SiLU, as
    VideoREPA's."""
    margin: float = Field(default=0.1, ge=0.0)
    """Differences of similarity up to this are ignored; 0.1 is VideoREPA's."""
    pool: int = Field(default=2, ge=1)
    """Side of the squares of tokens that become one token first, since the cost is quadratic in
    tokens; 3 gives VideoREPA's 10x15 from 30x45."""
    downsampler: Literal["mean", "learned"] = "mean"
    """How a square of the student's tokens becomes one: their mean, or a learned convolution over
    the square, as in VideoREPA. The teacher's tokens are averaged."""
    skip_first_latent: bool = False
    """Leave out the first latent frame, which encodes a single frame; true is VideoREPA's. A video
    encoder's maps leave it out by themselves."""
    projector_widths: tuple[int, int, int] = (512, 256, 256)
    """Widths of the projector's layers; VideoREPA's are 2048, 2048 and 768."""


class MaskConfig(AuxiliaryConfig):
    """Mask supervision: predict the subject's mask from the block's tokens."""

    weight: float = Field(default=0.1, ge=0.0)
    """Lambda: total = diffusion + weight * auxiliary; 0.1 is this project's."""
    projector_widths: tuple[int, int] = (256, 128)
    """Widths of the projector's hidden layers; its output is one logit per token."""
