"""Waiting for shards that other processes are writing."""

import time
from collections.abc import Callable, Mapping

from stages.processes.stop_request import check_stop
from stages.progress import Progress

POLL_INTERVAL_S = 5.0

_MAX_NAMED = 5
"""Shards that a message names."""


def wait_for_others(left: Callable[[], Mapping[str, bool]], progress: Progress) -> None:
    """Return when nothing is left, or when something is that nobody is writing.

    There is no time limit: a shard takes as long as its clips do. A lock ends with its process.

    Args:
        left: The unfinished shards as of now, and whether another process is writing them.
        progress: Told what is being waited for, whenever that changes.
    """
    logged: set[str] = set()
    while (shards := left()) and all(shards.values()):
        if logged != shards.keys():
            logged = set(shards)
            named = ", ".join(sorted(logged)[:_MAX_NAMED])
            more = f" and {len(logged) - _MAX_NAMED} more" if len(logged) > _MAX_NAMED else ""
            progress.log(f"waiting for other processes, which are writing {named}{more}")
        time.sleep(POLL_INTERVAL_S)
        check_stop()
