"""Output of every command in any encoding and terminal width."""

import io
import json
import os
import sys

import click
import numpy as np
import pytest
import typer

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from pipeline import cli, console
from pipeline.commands import train
from pipeline.console import CommandResult
from tests.fingerprints import fingerprint_of

TERMINALS = [
    {"encoding": "ascii", "COLUMNS": "20"},
    {"encoding": "ascii", "COLUMNS": "80", "TERM": "dumb"},
    {"encoding": "latin-1", "COLUMNS": "60", "TERM": None},
    {"encoding": "utf-8", "COLUMNS": "1", "TERM": "xterm-256color"},
    {"encoding": "utf-8", "COLUMNS": "nonsense", "TERM": ""},
]
AWKWARD = "走 … – ✓ été \udcff"
"""In no encoding of them all: the last letter is a byte of a file name that is no UTF-8."""


@pytest.fixture(params=TERMINALS, ids=lambda terminal: "-".join(map(str, terminal.values())))
def terminal(request, monkeypatch):
    """Encoding of the streams; the environment says the rest."""
    for name in ("COLUMNS", "TERM"):
        value = request.param.get(name)
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    return request.param["encoding"]


@pytest.fixture
def run(terminal, monkeypatch):
    def run(*arguments):
        """Exit code, stdout and stderr as the bytes say."""
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=terminal) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "argv", ["sam2vx-pipeline", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        texts = []
        for stream in streams:
            stream.flush()
            texts.append(stream.buffer.getvalue().decode(stream.encoding))
        return ended.value.code or 0, *texts

    return run


def commands(group, *names):
    """The words of every command there is."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield *names, name


def test_the_help_of_every_command(run):
    for words in [(), *commands(typer.main.get_command(cli.app))]:
        code, out, _ = run(*words, "--help")
        assert code == 0, words
        assert out.strip()


def test_a_table_and_its_notes(run, monkeypatch):
    answer = CommandResult(title=AWKWARD, rows=[(AWKWARD * 3, AWKWARD)], data={}, notes=[AWKWARD])
    monkeypatch.setattr(train, "run", lambda config, progress: answer)
    code, out, _ = run("train", "model.path=base")
    assert code == 0
    assert "\\udcff" in "".join(out.split())


def test_json_says_the_same_in_any_of_them(run, monkeypatch):
    answer = CommandResult(title="", rows=[], data={"words": AWKWARD})
    monkeypatch.setattr(train, "run", lambda config, progress: answer)
    _, out, _ = run("train", "model.path=base", "--json")
    assert json.loads(out) == {"words": AWKWARD}


def test_bars_lines_and_errors(run, monkeypatch):
    def work(config, progress):
        with progress.task(AWKWARD, 2, unit="clips") as task:
            task.advance()
            task.note(AWKWARD)
            progress.log(AWKWARD)
        raise ValueError(AWKWARD)

    monkeypatch.setattr(train, "run", work)
    code, _, err = run("train", "model.path=base")
    assert code == 1
    assert "\\udcff" in err


def test_a_store_with_a_key_in_another_alphabet(run, tmp_path):
    spec = ArraySpec(dtype="uint8", shape=(2,), dimension_names=("t",))
    settings = StoreSettings(kind="text", arrays={"a": spec}, values={"note": "été"})
    writer = StoreWriter.open(tmp_path / "cache", settings, provenance={"by": "走"})
    with writer.shard("00000", source="走.tar") as shard:
        shard.add("走/1", {"a": np.zeros(2, np.uint8)}, {}, fingerprint=fingerprint_of("走/1"))
        shard.commit()
    for words in (["cache", "list"], ["cache", "verify"], ["inspect"]):
        code, _, err = run(*words, str(writer.path))
        assert code == 0, err
        assert "Traceback" not in err


def test_a_configuration_is_printed_as_it_can_be_read_again(run, tmp_path, monkeypatch):
    words = ["config", "show", "--config", "demo", 'train.samples.prompts=["走 … été"]']
    _, out, _ = run(*words)
    (tmp_path / "mine.yaml").write_bytes(out.encode("utf-8"))
    _, again, _ = run("config", "show", "--config", str(tmp_path / "mine.yaml"))
    assert again == out
    assert "走 … été" in out


def test_a_path_that_is_no_utf_8_is_refused_in_one_line(run):
    code, _, err = run("train", "model.path=base", f"cache={os.fsdecode(b'caf' + bytes([0xE9]))}")
    assert code == 2
    assert "is not UTF-8" in err


def test_a_narrow_terminal_gets_a_line_per_row(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    answer = CommandResult(title="a title", rows=[("a long name of a row", "v" * 50)], data={})
    console.write_result(answer, as_json=False)
    assert capsys.readouterr().out == f"a title\na long name of a row: {'v' * 50}\n"
