"""Lists of clips are gone through once and read again row by row, with the same result."""

import json

import pytest

from stages.clips import BadRecord, metadata_folder, open_dataset, rows
from stages.clips.keys import KeyBook

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
    monkeypatch.setattr(
        metadata_folder, "parse_object", lambda line: parsed.append(line) or json.loads(line)
    )
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


def test_many_entries_of_one_key_are_named_in_a_walk_over_them():
    class Counting(set):
        asked = 0

        def __contains__(self, key: object) -> bool:
            Counting.asked += 1
            return super().__contains__(key)

    book = KeyBook()
    book._taken = Counting()
    names = [book.stand_in("k") for _ in range(200)]
    assert names[:2] == ["k (2)", "k (3)"] and len(set(names)) == 200
    assert Counting.asked <= 400
