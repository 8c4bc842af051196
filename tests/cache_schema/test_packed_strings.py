"""Packed texts behave as the list of texts they were made from."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.packed_strings import PackedText, SortedText

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(texts, max_size=30), st.data())
def test_packed_texts_are_the_list_they_were_made_from(
    wanted: list[str], data: st.DataObject
) -> None:
    packed = PackedText.from_strings(wanted)
    assert packed == wanted
    assert list(packed) == wanted
    assert [packed[row] for row in range(len(wanted))] == wanted
    assert [packed[row - len(wanted)] for row in range(len(wanted))] == wanted
    assert pickle.loads(pickle.dumps(packed)) == wanted
    bounds = data.draw(st.slices(len(wanted)))
    assert packed[bounds] == wanted[bounds]
    rows = data.draw(st.lists(st.integers(0, max(0, len(wanted) - 1)), max_size=9 * bool(wanted)))
    assert packed.take(np.array(rows, np.int64)) == [wanted[row] for row in rows]
    for row in (len(wanted), -len(wanted) - 1):
        with pytest.raises(IndexError):
            packed[row]


@given(st.sets(texts, max_size=30), texts)
def test_sorted_texts_are_found_in_the_order_of_code_points(wanted: set[str], other: str) -> None:
    ordered = sorted(wanted)
    packed = SortedText.from_strings(ordered)
    for row, text in enumerate(ordered):
        assert text in packed
        assert packed.find(text) == packed.index(text) == row
    assert (other in packed) == (other in wanted)
    assert packed.find(other) == (ordered.index(other) if other in wanted else None)
    if other not in wanted:
        with pytest.raises(ValueError, match="not among"):
            packed.index(other)
    assert None not in packed
    assert "\ud800" not in packed


@given(st.lists(st.sets(texts, max_size=20), min_size=1, max_size=4), st.sets(texts, max_size=20))
def test_texts_in_all_are_the_intersection(sets: list[set[str]], everywhere: set[str]) -> None:
    first, *others = (SortedText.from_strings(sorted(each | everywhere)) for each in sets)
    shared = set.intersection(*(each | everywhere for each in sets))
    assert first.in_all(*others) == sorted(shared)


@given(st.sets(texts, max_size=30), st.sets(texts, max_size=30))
def test_rows_of_other_texts_are_those_that_finding_each_gives(
    here: set[str], others: set[str]
) -> None:
    packed, wanted = (SortedText.from_strings(sorted(each)) for each in (here, others))
    expected = [packed.find(text) for text in wanted]
    assert packed.rows_of(wanted).tolist() == [-1 if row is None else row for row in expected]


def test_many_texts_go_through_in_pieces() -> None:
    wanted = sorted(
        f"{number * 7919 % 50_000:05d}-{'é' * (number % 4)}" for number in range(50_000)
    )
    packed = SortedText.from_strings(wanted)
    assert packed == wanted
    rows = np.random.default_rng(0).permutation(50_000)
    assert packed.take(rows) == [wanted[row] for row in rows]
    some = SortedText.from_strings(wanted[5::3])
    more = SortedText.from_strings(wanted[::2])
    expected = sorted(set(wanted[5::3]) & set(wanted[::2]))
    assert packed.in_all(some, packed, more) == expected
    assert more.in_all(some) == expected
    assert packed.in_all(packed, packed) is packed


@pytest.mark.parametrize("ends", [[3], [5], [4, 3, 4], [2, 5]])
def test_ends_that_do_not_fit_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        PackedText(np.frombuffer(b"abcd", np.uint8), np.array(ends, np.uint64))


def test_packed_texts_differ_where_the_texts_do() -> None:
    packed = PackedText.from_strings(["ab", "c"])
    assert packed != PackedText.from_strings(["a", "bc"])
    assert packed != ("ab",)
    assert packed != ["ab", "d"]
    assert packed != "abc"
    assert repr(PackedText.from_strings("abcd")) == "<4 texts: 'a', 'b', 'c', …>"
