"""Where sampled videos go: names made from the prompt, and files that replace nothing unasked."""

import hashlib
import itertools
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import ConfigError

_LONGEST_WORDS = 60
_LONGEST_BYTES = 120
"""Of the prompt's words in UTF-8: file systems allow 255 for the whole name."""


def file_stem(source: str, prompt: str, seed: int) -> str:
    """A name that can be read; a prompt that is cut ends in a digest of the whole of it.

    Args:
        source: the run, or `base`.
        prompt: of any length and alphabet.
        seed: of the noise.
    """
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")
    short = words[:_LONGEST_WORDS].encode()[:_LONGEST_BYTES].decode(errors="ignore").strip("-")
    if short != words:
        short += f"-{hashlib.sha256(prompt.encode(errors='surrogateescape')).hexdigest()[:6]}"
    return f"{source}-{short or 'video'}-seed{seed}"


@contextmanager
def new_file(folder: Path, stem: str) -> Iterator[Path]:
    """Claim `<stem>.mp4` in a folder that is made when missing, or the first number that is free.

    Yields:
        An empty file that no other process gets; it is gone afterwards if nothing was written.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        file = folder / (f"{stem}.mp4" if number == 1 else f"{stem}-{number}.mp4")
        if file.with_suffix(".json").exists():
            continue
        try:
            file.open("xb").close()
        except FileExistsError:
            continue
        with _gone_if_empty(file):
            yield file
        return


@contextmanager
def named_file(file: Path, *, overwrite: bool) -> Iterator[Path]:
    """Claim the mp4 that the user named, and the JSON beside it; its folder is made when missing.

    Yields:
        The file, empty, or with `overwrite` as it was. An empty one is gone afterwards.

    Raises:
        ConfigError: one of the two is there already.
        OSError: the folder cannot be written to.
    """
    there = [one for one in (file, file.with_suffix(".json")) if one.exists()]
    if there and not overwrite:
        raise ConfigError(f"{there[0]} is there already; give another --out, or --overwrite")
    file.parent.mkdir(parents=True, exist_ok=True)
    _check_writable(file.parent)
    file.open("ab").close()
    with _gone_if_empty(file):
        yield file


def _check_writable(folder: Path) -> None:
    """A video is written beside its place and then moved: the folder must take new files."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


@contextmanager
def _gone_if_empty(file: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if file.is_file() and file.stat().st_size == 0:
            file.unlink()
