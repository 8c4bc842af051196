"""Errors to exit codes: what a person must know on one line, the traceback on request.

0 done; 1 a failure while working; 2 bad usage or configuration, before any work, or a cache that
was made from other sources, which extraction may find later; 3 finished, but more clips were
skipped than `extract.max_skipped` allows; 130 stopped with Ctrl-C or SIGTERM.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from pipeline.config.schema import ConfigError
from pipeline.console import complain
from stages.processes.stop_request import ENDED_BY_SIGNAL, check_stop

FAILED = 1
BAD_USAGE = 2
TOO_MANY_SKIPPED = 3
INTERRUPTED = ENDED_BY_SIGNAL


@contextmanager
def failures(*, traceback: bool, resumable: bool = False) -> Iterator[None]:
    """Turn what goes wrong in the block into a message on stderr and an exit code.

    Args:
        traceback: Let errors through with their traceback.
        resumable: Whether running the same command again goes on where it was stopped.
    """
    try:
        check_stop()
        yield
        check_stop()
    except KeyboardInterrupt:
        again = "; run the same command again and it goes on from there" if resumable else ""
        complain(f"stopped{again}")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        told = _told(error)
        if traceback or told is None:
            raise
        message, exit_code = told
        complain(message)
        raise typer.Exit(exit_code) from None


def _told(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of an expected error: one whose words say what and where.

    None for any other, which is shown with its traceback.
    """
    if isinstance(error, ConfigError):
        return f"configuration: {error}", BAD_USAGE
    # Here, since it takes as long to import as all that `--help` needs.
    from cache_schema.errors import CacheError

    # By name, since their modules take seconds to import: torch's and the training loop's.
    name = type(error).__name__
    if not isinstance(error, ValueError | OSError | CacheError) and name not in _BY_NAME:
        return None
    remedy = [_LESS_MEMORY] if name == "OutOfMemoryError" else []
    notes = getattr(error, "__notes__", [])
    return "\n".join([f"error: {in_words(error) or name}", *notes, *remedy]), FAILED


def in_words(error: Exception) -> str:
    """What an error says; the system's with path and remedy, in place of `[Errno 13] …: 'a'`."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    names = (error.filename, error.filename2)
    where = " -> ".join(os.fsdecode(name) for name in names if isinstance(name, str | bytes))
    words = f"{where}: {error.strerror}" if where else error.strerror
    return words + _REMEDIES.get(error.errno or 0, "")


_ELSEWHERE = (
    "choose another folder (it is set by cache=…, outputs=…, train.run_dir=…, demo.root=…, --out "
    "or an argument of the command)"
)

_REMEDIES = {
    errno.EPERM: f"; this user may not write there: {_ELSEWHERE}",
    errno.EACCES: f"; this user may not read or write there: mend the permissions, or {_ELSEWHERE}",
    errno.EROFS: f"; that disk is read-only: {_ELSEWHERE}",
    errno.ENOSPC: f"; free some space, or {_ELSEWHERE}",
    errno.EDQUOT: f"; this user's quota is used up: free some space, or {_ELSEWHERE}",
    errno.ENAMETOOLONG: "; choose a shorter name",
    errno.EMFILE: "; allow more open files: ulimit -n 4096",
}

_BY_NAME = ("OutOfMemoryError", "TrainingDivergedError")

_LESS_MEMORY = (
    "for less memory: train.micro_batch_size=1, train.gradient_checkpointing=true, "
    "train.deepspeed.zero_stage=3; extract.latents.tiling=true, extract.teacher.clips_per_batch=1, "
    "extract.teacher.frames_per_batch=1, extract.teacher.keep_encoded=host, "
    "extract.teacher.image_size=512; sample.cpu_offload=true"
)
