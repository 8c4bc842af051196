"""Refuses settings of validation and samples before anything is loaded; `prepare` asks."""

from stages.base_facts import BaseFacts
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.sample_videos.drawing import first_frame
from stages.train_student.config import TrainConfig


def check_validation(
    config: TrainConfig, facts: BaseFacts, model: BaseModelConfig, clips: ClipsConfig
) -> None:
    """Refuse what could not be measured or drawn.

    Args:
        clips: the size that is drawn.

    Raises:
        ValueError: naming the field and what would do.
    """
    timesteps, most = config.validation.timesteps, facts.scheduler["num_train_timesteps"] - 1
    if config.validation.clips and (
        not timesteps
        or len(set(timesteps)) < len(timesteps)
        or not all(0 <= timestep <= most for timestep in timesteps)
    ):
        raise ValueError(
            f"train.validation.timesteps must be one or more of 0 to {most}, each once, got "
            f"{list(timesteps)}; [100, 300, 500, 700, 900] is usual"
        )
    samples = config.samples
    if not all(prompt.strip() for prompt in samples.prompts):
        raise ValueError("train.samples.prompts holds an empty prompt; say what to draw")
    if not facts.image_to_video and samples.images:
        raise ValueError(
            f"{model.path} makes video from text alone; leave train.samples.images out"
        )
    if facts.image_to_video and len(samples.images) != len(samples.prompts):
        raise ValueError(
            f"{model.path} makes video from an image: train.samples.images must name one for each "
            f"of the {len(samples.prompts)} prompts, got {len(samples.images)}"
        )
    for image in samples.images:
        first_frame(image, clips)
