"""Settings of stage one."""

from typing import Literal

from pydantic import Field, model_validator

from stages.config import FeatureKind, Precision, Section
from stages.teacher_store.config import FeatureDtype, GramFlowConfig

Kind = Literal["text", "latents", "teacher", "gram_flow", "masks"]
"""The stores that stage one writes."""

PromptSource = Literal["dataset", "grounding", "automatic"]
"""Where a clip's prompt may come from."""


class GroundingConfig(Section):
    """Grounding DINO: a box from words."""

    model: str = "IDEA-Research/grounding-dino-tiny"
    """Folder of a Grounding DINO in transformers' format, or its hub id."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null takes the newest."""
    phrase: str | None = None
    """What to look for in every clip, such as `a dog`; phrases parted by full stops are several
    subjects. null takes the clip's own `subject` field, else its caption."""
    box_threshold: float = Field(default=0.35, ge=0.0, le=1.0)
    """Score below which a box is no find; 0.35 is usual."""
    text_threshold: float = Field(default=0.25, ge=0.0, le=1.0)
    """Score below which a word does not belong to a box's label; 0.25 is usual."""
    frame_step: int = Field(default=4, ge=1)
    """When nothing is found on a frame, how many frames further to look; 4 is usual."""


class TeacherConfig(Section):
    """SAM2 over each clip, both ways, fused per frame."""

    checkpoint: str = "facebook/sam2.1-hiera-large"
    """An official SAM2 or SAM2.1 checkpoint, or one in the same format: its path, or the hub id of
    an official one."""
    config: str | None = None
    """Name of an official SAM2 configuration (sam2.1_hiera_t, _s, _b+, _l; sam2_hiera_…), or the
    path of a YAML file in their format. null takes the official one that fits the checkpoint."""
    image_size: int = Field(default=1024, ge=64, multiple_of=32)
    """Side in pixels of the square SAM2 sees; 1024 is what it was trained at, 512 is a quarter of
    the cost."""
    prompts: tuple[PromptSource, ...] = Field(default=("dataset", "automatic"), min_length=1)
    """Where the prompt comes from, in this order: the dataset's mask, box or points; a box that
    Grounding DINO finds; the most salient moving region. The first source that has anything to go
    by decides."""
    prompt_fallback: bool = False
    """When a source finds nothing, go on to the next one; otherwise the clip is skipped."""
    grounding: GroundingConfig = GroundingConfig()
    subjects: Literal["union", "each"] = "union"
    """Several subjects in a clip: one track of their union, or a track each, averaged in the space
    of Gram flows (a store that is `max_subjects` times as wide)."""
    max_subjects: int = Field(default=4, ge=1)
    """With subjects=each: the most a clip may have; one with more is skipped. 4 is usual."""
    backward_prompt: Literal["track", "dataset"] = "track"
    """What the backward track starts from: the forward track's last mask, or the dataset's prompt
    for the last frame (a clip without one takes the track's)."""
    min_cycle_consistency: float = Field(default=0.0, ge=0.0, le=1.0)
    """Mean overlap (IoU) of the forward and backward masks below which a clip is skipped; 0 keeps
    all, 0.7 is strict."""
    features: FeatureKind = "memory_attention"
    """Which features: the frame after memory attention, or the stored memory."""
    fusion: Literal["gram_flow", "average", "forward"] = "gram_flow"
    """How the two directions become one: exact in Gram-flow space (the paper), averaged (ablation),
    or the forward pass alone (ablation)."""
    forward_weight: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share a of the forward direction: S = a S_fwd + (1-a) S_bwd; 0.5 is a public
    re-implementation's."""
    time_rate: Literal["frame", "latent"] = "frame"
    """One feature map per frame, or the mean over each latent frame's frames."""
    grid: Literal["student", "native"] = "student"
    """The student's token grid, or SAM2's own (64x64 at 1024 pixels), resampled when it is read:
    one store then serves several training sizes."""
    dtype: FeatureDtype = "float16"
    """How the features are stored: float16, or int8 with a scale for each token: half the size, and
    a Gram flow within 1e-5 nats. A Gram flow is made from them as they are stored."""
    precision: Precision = "fp32"
    """Arithmetic of the tracker; bf16 on a GPU."""
    clips_per_batch: int = Field(default=1, ge=1)
    """Clips tracked side by side; more keep a big GPU busy, and change values by rounding. 1 is
    usual on a CPU, 4 on a GPU."""
    frames_per_batch: int = Field(default=1, ge=1)
    """Frames per pass of the image encoder; more keep a GPU busy, and change values by rounding. 1
    is usual on a CPU, 8 on a GPU."""
    keep_encoded: Literal["device", "host", "disk"] = "device"
    """Where a clip's encoded frames wait for the two tracks: on the GPU, in the host's memory, or
    in a temporary file. With the last two, GPU memory does not grow with a clip's length."""
    compile: bool = False
    """Compile the image encoder with torch.compile: minutes at the start, faster afterwards."""

    @model_validator(mode="after")
    def _prompts_once(self) -> "TeacherConfig":
        if len(set(self.prompts)) != len(self.prompts):
            raise ValueError(f"prompts names a source twice: {', '.join(self.prompts)}")
        return self


class LatentsConfig(Section):
    """The VAE's posterior of each clip, and of its first frame for image-to-video."""

    precision: Precision = "fp32"
    """Arithmetic of the VAE; bf16 on a GPU."""
    tiling: bool = False
    """Encode in overlapping tiles: less memory, slightly different values."""
    image_draws: int = Field(default=8, ge=1)
    """For image-to-video: how often the first frame is drawn with noise and encoded. Training picks
    one of them each time it sees a clip. 8 are 2.8 MB a clip at 480x720 and vary as much over 64
    visits as new draws do; with 1 each clip's noise is always the same, a third of that."""


class TextConfig(Section):
    """The text encoder's states of each caption."""

    precision: Precision = "fp32"
    """Arithmetic of the text encoder; bf16 on a GPU."""


class RayConfig(Section):
    """Workers on a Ray cluster; read with engine=ray alone."""

    address: str | None = None
    """The cluster's address, auto for the one this machine belongs to; null starts Ray on this
    machine."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes; null takes one per GPU of the cluster, or one where there is none."""
    restarts: int = Field(default=3, ge=0)
    """How many times in a row a shard is given to another worker after one died on it; 3 is
    usual."""


class ExtractConfig(Section):
    """What stage one computes and where it runs."""

    kinds: tuple[Kind, ...] = Field(default=("text", "latents", "teacher", "masks"), min_length=1)
    """The stores to write, one big model at a time; teacher, gram_flow and masks come from one
    pass."""
    engine: Literal["local", "ray"] = "local"
    """local: this process, or the group a launcher started, shares the shards. ray: workers on a
    Ray cluster, which may come and go."""
    ray: RayConfig = RayConfig()
    device: str = "auto"
    """auto takes CUDA when there is one; otherwise a torch device such as cuda:1 or cpu."""
    seed: int = 0
    """Seeds the noise on image-to-video's first frames, per clip."""
    max_skipped: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of clips that may be skipped before the command exits with 3; 0.1 is usual."""
    teacher: TeacherConfig = TeacherConfig()
    gram_flow: GramFlowConfig = GramFlowConfig()
    latents: LatentsConfig = LatentsConfig()
    text: TextConfig = TextConfig()
