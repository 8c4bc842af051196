"""The cache commands from their arguments to stdout and exit code, on small real stores."""

import json
import sys
import threading
import types
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter, checksummed_json
from pipeline.cli import app
from pipeline.commands.maintenance import copying, drop, merge, repair, verify
from stages.extract_features.derive import DeriveSummary
from tests.fingerprints import fingerprint_of

SHAPES = {"teacher": (4, 2, 3, 5), "text": (3, 8)}
PROVENANCE = {"sam2videox": "9.8.7", "commit": "0123456789abcdef", "uncommitted_changes": True}


def settings_of(kind, precision="fp32"):
    shape = SHAPES[kind]
    spec = ArraySpec(dtype="float32", shape=shape, dimension_names=tuple("thwc"[: len(shape)]))
    return StoreSettings(kind=kind, arrays={"values": spec}, values={"precision": precision})


def value(kind, key):
    """What the store of that kind holds of a clip."""
    seed = [ord(character) for character in f"{kind} {key}"]
    return np.random.default_rng(seed).standard_normal(SHAPES[kind], np.float32)


def write_store(cache, kind, shards, *, skipped=(), precision="fp32"):
    writer = StoreWriter.open(cache, settings_of(kind, precision), provenance=PROVENANCE)
    for name, keys in shards.items():
        with writer.shard(name, source=f"{name}.tar") as shard:
            for key in keys:
                shard.add(key, {"values": value(kind, key)}, {}, fingerprint=fingerprint_of(key))
            for key in skipped if name == min(shards) else ():
                shard.skip(key, "too_short", "has 3 frames", fingerprint=fingerprint_of(key))
            shard.commit()
    writer.write_index()
    return writer.path


def holds(store, kind, keys):
    """Whether a store reads back exactly these clips."""
    reader = StoreReader(store)
    assert list(reader.keys) == sorted(keys)
    for key in keys:
        np.testing.assert_array_equal(reader.read(key)["values"], value(kind, key))
    return True


@pytest.fixture
def cache(tmp_path):
    """Two shards, three clips, of two kinds."""
    folder = tmp_path / "cache"
    shards = {"00000": ["walk/0", "walk/1"], "00001": ["run/0"]}
    write_store(folder, "teacher", shards, skipped=["walk/9"])
    write_store(folder, "text", shards)
    return folder


KEYS = ["walk/0", "walk/1", "run/0"]


def store(cache, kind):
    (found,) = cache.glob(f"{kind}-*")
    return found


def file_of(cache, kind, key):
    """Where the bytes of a clip lie."""
    reader = StoreReader(store(cache, kind))
    entry = reader.record(key)
    (folder,) = (reader.path / "shards").glob(f"{entry.shard}*")
    return folder / entry.arrays["values"].path


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 64
    path.write_bytes(data)


def invoke(*words):
    return CliRunner().invoke(app, ["cache", *map(str, words)])


def answer(*words, exit_code=0):
    """The stores that a command tells of, by kind."""
    result = invoke(*words, "--json")
    assert result.exit_code == exit_code, result.output
    told = json.loads(result.stdout)["stores"]
    return {Path(one["store"]).name.rpartition("-")[0]: one for one in told}


@pytest.mark.parametrize(
    "words",
    ["", "list", "verify", "repair", "drop", "merge", "copy", "derive gram-flow"],
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


@pytest.mark.parametrize("words", ["list", "verify", "repair", "drop", "copy"])
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


@pytest.mark.parametrize("words", ["list", "verify", "repair", "copy"])
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
        found = answer("repair", cache, exit_code=1)["teacher"]
        assert "extract-features" in found["left"][0]["what"]


class TestDrop:
    def test_a_clip_goes_from_every_store(self, cache):
        found = answer("drop", cache, "walk/1")
        assert {kind: one["dropped"] for kind, one in found.items()} == {"teacher": 1, "text": 1}
        for kind in SHAPES:
            assert holds(store(cache, kind), kind, ["walk/0", "run/0"])
        answer("verify", cache)

    def test_a_clip_that_one_store_never_had_goes_from_the_others(self, cache):
        write_store(cache, "text", {"00002": ["jump/0"]})
        found = answer("drop", cache, "jump/0")
        assert {kind: one["dropped"] for kind, one in found.items()} == {"teacher": 0, "text": 1}

    def test_a_skipped_clip_is_dropped_for_good(self, cache):
        assert answer("drop", cache, "walk/9")["teacher"]["dropped"] == 1
        assert answer("drop", cache, "walk/9")["teacher"]["already_dropped"] == 1
        (skipped,) = StoreReader(store(cache, "teacher")).skipped
        assert (skipped.key, skipped.reason) == ("walk/9", "dropped")

    def test_an_unknown_clip_stops_it_before_any_work(self, cache):
        result = invoke("drop", cache, "walk/0", "wolk/1")
        assert result.exit_code == 1
        assert "'wolk/1'" in result.stderr
        assert "walk/0" not in result.stderr
        assert all(holds(store(cache, kind), kind, KEYS) for kind in SHAPES)

    def test_a_list_names_clips_as_failures_jsonl_does(self, cache, tmp_path):
        listed = tmp_path / "list.jsonl"
        listed.write_text('{"key": "walk/0", "why": "cut"}\n\n{"key": "run/0"}\n')
        assert answer("drop", cache, "--from", listed)["text"]["dropped"] == 2
        assert answer("drop", cache, "--from", listed)["text"]["already_dropped"] == 2

    def test_the_reason_is_kept_with_the_clip_and_in_the_list_of_failures(self, cache):
        (cache / "failures.jsonl").touch()
        invoke("drop", store(cache, "text"), "walk/0", "--because", "a cut")
        (skipped,) = StoreReader(store(cache, "text")).skipped
        assert (skipped.key, skipped.reason, skipped.detail) == ("walk/0", "dropped", "a cut")
        lines = [json.loads(line) for line in (cache / "failures.jsonl").read_text().splitlines()]
        assert ("text", "walk/0", "a cut") in {(o["kind"], o["key"], o["detail"]) for o in lines}


class TestMerge:
    def test_stores_of_two_machines_come_together_by_kind(self, cache, tmp_path):
        other = tmp_path / "other"
        for kind in SHAPES:
            write_store(other, kind, {"00002": ["jump/0"]})
        target = tmp_path / "target"
        found = answer("merge", target, cache, other)
        assert {kind: len(one["shards"]) for kind, one in found.items()} == {
            "teacher": 3,
            "text": 3,
        }
        for kind in SHAPES:
            assert holds(store(target, kind), kind, [*KEYS, "jump/0"])
            assert holds(store(cache, kind), kind, KEYS)
        assert answer("merge", target, cache, other)["text"]["shards_already_there"] == 3

    def test_one_store_can_be_merged_into_another(self, cache, tmp_path):
        other = write_store(tmp_path / "other", "text", {"00002": ["jump/0"]})
        answer("merge", store(cache, "text"), other)
        assert holds(store(cache, "text"), "text", [*KEYS, "jump/0"])

    def test_shards_of_one_name_are_refused_and_a_prefix_helps(self, cache, tmp_path):
        other = tmp_path / "other"
        write_store(other, "text", {"00000": ["jump/0"]})
        refused = invoke("merge", cache, other)
        assert refused.exit_code == 1
        assert "--prefix" in refused.stderr
        assert holds(store(cache, "text"), "text", KEYS)
        answer("merge", cache, other, "--prefix", "b-")
        assert holds(store(cache, "text"), "text", [*KEYS, "jump/0"])

    def test_other_settings_stay_apart_and_are_told(self, cache, tmp_path):
        other = tmp_path / "other"
        write_store(other, "text", {"00002": ["jump/0"]}, precision="bf16")
        shown = invoke("merge", cache, other).stdout
        assert len(list(cache.glob("text-*"))) == 2
        assert "they differ in values.precision;" in shown
        assert "train.stores.text" in shown

    def test_into_a_store_of_other_settings_is_refused(self, cache, tmp_path):
        other = write_store(tmp_path / "other", "text", {"00002": ["jump/0"]}, precision="bf16")
        found = answer("merge", store(cache, "text"), other, exit_code=1)
        assert "values.precision" in found["text"]["error"]


class TestCopy:
    def test_every_store_of_a_folder_keeps_its_name(self, cache, tmp_path):
        assert answer("copy", cache, tmp_path / "there")["teacher"]["files_sent"] > 0
        for kind in SHAPES:
            assert (tmp_path / "there" / store(cache, kind).name).is_dir()
            assert holds(store(tmp_path / "there", kind), kind, KEYS)
        assert answer("copy", cache, tmp_path / "there")["teacher"]["files_sent"] == 0

    def test_one_store_goes_into_a_folder_or_to_its_own_name(self, cache, tmp_path):
        text = store(cache, "text")
        answer("copy", text, tmp_path / "a")
        answer("copy", text, tmp_path / "b" / text.name)
        assert holds(tmp_path / "a" / text.name, "text", KEYS)
        assert holds(tmp_path / "b" / text.name, "text", KEYS)

    def test_a_damaged_clip_is_not_copied(self, cache, tmp_path):
        flip_a_byte(file_of(cache, "text", "walk/1"))
        found = answer("copy", cache, tmp_path / "there", exit_code=1)
        assert "walk/1" in found["text"]["error"]
        assert "cache repair" in found["text"]["error"]
        assert holds(store(tmp_path / "there", "teacher"), "teacher", KEYS)


class TestOverHttp:
    @pytest.fixture
    def url(self, cache):
        handler = partial(SimpleHTTPRequestHandler, directory=str(cache))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

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


class TestDeriveGramFlow:
    def test_the_stage_gets_the_teacher_its_settings_and_the_token_grid(
        self, cache, minimal, monkeypatch
    ):
        calls = []

        def derive(root, teacher, **options):
            calls.append((root, teacher, options))
            return DeriveSummary(
                store=cache / "gram_flow-0",
                clips_written=2,
                clips_already_there=1,
                skipped=StoreReader(store(cache, "teacher")).skipped,
                seconds=2.0,
                bytes=1000,
            )

        stage = types.SimpleNamespace(derive_gram_flow=derive)
        monkeypatch.setitem(sys.modules, "stages.extract_features.derive", stage)
        words = ["--config", minimal, f"cache={cache}", "data.height=32", "data.width=48"]
        result = invoke("derive", "gram-flow", *words, "extract.gram_flow.radius=2")
        assert result.exit_code == 0, result.output
        ((root, teacher, options),) = calls
        assert (root, teacher) == (cache, store(cache, "teacher"))
        assert options["config"].radius == 2
        assert options["token_grid"] == (2, 3)
        assert options["provenance"]["libraries"]["torch"]
        assert "2 written, 1 already there" in result.stdout
        assert "1 (1 too_short)" in result.stdout

    def test_without_a_teacher_it_says_what_makes_one(self, minimal, tmp_path):
        words = ["--config", minimal, f"cache={tmp_path}/none"]
        result = invoke("derive", "gram-flow", *words)
        assert result.exit_code == 1
        assert "no teacher store" in result.stderr

    def test_a_url_cannot_be_written_to(self, minimal):
        result = invoke("derive", "gram-flow", "--config", minimal, "cache=s3://bucket/cache")
        assert result.exit_code == 2
        assert "cache copy" in result.stderr


def test_a_target_that_cannot_be_written_is_told_in_words(cache, tmp_path):
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["cache", "copy", str(cache), str(tmp_path / "file" / "x")])
    assert done.exit_code == 1
    assert "Errno" not in done.output
    assert "Not a directory" in done.output
