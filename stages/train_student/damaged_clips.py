"""Clips that turned out damaged while training: how many there may be; the training loop asks."""

from cache_schema import CacheError
from stages.train_student.data.damaged import DamagedClip
from stages.train_student.distributed import World, gather
from stages.train_student.logs.rows import DAMAGED_FILE, DamagedRow


class TooManyDamaged(CacheError):  # noqa: N818 (as the cache's other errors)
    """More clips are damaged than `train.max_damaged` allows."""


class DamagedClips:
    """Counts the damaged clips of all ranks, on every rank alike."""

    def __init__(self, *, clips: int, most: float, world: World) -> None:
        """Begin with none, also in a resumed run: the cache may have been repaired.

        Args:
            clips: how many there are to train on.
            most: largest share of them that may be damaged.
        """
        self._clips = clips
        self._most = most
        self._world = world
        self._keys: set[str] = set()

    def of_all_ranks(self, step: int, mine: list[DamagedClip]) -> tuple[DamagedRow, ...]:
        """The damaged clips of every rank's passes; every rank asks, if any has one."""
        return tuple(
            DamagedRow(step=step, key=clip.key, message=clip.message, gone=clip.gone)
            for rank in gather(self._world, mine)
            for clip in rank
        )

    def add(self, rows: tuple[DamagedRow, ...]) -> None:
        """Count the damaged ones; the same clip counts once.

        Clips that were dropped are somebody's decision, and what is left of the cache is whole.

        Raises:
            TooManyDamaged: naming some, and what would help.
        """
        self._keys.update(row.key for row in rows if not row.gone)
        if not rows or len(self._keys) <= self._most * self._clips:
            return
        named = ", ".join(map(repr, sorted(self._keys)[:3]))
        more = f" and {len(self._keys) - 3} more" if len(self._keys) > 3 else ""
        raise TooManyDamaged(
            f"{len(self._keys)} of {self._clips} clips cannot be read, more than "
            f"train.max_damaged={self._most} allows: {named}{more}; {DAMAGED_FILE} in the run's "
            "folder says why. sam2vx-pipeline cache verify finds all of them, cache repair takes "
            "them out, extract-features --retry-failed makes them again; then run the same command "
            "again: it goes on, also without them"
        )
