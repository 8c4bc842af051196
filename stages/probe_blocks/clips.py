"""The clips of a probe: which are fitted on and measured, and their batches."""

from collections.abc import Sequence

from stages.probe_blocks.config import ProbeConfig
from stages.progress import Progress
from stages.train_student.data.dataset import UNREADABLE, Batch, CachedSamples
from stages.train_student.data.splits import choose_held_out
from stages.train_student.data.stores import Buckets


def choose_clips(config: ProbeConfig, stores: Buckets) -> tuple[str, ...]:
    """Keys of the held-out clips, then of those to fit on, by the hash of the key.

    The held-out clips are those that training would hold out first (`train.validation.clips`).

    Raises:
        ValueError: the cache has too few clips.
    """
    wanted = config.held_out + config.clips
    chosen = choose_held_out([joined.keys for joined in stores.stores], wanted)
    if len(chosen) < wanted:
        raise ValueError(
            f"probe.clips={config.clips} and probe.held_out={config.held_out} need {wanted} clips, "
            f"but {len(chosen)} are in every store; lower them, or extract more clips"
        )
    return chosen


def read_clips(
    samples: CachedSamples, keys: Sequence[str], timesteps: Sequence[int], progress: Progress
) -> tuple[dict[str, list[Batch]], dict[str, str]]:
    """Batches of each clip at every timestep, and why each of the other clips cannot be used."""
    batches: dict[str, list[Batch]] = {}
    excluded: dict[str, str] = {}
    with progress.task("read clips", len(keys), unit="clips") as task:
        for key in keys:
            try:
                of_clip = samples.fixed_batches(key, timesteps)
            except UNREADABLE as error:
                excluded[key] = str(error)
            else:
                valid_BT = of_clip[0].teacher_valid_BT
                assert valid_BT is not None, "the objective reads a teacher"
                if (valid_BT[:, :-1] & valid_BT[:, 1:]).any():
                    batches[key] = of_clip
                else:
                    excluded[key] = "the subject is not visible in any two adjacent frames"
            task.advance()
    for key, reason in excluded.items():
        progress.log(f"warning: clip {key!r} is left out: {reason}")
    return batches, excluded
