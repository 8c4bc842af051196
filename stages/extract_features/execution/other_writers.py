"""Waiting for shards that other processes are writing."""

import time
from collections.abc import Callable, Mapping

from stages.processes.stop_request import check_stop
from stages.progress import Progress

POLL_INTERVAL_S = 5.0

_MAX_NAMED = 5
"""Maximum number of shards named in a message."""


def wait_for_others(left: Callable[[], Mapping[str, bool]], progress: Progress) -> None:
    """Wait until no shard is left, or until one is left that no process is writing.

    There is no time limit, since a shard may take long. A lock is released when its process ends.

    Args:
        left: Returns the unfinished shards, and whether another process is writing each.
        progress: Logs the shards that are waited for, whenever they change.
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
