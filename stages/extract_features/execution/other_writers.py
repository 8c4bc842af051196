"""Waiting for shards that other processes are writing."""

import time
from collections.abc import Callable, Mapping

from stages.processes.stop_request import check_stop
from stages.progress import Progress

ASK_EVERY_S = 5.0

_NAMED = 5
"""Shards that a message names."""


def wait_for_others(left: Callable[[], Mapping[str, bool]], progress: Progress) -> None:
    """Return when nothing is left, or when something is that nobody is writing.

    There is no time limit: a shard takes as long as its clips do. A lock ends with its process.

    Args:
        left: The unfinished shards as of now, and whether another process is writing them.
        progress: Told what is being waited for, whenever that changes.
    """
    told: set[str] = set()
    while (shards := left()) and all(shards.values()):
        if told != shards.keys():
            told = set(shards)
            named = ", ".join(sorted(told)[:_NAMED])
            more = f" and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
            progress.log(f"waiting for other processes, which are writing {named}{more}")
        time.sleep(ASK_EVERY_S)
        check_stop()
