"""`explore`: arguments, the printed address, saved pages, messages for what cannot be opened."""

import json
import sys

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands import explore
from tests.stages.explore.conftest import make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("explored") / "cache")


@pytest.fixture
def served(monkeypatch):
    """The servers that the command would have run; each is closed."""
    servers = []

    def serve(server):
        servers.append(server)
        server.server_close()

    monkeypatch.setattr(explore, "serve", serve)
    return servers


def run(*arguments):
    return CliRunner().invoke(app, ["explore", *map(str, arguments)])


def test_it_prints_the_address_and_serves(cache, tmp_path, served):
    result = run(cache, f"outputs={tmp_path}/out", "train.lgf.radius=2", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    (server,) = served
    assert printed == {
        "address": server.address,
        "clips": 4,
        "leave_out": f"{tmp_path}/out/leave_out.jsonl",
    }
    assert server.explorer.sources.lgf.radius == 2
    assert "data.path is not set" in server.explorer.sources.no_dataset


def test_a_store_alone_and_the_list_of_the_configuration(cache, tmp_path, served):
    (store,) = cache.glob("teacher-*")
    named = tmp_path / "named.jsonl"
    named.write_text('{"key": "walk/0001"}\n')
    result = run(store, f"train.leave_out={named}")
    assert result.exit_code == 0, result.stderr
    (server,) = served
    assert [size.listed.path for size in server.explorer.sources.sizes] == [store]
    assert server.explorer.sources.leave_out.keys() == {"walk/0001"}
    assert f"open {server.address}" in result.stdout.replace("\n", "")


def test_clips_are_saved_as_one_page(cache, tmp_path, served):
    page = tmp_path / "new" / "page.html"
    result = run(cache, "--export", page, "--clips", "walk/0002", "--clips", "run/0004")
    assert result.exit_code == 0, result.stderr
    assert page.read_text().count("<html") == 1
    assert not served


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--export", "page.html"], 2, "need each other"),
        (["--clips", "walk/0001"], 2, "need each other"),
        (["--export", "page.html", "--clips", "walk/7"], 1, "no clip 'walk/7'"),
        (["train.leave_out={bad}"], 1, "is not JSON"),
        (["train.lgf.radius=0"], 2, "radius"),
    ],
)
def test_what_cannot_be_shown_ends_with_a_reason(cache, tmp_path, served, arguments, code, words):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no list\n")
    result = run(cache, *(text.format(bad=bad) for text in arguments))
    assert result.exit_code == code
    assert words in " ".join(result.stderr.split())
    assert not served


def test_an_empty_folder_is_no_cache(tmp_path, served):
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "no store in" in result.stderr


def test_the_ending_of_an_export_says_what_it_is(cache, tmp_path, monkeypatch):
    result = run(cache, "--export", tmp_path / "clips.mp4", "--clips", "walk/0001")
    assert result.exit_code == 2
    assert "the name must end in .html, for a page, or .rrd" in " ".join(result.stderr.split())
    monkeypatch.setitem(sys.modules, "rerun", None)
    result = run(cache, "--export", tmp_path / "clips.rrd", "--clips", "walk/0001")
    assert result.exit_code == 1
    assert 'pip install "sam2videox[rerun]"' in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
