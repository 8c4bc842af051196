"""Settings of stage two."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from stages.config import Section
from stages.train_student.objectives.config import (
    LgfConfig,
    MaskConfig,
    ObjectiveName,
    RepaConfig,
    TokenRelationConfig,
)

TeacherForm = Literal["features", "gram_flow"]
"""What is stored of the teacher: its features, or their similarities to each neighbourhood."""

KIND_OF_FORM: dict[TeacherForm, str] = {"features": "teacher", "gram_flow": "gram_flow"}
"""The kind of store that holds each form."""

Folders = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,)),
]
"""Names of folders; one alone may be written without brackets."""

WorkerStart = Literal["fork", "spawn"]
"""How a process that reads the cache is started."""


class LoraSettings(Section):
    """Low-rank adapters; as peft names them."""

    rank: int = Field(default=128, ge=1)
    """Rank of the update; 128 is usual."""
    alpha: float = Field(default=64.0, gt=0)
    """The update is scaled by alpha / rank; 64 is usual at rank 128."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Modules that get an adapter."""
    dora: bool = False
    """Also learn the length of each weight's rows apart from their direction (DoRA)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that a larger rank does not learn slower."""


class EmaConfig(Section):
    """A running average of the trained weights, which is what is exported where it is kept."""

    decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """What stays of the average at each step, less in the first ones; 0.999 for some thousands of
    steps is usual, null keeps no average."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then constant or cosine."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments in 8 bits, a quarter of the memory; it is an extra to install."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak rate; 1e-4 for LoRA, 2e-6 for full tuning. Not scaled by the number of GPUs."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moment estimates."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay; 1e-4 is usual."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps from zero to the peak rate; 100 is usual."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero over the remaining steps."""
    gradient_clipping: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; 1.0 is usual."""


Offload = Literal["none", "cpu", "nvme"]
"""Where what is not needed at the moment waits: on the GPU, in host memory, on a disk."""


class DeepSpeedConfig(Section):
    """How the engine shares the work."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """0 replicates; 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Format of the weights in the forward and backward pass; fp32 on a CPU."""
    offload_optimizer: Offload = "none"
    """Where optimizer states wait between steps; cpu needs zero_stage 1 or more, nvme 3."""
    offload_parameters: Offload = "none"
    """Where the shards of the weights wait until they are used; cpu and nvme need zero_stage 3."""
    nvme_path: Path | None = None
    """Folder on a fast local disk for what is offloaded to nvme; such a run cannot go on once it is
    stopped."""


class ValidationConfig(Section):
    """Losses on clips that are never trained on, at fixed timesteps and with fixed noise."""

    clips: int = Field(default=0, ge=0)
    """How many clips are held out of training, chosen by their keys' hash; 32 is usual, 0 validates
    nothing."""
    every: int = Field(default=250, ge=1)
    """Steps between validations, the first before training, another at the end; 250 is usual."""
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    """At which noise each clip is seen."""


class TrainingSamplesConfig(Section):
    """Videos drawn with the weights as they are, by all ranks together."""

    prompts: tuple[str, ...] = ()
    """What is drawn each time; none draws nothing."""
    images: tuple[Path, ...] = ()
    """The first frame for each prompt, for image-to-video models."""
    every: int = Field(default=500, ge=1)
    """Steps between drawings, the first before training, another at the end; 500 is usual."""
    steps: int = Field(default=50, ge=1)
    """Denoising steps; 50 is usual."""
    guidance: float = Field(default=6.0, ge=1.0)
    """Classifier-free guidance scale; 6 is usual, 1 turns it off."""
    seed: int = 0
    """Seeds the initial noise, the same at every drawing."""


class TrainConfig(Section):
    """What is trained, how long, and where the run is kept."""

    run_dir: Path = Path("runs/sam2videox")
    """Folder of the run; running again with the same settings resumes it."""
    steps: int = Field(default=2000, ge=1)
    """Optimizer steps; 2000 is usual. A run may be given more later: schedules follow at once."""
    batch_size: int = Field(default=32, ge=1)
    """Clips per optimizer step over all ranks; how many passes make one follows from it."""
    micro_batch_size: int = Field(default=1, ge=1)
    """The most clips per rank and forward pass, fewer where these do not go evenly into a rank's
    share of the batch; 1 at 49x480x720."""
    seed: int = 0
    """Seeds weights, data order, noise and timesteps."""
    method: Literal["lora", "full"] = "lora"
    """Train low-rank adapters, or every weight of the transformer."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more work."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints; the last step always makes one."""
    checkpoints_kept: int = Field(default=3, ge=1)
    """How many complete checkpoints stay on disk; 3 is usual."""
    log_every: int = Field(default=10, ge=1)
    """Steps between rows of the console's table."""
    loader_workers: int = Field(default=2, ge=0)
    """Processes per rank that read the cache; 0 reads in the training process."""
    loader_start: WorkerStart = "fork"
    """How they are started: fork takes no time and little memory; spawn loads everything anew, and
    is for systems whose libraries do not bear a fork."""
    teacher_form: TeacherForm = "features"
    """What the teacher is read from: the teacher store's features, or the gram_flow store, which is
    a tenth of the size and teaches the same."""
    stores: dict[str, Folders] = Field(default_factory=dict)
    """Which store of a kind to read when the cache holds several that would do: kind -> folder
    name; with data.buckets a list, of one for each size."""
    leave_out: Path | None = None
    """JSON lines that each name a clip (`key`) to leave out, such as the cache's failures.jsonl;
    null leaves out none but those that some store lacks."""
    max_damaged: float = Field(default=0.01, ge=0.0, le=1.0)
    """Largest share of the clips that may turn out damaged or gone; each costs a warning, and
    another clip takes its place. 0.01 is usual."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """How many steps in a row may be skipped for a loss or gradient that is no number; 10 is
    usual."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where curves and videos go, beside losses.jsonl and the run's own page."""
    wandb_project: str = Field(default="sam2videox", min_length=1)
    """Project of Weights & Biases; sam2videox is usual."""
    objectives: tuple[ObjectiveName, ...] = ("lgf",)
    """The auxiliary losses; several add up. [] or none is plain fine-tuning."""
    block: int = Field(default=25, ge=0)
    """Index of the transformer block whose output is taught, counted from 0; 25 of the 5B model's
    42 is a public re-implementation's. REPA and VideoREPA count from 1: their 18 is 17 here."""
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

    def folder_of(self, kind: str) -> str | None:
        """The folder that `stores` names for a kind; None without one, and among several."""
        named = self.stores.get(kind, ())
        return named[0] if len(named) == 1 else None

    @model_validator(mode="after")
    def _objectives_once(self) -> "TrainConfig":
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(
                f"train.objectives must name each loss once, got {', '.join(self.objectives)}"
            )
        return self
