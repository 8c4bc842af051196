"""Exit codes, and one-line error messages in place of tracebacks.

0 success; 1 failure during the work; 2 bad usage or configuration, found before any work, or a
cache made from other sources, which extraction may find later; 3 finished, but more clips were
skipped than `extract.max_skipped` allows; 130 stopped with Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from pipeline.config.schema import ConfigError
from pipeline.console import print_error
from stages.processes.stop_request import ENDED_BY_SIGNAL, check_stop

if TYPE_CHECKING:
    from cache_schema.errors import Remedy

FAILED = 1
BAD_USAGE = 2
TOO_MANY_SKIPPED = 3
INTERRUPTED = ENDED_BY_SIGNAL


@contextmanager
def exit_on_error(*, traceback: bool, resumable: bool = False) -> Iterator[None]:
    """Turn errors of the block into a message on stderr and an exit code.

    Args:
        traceback: Let errors propagate with their traceback.
        resumable: Whether running the same command again resumes interrupted work.
    """
    try:
        check_stop()
        yield
        check_stop()
    except KeyboardInterrupt:
        remedy = "; run the same command again to resume" if resumable else ""
        print_error(f"stopped{remedy}")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        expected = _message_and_code(error)
        if traceback or expected is None:
            raise
        message, exit_code = expected
        print_error(message)
        raise typer.Exit(exit_code) from None


def _message_and_code(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of an expected error; None for any other, which gets a traceback."""
    if isinstance(error, ConfigError):
        return f"configuration: {error}", BAD_USAGE
    # Imported here: it would double the time of `--help`.
    from cache_schema.errors import CacheError

    # Compared by name: their modules, torch's and the training loop's, take seconds to import.
    name = type(error).__name__
    if not isinstance(error, ValueError | OSError | CacheError) and name not in _EXPECTED_BY_NAME:
        return None
    remedy = [_LESS_MEMORY] if name == "OutOfMemoryError" else []
    notes = getattr(error, "__notes__", [])
    return "\n".join([f"error: {error_text(error) or name}", *notes, *remedy]), FAILED


def error_text(error: Exception) -> str:
    """Message of an error and what to do about it.

    For system errors path, cause and remedy instead of `[Errno 13] …`.
    """
    if not isinstance(error, OSError) or error.strerror is None:
        remedy: Remedy | None = getattr(error, "remedy", None)
        if remedy is None:
            return str(error)
        return f"{error}; {remedy_text(remedy, getattr(error, 'subject', ''))}"
    names = (error.filename, error.filename2)
    paths = " -> ".join(os.fsdecode(name) for name in names if isinstance(name, str | bytes))
    message = f"{paths}: {error.strerror}" if paths else error.strerror
    return message + _SYSTEM_REMEDIES.get(error.errno or 0, "")


def remedy_text(remedy: Remedy, subject: str = "") -> str:
    """The command or setting of a remedy; `subject` is the store, or the kind, it is applied to."""
    return _REMEDIES[remedy].format(subject=shlex.quote(subject) if subject else "")


_REMEDIES: dict[Remedy, str] = {
    "repair": "run sam2vx-pipeline cache repair {subject}, then extract-features --retry-failed",
    "extract": "harmless: readers ignore it, and extract-features finishes or removes it",
    "copy": "run sam2vx-pipeline cache copy again from the store it was copied from",
    "by hand": "no command repairs it",
    "rewrite": "if it is a copy, copy it again; otherwise run sam2vx-pipeline extract-features "
    "with the configuration it was made with, which rewrites that file and keeps every shard",
    "make": "run sam2vx-pipeline extract-features to make it",
    "make again": "its clips must be extracted again: set another cache folder, or remove "
    "{subject}, and run sam2vx-pipeline extract-features",
    "choose": "set train.stores.{subject} to the folder of the one to use",
    "choose or make": "set train.stores.{subject} to the folder of the one to use, or run "
    "sam2vx-pipeline extract-features to make it",
    "prefix": "rename the merged shards with --prefix, such as --prefix second-",
    "drop": "remove them from one of the stores with sam2vx-pipeline cache drop",
    "merge": "to combine the stores, run sam2vx-pipeline cache merge",
}
"""The sentence of each remedy of `cache_schema.errors`."""

_OTHER_FOLDER = (
    "choose another folder (it is set by cache=…, outputs=…, train.run_dir=…, demo.root=…, --out "
    "or an argument of the command)"
)

_SYSTEM_REMEDIES = {
    errno.EPERM: f"; this user may not write there: {_OTHER_FOLDER}",
    errno.EACCES: f"; this user may not read or write there: fix the permissions, or "
    f"{_OTHER_FOLDER}",
    errno.EROFS: f"; that disk is read-only: {_OTHER_FOLDER}",
    errno.ENOSPC: f"; free some space, or {_OTHER_FOLDER}",
    errno.EDQUOT: f"; this user's quota is used up: free some space, or {_OTHER_FOLDER}",
    errno.ENAMETOOLONG: "; choose a shorter name",
    errno.EMFILE: "; allow more open files: ulimit -n 4096",
}

_EXPECTED_BY_NAME = ("OutOfMemoryError", "TrainingDivergedError")

_LESS_MEMORY = (
    "to use less memory: train.micro_batch_size=1, train.gradient_checkpointing=true, "
    "train.deepspeed.zero_stage=3; extract.latents.tiling=true, extract.teacher.clips_per_batch=1, "
    "extract.teacher.frames_per_batch=1, extract.teacher.keep_encoded=host, "
    "extract.teacher.image_size=512; sample.offload=model; sample.tiling=true"
)
