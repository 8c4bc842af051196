import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.files.yaml import MAX_FILE_BYTES, YamlError, dump_value, parse_yaml, read_yaml

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**64, 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abe1.", min_size=1), inner)
    ),
    max_leaves=6,
)


@given(VALUES)
@example({"a": ":b"})
@example({"a": "?0"})
@example(["?0", "-", "%a", "a?b: c"])
@example("\N{NO-BREAK SPACE}")
@example(["\N{NO-BREAK SPACE}a\N{EM SPACE}"])
def test_what_is_written_is_read_back_unchanged(value):
    assert parse_yaml(f"key: {dump_value(value)}\n") == {"key": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("010", 10),
        ("1:30", "1:30"),
        ("on", "on"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("0x1f", 31),
        ("true", True),
        ("~", None),
        ("", None),
        ('"5"', "5"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_duplicate_key_is_refused_with_its_line():
    with pytest.raises(YamlError, match='line 3: found duplicate key "steps"'):
        parse_yaml("train:\n  steps: 1\n  steps: 2\n")


@pytest.mark.parametrize("text", ["a: [1", "!!python/object/apply:os.getcwd []", "a: b: c"])
def test_what_is_not_plain_yaml_is_refused_with_the_line(text):
    with pytest.raises(YamlError, match="line 1"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a [*a]", "line 1: alias .a refers to itself"),
        ("x: &a {b: [1, *a]}", "line 1: alias .a refers to itself"),
        ("x: *a", "line 1: found undefined alias"),
        ("[" * 100_000, "nested more than 64 levels deep"),
        ("- " * 100 + "1", "nested more than 64 levels deep"),
        (f"x: &a [{'1, ' * 5000}]\ny: [{'*a, ' * 5000}]", "line 2: more than 1048576 values"),
        (f"x: &a {'text' * 5000}\ny: [{'*a, ' * 5000}]", "line 2: more than 1048576 values"),
        ("9" * 5000, "digits"),
        ("9" * 30, "line 1: integer of more than 64 bits"),
        (f"x: 0x{'f' * 5000}", "line 1: integer of more than 64 bits"),
    ],
)
def test_what_would_not_fit_is_refused_before_it_is_made(text, message):
    with pytest.raises(YamlError, match=message):
        parse_yaml(text)


def test_aliases_and_merged_mappings_are_read():
    assert parse_yaml("x: &a {b: 1}\ny: *a\nz: {<<: *a, c: 2}\n") == {
        "x": {"b": 1},
        "y": {"b": 1},
        "z": {"b": 1, "c": 2},
    }


def test_a_file_is_refused_by_its_size_before_it_is_read(tmp_path):
    file = tmp_path / "sparse.yaml"
    with file.open("wb") as opened:
        opened.truncate(20 << 30)
    with pytest.raises(YamlError, match=f"at most {MAX_FILE_BYTES:,} are read"):
        read_yaml(file)
