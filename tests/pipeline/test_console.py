import json
import os
import subprocess
import sys

import pytest

from cache_schema.shown_text import without_credentials
from pipeline import console
from pipeline.console import CommandResult, format_bytes, format_time

ANSWER = CommandResult(
    title="a [title]",
    rows=[("name", "[bold]not markup[/bold]"), ("path", "x" * 300)],
    data={"name": "é", "number": 1.5},
    notes=["out/[0].mp4"],
)


def test_the_table_shows_text_as_it_is_and_cuts_nothing(capsys):
    console.write_result(ANSWER, as_json=False)
    out, err = capsys.readouterr()
    assert "a [title]" in out
    assert "[bold]not markup[/bold]" in out
    assert out.count("x") == 300
    assert out.splitlines()[-1] == "out/[0].mp4"
    assert not err


def test_json_is_one_object_on_stdout(capsys):
    console.write_result(ANSWER, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"name": "é", "number": 1.5}


HOSTILE = "\x1b]0;owned\x07\x9b2J\u202e http://me:s3cr3t@host/a?sig=s3cr3t"
SHOWN = "\\x1b]0;owned\\x07\\x9b2J\\u202e http://***@host/a?sig=***"


def test_nothing_that_is_printed_is_obeyed_or_holds_credentials(capfd, monkeypatch):
    monkeypatch.setattr(console, "_LINE_INTERVAL_S", 0)
    monkeypatch.setenv("COLUMNS", "300")
    console.write_result(
        CommandResult(title=HOSTILE, rows=[(HOSTILE, HOSTILE)], data={}, notes=[HOSTILE]),
        as_json=False,
    )
    with console.console_progress() as progress:
        progress.log(HOSTILE)
        with progress.task(HOSTILE, 2) as task:
            task.note(HOSTILE)
            task.advance()
    console.print_error(HOSTILE)
    out, err = capfd.readouterr()
    assert out.count(SHOWN) == 4
    assert err.count(SHOWN) >= 5
    told = out + err
    assert not any(bad in told for bad in ("\x1b", "\x07", "\x9b", "\u202e", "s3cr3t"))


def test_json_spells_controls_out_and_holds_no_credentials(capsys):
    console.write_result(CommandResult(title="", rows=[], data={"key": HOSTILE}), as_json=True)
    out = capsys.readouterr().out
    assert out.rstrip("\n").isprintable()
    assert json.loads(out) == {"key": without_credentials(HOSTILE)}


def test_a_traceback_is_printed_by_the_same_rules():
    script = (
        "from pipeline.console import escape_unencodable_output\n"
        "escape_unencodable_output()\n"
        f"raise AttributeError({HOSTILE!r}) from ValueError({HOSTILE!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 1
    err = done.stderr.decode()
    assert f"AttributeError: {SHOWN}" in err
    assert f"ValueError: {SHOWN}" in err
    assert "Traceback" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("as_json", [False, True])
def test_only_the_first_process_prints(capfd, monkeypatch, as_json):
    monkeypatch.setenv("RANK", "1")
    console.write_result(ANSWER, as_json=as_json)
    with console.console_progress() as progress:
        progress.log("hello")
        with progress.task("work", 2) as task:
            task.advance()
    assert capfd.readouterr() == ("", "")


def test_bars_and_lines_go_to_stderr_with_counts_units_and_notes(capfd):
    with console.console_progress() as progress:
        with progress.task("decode [x]", 4, completed=2, unit="clips") as task:
            task.advance()
            task.advance()
            task.note("loss [0.5]")
        progress.log("a [line]")
    out, err = capfd.readouterr()
    assert not out
    assert "a [line]" in err
    assert "decode [x]" in err
    assert "4/4 clips" in err
    assert "loss [0.5]" in err


def test_a_bar_says_where_it_is_when_stderr_is_a_file(capfd, monkeypatch):
    monkeypatch.setattr(console, "_LINE_INTERVAL_S", 0)
    with console.console_progress() as progress, progress.task("read", 3, unit="files") as task:
        for _ in range(3):
            task.advance()
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("read 1/3 files")]
    assert [line for line in lines if line.startswith("read 2/3 files")]


def test_a_bar_of_unknown_length_counts(capfd):
    with console.console_progress() as progress, progress.task("read", None, unit="files") as task:
        task.advance(3)
    assert "3 files" in capfd.readouterr().err


def test_a_bar_of_bytes_shows_them_in_their_usual_multiples(capfd):
    with console.console_progress() as progress, progress.task("x", 5000, unit="bytes") as task:
        task.advance(1500)
        task.advance(1000)
    err = capfd.readouterr().err
    assert "2.5 kB/5.0 kB" in err
    assert "B/s" in err
    assert "2500" not in err


def test_an_error_within_a_bar_passes_through():
    with (
        pytest.raises(ValueError, match="boom"),
        console.console_progress() as progress,
        progress.task("work", 1),
    ):
        raise ValueError("boom")


def test_stdout_holds_the_answer_alone_whoever_prints(tmp_path):
    script = (
        "import os, subprocess, sys\n"
        "from pipeline.console import stdout_to_stderr\n"
        "with stdout_to_stderr():\n"
        "    print('library', flush=True)\n"
        "    os.write(1, b'descriptor')\n"
        "    subprocess.run([sys.executable, '-c', 'print(\"child\")'])\n"
        "print('answer')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "answer\n"
    assert all(word in done.stderr for word in ("library", "descriptor", "child"))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (67_700_000, "67.7 MB"), (2e12, "2.0 TB"), (5e15, "5000.0 TB")],
)
def test_bytes_are_written_for_people(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (187, "3 min 07 s"), (7500, "2 h 05 min")],
)
def test_times_are_written_for_people(seconds, text):
    assert format_time(seconds) == text
