"""Whether the entries of a clip in several stores are of one video and one prompt."""

from collections.abc import Callable, Mapping

import numpy as np

from cache_schema import SortedText, StoreReader
from stages.clips.fingerprints import sources_half, video_half

_NAMED = 5
"""Keys that a message names."""

_PROMPTED_BY = ("prompts", "backward_prompt")
"""Settings that say what of a clip's prompt goes into a fingerprint."""


def refuse_other_sources(readers: Mapping[str, StoreReader], keys: SortedText) -> None:
    """Refuse stores whose entries of a clip must not be trained on together.

    Compares fingerprints in the stores' indexes; no clip and no record is read.

    Args:
        readers: By kind; latents among them.
        keys: Clips that all of them hold.

    Raises:
        ValueError: A clip's entries were made from different videos; or teacher and masks, where
            they are prompted alike, from different prompts.
    """
    fingerprints = {
        kind: reader.fingerprints[reader.keys.rows_of(keys)] for kind, reader in readers.items()
    }
    for kind in readers:
        _compare("latents", kind, readers, fingerprints, keys, video_half, "videos")
    for kind in ("teacher", "gram_flow"):
        if kind in readers and "masks" in readers and _prompted_alike(readers, kind):
            _compare("masks", kind, readers, fingerprints, keys, sources_half, "prompts")


def _prompted_alike(readers: Mapping[str, StoreReader], kind: str) -> bool:
    teacher, masks = readers[kind].settings.values, readers["masks"].settings.values
    return all(
        name in teacher and name in masks and teacher[name] == masks[name] for name in _PROMPTED_BY
    )


def _compare(
    kind: str,
    other: str,
    readers: Mapping[str, StoreReader],
    fingerprints: Mapping[str, np.ndarray],
    keys: SortedText,
    half: Callable[[np.ndarray], np.ndarray],
    what: str,
) -> None:
    rows = np.flatnonzero(half(fingerprints[kind]) != half(fingerprints[other]))
    if not len(rows):
        return
    named = ", ".join(repr(keys[int(row)]) for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    raise ValueError(
        f"{readers[kind].path} and {readers[other].path} were made from different {what} of "
        f"{len(rows)} of {len(keys)} clips: {named}{more}. Run sam2vx-pipeline extract-features "
        f"--kinds {','.join(readers)} on the dataset that is meant; it says which clips to make "
        "again with --refresh-changed. Or leave the clips out with train.leave_out"
    )
