"""Settings of stage two."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.config import Section

TeacherForm = Literal["features", "gram_flow"]
"""What is stored of the teacher: its features, or their similarities to each neighbourhood."""

KIND_OF_FORM: dict[TeacherForm, str] = {"features": "teacher", "gram_flow": "gram_flow"}
"""The kind of store that holds each form."""

WorkerStart = Literal["fork", "spawn"]
"""How a process that reads the cache is started."""


class ObjectiveConfig(Section):
    """The auxiliary loss beside the diffusion loss."""

    name: Literal["lgf", "none"] = "lgf"
    """lgf is Local Gram Flow; none is plain fine-tuning (the baseline)."""
    weight: float = Field(default=0.5, ge=0.0)
    """Lambda: total = diffusion + weight * auxiliary; 0.5 is usual."""
    block: int = Field(default=25, ge=0)
    """Index of the transformer block whose output is taught; 25 of the 5B model's 42."""
    radius: int = Field(default=3, ge=1)
    """Half the window; 3 gives the paper's 7x7 window."""
    temperature: float = Field(default=0.1, gt=0.0)
    """Temperature of the softmax over neighbours; 0.1 is usual."""
    divergence: Literal["kl", "l2"] = "kl"
    """KL of the distributions (the paper), or squared error of the similarities (ablation)."""
    projector_widths: tuple[int, int, int] = (512, 256, 256)
    """Widths of the projector's layers."""


class LoraSettings(Section):
    """Low-rank adapters; as peft names them."""

    rank: int = Field(default=128, ge=1)
    """Rank of the update; 128 is usual."""
    alpha: float = Field(default=64.0, gt=0)
    """The update is scaled by alpha / rank; 64 is usual at rank 128."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Modules that get an adapter."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then constant or cosine."""

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


class DeepSpeedConfig(Section):
    """How the engine shares the work."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """0 replicates; 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Format of the weights in the forward and backward pass; fp32 on a CPU."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory."""


class TrainConfig(Section):
    """What is trained, how long, and where the run is kept."""

    run_dir: Path = Path("runs/sam2videox")
    """Folder of the run; running again with the same settings resumes it."""
    steps: int = Field(default=2000, ge=1)
    """Optimizer steps; 2000 is usual."""
    batch_size: int = Field(default=32, ge=1)
    """Clips per optimizer step over all ranks; the micro-batch and accumulation follow from it."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Clips per rank and forward pass; 1 at 49x480x720."""
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
    stores: dict[str, str] = Field(default_factory=dict)
    """Which store of a kind to read when the cache holds several: kind -> folder name."""
    leave_out: Path | None = None
    """JSON lines that each name a clip (`key`) to leave out, such as the cache's failures.jsonl;
    null leaves out none but those that some store lacks."""
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
