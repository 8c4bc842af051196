"""Settings of student training (stage two)."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from stages.config import FrameScoreGroup, Section
from stages.train_student.objectives.config import (
    AuxiliaryConfig,
    LgfConfig,
    MaskConfig,
    ObjectiveName,
    RepaConfig,
    TokenRelationConfig,
)

TeacherForm = Literal["features", "gram_flow"]
"""Stored form of the teacher: features, or their local similarities (Gram flow)."""

KIND_OF_FORM: dict[TeacherForm, str] = {"features": "teacher", "gram_flow": "gram_flow"}
"""Store kind of each form of SAM2's teacher."""

Folders = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,)),
]
"""Folder names; a single one may be written without brackets."""

WorkerStart = Literal["fork", "spawn"]
"""Start method of the loader processes."""


class LoraSettings(Section):
    """LoRA adapters, with peft's terms."""

    rank: int = Field(default=128, ge=1)
    """Rank of the update; 128 is usual."""
    alpha: float = Field(default=64.0, gt=0)
    """The update is scaled by alpha / rank; 64 is usual at rank 128."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Modules that get an adapter."""
    dora: bool = False
    """Learn the magnitude of each weight's rows separately from their direction (DoRA)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that larger ranks do not learn slower."""


class EmaConfig(Section):
    """Exponential moving average of the trained weights, exported by default if enabled."""

    decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """EMA decay, ramped up over the first steps; 0.999 is usual for a few thousand steps, null
    disables the average."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then a constant or cosine schedule."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit stores the moments in 8 bits, a quarter of the memory; install the extra first."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; 1e-4 for LoRA, 2e-6 for full tuning. Not scaled by the number of GPUs."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moment estimates."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay; 1e-4 is usual."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps from zero to the peak learning rate; 100 is usual."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay constant, or decay to zero over the remaining steps."""
    gradient_clipping: float = Field(default=1.0, gt=0)
    """Maximum gradient norm; 1.0 is usual."""


Offload = Literal["none", "cpu", "nvme"]
"""Where tensors are kept between uses: on the GPU, in host memory, or on a disk."""


class DeepSpeedConfig(Section):
    """DeepSpeed's ZeRO stage, precision and offloading."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """0 replicates; 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Dtype of the weights in the forward and backward pass; fp32 on a CPU."""
    offload_optimizer: Offload = "none"
    """Where optimizer states are kept between steps; cpu needs zero_stage 1 or more, nvme 3."""
    offload_parameters: Offload = "none"
    """Where weight shards are kept until they are used; cpu and nvme need zero_stage 3."""
    nvme_path: Path | None = None
    """Folder on a fast local disk for NVMe offload; a run that uses it cannot be resumed."""

    @property
    def uses_nvme(self) -> bool:
        """Whether something is offloaded to an NVMe disk."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)


class ValidationConfig(Section):
    """Validation losses on held-out clips, at fixed timesteps and with fixed noise."""

    clips: int = Field(default=0, ge=0)
    """Number of clips held out of training, chosen by the hash of their keys; 32 is usual, 0
    disables validation."""
    every: int = Field(default=250, ge=1)
    """Steps between validations; also run before training and at the end. 250 is usual."""
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    """Timesteps at which each clip is evaluated."""


class TrainingSamplesConfig(Section):
    """Videos generated during training with the current weights, by all ranks together."""

    prompts: tuple[str, ...] = ()
    """Prompts to generate each time; none disables sampling."""
    images: tuple[Path, ...] = ()
    """The first frame for each prompt, for image-to-video models."""
    every: int = Field(default=500, ge=1)
    """Steps between samplings; also run before training and at the end. 500 is usual."""
    steps: int = Field(default=50, ge=1)
    """Denoising steps; 50 is usual."""
    guidance: float = Field(default=6.0, ge=1.0)
    """Classifier-free guidance scale; 6 is usual, 1 disables it."""
    seed: int = 0
    """Seed of the initial noise, the same at every sampling."""
    scores: tuple[FrameScoreGroup, ...] = ("appearance",)
    """Groups of scores to compute of each video and to log as curves. With appearance, a warning is
    given when contrast, saturation or sharpness fall far below the base model's; figures is for the
    demo; [] computes none."""

    def as_recorded(self) -> dict[str, Any]:
        """What determines the videos, apart from weights and clip size, as in samples.json."""
        return {
            "prompts": list(self.prompts),
            "images": [str(image) for image in self.images],
            "denoising_steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
        }


class TrainConfig(Section):
    """Training run: method, length, data, objectives, and where the run is stored."""

    run_dir: Path = Path("runs/sam2videox")
    """Folder of the run; running again with the same settings resumes it."""
    steps: int = Field(default=2000, ge=1)
    """Optimizer steps; 2000 is usual. Can be raised later: schedules adapt when the run resumes."""
    batch_size: int = Field(default=32, ge=1)
    """Clips per optimizer step over all ranks; determines the gradient accumulation steps."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Maximum clips per rank and forward pass; reduced to a divisor of the rank's part of the
    batch. 1 at 49x480x720."""
    seed: int = 0
    """Seed of weights, data order, noise and timesteps."""
    method: Literal["lora", "full"] = "lora"
    """Train low-rank adapters, or every weight of the transformer."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more compute."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    checkpoints_kept: int = Field(default=3, ge=1)
    """Number of newest complete checkpoints kept on disk; 3 is usual."""
    keep_best: str | None = None
    """Curve, by its name in the trackers, whose best checkpoint is kept besides the newest:
    validation/diffusion, another loss on held-out clips, or a score of the samples such as
    samples/limb_presence; null keeps only the newest."""
    log_every: int = Field(default=10, ge=1)
    """Steps between rows of the console table."""
    loader_workers: int = Field(default=2, ge=0)
    """Processes per rank that read the cache; 0 reads in the training process."""
    loader_start: WorkerStart = "fork"
    """Start method of the loader processes: fork is fast and needs little memory; spawn imports
    everything again, for systems whose libraries are not fork-safe."""
    teacher_form: TeacherForm = "features"
    """Form of the teacher to read: features from the teacher store, or similarities from the
    gram_flow store, which is a tenth of the size and gives the same targets."""
    stores: dict[str, Folders] = Field(default_factory=dict)
    """Store to read for each kind if the cache holds several that match: kind -> folder name; with
    data.buckets a list with one per size."""
    leave_out: Path | None = None
    """JSON lines file whose `key`s are excluded, such as the cache's failures.jsonl; null excludes
    only clips that some store lacks."""
    max_damaged: float = Field(default=0.01, ge=0.0, le=1.0)
    """Maximum fraction of clips that may turn out damaged or missing; each is logged as a warning
    and replaced by another clip. 0.01 is usual."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Maximum number of consecutive steps skipped because the loss or gradient is NaN or infinite;
    10 is usual."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Trackers for curves and videos, in addition to losses.jsonl and the run's report."""
    wandb_project: str = Field(default="sam2videox", min_length=1)
    """Weights & Biases project; sam2videox is usual."""
    objectives: tuple[ObjectiveName, ...] = ("lgf",)
    """Auxiliary losses, summed. [] or none is plain fine-tuning."""
    block: int = Field(default=25, ge=0)
    """Index, from 0, of the transformer block whose output the auxiliary losses use; 25 of the 5B
    model's 42 is a public re-implementation's. (REPA and VideoREPA count from 1: 18 is 17 here.)"""
    lgf: LgfConfig = LgfConfig()
    repa: RepaConfig = RepaConfig()
    token_relation: TokenRelationConfig = TokenRelationConfig()
    mask: MaskConfig = MaskConfig()
    lora: LoraSettings = LoraSettings()
    ema: EmaConfig = EmaConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: TrainingSamplesConfig = TrainingSamplesConfig()

    @field_validator("objectives", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return () if value in ("none", ["none"], ("none",)) else value

    def settings_of(self, objective: ObjectiveName) -> AuxiliaryConfig:
        """Settings of an auxiliary loss."""
        settings: AuxiliaryConfig = getattr(self, objective.replace("-", "_"))
        return settings

    def folder_of(self, kind: str) -> str | None:
        """Folder that `stores` names for a kind; None if it names none or several."""
        named = self.stores.get(kind, ())
        return named[0] if len(named) == 1 else None

    @model_validator(mode="after")
    def _objectives_once(self) -> "TrainConfig":
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(
                f"train.objectives must name each loss once, got {', '.join(self.objectives)}"
            )
        return self
