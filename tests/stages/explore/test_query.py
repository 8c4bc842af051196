"""Search, filters and histograms, against plain loops over the clips' facts."""

import math
import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import PackedText, StoreReader, StoreWriter
from stages.explore.query import Query, histograms, parse_query, select
from stages.explore.search import containing, without_separators
from stages.explore.stores import open_cache
from stages.explore.table import LABELS, NUMBERS, ClipTable
from tests.stages.explore.conftest import CAPTIONS, FRAMES, LOST, QUALITY, ROWS


@pytest.fixture(scope="module")
def table(cache):
    table = ClipTable(open_cache(cache))
    table.read(threading.Event())
    return table


def keys(table, left_out=frozenset(), **query):
    return [table.key(row) for row in select(table, Query(**query), left_out).tolist()]


def test_the_table_holds_what_the_records_say(table):
    assert (table.num_stored, len(table), table.num_read) == (4, 5, 4)
    assert table.finished and not table.problems
    for row, key in enumerate(ROWS):
        assert table.key(row) == key
        assert table.row_of(key) == row
        assert table.caption(row) == CAPTIONS[key]
        assert table.shard(row) == key.split("/")[0]
        quality = table.number("quality", row)
        assert quality == pytest.approx(QUALITY[key]) if QUALITY[key] else quality is None
        assert table.number("lost", row) == LOST[key]
        assert table.number("valid", row) == FRAMES - LOST[key]
        assert table.word("size", row) == "9x48x64"
        assert table.word("reason", row) is None
    assert table.word("prompt", ROWS.index("run/<i>3")) == "grounding box"
    assert table.number("confidence", ROWS.index("run/<i>3")) == 0.75


def test_attribute_tables_give_what_the_records_give(table, cache, tmp_path):
    copied = shutil.copytree(cache, tmp_path / "cache")
    for store in copied.iterdir():
        writer = StoreWriter(store, StoreReader(store).settings)
        writer.write_attributes()
    listed = ClipTable(open_cache(copied))
    listed.read(threading.Event())
    assert (table.num_shards_read, listed.num_shards_read) == (4, 0)
    assert (listed.num_read, listed.finished, listed.problems) == (4, True, [])
    for row in range(len(table)):
        for name in NUMBERS:
            assert listed.number(name, row) == table.number(name, row)
        for name in LABELS:
            assert listed.word(name, row) == table.word(name, row)
        assert listed.caption(row) == table.caption(row)
    for search in ("lion", "LÖWE", "runs", "walk", "a"):
        assert keys(listed, search=search) == keys(table, search=search)


def test_a_skipped_clip_is_listed_once_with_its_reason(table):
    assert keys(table, show="skipped") == ["walk/0009"]
    row = table.row_of("walk/0009")
    assert (row, table.word("reason", row), table.detail(row)) == (4, "too_short", "3 <frames>")
    assert table.caption(row) is None and table.shard(row) == "walk"
    assert table.size_of(row).size == "9x48x64"


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("", ROWS),
        ("lion", ["walk/0001"]),
        ("LION WALK", ["walk/0001"]),
        ("löwe", ["run/<i>3"]),
        ("RUN/", ["run/0004", "run/<i>3"]),
        ("runs 0004", ["run/0004"]),
        ("<script>", []),
        ("</script>", ["walk/0002"]),
        (".*", []),
        ("s l", ["walk/0001", "walk/0002"]),
        ("lion dog", []),
    ],
)
def test_every_word_must_be_in_the_key_or_the_caption(table, search, found):
    assert keys(table, search=search) == found


def test_clips_without_a_value_come_last_in_either_order(table):
    assert keys(table, sort="quality") == ["walk/0002", "run/0004", "walk/0001", "run/<i>3"]
    assert keys(table, sort="quality", descending=True) == [
        "walk/0001",
        "run/0004",
        "walk/0002",
        "run/<i>3",
    ]


def test_clips_of_the_list_are_shown_skipped_ones_too(table):
    left_out = frozenset(["walk/0009", "run/0004", "not/there"])
    assert keys(table, left_out, show="left_out") == ["run/0004", "walk/0009"]


bounds = st.floats(-0.5, 9.5, allow_nan=False, width=32)


@settings(max_examples=30)
@given(
    quality=st.tuples(bounds, bounds).map(sorted),
    lost=st.tuples(bounds, bounds).map(sorted),
    label=st.sampled_from([None, "dataset mask", "grounding box", "no such"]),
)
def test_filters_and_histograms_equal_loops(table, quality, lost, label):
    prompt = {key: "grounding box" if QUALITY[key] is None else "dataset mask" for key in ROWS}
    tests = {
        "quality": lambda key: QUALITY[key] is not None and in_range(QUALITY[key], quality),
        "lost": lambda key: in_range(LOST[key], lost),
        "prompt": lambda key: label is None or prompt[key] == label,
    }

    def passing(*ignoring):
        chosen = [test for name, test in tests.items() if name not in ignoring]
        return [key for key in ROWS if all(test(key) for test in chosen)]

    query = Query(
        ranges=(("quality", *quality), ("lost", *lost)),
        labels=() if label is None else (("prompt", label),),
    )
    rows = select(table, query, frozenset())
    assert [table.key(row) for row in rows.tolist()] == passing()
    found = histograms(table, query, frozenset())
    of_quality = [QUALITY[key] for key in passing("quality")]
    assert sum(found["numbers"]["quality"]["counts"]) == sum(v is not None for v in of_quality)
    assert found["numbers"]["quality"]["missing"] == of_quality.count(None)
    counts = dict(found["labels"]["prompt"]["counts"])
    for word in counts:
        assert counts[word] == [prompt[key] for key in passing("prompt")].count(word)


def in_range(value, ends):
    return np.float32(ends[0]) <= np.float32(value) <= np.float32(ends[1])


def test_a_histogram_spans_all_clips_whatever_is_filtered(table):
    query = Query(ranges=(("quality", 0.8, 1.0),))
    found = histograms(table, query, frozenset())["numbers"]["quality"]
    assert (found["low"], found["high"]) == pytest.approx((0.25, 0.9))
    counts = np.array(found["counts"])
    assert counts.sum() == 3
    centre = math.floor((0.5 - 0.25) / (0.9 - 0.25) * len(counts))
    assert counts[0] == counts[-1] == counts[centre] == 1
    # Of a single value, a histogram says nothing.
    assert "confidence" not in histograms(table, query, frozenset())["numbers"]


def test_a_query_is_read_from_an_address():
    found = parse_query(
        {
            "show": ["skipped"],
            "search": ["a b"],
            "sort": ["-lost"],
            "range": ["quality:0:0.5"],
            "label": ["prompt:dataset mask:x"],
        }
    )
    assert found == Query(
        show="skipped",
        search="a b",
        sort="lost",
        descending=True,
        ranges=(("quality", 0.0, 0.5),),
        labels=(("prompt", "dataset mask:x"),),
    )
    assert parse_query({}) == Query()


def test_a_caption_with_the_separator_is_searched_as_if_it_had_a_space():
    texts = PackedText.from_strings(["a\0lion", "", "Löwe", "dog\0"])
    searched = without_separators(texts)
    assert searched == ["a lion", "", "Löwe", "dog "]
    assert without_separators(searched) is searched
    assert containing(searched, ["löwe", "a lion", ""]).tolist() == [
        [False, False, True, False],
        [True, False, False, False],
        [True, True, True, True],
    ]
