import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.strict_yaml import YamlError, dump_value, parse_yaml

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abe1.", min_size=1), inner)
    ),
    max_leaves=6,
)


@given(VALUES)
@example({"a": ":b"})
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
