"""Which process of a launched group this is; torchrun and deepspeed say so in the environment."""

import os


def rank() -> int:
    """Return this process's number, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
