"""Lists of clips: reading single rows gives the same as the scan of the file."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.clips import BadRecord, open_dataset
from stages.clips.dataset import keys, metadata, rows
from stages.clips.dataset.fields import parse_object
from stages.clips.dataset.keys import KeyRegistry

CAPTIONS = ("a\u2028b", "Äpfel, “rot”", "a\x0bb\x85c", "日本語", "plain")


def jsonl(captions) -> str:
    lines = [
        json.dumps({"file_name": f"{row}.mp4", "caption": caption}, ensure_ascii=False)
        for row, caption in enumerate(captions)
    ]
    return "\n\n".join(lines)


def csv(captions) -> str:
    lines = [f'{row}.mp4,"{caption} ""\nsaid"' for row, caption in enumerate(captions)]
    return "\r\n".join(["file_name,caption", *lines])


FILES = {
    "metadata.jsonl": lambda: {"metadata.jsonl": jsonl(CAPTIONS)},
    "metadata.csv": lambda: {"metadata.csv": csv(CAPTIONS)},
    "videos.txt": lambda: {
        "prompts.txt": "\r\n".join(CAPTIONS) + "\n\n",
        "videos.txt": "\n".join(f"{row}.mp4" for row in range(len(CAPTIONS))),
    },
}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("name", FILES)
def test_every_row_is_found_again_whatever_its_letters(name, bom, config, tmp_path):
    for file, text in FILES[name]().items():
        (tmp_path / file).write_text(bom + text, encoding="utf-8", newline="")
    shards = open_dataset(config(path=tmp_path / name, clips_per_shard=1)).shards
    records = [record for shard in reversed(shards) for record in shard.records()]
    assert [record.key for record in reversed(records)] == [str(row) for row in range(5)]
    ending = ' "\nsaid' if name.endswith("csv") else ""
    assert [record.caption for record in reversed(records)] == [one + ending for one in CAPTIONS]


def test_a_shard_parses_its_own_rows_alone(config, tmp_path, monkeypatch):
    (tmp_path / "metadata.jsonl").write_text(jsonl("abcdef"))
    parsed = []
    monkeypatch.setattr(rows, "parse_object", lambda line: parsed.append(line) or json.loads(line))
    shards = open_dataset(config(clips_per_shard=2)).shards
    assert len(parsed) == 6
    assert [record.caption for record in shards[1].records()] == ["c", "d"]
    assert len(parsed) == 8


@pytest.mark.parametrize("name", FILES)
def test_a_list_that_changes_in_use_is_refused(name, config, tmp_path):
    for file, text in FILES[name]().items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    shards = open_dataset(config(path=tmp_path / name, clips_per_shard=2)).shards
    with (tmp_path / name).open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=f"{name} was changed while it was in use"):
        list(shards[0].records())


def test_a_line_beyond_all_bounds_is_one_bad_row(config, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    lines = jsonl(["a", "x" * 1000, "b", "y" * 1000]).split("\n\n")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    records = [r for shard in open_dataset(config()).shards for r in shard.records()]
    assert [isinstance(record, BadRecord) for record in records] == [False, True, False, True]
    assert records[1].key == "line 2 (2)" and "over 100 bytes" in records[1].detail


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "a.mp4", "file_name": "b.mp4"}',
        '{"file_name": "a.mp4", "points": {"x": 1, "x": 2}}',
        '{"file_name": "a.mp4", "caption": "b: c", "caption": "d"}',
    ],
)
def test_a_field_that_is_given_twice_is_refused(line, config, tmp_path):
    (tmp_path / "metadata.jsonl").write_text(line)
    (shard,) = open_dataset(config()).shards
    (record,) = shard.records()
    assert isinstance(record, BadRecord) and "is given twice" in record.detail


def by_json(content: bytes) -> object:
    def without_doubles(pairs):
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    text = content.decode("utf-8").removeprefix("\ufeff")
    found = json.loads(text, object_pairs_hook=without_doubles)
    assert isinstance(found, dict)
    return found


PIECES = [
    *('"a"', '"b"', ":", ",", "{", "}", "[", "]", " ", "\n", "\ufeff", "null", "true", "NaN"),
    *(
        "-Infinity",
        "0",
        "-0",
        "01",
        "1e400",
        "0.1",
        "1" * 40,
        '"\\ud800"',
        '"\\u0000"',
        '"\x7f"',
        "'",
    ),
]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join).map('{{"c": {}}}'.format))
@example('{"c": ' + "[" * 300 + "]" * 300 + "}")
@example('\ufeff{"c": "\ufeff", "a": {"b": 1, "b": 2}}')
@example('{"c": 1} {"c": 1}')
def test_rows_are_parsed_as_by_the_standard_library(text):
    content = text.encode()
    try:
        expected = by_json(content)
    except (ValueError, AssertionError):
        with pytest.raises(ValueError, match=r"not valid JSON in UTF-8|not a JSON object"):
            parse_object(content)
    else:
        assert repr(parse_object(content)) == repr(expected)


def test_bytes_that_are_not_utf8_are_no_row():
    with pytest.raises(ValueError, match="not valid JSON in UTF-8: 'utf-8' codec can't decode"):
        parse_object(b'{"caption": "\xff"}')


NAMES = ["b", "a", "", "a", "c", "a (2)", "a", "b", "/d", "a (3)"]


@pytest.mark.parametrize("equal", ["", "abc"])
def test_of_equal_keys_the_first_is_the_clip_whatever_the_hashes(
    equal, config, tmp_path, monkeypatch
):
    for module in (metadata, keys):
        one_hash = lambda key: 7 if key in tuple(equal) else hash(key)  # noqa: E731
        monkeypatch.setattr(module, "hash", one_hash, raising=False)
    lines = [json.dumps({"file_name": f"{name}.mp4" if name else None}) for name in NAMES]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    records = [
        r for shard in open_dataset(config(clips_per_shard=3)).shards for r in shard.records()
    ]
    good = ["b", "a", None, None, "c", "a (2)", None, None, None, "a (3)"]
    assert [None if isinstance(r, BadRecord) else r.key for r in records] == good
    assert {row: r.detail for row, r in enumerate(records, 1) if isinstance(r, BadRecord)} == {
        3: "line 3: file_name is missing or not a string: None",
        4: "line 4: another entry has the same key 'a'",
        7: "line 7: another entry has the same key 'a'",
        8: "line 8: another entry has the same key 'b'",
        9: "line 9: file_name must name a file inside the folder, got '/d.mp4'",
    }
    assert [r.key for r in records if isinstance(r, BadRecord)] == [
        *("line 3 (2)", "a (4)", "a (5)", "b (2)", "line 9 (2)")
    ]


def test_many_entries_of_one_key_are_named_in_a_walk_over_them():
    class Counting(set):
        asked = 0

        def __contains__(self, key: object) -> bool:
            Counting.asked += 1
            return super().__contains__(key)

    registry = KeyRegistry()
    registry._taken = Counting()
    names = [registry.substitute("k") for _ in range(200)]
    assert names[:2] == ["k (2)", "k (3)"] and len(set(names)) == 200
    assert Counting.asked <= 400
