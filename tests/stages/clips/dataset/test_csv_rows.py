"""CSV files: a malformed record is reported and does not affect the others."""

import contextlib
import csv
import io
import random

import pytest

from stages.clips import BadRecord, open_dataset
from stages.clips.dataset.csv_rows import CsvRows


@pytest.fixture
def read(config, tmp_path):
    def read_all(text: str) -> list:
        (tmp_path / "metadata.csv").write_text(text, encoding="utf-8", newline="")
        return [record for shard in open_dataset(config()).shards for record in shard.records()]

    return read_all


def told(records) -> list[tuple[str, str | None]]:
    """Key and caption; of a bad record its line and the word bad."""
    return [
        (record.detail.partition(":")[0], "bad")
        if isinstance(record, BadRecord)
        else (record.key, record.caption)
        for record in records
    ]


@pytest.mark.parametrize(
    "second",
    [
        'b.mp4,"A cat, sleeping',
        'b.mp4,"A "cat" sleeping"',
        'b.mp4,"A cat" sleeping',
        "b.mp4,A cat, sleeping",
    ],
    ids=["left open", "quotes not doubled", "more after the quote", "comma without quotes"],
)
@pytest.mark.parametrize(
    "rest",
    [
        "c.mp4,A lion\nd.mp4,A bear\n",
        'c.mp4,"A lion"\nd.mp4,"A bear"\n',
        '"c.mp4","A lion"\n"d.mp4","A bear"',
        'c.mp4,"A lion"\r\nd.mp4,A bear\r\n',
    ],
    ids=["no quotes", "quoted captions", "all quoted", "carriage returns"],
)
def test_a_malformed_record_spoils_no_other(second, rest, read):
    records = read(f"file_name,caption\na.mp4,A dog\n{second}\n{rest}")
    assert told(records) == [
        ("a", "A dog"), ("line 3", "bad"), ("c", "A lion"), ("d", "A bear")
    ]  # fmt: skip


def test_a_quote_that_meets_a_later_one_takes_nothing_in(read):
    """Read as one record it would be well formed: three cells, closed quotes."""
    text = 'file_name,caption,subject\na.mp4,"A dog,x\nb.mp4,A cat,y\nc.mp4,A lion,",z"\n'
    (row,) = list(csv.reader(io.StringIO(text), strict=True))[1:2]
    assert row[0] == "a.mp4" and "b.mp4" in row[1]
    records = told(read(text))
    assert records[:2] == [("line 2", "bad"), ("b", "A cat")]


def test_quotes_that_are_closed_hold_anything(read):
    captions = ["A dog,\nrunning\n\nfast.", 'A "cat"\r\n"sleeps", sound', "eine Löwin\nund b.mp4"]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["file_name", "caption"])
    writer.writerows([f"{index}.mp4", caption] for index, caption in enumerate(captions))
    assert told(read(out.getvalue())) == [(str(i), text) for i, text in enumerate(captions)]
    assert told(read("\ufeff" + out.getvalue())) == [
        (str(i), text) for i, text in enumerate(captions)
    ]


def test_spaces_after_commas_are_no_part_of_cells(read):
    text = (
        'file_name , caption, box_xyxy\na.mp4, "A dog, running", "[1, 2, 30, 20]"\n b.mp4 , A cat\n'
    )
    first, second = read(text)
    assert (first.caption, first.prompts[0].box_xyxy) == ("A dog, running", (1.0, 2.0, 30.0, 20.0))
    assert (second.key, second.caption) == ("b", "A cat")


def test_a_line_break_outside_quotes_is_told(read):
    records = told(read("file_name,caption\na.mp4,A dog\nruns fast.\nb.mp4,A cat\n"))
    assert records == [("a", "A dog"), ("line 3", "bad"), ("b", "A cat")]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("file_name;caption", "separated by semicolons.*delimiter=';'"),
        ("file_name\tcaption", r"separated by tabs.*delimiter='\\t'"),
        ("file_name,caption,caption", "column caption twice"),
        ("file_name,caption, caption", "column caption twice"),
        ("video,caption", r"no column file_name; its header is \['video', 'caption'\]"),
        ('"file_name,caption', "header cannot be read"),
    ],
)
def test_headers_that_cannot_be_meant_are_refused(header, words, read):
    with pytest.raises(ValueError, match=words):
        read(f"{header}\na.mp4,A dog\n")


@pytest.mark.parametrize("place", [0, 3000, 5999])
@pytest.mark.parametrize("quote", ["", '"'])
def test_one_open_quote_in_thousands_of_rows(place, quote, read):
    rows = [f"{n}.mp4,{quote}A dog runs over field {n}{quote}" for n in range(6000)]
    rows[place] = f'{place}.mp4,"A dog runs'
    expected = [(str(n), f"A dog runs over field {n}") for n in range(6000)]
    expected[place] = (f"line {place + 2}", "bad")
    assert told(read("\n".join(["file_name,caption", *rows]))) == expected


def test_open_quotes_in_every_row_take_no_longer_than_the_rows(read):
    rows = [f'{n}.mp4,"A dog says ""now' for n in range(6000)]
    records = told(read("\n".join(["file_name,caption", *rows])))
    assert [what for _, what in records] == ["bad"] * 6000


def test_a_quote_in_a_cell_without_quotes_is_told(read):
    records = read('file_name,caption\na.mp4,A 5" screen\nb.mp4,"A 5"" screen"\n')
    assert told(records) == [("line 2", "bad"), ("b", 'A 5" screen')]
    assert "inside an unquoted cell" in records[0].detail


WORDS = ["a dog", "runs, fast", '"stop"', 'said ""', "\n", "x", "b.mp4", '"', ",", "é"]


def test_whichever_quote_is_missing_no_other_record_reads_wrong(tmp_path):
    """Records as csv writes them, in several orders and dialects, less one quote character."""
    draw = random.Random(0)
    path = tmp_path / "metadata.csv"
    compared = lost = 0
    for _ in range(1500):
        columns = draw.choice([["file_name", "caption"], ["caption", "file_name", "subject"]])
        rows = [
            {
                "file_name": f"{number}.mp4",
                "caption": "".join(draw.choices(WORDS, k=draw.randint(1, 4))).strip(" "),
                "subject": draw.choice(["", "dog", "a, b"]),
            }
            for number in range(draw.randint(2, 6))
        ]
        out = io.StringIO()
        quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        writer = csv.DictWriter(out, columns, extrasaction="ignore", quoting=quoting)
        writer.writeheader()
        starts = []
        for row in rows:
            starts.append(out.tell())
            writer.writerow(row)
        text = out.getvalue()
        quotes = [place for place, letter in enumerate(text) if letter == '"' and place > starts[0]]
        if not quotes:
            continue
        gone = draw.choice(quotes)
        damaged = sum(start <= gone for start in starts) - 1
        path.write_bytes((text[:gone] + text[gone + 1 :]).encode())
        found = {}
        for _, cells in CsvRows(path).scan():
            with contextlib.suppress(ValueError):
                row = cells()
                assert row["file_name"] not in found
                found[row["file_name"]] = row.get("caption", "")
        for row in rows[:damaged] + rows[damaged + 1 :]:
            compared += 1
            lost += row["file_name"] not in found
            assert found.get(row["file_name"], row["caption"]) == row["caption"]
    assert compared > 3000 and lost < 0.03 * compared  # by captions that read as records
