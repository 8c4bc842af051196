"""`cache drop`, `merge`, `copy` and `derive` from their arguments to stdout and exit code."""

import json
import sys
import types

from typer.testing import CliRunner

from cache_schema import StoreReader
from pipeline.cli import app
from stages.extract_features.summary import KindSummary
from tests.pipeline.cache_stores import (
    KEYS,
    SHAPES,
    answer,
    file_of,
    flip_a_byte,
    holds,
    invoke,
    store,
    write_store,
)


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


class TestDeriveGramFlow:
    def test_the_stage_gets_the_teacher_its_settings_and_the_token_grid(
        self, cache, minimal, monkeypatch
    ):
        calls = []

        def derive(root, teacher, **options):
            calls.append((root, teacher, options))
            return KindSummary(
                kind="gram_flow",
                bucket=None,
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


class TestIndex:
    def test_every_store_gets_its_index_and_attribute_table(self, cache):
        (store(cache, "text") / "index.npz").unlink(missing_ok=True)
        found = answer("index", cache)
        assert set(found) == set(SHAPES)
        for kind in SHAPES:
            sizes = found[kind]["bytes"]
            assert set(sizes) == {"index.npz", "attributes.npz"}
            assert all((store(cache, kind) / name).stat().st_size == sizes[name] for name in sizes)
            assert StoreReader(store(cache, kind)).listed_attributes().missing == ()
        answer("verify", cache)
