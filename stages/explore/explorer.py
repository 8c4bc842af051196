"""What the page asks for: lists of clips, one clip's pictures and Gram flow, the list to leave out.

Everything that may come from a dataset is made visible text here; the page inserts it as text.
"""

import os
import shlex
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cache_schema import CacheError, is_url
from cache_schema.shown_text import redacted
from stages.clips import ClipDataset, ClipsConfig
from stages.explore.descriptions import describe_layers, shown, shown_values
from stages.explore.flow_view import FlowView
from stages.explore.kept import Kept
from stages.explore.layers import (
    MASK_COLOURS,
    ClipLayers,
    load_layers,
    thumbnail_frames,
)
from stages.explore.leave_out import LeaveOutList
from stages.explore.pictures import make_thumbnail
from stages.explore.query import MAX_PAGE, BadQuery, Query, histograms, parse_query, select
from stages.explore.stores import SizeStores
from stages.explore.student import RunStudent, StudentView
from stages.explore.table import LABELS, NUMBERS, ClipTable
from stages.inspect_cache.clip_facts import describe_track
from stages.train_student.objectives.config import LgfConfig

_KEPT_CLIPS, _KEPT_THUMBNAILS, _KEPT_ORDERS = 4, 256, 4
_PAGE = 60
_DRAWN_AT_ONCE = max(2, (os.cpu_count() or 2) // 2)


class NoSuchClip(LookupError):  # noqa: N818 (named after the condition)
    """There is no such row, or nothing of it to draw."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What is explored, and how."""

    cache: str
    """The cache as the user named it."""
    sizes: Sequence[SizeStores]
    data: ClipsConfig
    """The dataset's settings."""
    dataset: ClipDataset | None
    """Source of the frames; None shows features instead."""
    no_dataset: str
    """Why there is no dataset; empty if there is one."""
    lgf: LgfConfig
    """Window, tracks and pairs of the Gram flow, and its temperature."""
    leave_out: LeaveOutList
    student: RunStudent | None = None
    """The student of a run, shown beside the teacher."""


@dataclass(kw_only=True, eq=False)
class Explorer:
    """Answers of the page's requests, from any thread."""

    sources: Sources
    table: ClipTable = field(init=False)

    def __post_init__(self) -> None:
        self.table = ClipTable(self.sources.sizes)
        self._stop = threading.Event()
        self._reading = threading.Thread(target=self.table.read, args=(self._stop,), daemon=True)
        self._clips: Kept[ClipLayers] = Kept(_KEPT_CLIPS)
        self._students: Kept[StudentView] = Kept(_KEPT_CLIPS)
        self._thumbnails: Kept[tuple[bytes, bytes]] = Kept(_KEPT_THUMBNAILS)
        self._orders: Kept[np.ndarray] = Kept(_KEPT_ORDERS)
        self._drawing = threading.BoundedSemaphore(_DRAWN_AT_ONCE)
        self._records = threading.Lock()

    def start(self) -> None:
        """Begin to read the records of all clips."""
        self._reading.start()

    def close(self) -> None:
        """Stop reading records."""
        self._stop.set()
        if self._reading.is_alive():
            self._reading.join()

    def state(self) -> dict[str, Any]:
        """What is explored, and how much of it has been read."""
        table, sources = self.table, self.sources
        path = str(sources.leave_out.path)
        return {
            "cache": shown(sources.cache),
            "stores": [
                {"kind": kind, "name": shown(reader.name), "size": size.size}
                for size in sources.sizes
                for kind, reader in size.readers.items()
            ],
            "stored": table.num_stored,
            "skipped": len(table) - table.num_stored,
            "read": table.num_read,
            "finished": table.finished,
            "index_command": self._index_command(),
            "problems": [shown(problem) for problem in table.problems[:20]],
            "no_dataset": shown(sources.no_dataset),
            "columns": {"numbers": NUMBERS, "labels": LABELS},
            "student": None
            if sources.student is None
            else {
                "run": shown(str(sources.student.run_dir)),
                "timesteps": sources.student.timesteps,
            },
            "temperature": sources.lgf.temperature,
            "mask_colours": MASK_COLOURS,
            "left_out": len(sources.leave_out.keys()),
            "leave_out_commands": [
                shown(f"sam2vx-pipeline train … train.leave_out={shlex.quote(path)}"),
                shown(
                    f"sam2vx-pipeline cache drop {shlex.quote(sources.cache)} --from "
                    f"{shlex.quote(path)}"
                ),
            ],
        }

    def _index_command(self) -> str:
        """The command after which no record has to be read; empty if none had to be."""
        cache = self.sources.cache
        if not self.table.num_shards_read or is_url(cache):
            return ""
        return shown(f"sam2vx-pipeline cache index {shlex.quote(cache)}")

    def clips(self, parameters: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """A page of clips: `offset` and `limit` besides a query.

        Raises:
            BadQuery: A parameter has a value that it cannot have.
        """
        query = parse_query(parameters)
        offset = _integer(parameters, "offset", 0, 10**9)
        limit = _integer(parameters, "limit", _PAGE, MAX_PAGE)
        left_out = self.sources.leave_out.keys()
        rows = self._order(query, left_out)
        return {
            "matching": len(rows),
            "offset": offset,
            "read": self.table.num_read,
            "finished": self.table.finished,
            "clips": [self.line(row, left_out) for row in rows[offset : offset + limit].tolist()],
        }

    def _order(self, query: Query, left_out: frozenset[str]) -> np.ndarray:
        marked = left_out if query.show == "left_out" else frozenset()
        key = (query, self.table.version, marked)
        return self._orders.get(key, lambda: select(self.table, query, left_out))

    def histograms(self, parameters: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Counts of the columns' values over the clips of a query; raises `BadQuery`."""
        query = parse_query(parameters)
        return histograms(self.table, query, self.sources.leave_out.keys())

    def line(self, row: int, left_out: frozenset[str]) -> dict[str, Any]:
        """What a list says of a clip."""
        table = self.table
        caption = table.caption(row)
        return {
            "row": row,
            "key": shown(table.key(row)),
            "caption": None if caption is None else shown(caption),
            "numbers": {name: table.number(name, row) for name in NUMBERS},
            "labels": {name: table.word(name, row) for name in LABELS},
            "detail": shown(table.detail(row)),
            "left_out": table.key(row) in left_out,
        }

    def clip(self, row: int) -> dict[str, Any]:
        """Everything about one clip but its pictures.

        Raises:
            NoSuchClip: There is no such row.
        """
        layers = self.layers(row)
        key, size = self.table.key(row), self.table.size_of(row)
        stores: list[dict[str, Any]] = []
        facts: list[str] = []
        for kind, reader in size.readers.items():
            if key not in reader:
                continue
            try:
                with self._records:
                    entry = reader.record(key)
            except CacheError as error:
                stores.append({"kind": kind, "name": shown(reader.name), "problem": str(error)})
                continue
            if not facts and "prompt" in entry.attributes:
                facts = [*describe_track(entry.attributes, layers.num_frames)]
            specs = reader.settings.arrays
            stores.append(
                {
                    "kind": kind,
                    "name": shown(reader.name),
                    "shard": entry.shard,
                    "source": entry.source,
                    "fingerprint": entry.fingerprint,
                    "arrays": [
                        [name, specs[name].dtype, list(specs[name].shape), array.bytes]
                        for name, array in entry.arrays.items()
                    ],
                    "attributes": entry.attributes,
                    "settings": reader.settings.values,
                    "made_with": reader.provenance,
                }
            )
        return {
            **self.line(row, self.sources.leave_out.keys()),
            "facts": [shown(fact) for fact in facts],
            "stores": shown_values(redacted(stores)),
            **describe_layers(layers),
        }

    def layers(self, row: int) -> ClipLayers:
        """A clip's pictures and Gram flow; raises `NoSuchClip`."""
        self._check(row)

        def load() -> ClipLayers:
            with self._drawing:
                return load_layers(
                    self.table.size_of(row).readers,
                    self.table.key(row),
                    self.table.shard(row),
                    data=self.sources.data,
                    dataset=self.sources.dataset,
                    lgf=self.sources.lgf,
                )

        return self._clips.get(row, load)

    def flow(self, row: int, side: str) -> FlowView:
        """A clip's Gram flow of the `teacher`, or of the student at the timestep `side`.

        Raises:
            NoSuchClip: There is no such row, or no Gram flow of it.
            CacheError, ValueError: The student cannot be loaded, or lacks a store.
        """
        flow = self.layers(row).flow if side == "teacher" else self.student(row, int(side)).flow
        if flow is None:
            raise NoSuchClip(f"no Gram flow of row {row}")
        return flow

    def student(self, row: int, timestep: int) -> StudentView:
        """The student's side of a clip at one of the offered timesteps; raises as `flow`."""
        self._check(row)
        student = self.sources.student
        if student is None or timestep not in student.timesteps:
            raise NoSuchClip(f"no student at timestep {timestep}")
        return self._students.get(
            (row, timestep), lambda: student.view(self.table.key(row), timestep)
        )

    def thumbnail(self, row: int) -> tuple[bytes, bytes]:
        """A still and an animation of a clip, WebP.

        Raises:
            NoSuchClip: There is no such row, or nothing of it to draw.
            CacheError, ValueError: What there is cannot be drawn.
        """
        self._check(row)

        def draw() -> tuple[bytes, bytes]:
            with self._drawing:
                found = thumbnail_frames(
                    self.table.size_of(row).readers,
                    self.table.key(row),
                    self.table.shard(row),
                    data=self.sources.data,
                    dataset=self.sources.dataset,
                )
                if found is None:
                    raise NoSuchClip(f"nothing to draw of row {row}")
                return make_thumbnail(*found)

        return self._thumbnails.get(row, draw)

    def set_left_out(self, row: int, leave_out: bool) -> dict[str, Any]:
        """Put a clip on the list of clips to leave out, or take it off; returns the new state."""
        self._check(row)
        self.sources.leave_out.change(self.table.key(row), leave_out=leave_out)
        return self.state()

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self.table):
            raise NoSuchClip(f"no row {row}: there are {len(self.table)}")


def _integer(parameters: Mapping[str, Sequence[str]], name: str, default: int, most: int) -> int:
    text = parameters.get(name, [str(default)])[-1]
    # Not int(), which takes other digits, signs and underscores.
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most):
        raise BadQuery(f"{name} must be a number from 0 to {most}, got {text[:20]!r}")
    return int(text)
