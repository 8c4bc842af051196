"""Results of a probe: losses of each block, their means and intervals, and the folder they are in.

    <out>/
        settings.json    what determines the results; other settings need another folder
        block-03.json    losses of one block; written once it is measured
        summary.json     means with intervals, of every block in the folder
        scores.csv       one row per block, timestep and held-out clip
        heat_map.png     agreement by block and timestep

Legend: S timestep, K held-out clip.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from cache_schema.atomic_io import make_directories, write_atomic
from cache_schema.schema import flatten
from cache_schema.shown_text import redacted
from stages.evaluate.compare import Mean, mean_of
from stages.files.text import MAX_JSON_BYTES, read_object, read_text

SETTINGS_FILE = "settings.json"
SUMMARY_FILE = "summary.json"
SCORES_FILE = "scores.csv"
PICTURE_FILE = "heat_map.png"

_SEED = 0
"""Of the intervals' resampling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLosses:
    """Losses of one block's linear map, in nats; a loss that is NaN or infinite is None."""

    block: int
    fit_loss: float | None
    """Mean over the last quarter of the steps of fitting."""
    losses: dict[str, list[float | None]]
    """Key of each held-out clip -> its loss at each timestep."""


@dataclass(frozen=True, kw_only=True)
class ProbeResults:
    """Losses of all measured blocks on the same held-out clips, and what follows from them."""

    timesteps: tuple[int, ...]
    num_blocks: int
    """Blocks of the transformer."""
    fitted_on: int
    """Number of clips that the maps are fitted on."""
    excluded: dict[str, str]
    """Key of each chosen clip that could not be used -> why."""
    uniform: dict[str, float]
    """Key of each held-out clip -> loss of a uniform Gram flow."""
    blocks: tuple[BlockLosses, ...]
    """In order of their index."""

    @cached_property
    def uniform_loss(self) -> Mean:
        """Loss of a uniform Gram flow, over the held-out clips."""
        return mean_of(list(self.uniform.values()), seed=_SEED)

    def losses_KS(self, block: BlockLosses) -> np.ndarray:
        """Losses of a block, float64; NaN where there is none."""
        return np.array([block.losses[key] for key in self.uniform], dtype=np.float64)

    def loss(self, block: BlockLosses, timestep: int | None = None) -> float:
        """Mean loss over held-out clips, and over timesteps without one; NaN if one is missing."""
        return float(self._per_clip(block, timestep).mean())

    def agreement(self, block: BlockLosses, timestep: int | None = None) -> Mean:
        """1 - loss / loss of a uniform flow, both means over the clips; all timesteps without one.

        0 is a uniform flow, which says nothing, 1 the teacher's own; below 0 is worse than uniform.
        The interval is over the clips' losses; the mean loss of a uniform flow is taken as fixed.
        Clips without a loss are counted as missing.
        """
        return self._agreements[block.block, timestep]

    @cached_property
    def _agreements(self) -> dict[tuple[int, int | None], Mean]:
        """By index of the block and timestep; None is their mean."""
        uniform_K = np.array(list(self.uniform.values()))
        return {
            (block.block, timestep): mean_of(
                (uniform_K - self._per_clip(block, timestep)) / uniform_K.mean(), seed=_SEED
            )
            for block in self.blocks
            for timestep in (*self.timesteps, None)
        }

    @cached_property
    def best(self) -> BlockLosses | None:
        """The block with the lowest loss over all timesteps; None without one.

        A block that lacks a loss of some clip is left out, since it cannot be compared.
        """
        complete = [block for block in self.blocks if not math.isnan(self.loss(block))]
        return min(complete, key=self.loss, default=None)

    def behind_best(self, block: BlockLosses) -> Mean | None:
        """Loss minus the best block's, paired by clip; None for the best block, or without one."""
        best = self.best
        if best is None or block is best:
            return None
        return mean_of(self._per_clip(block, None) - self._per_clip(best, None), seed=_SEED)

    @cached_property
    def close_to_best(self) -> tuple[int, ...]:
        """Blocks whose interval of `behind_best` includes 0; empty if there are no intervals."""
        found = [(block.block, self.behind_best(block)) for block in self.blocks]
        return tuple(
            number
            for number, behind in found
            if behind is not None and behind.low is not None and behind.low <= 0
        )

    def _per_clip(self, block: BlockLosses, timestep: int | None) -> np.ndarray:
        losses_KS = self.losses_KS(block)
        if timestep is None:
            # A clip without a loss at some timestep has no mean: NaN.
            per_clip: np.ndarray = losses_KS.mean(1)
            return per_clip
        return losses_KS[:, self.timesteps.index(timestep)]

    def as_dict(self) -> dict[str, Any]:
        """JSON values of the summary."""
        return {
            "num_blocks": self.num_blocks,
            "timesteps": list(self.timesteps),
            "clips": {"fitted_on": self.fitted_on, "held_out": len(self.uniform)},
            "excluded": self.excluded,
            "uniform_loss": self.uniform_loss.as_dict(),
            "best": None if self.best is None else self.best.block,
            "close_to_best": list(self.close_to_best),
            "blocks": [self._block_as_dict(block) for block in self.blocks],
        }

    def _block_as_dict(self, block: BlockLosses) -> dict[str, Any]:
        behind = self.behind_best(block)
        return {
            "block": block.block,
            "fit_loss": block.fit_loss,
            "loss": none_if_nan(self.loss(block)),
            "agreement": self.agreement(block).as_dict(),
            "behind_best": None if behind is None else behind.as_dict(),
            "by_timestep": [
                {
                    "timestep": timestep,
                    "loss": none_if_nan(self.loss(block, timestep)),
                    "agreement": self.agreement(block, timestep).as_dict(),
                }
                for timestep in self.timesteps
            ],
        }


def open_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Create the folder, or check that its results have the same settings.

    Raises:
        ValueError: it holds a probe with other settings, or its record is damaged.
    """
    file = out / SETTINGS_FILE
    # Through JSON, so that the values compare equal to those in the file.
    current = flatten(json.loads(json.dumps(redacted(dict(settings)))))
    if file.is_file():
        found = read_object(file)
        names = sorted(found.keys() | current.keys())
        changes = [
            f"{name} was {found.get(name)!r:.80}, is {current.get(name)!r:.80}"
            for name in names
            if name not in found or name not in current or found[name] != current[name]
        ]
        if changes:
            raise ValueError(
                f"{out} holds a probe with different settings: {'; '.join(changes)}. Choose "
                "another folder with --out, or restore the settings it was made with"
            )
        return
    make_directories(out)
    write_atomic(file, _json(current))


def write_block(out: Path, block: BlockLosses) -> None:
    """Write the losses of one block."""
    write_atomic(_file_of(out, block.block), _json(asdict(block)))


def read_block(out: Path, block: int, keys: Sequence[str], timesteps: int) -> BlockLosses | None:
    """Read the losses of a block; None if it is not measured yet.

    Args:
        keys: keys of the held-out clips.
        timesteps: number of timesteps.

    Raises:
        ValueError: the file is damaged.
    """
    file = _file_of(out, block)
    if not file.is_file():
        return None
    try:
        text = read_text(file, MAX_JSON_BYTES)
        found = TypeAdapter(BlockLosses).validate_json(text, strict=True)
        if found.block != block or found.losses.keys() != set(keys):
            raise ValueError("it is of another block or of other clips")
        if any(len(values) != timesteps for values in found.losses.values()):
            raise ValueError(f"a clip has not {timesteps} losses")
    except (ValidationError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, and run probe again") from error
    return found


def write_results(
    out: Path, results: ProbeResults, picture: bytes, about: Mapping[str, Any]
) -> None:
    """Write summary, table and picture, each atomically.

    Args:
        picture: a PNG.
        about: recorded in the summary, such as software versions.
    """
    write_atomic(out / SUMMARY_FILE, _json({**results.as_dict(), **about}))
    write_atomic(out / SCORES_FILE, _table(results).encode("utf-8", "backslashreplace"))
    write_atomic(out / PICTURE_FILE, picture)


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _table(results: ProbeResults) -> str:
    """Empty where there is no loss."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["block", "timestep", "clip", "loss", "uniform_loss"])
    for block in results.blocks:
        for column, timestep in enumerate(results.timesteps):
            for key, uniform in results.uniform.items():
                loss = block.losses[key][column]
                shown = "" if loss is None else repr(loss)
                writer.writerow([block.block, timestep, key, shown, repr(uniform)])
    return out.getvalue()


def _file_of(out: Path, block: int) -> Path:
    return out / f"block-{block:02d}.json"


def _json(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    return text.encode("utf-8", "backslashreplace")
