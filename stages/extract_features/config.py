"""Settings of stage one."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from stages.config import FeatureKind, Precision, Section
from stages.teacher_store.config import FeatureDtype, GramFlowConfig

Kind = Literal["text", "latents", "teacher", "gram_flow", "masks", "visual"]
"""Kinds of stores that stage one writes."""

PromptSource = Literal["dataset", "grounding", "automatic"]
"""Source of a clip's prompt."""


class GroundingConfig(Section):
    """Grounding DINO: boxes from text."""

    model: str = "IDEA-Research/grounding-dino-tiny"
    """Folder of a Grounding DINO model in transformers' format, or its hub id."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null uses the newest."""
    phrase: str | None = None
    """Text to detect in every clip, such as `a dog`; phrases separated by full stops are several
    subjects. null uses the clip's own `subject` field, or its caption."""
    box_threshold: float = Field(default=0.35, ge=0.0, le=1.0)
    """Minimum score of a box; 0.35 is usual."""
    text_threshold: float = Field(default=0.25, ge=0.0, le=1.0)
    """Minimum score of a word in a box's label; 0.25 is usual."""
    frame_step: int = Field(default=4, ge=1)
    """Distance in frames between detection attempts until something is found; 4 is usual."""


class TeacherConfig(Section):
    """A tracker, usually SAM2, over each clip in both directions, fused per frame."""

    checkpoint: str = "facebook/sam2.1-hiera-large"
    """Path of a checkpoint in the official SAM2 format, or of its state dict in a safetensors file,
    or the hub id of an official SAM2 or SAM2.1: read by the sam2 package. Or a folder in
    transformers' format, or its hub id, of SAM2, EdgeTAM or SAM3."""
    config: str | None = None
    """Name of an official SAM2 configuration (sam2.1_hiera_t, _s, _b+, _l; sam2_hiera_…), or the
    path of a YAML file in their format. null uses the official one that matches the checkpoint.
    Not for checkpoints in transformers' format, which have one of their own."""
    image_size: int = Field(default=1024, ge=64)
    """Side in pixels of the tracker's square input. SAM2 takes multiples of 32 and was trained at
    1024; EdgeTAM multiples of 256, trained at 1024; SAM3 multiples of 14, trained at 1008. 512
    costs a quarter of 1024."""
    prompts: tuple[PromptSource, ...] = Field(default=("dataset", "automatic"), min_length=1)
    """Sources of the prompt, in order of preference. dataset: its mask, box or points; grounding: a
    box from Grounding DINO; automatic: the most salient moving region. The first source with
    input for the clip is used."""
    prompt_fallback: bool = False
    """If a source finds nothing, try the next one; otherwise the clip is skipped."""
    grounding: GroundingConfig = GroundingConfig()
    subjects: Literal["union", "each"] = "union"
    """Several subjects in a clip: one track of their union, or a track each, averaged in Gram-flow
    space (stored features are `max_subjects` times as wide)."""
    max_subjects: int = Field(default=4, ge=1)
    """With subjects=each: maximum number of subjects; clips with more are skipped. 4 is usual."""
    backward_prompt: Literal["track", "dataset"] = "track"
    """Prompt of the backward track: the forward track's last mask, or the dataset's prompt for the
    last frame (clips without one use the track's)."""
    min_cycle_consistency: float = Field(default=0.0, ge=0.0, le=1.0)
    """Minimum mean IoU of the forward and backward masks; clips below are skipped. 0 keeps all, 0.7
    is strict."""
    features: FeatureKind = "memory_attention"
    """Features to store: the output of memory attention, of the memory encoder, or of the image
    encoder (ablation: no memory; equal in both directions, so fusion=average stores them once)."""
    fusion: Literal["gram_flow", "average", "forward"] = "gram_flow"
    """Fusion of the two directions: exact in Gram-flow space (the paper), averaged features
    (ablation), or the forward pass only (ablation)."""
    forward_weight: float = Field(default=0.5, ge=0.0, le=1.0)
    """Weight a of the forward direction: S = a S_fwd + (1-a) S_bwd; 0.5 is the value of a public
    re-implementation."""
    time_rate: Literal["frame", "latent"] = "frame"
    """One feature map per frame, or one per latent frame: the mean over its frames."""
    grid: Literal["student", "native"] = "student"
    """Grid of stored features: the student's tokens, or the tracker's own (64x64 for SAM2 at 1024
    pixels), which is resampled when read, so that one store supports several training sizes."""
    dtype: FeatureDtype = "float16"
    """Storage dtype of features: float16, or int8 with a scale per token, which halves the size and
    changes a Gram flow by at most 1e-5 nats. The Gram flow is computed from stored values."""
    precision: Precision = "fp32"
    """Precision of the tracker; bf16 on a GPU."""
    clips_per_batch: int = Field(default=1, ge=1)
    """Clips tracked as one batch; more use a large GPU better and change values by rounding. 1 is
    usual on a CPU, 4 on a GPU."""
    frames_per_batch: int = Field(default=1, ge=1)
    """Frames per pass of the image encoder; more use a GPU better and change values by rounding. 1
    is usual on a CPU, 8 on a GPU."""
    keep_encoded: Literal["device", "host", "disk"] = "device"
    """Where a clip's encoded frames are kept while tracking: device (GPU), host (memory), disk (a
    temporary file). With host and disk, GPU memory does not depend on clip length."""
    compile: bool = False
    """Compile the image encoder with torch.compile: takes minutes at first, then runs faster."""

    @model_validator(mode="after")
    def _prompts_once(self) -> "TeacherConfig":
        if len(set(self.prompts)) != len(self.prompts):
            raise ValueError(f"prompts names a source twice: {', '.join(self.prompts)}")
        return self


class VisualConfig(Section):
    """Tokens of an image or video encoder in transformers' format, for REPA and its relatives."""

    checkpoint: str = "facebook/dinov2-base"
    """Folder of a DINOv2, DINOv3, V-JEPA 2 or VideoMAE in transformers' format, or its hub id."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null uses the default branch."""
    image_size: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width in pixels that whole frames are resized to, multiples of the encoder's
    patch, a square for V-JEPA 2. null gives DINOv2 and DINOv3 a token for each of the student's
    (420x630 for 480x720 and patches of 14), V-JEPA 2 and VideoMAE their own size."""
    layer: int | None = Field(default=None, ge=1)
    """Block whose output is stored, counted from 1, without the encoder's final norm; null stores
    the encoder's output, after the norm where it has one."""
    window: int | None = Field(default=None, ge=1)
    """Frames that a video encoder sees at once; a last window may overlap the one before it. null
    takes its own, 16 for VideoMAE and 64 for V-JEPA 2, or all of a shorter clip. An image encoder
    has none."""
    time_rate: Literal["encoder", "latent"] = "encoder"
    """A map per frame of an image encoder, and per tubelet (two frames) of a video encoder; or one
    per latent frame, their mean. Video encoders start at frame 1: they have no map of frame 0."""
    grid: Literal["student", "native"] = "student"
    """Grid of stored tokens: the student's, or the encoder's own, which is resampled when read."""
    dtype: FeatureDtype = "float16"
    """Storage dtype of tokens: float16, or int8 with a scale per token, which halves the size."""
    precision: Precision = "fp32"
    """Precision of the encoder; bf16 on a GPU."""
    frames_per_batch: int = Field(default=1, ge=1)
    """Frames per pass of an image encoder; 1 is usual on a CPU, 16 on a GPU."""


class LatentsConfig(Section):
    """VAE posterior of each clip, and of its first frame for image-to-video."""

    precision: Precision = "fp32"
    """Precision of the VAE; bf16 on a GPU."""
    tiling: bool = False
    """Encode in overlapping tiles: less memory, slightly different values."""
    image_draws: int = Field(default=8, ge=1)
    """For image-to-video: number of noisy draws of the first frame to encode. Training picks one
    each time it reads a clip. 8 take 2.8 MB per clip at 480x720 and vary over 64 reads as much as
    new draws do; with 1 the noise of each clip is fixed, and varies a third as much."""


class TextConfig(Section):
    """Text encoder states of each caption."""

    precision: Precision = "fp32"
    """Precision of the text encoder; bf16 on a GPU."""


class RayConfig(Section):
    """Workers on a Ray cluster; used with engine=ray only."""

    address: str | None = None
    """Address of the cluster; auto finds the cluster of this machine, null starts Ray on this
    machine."""
    workers: int | None = Field(default=None, ge=1)
    """Number of workers; null uses one per GPU of the cluster, or one if there are no GPUs."""
    restarts: int = Field(default=3, ge=0)
    """How many times in a row a shard is reassigned after its worker died; 3 is usual."""


class ExtractConfig(Section):
    """Kinds of stores to extract, and where to run."""

    kinds: tuple[Kind, ...] = Field(default=("text", "latents", "teacher", "masks"), min_length=1)
    """Stores to write, with one large model loaded at a time; teacher, gram_flow and masks are
    written in one pass of SAM2, visual by the encoder of extract.visual."""
    engine: Literal["local", "ray"] = "local"
    """local: this process, or those of a launcher, which share the shards. ray: workers on a Ray
    cluster, whose machines may come and go."""
    ray: RayConfig = RayConfig()
    device: str = "auto"
    """auto uses CUDA if available; otherwise a torch device such as cuda:1 or cpu."""
    seed: int = 0
    """Seed of the per-clip noise on first frames for image-to-video."""
    max_skipped: float = Field(default=0.1, ge=0.0, le=1.0)
    """Maximum fraction of skipped clips; above it the command exits with 3. 0.1 is usual."""
    teacher: TeacherConfig = TeacherConfig()
    gram_flow: GramFlowConfig = GramFlowConfig()
    visual: VisualConfig = VisualConfig()
    latents: LatentsConfig = LatentsConfig()
    text: TextConfig = TextConfig()
