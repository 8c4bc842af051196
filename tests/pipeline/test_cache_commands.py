"""`cache list`, `verify` and `repair`, and what all cache commands share: exit codes, URLs."""

import json
from pathlib import Path

import pytest

from cache_schema import checksummed_json
from pipeline.commands.maintenance import copying, drop, merge, repair, verify
from tests.cache_schema.servers import serving_plainly
from tests.pipeline.cache_stores import (
    KEYS,
    PROVENANCE,
    answer,
    file_of,
    flip_a_byte,
    holds,
    invoke,
    settings_of,
    store,
    write_store,
)


@pytest.mark.parametrize(
    "words",
    ["", "list", "index", "verify", "repair", "drop", "merge", "copy", "derive gram-flow"],
)
def test_every_command_has_help_with_an_example(words):
    result = invoke(*words.split(), "--help")
    assert result.exit_code == 0
    if words:
        assert f"sam2vx-pipeline cache {words} " in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["list", ".", "more"],
        ["repair", "/nowhere"],
        ["repair", "s3://bucket/cache"],
        ["merge", "s3://bucket/cache", "."],
        ["drop", "."],
        ["drop", ".", "--from", "/nowhere.jsonl"],
        ["merge", "target"],
        ["merge", "target", "/nowhere"],
        ["copy", "."],
        ["derive", "gram-flow", "extract.gram_flow.radios=3"],
    ],
)
def test_bad_usage_exits_with_2(words):
    assert invoke(*words).exit_code == 2


@pytest.mark.parametrize("words", ["list", "index", "verify", "repair", "drop", "copy"])
def test_a_folder_without_stores_is_an_error_that_says_where_stores_come_from(tmp_path, words):
    more = {"drop": ["walk/0"], "copy": [tmp_path / "target"]}.get(words, [])
    result = invoke(words, tmp_path, *more)
    assert result.exit_code == 1
    assert "neither a store nor a folder of stores" in result.stderr
    assert "extract-features" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_changes_stores_refuses_a_url_and_names_the_way(cache):
    result = invoke("repair", "s3://bucket/cache")
    assert "cache copy" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("words", ["list", "index", "verify", "repair", "copy"])
def test_a_store_that_lost_its_manifest_is_not_passed_over(cache, tmp_path, words):
    (store(cache, "teacher") / "store.json").unlink()
    more = [tmp_path / "target"] if words == "copy" else []
    found = answer(words, cache, *more, exit_code=1)
    assert "extract-features" in found["teacher"]["error"]
    assert "error" not in found["text"]


class TestList:
    def test_tells_of_each_store_what_it_holds_and_how_it_was_made(self, cache):
        teacher = answer("list", cache)["teacher"]
        size = sum(file_of(cache, "teacher", key).stat().st_size for key in KEYS)
        assert teacher["kind"] == "teacher"
        assert (teacher["clips"], teacher["skipped"], teacher["shards"]) == (3, 1, 2)
        assert teacher["bytes"] == size
        assert teacher["schema_version"] == 4
        assert teacher["settings_hash"] == settings_of("teacher").hash
        assert teacher["made_with"] == PROVENANCE
        assert teacher["made"].startswith("20")
        assert "quarantine_bytes" not in teacher

    def test_the_table_shows_it_too(self, cache):
        shown = invoke("list", cache).stdout
        assert "2 stores" in shown
        assert "3, and 1 skipped (1 too_short)" in shown
        assert "sam2videox 9.8.7" in shown
        assert "0123456789" in shown

    def test_one_store_can_be_named(self, cache):
        assert list(answer("list", store(cache, "text"))) == ["text"]

    @pytest.mark.parametrize("version", [1, 2, 3])
    def test_an_old_store_is_listed_with_what_to_do(self, cache, version, monkeypatch):
        monkeypatch.setattr(checksummed_json, "SCHEMA_VERSION", version)
        text = store(cache, "text")
        record = json.loads((text / "store.json").read_bytes())
        del record["crc32c"], record["schema_version"]
        (text / "store.json").write_bytes(checksummed_json.encode_record(record))
        monkeypatch.undo()
        old = answer("list", cache)["text"]
        assert old["schema_version"] == version
        assert old["settings_hash"] == record["settings_hash"]
        assert f"another cache folder, or remove {text}," in old["remedy"]
        assert "run sam2vx-pipeline extract-features" in invoke("list", cache).stdout

    def test_a_damaged_store_is_told_and_the_others_are_listed(self, cache):
        flip_a_byte(store(cache, "teacher") / "store.json")
        found = answer("list", cache, exit_code=1)
        assert "store.json" in found["teacher"]["error"]
        assert found["text"]["clips"] == 3
        assert "error: " in invoke("list", cache).stdout


class TestVerify:
    @pytest.mark.parametrize("fast", [[], ["--fast"]])
    def test_an_intact_cache_is_a_success(self, cache, fast):
        found = answer("verify", cache, *fast)
        assert {kind: (one["clips"], one["problems"]) for kind, one in found.items()} == {
            "teacher": (3, []),
            "text": (3, []),
        }
        assert "intact" in invoke("verify", cache, *fast).stdout

    def test_a_flipped_byte_is_a_failure_that_names_clip_and_remedy(self, cache):
        flip_a_byte(file_of(cache, "teacher", "walk/1"))
        found = answer("verify", cache, exit_code=1)
        assert [(one["shard"], one["key"]) for one in found["teacher"]["problems"]] == [
            ("00000", "walk/1")
        ]
        assert found["text"]["intact"]
        shown = invoke("verify", cache).stdout
        assert "'walk/1'" in shown
        assert f"run sam2vx-pipeline cache repair {cache}, then extract-features" in shown

    def test_fast_compares_sizes_alone(self, cache):
        flip_a_byte(file_of(cache, "teacher", "walk/1"))
        answer("verify", cache, "--fast")
        file_of(cache, "teacher", "walk/1").write_bytes(b"short")
        answer("verify", cache, "--fast", exit_code=1)

    def test_what_the_next_extraction_clears_up_is_told_and_is_no_failure(self, cache):
        for folder in ("shards", ".staging"):  # as a writer that is killed between two steps
            (store(cache, "text") / folder / "00007").mkdir()
        found = answer("verify", cache)["text"]
        assert found["intact"]
        assert [one["mend"] for one in found["problems"]] == ["extract"]
        assert "1 harmless leftover" in invoke("verify", cache).stdout

    def test_a_lost_record_is_a_problem_to_repair(self, cache):
        (store(cache, "text") / "commits" / "00001.json").unlink()
        found = answer("verify", cache, exit_code=1)["text"]
        assert [one["mend"] for one in found["problems"]] == ["repair"]
        answer("repair", cache)
        assert answer("verify", cache)["text"]["problems"] == []

    def test_a_damaged_manifest_is_a_problem_to_repair(self, cache):
        flip_a_byte(store(cache, "teacher") / "store.json")
        found = answer("verify", cache, exit_code=1)["teacher"]
        assert [one["mend"] for one in found["problems"]] == ["repair"]

    def test_many_problems_are_cut_in_the_table_and_whole_in_json(self, tmp_path):
        keys = [f"clip/{n}" for n in range(30)]
        path = write_store(tmp_path / "cache", "text", {"00000": keys})
        for file in path.glob("shards/00000/values/c.*"):
            flip_a_byte(file)
        assert len(answer("verify", path, exit_code=1)["text"]["problems"]) == 30
        assert "… and 10 more; --json lists them" in invoke("verify", path).stdout

    def test_a_bar_of_bytes_goes_to_stderr(self, cache):
        result = invoke("verify", cache)
        assert "verify teacher" in result.stderr
        assert "B/s" in result.stderr


class TestRepair:
    def test_what_is_damaged_is_set_aside_and_the_rest_kept(self, cache):
        flip_a_byte(file_of(cache, "teacher", "walk/1"))
        found = answer("repair", cache)
        assert [(one["key"], one["reason"]) for one in found["teacher"]["clips"]] == [
            ("walk/1", "damaged")
        ]
        assert Path(found["teacher"]["quarantine"]).is_dir()
        assert holds(store(cache, "teacher"), "teacher", ["walk/0", "run/0"])
        assert holds(store(cache, "text"), "text", KEYS)
        answer("verify", cache)
        assert answer("list", cache)["teacher"]["quarantine_bytes"] > 0

    def test_the_table_says_what_to_do_next(self, cache):
        flip_a_byte(file_of(cache, "teacher", "walk/1"))
        shown = invoke("repair", cache).stdout
        assert "1 of 2 stores needed repair" in shown
        assert "extract-features --retry-failed" in shown
        assert "0 of 2 stores needed repair" in invoke("repair", cache).stdout

    def test_what_nothing_mends_is_a_failure(self, cache):
        flip_a_byte(store(cache, "teacher") / "store.json")
        shown = invoke("repair", cache).stdout
        assert "run sam2vx-pipeline extract-features" in shown


class TestOverHttp:
    @pytest.fixture
    def url(self, cache):
        with serving_plainly(cache) as url:
            yield url

    def test_a_store_is_listed_checked_and_fetched(self, cache, url, tmp_path):
        text = f"{url}/{store(cache, 'text').name}"
        listed = answer("list", text)["text"]
        assert (listed["clips"], listed["made"]) == (3, None)
        answer("verify", text)
        answer("copy", text, tmp_path / "here")
        assert holds(store(tmp_path / "here", "text"), "text", KEYS)

    def test_a_damaged_clip_behind_a_url_is_a_failure_with_another_remedy(self, cache, url):
        text = store(cache, "text")
        flip_a_byte(file_of(cache, "text", "walk/1"))
        found = answer("verify", f"{url}/{text.name}", exit_code=1)["text"]
        assert [one["mend"] for one in found["problems"]] == ["copy"]
        assert "cache copy" in invoke("verify", f"{url}/{text.name}").stdout


class TestInterrupted:
    @pytest.mark.parametrize(
        ("module", "function", "words"),
        [
            (repair, "repair_store", ["repair"]),
            (drop, "drop_clips", ["drop", "walk/0"]),
            (merge, "merge_stores", ["merge"]),
            (copying, "copy_store", ["copy", "target"]),
        ],
    )
    def test_what_goes_on_when_it_is_run_again_says_so(
        self, cache, monkeypatch, module, function, words
    ):
        def stopped(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, function, stopped)
        name, *more = words
        places = [cache.parent / "target", cache] if name == "merge" else [cache]
        result = invoke(name, *places, *more)
        assert result.exit_code == 130
        assert "run the same command again" in result.stderr

    def test_the_bytes_of_a_check_are_told(self, cache, monkeypatch):
        told = []

        def check(path, *, fast, advance):
            told.append((path.name, fast))
            advance(1000)
            return verify.VerifyReport((), 3, 1000)

        monkeypatch.setattr(verify, "verify_store", check)
        result = invoke("verify", cache, "--fast")
        assert [fast for _, fast in told] == [True, True]
        assert "1.0 kB" in result.stderr
