"""What `scale.py` measured and the format's own constants come to at 10^8 clips on 1,000 nodes.

Nothing here was run. Sizes and limits are computed from `cache_schema` and the stages; times grow
in proportion to clips, as they were measured. What is assumed of machines stands in the constants.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_schema import ArraySpec, StoreSettings
from cache_schema.checksummed_json import encode_record
from cache_schema.commit import _MAX_UNLISTED, _MAX_UNLISTED_SHARE
from cache_schema.index_columns import column_types
from cache_schema.names import MAX_INDEX_BYTES, MAX_RECORD_BYTES
from cache_schema.zarr_shard import metadata_paths
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.dry_run.extract_stores import bytes_of, planned_passes
from stages.extract_features.config import ExtractConfig, TeacherConfig
from tests.benchmarks.open_index import make_record
from tests.benchmarks.report import table
from tests.benchmarks.scale_fixtures import PER_SHARD, Found, key_of

CLIPS, NODES, PROCESSES = 10**8, 1000, 8
"""Clips of the cache, nodes, and training processes on each."""
NODE_BYTES = 2**40
"""Memory of a node."""
OPERATIONS_PER_S = 50_000
"""Operations that the file system's metadata server answers."""
NAMES_PER_OPERATION = 1000
"""Names that one operation of it lists."""
NAMES_PER_FOLDER = 10**6
"""Names in a folder up to which listing and looking up are usually quick."""
INODES = 2**32
"""Inodes of a file system: ext4's most."""
DAY_S = 86_400
"""How long maintenance, or all of a metadata server's work for stage one or an epoch, may take."""
START_S = 600
"""How long starting a run, or one process that the others need, may take."""

Known = Mapping[tuple[str, int], Found]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """Something that grows in proportion to clips, and its limit."""

    what: str
    unit: str
    each: float
    """For one clip; NaN if it was not measured."""
    limit: float
    limit_is: str
    instead: str
    """What would have to change."""

    @property
    def clips(self) -> float:
        """Clips at which the limit is reached."""
        return self.limit / self.each if self.each > 0 else math.inf


def default_arrays() -> dict[str, Mapping[str, ArraySpec]]:
    """Arrays of stage one's default kinds for CogVideoX-5B, by kind."""
    config = ExtractConfig(teacher=TeacherConfig(prompts=("dataset",)))
    passes = planned_passes(
        config, ClipsConfig(path=Path("clips")), BaseModelConfig(path="zai-org/CogVideoX-5b")
    )
    return {kind: arrays for one in passes for kind, arrays in (one.arrays or {}).items()}


def index_bytes(arrays: Mapping[str, ArraySpec]) -> int:
    """Bytes of a clip in the index."""
    fixed = (
        np.dtype(dtype).itemsize
        for name, dtype in column_types(arrays).items()
        if name.split(".")[0] in ("keys", "clips", "arrays") and name != "keys.text"
    )
    return sum(fixed) + len(key_of(0).encode())


def record_bytes(kind: str, arrays: Mapping[str, ArraySpec]) -> float:
    """Bytes of a clip in a commit record."""
    settings = StoreSettings(kind=kind, arrays=dict(arrays), values={})
    record = make_record(settings, "00000", range(PER_SHARD))
    return len(encode_record(record.as_dict(settings.hash))) / PER_SHARD


def index_writes(shards: int) -> tuple[int, float]:
    """How often writers update an index until it lists all shards, and how many indexes of the
    final size they write in all."""
    listed = writes = written = 0
    while listed < shards:
        listed += int(max(_MAX_UNLISTED, _MAX_UNLISTED_SHARE * listed)) + 1
        writes, written = writes + 1, written + listed
    return writes, written / shards


def per_clip(known: Known, cell: str, what: str) -> float:
    """What a further clip adds to a cell, from its smallest to its largest size; NaN for one
    size alone."""
    sizes = sorted(n for name, n in known if name == cell and what in known[name, n])
    if len(sizes) < 2:
        return float("nan")
    few, many = sizes[0], sizes[-1]
    return float(known[cell, many][what] - known[cell, few][what]) / (many - few)


def quantities(known: Known, arrays: Mapping[str, Mapping[str, ArraySpec]]) -> list[Quantity]:
    """Everything that has a limit."""
    indexes = {kind: index_bytes(of_kind) for kind, of_kind in arrays.items()}
    per_shard = [
        len(metadata_paths(StoreSettings(kind=kind, arrays=dict(of_kind), values={}))) + 1
        for kind, of_kind in arrays.items()
    ]
    files = sum(map(len, arrays.values())) + sum(per_shard) / PER_SHARD
    counts = known.get(("operations a clip", PER_SHARD), {})
    order = 2 * np.random.default_rng(0).permutation(1).itemsize
    default_shard = ClipsConfig(path=Path("clips")).clips_per_shard
    day, start, memory = "a day", "a start", "a node's memory"
    several = "several clips in a file, or several file systems"
    mapped = "the index in parts by key, mapped from a local file"

    def seconds(cell: str, limit: float, limit_is: str, instead: str) -> Quantity:
        each = per_clip(known, cell, "processor_s")
        return Quantity(
            what=cell, unit="s", each=each, limit=limit, limit_is=limit_is, instead=instead
        )

    def plain(
        what: str, unit: str, each: float, limit: float, limit_is: str, instead: str
    ) -> Quantity:
        return Quantity(
            what=what, unit=unit, each=each, limit=limit, limit_is=limit_is, instead=instead
        )

    return [
        plain("files, four kinds", "", files, INODES, "ext4's inodes", several),
        *(
            plain(
                f"operations to {name} all, of the metadata server",
                "s",
                counts.get(f"{name}_operations", float("nan")) / OPERATIONS_PER_S,
                DAY_S,
                day,
                several,
            )
            for name in ("write", "read")
        ),
        *(
            plain(
                f"names in `shards/` and `commits/`, {number:,} clips a shard",
                "",
                1 / number,
                NAMES_PER_FOLDER,
                "names in a folder",
                "larger shards",
            )
            for number in (default_shard, PER_SHARD)
        ),
        plain(
            "largest `index.npz`",
            "B",
            max(indexes.values()),
            MAX_INDEX_BYTES,
            "`MAX_INDEX_BYTES`",
            "an index for each range of shards",
        ),
        plain(
            f"indexes of four kinds, {PROCESSES} processes a node",
            "B",
            PROCESSES * sum(indexes.values()),
            NODE_BYTES,
            memory,
            mapped,
        ),
        plain(
            f"orders of two epochs, {PROCESSES} processes a node",
            "B",
            PROCESSES * order,
            NODE_BYTES,
            memory,
            "an order that is computed, not drawn",
        ),
        plain(
            f"memory of first clip, metadata.jsonl, {PROCESSES} processes a node",
            "B",
            PROCESSES * per_clip(known, "first clip, metadata.jsonl", "peak_mb") * 1e6,
            NODE_BYTES,
            memory,
            "tars",
        ),
        seconds("first clip, metadata.jsonl", START_S, start, "tars"),
        seconds("first clip, tars", START_S, start, "a list of the tars"),
        seconds("open a reader", START_S, start, mapped),
        seconds("training start", START_S, start, mapped),
        seconds("cache list", START_S, start, mapped),
        seconds("begin a shard, index there", START_S, start, mapped),
        seconds("write the index", START_S, start, "an index for each range of shards"),
        seconds("cache verify", DAY_S, day, "several processes, a range of shards each"),
        seconds("cache copy", DAY_S, day, "several processes, a range of shards each"),
    ]


def section(known: Known) -> str:
    """The section of the report: sizes, then every limit, the first to be reached first."""
    arrays = default_arrays()
    found = quantities(known, arrays)
    rows = [
        [
            one.what,
            _short(one.each, one.unit),
            _short(one.each * CLIPS, one.unit),
            f"{one.limit_is}: {_short(one.limit, one.unit)}",
            _short(one.clips, ""),
            one.instead if one.clips < 10 * CLIPS else "",
        ]
        for one in sorted(found, key=lambda one: one.clips)
        if not math.isnan(one.each)
    ]
    not_measured = [one.what for one in found if math.isnan(one.each)]
    sizes = {kind: bytes_of(of_kind) for kind, of_kind in arrays.items()}
    writes, total = index_writes(CLIPS // PER_SHARD)
    largest_record = max(record_bytes(kind, of_kind) for kind, of_kind in arrays.items())
    reads = sum(map(len, arrays.values()))
    listing = []
    for number in (PER_SHARD, ClipsConfig(path=Path("clips")).clips_per_shard):
        names = (CLIPS / number) ** 2 / 2
        hours = names / NAMES_PER_OPERATION / OPERATIONS_PER_S / 3600
        listing.append(
            f"{_short(names, '')} names a kind with {number:,} clips a shard, {hours:.2g} h"
        )
    texts = [
        f"## To {_short(CLIPS, '')} clips on {NODES:,} nodes",
        "By arithmetic: constants of the format, and what a further clip adds to the processor's "
        "time in the table, from the smallest to the largest size. Shards have "
        f"{PER_SHARD:,} clips, keys {len(key_of(0))} bytes.",
        f"Assumed: a metadata server that answers {OPERATIONS_PER_S:,} operations a second, "
        f"{_short(NODE_BYTES, 'B')} of memory a node.",
        table(["", "a clip", f"{_short(CLIPS, '')} clips", "limit", "reached at", "instead"], rows),
        "Bytes a clip of 49x480x720, CogVideoX-5B: "
        + ", ".join(f"{kind} {_short(size, 'B')}" for kind, size in sizes.items())
        + f"; {_short(sum(sizes.values()) * CLIPS, 'B')} in all.",
        f"A record of {_short(MAX_RECORD_BYTES, 'B')} (`MAX_RECORD_BYTES`) holds a shard of "
        f"{_short(MAX_RECORD_BYTES / largest_record, '')} clips. Until an index lists all shards "
        f"it is written {writes} times, {total:.0f} times its bytes. A sample behind a URL takes "
        f"{reads} requests of a range if all kinds are read.",
        "Committing a shard lists `commits/`, which grows with the square of shards: over the run "
        f"{'; '.join(listing)} of the metadata server.",
    ]
    if not_measured:
        texts.append(f"Not measured: {', '.join(not_measured)}.")
    return "\n\n".join(texts)


def _short(value: float, unit: str) -> str:
    """Three digits, with a prefix for bytes."""
    if unit == "B":
        for prefix, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if value >= size:
                return f"{value / size:.3g} {prefix}"
        return f"{value:.3g} B"
    return f"{value:.3g} {unit}".strip().replace("e+0", "e")
