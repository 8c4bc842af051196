"""Columns of facts of all clips against the facts of each clip's record."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import ClipEntry, StoredArray
from cache_schema.attribute_building import TableBuilder
from cache_schema.attribute_table import AttributeTable
from cache_schema.index import ClipIndex
from cache_schema.records import CommitRecord
from stages.inspect_cache.clip_facts import clip_columns, clip_line

FRACTION = st.none() | st.floats(0, 1)
FRAMES = st.none() | st.integers(0, 99)
PROMPT = st.fixed_dictionaries(
    {
        "source": st.sampled_from(["dataset", "grounding", "automatic"]),
        "kinds": st.lists(st.sampled_from(["box", "mask", "points"]), max_size=2),
    },
    optional={"confidence": FRACTION},
)
CLIP = st.fixed_dictionaries(
    {},
    optional={
        "quality": FRACTION,
        "num_frames": FRAMES,
        "valid_frames": FRAMES,
        "lost_at": FRAMES,
        "prompt": PROMPT | st.none(),
    },
)
FILES = {"a": StoredArray("", 1, "0" * 8, "0" * 8)}


@settings(max_examples=50, deadline=None)
@given(st.lists(CLIP, max_size=6))
def test_the_line_of_each_clip_is_that_of_its_record(clips):
    entries = [
        ClipEntry(f"{9 - number}", "s", number, "s", "0" * 32, attributes, FILES)
        for number, attributes in enumerate(clips)
    ]
    record = CommitRecord("s", 0, 0, "s", tuple(entries), (), {})
    table = TableBuilder()
    table.add(record, 7)
    index = ClipIndex.from_records([(record, 7)], FILES)
    columns = clip_columns(AttributeTable(table.columns()).in_order_of(index))
    for entry in entries:
        row = index.keys.index(entry.key)
        assert columns.line(row, entry.key, entry.shard) == clip_line(entry)
