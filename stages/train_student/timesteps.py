"""Checks of settings that name timesteps against those that training draws from."""

from collections.abc import Sequence

from stages.students.student import StudentConfigs
from stages.train_student.config import TrainConfig

_SPREAD = (0.1, 0.3, 0.5, 0.7, 0.9)


def check_evaluated(
    name: str, timesteps: Sequence[int], allowed: range, configs: StudentConfigs, *, where: str = ""
) -> None:
    """Check a list of timesteps at which clips are evaluated.

    Args:
        name: the setting.
        timesteps: its value.
        allowed: timesteps that it may name.
        configs: of the base model.
        where: what holds for these timesteps, for the message.

    Raises:
        ValueError: there is none, one is not allowed, or one is repeated.
    """
    if timesteps and len(set(timesteps)) == len(timesteps) and set(timesteps) <= set(allowed):
        return
    # In whole hundreds for the whole schedule of 1,000.
    usual = [allowed.start + round(share * len(allowed)) for share in _SPREAD]
    raise ValueError(
        f"{name} must be one or more of {_named(allowed, configs)}{where}, without repeats, got "
        f"{list(timesteps)}; {usual} is usual"
    )


def check_timesteps(config: TrainConfig, configs: StudentConfigs) -> None:
    """Check the timesteps of validation and of the auxiliary losses.

    Raises:
        ValueError: validation names others than training draws, or a loss would never apply.
    """
    if config.validation.clips:
        timesteps, drawn = config.validation.timesteps, configs.trained_timesteps
        check_evaluated("train.validation.timesteps", timesteps, drawn, configs)
    check_applied(config, configs)


def check_applied(config: TrainConfig, configs: StudentConfigs) -> None:
    """Check that every auxiliary loss applies at some timestep that is drawn (`ValueError`)."""
    drawn = configs.trained_timesteps
    for objective in config.objectives:
        first, last = config.settings_of(objective).timesteps
        if last < drawn.start or first >= drawn.stop:
            name = f"train.{objective.replace('-', '_')}.timesteps"
            raise ValueError(
                f"{name} is {[first, last]}, but training draws {_named(drawn, configs)}, so that "
                "the loss would never apply; [0, 999] is usual"
            )


def _named(timesteps: range, configs: StudentConfigs) -> str:
    """The first and last of some timesteps, and the expert they belong to."""
    expert = "" if configs.expert is None else f", those of the {configs.expert} transformer"
    return f"{timesteps.start} to {timesteps.stop - 1}{expert}"
