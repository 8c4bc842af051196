"""Settings: validation, and a hash that changes with everything that affects values."""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import ArraySpec, Compression, CorruptRecord, StoreSettings
from cache_schema.checksummed_json import decode_record, encode_record
from cache_schema.names import SCHEMA_VERSION
from tests.cache_schema import tampering
from tests.cache_schema.made_stores import SETTINGS

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | floats | text
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)
)
names = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True)


@st.composite
def array_specs(draw: st.DrawFn) -> ArraySpec:
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    axes = draw(
        st.lists(
            names.filter(lambda name: name != "clip"),
            min_size=len(shape),
            max_size=len(shape),
            unique=True,
        )
    )
    dtype = draw(st.sampled_from(["float16", "float32", "uint8", "int64"]))
    compression = draw(st.sampled_from(get_args(Compression)))
    return ArraySpec(
        dtype=dtype, shape=tuple(shape), dimension_names=tuple(axes), compression=compression
    )


all_settings = st.builds(
    StoreSettings,
    kind=names,
    arrays=st.dictionaries(names, array_specs(), min_size=1, max_size=3),
    values=st.dictionaries(text, json_values, max_size=4),
)


@hypothesis.settings(max_examples=40)
@given(all_settings)
def test_settings_survive_a_sealed_file(settings: StoreSettings) -> None:
    back = StoreSettings.from_dict(
        decode_record(encode_record(settings.as_dict()), "test", store="s")
    )
    assert back == settings
    assert back.hash == settings.hash
    assert list(back.arrays) == list(settings.arrays)


@hypothesis.settings(max_examples=40)
@given(all_settings)
def test_white_space_of_a_record_changes_nothing_of_what_is_read(settings: StoreSettings) -> None:
    compact = encode_record(settings.as_dict())
    record = json.loads(compact)
    indented = tampering.seal(record)
    assert indented != compact
    for data in (compact, indented):
        found = decode_record(data, "test", store="s")
        assert found == {k: v for k, v in record.items() if k not in ("crc32c", "schema_version")}


def test_a_record_has_each_of_its_clips_on_a_line() -> None:
    clips: list[Any] = [{"key": f"clip {i}", "arrays": {"a": {"bytes": i}}} for i in range(3)]
    lines = encode_record({"shard": "0", "clips": clips}).decode("utf-8").splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines if "clip " in line] == clips


def test_a_changed_version_is_damage_and_not_an_older_store() -> None:
    sealed = encode_record({"a": 1})
    data = sealed.replace(b'"schema_version": %d' % SCHEMA_VERSION, b'"schema_version": 2')
    assert data != sealed
    with pytest.raises(CorruptRecord, match="checksum"):
        decode_record(data, "test", store="s")


@hypothesis.settings(max_examples=40)
@given(all_settings)
def test_hash_is_sha256_of_the_documented_canonical_json(settings: StoreSettings) -> None:
    canonical = json.dumps(
        {
            "arrays": {
                name: {
                    "dimension_names": list(spec.dimension_names),
                    "dtype": spec.dtype,
                    "shape": list(spec.shape),
                }
                for name, spec in settings.arrays.items()
            },
            "kind": settings.kind,
            "values": settings.values,
        },
        sort_keys=True,
        separators=(",", ":"),
    )
    assert settings.hash == hashlib.sha256(canonical.encode()).hexdigest()
    assert settings.folder_name == f"{settings.kind}-{settings.hash[:12]}"


def test_hash_never_changes_between_versions() -> None:
    # A change here makes every store in the world unreachable: raise the schema version instead.
    assert SETTINGS.folder_name == "teacher-3cbcd44337d6"


def test_order_of_values_does_not_change_the_hash() -> None:
    turned = StoreSettings(
        kind=SETTINGS.kind,
        arrays=dict(reversed(SETTINGS.arrays.items())),
        values=dict(reversed(SETTINGS.values.items())),
    )
    assert turned.hash == SETTINGS.hash


@pytest.mark.parametrize(
    "values",
    [
        {"checkpoint": "cd" * 32},
        {"fps": 8.000001},
        {"grid": [3, 2]},
        {"prompt": {"kind": "box"}},
        {"prompt": {"kind": "mask", "frame": 0}},
        {"new": None},
    ],
)
def test_any_changed_value_changes_the_hash(values: Any) -> None:
    changed = StoreSettings(
        kind=SETTINGS.kind, arrays=SETTINGS.arrays, values={**SETTINGS.values, **values}
    )
    assert changed.hash != SETTINGS.hash


def test_any_changed_array_changes_the_hash() -> None:
    mask = SETTINGS.arrays["mask"]
    for changed in (
        ArraySpec(dtype="int8", shape=mask.shape, dimension_names=mask.dimension_names),
        ArraySpec(dtype="uint8", shape=(3, 2), dimension_names=mask.dimension_names),
        ArraySpec(dtype="uint8", shape=mask.shape, dimension_names=("w", "h")),
    ):
        other = StoreSettings(
            kind=SETTINGS.kind,
            arrays={**SETTINGS.arrays, "mask": changed},
            values=SETTINGS.values,
        )
        assert other.hash != SETTINGS.hash


def test_tuples_are_stored_as_lists() -> None:
    spec = ArraySpec(dtype="uint8", shape=(1,), dimension_names=("n",))
    grid: Any = (2, (3,))
    as_tuple = StoreSettings(kind="x", arrays={"a": spec}, values={"grid": grid})
    as_list = StoreSettings(kind="x", arrays={"a": spec}, values={"grid": [2, [3]]})
    assert as_tuple == as_list


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "finite"),
        ([1.0, float("-inf")], r"values\.bad\[1\]"),
        (np.float32(1.0), "float32"),
        (np.int64(1), "int64"),
        (Path("x"), "convert"),
        ({1: "one"}, "keys must be text"),
        ("\ud800", "Unicode"),
        ({"deep": [{"er": b"bytes"}]}, r"values\.bad\.deep\[0\]\.er"),
    ],
)
def test_values_that_json_cannot_hold_are_refused(value: Any, message: str) -> None:
    spec = ArraySpec(dtype="uint8", shape=(1,), dimension_names=("n",))
    with pytest.raises(ValueError, match=message):
        StoreSettings(kind="x", arrays={"a": spec}, values={"bad": value})


@pytest.mark.parametrize("name", ["", "Teacher", "a-b", "../a", "a/b", "1a", "ä", "a" * 65, "a\n"])
def test_names_that_are_no_identifiers_are_refused(name: str) -> None:
    spec = ArraySpec(dtype="uint8", shape=(1,), dimension_names=("n",))
    with pytest.raises(ValueError, match="lower-case"):
        StoreSettings(kind=name, arrays={"a": spec}, values={})
    with pytest.raises(ValueError, match="lower-case"):
        StoreSettings(kind="x", arrays={name: spec}, values={})
    with pytest.raises(ValueError, match="lower-case"):
        ArraySpec(dtype="uint8", shape=(1,), dimension_names=(name,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "float16"),
        ({"dtype": ">f2"}, "must be one of"),
        ({"shape": ()}, "one or more"),
        ({"shape": (0, 3)}, ">= 1"),
        ({"shape": (2.0, 3)}, "integers"),
        ({"shape": (2, 3, 4)}, "one per axis"),
        ({"dimension_names": ("h", "h")}, "different"),
        ({"dimension_names": ("clip", "h")}, "'clip'"),
    ],
)
def test_impossible_arrays_are_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"dtype": "uint8", "shape": (2, 3), "dimension_names": ("h", "w")}
    ArraySpec(**good)
    with pytest.raises(ValueError, match=message):
        ArraySpec(**{**good, **change})


@pytest.mark.parametrize(
    ("shape", "length"),
    [((49, 30, 45, 512), 1), ((226, 4096), 113), ((13, 16, 60, 90), 1), ((13, 4, 8, 12), 13)],
)
def test_inner_chunks_are_frames_unless_frames_are_small(
    shape: tuple[int, ...], length: int
) -> None:
    axes = tuple("abcd"[: len(shape)])
    assert ArraySpec(dtype="float16", shape=shape, dimension_names=axes).chunk_length == length
