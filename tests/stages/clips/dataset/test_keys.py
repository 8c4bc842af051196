"""Keys: the dataset's check agrees with the store's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.names import check_key
from stages.clips.dataset.keys import MAX_KEY_BYTES, key_problem


@pytest.mark.parametrize("key", ["a\u00a0b", "a\u3000b", "a\u2028b", "a\u200bb", "walk/été"])
def test_spaces_of_every_kind_may_be_in_keys(key: str) -> None:
    assert key_problem(key) is None
    assert check_key(key) == key


@given(st.text(st.characters(), max_size=12))
def test_what_the_dataset_accepts_the_store_accepts(key: str) -> None:
    """Alike for keys that are far from the longest, of which the dataset keeps a few bytes."""
    assert len(key.encode("utf-8", "surrogatepass")) < MAX_KEY_BYTES - 16
    try:
        check_key(key)
    except ValueError:
        assert key_problem(key) is not None
    else:
        assert key_problem(key) is None
