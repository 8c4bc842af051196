"""Output of `extract-features --dry-run`."""

import json
from dataclasses import replace

import pytest

from cache_schema import SkippedClip
from pipeline.commands import estimate as command
from pipeline.config.load import ConfigError, load_config
from stages.dry_run import extract as module
from stages.dry_run.extract import Estimate, KindEstimate, PassEstimate
from stages.dry_run.extract_costs import ModelCost
from stages.dry_run.extract_stores import EncodingEstimate
from stages.extract_features.config import Kind
from stages.progress import SilentProgress

QUIET = SilentProgress()
SKIPPED = tuple(
    SkippedClip(
        key=f"clip/{n}", reason="too_short", detail="3 frames", fingerprint="0" * 32, shard="00000"
    )
    for n in range(25)
)
COST = ModelCost(clip_flops=2e12, weight_bytes=9 * 10**8, working_bytes=10**9, waiting_bytes=10**8)
TEACHER = KindEstimate(
    kind="teacher",
    bucket=None,
    store=None,
    clips_already_there=10,
    clips=275,
    skipped_count=25,
    skipped=SKIPPED,
    bytes_per_clip=10**7,
    compressed=False,
)
FORM_SIZES: list[tuple[Kind, str, int]] = [
    ("teacher", "float16", 68),
    ("teacher", "int8", 34),
    ("gram_flow", "float16", 3),
    ("gram_flow", "uint8", 4),
]
FORMS = tuple(
    EncodingEstimate(
        kind=kind,
        dtype=dtype,
        bucket=None,
        chosen=(kind, dtype) == ("teacher", "int8"),
        clips=285,
        bytes_per_clip=megabytes * 10**6,
        compressed=(kind, dtype) == ("gram_flow", "float16"),
    )
    for kind, dtype, megabytes in FORM_SIZES
)
FOUND = Estimate(
    dataset="webdataset, 5 tars",
    shards=5,
    clips=310,
    frames_per_clip=(49,),
    dataset_bytes=10**9,
    clips_probed=310,
    prompts={"dataset": 270, "automatic": 5},
    conversions={"deinterlaced": 3, "PQ to SDR": 2},
    kinds=(TEACHER, replace(TEACHER, kind="masks", skipped=())),
    passes=(
        PassEstimate(
            bucket=None,
            kinds=("teacher", "masks"),
            clips=275,
            cost=COST,
            flops=275 * 2e12,
            flops_per_second=1e12,
            assumed_peak_fraction=0.5,
        ),
    ),
    forms=FORMS,
    device="some device",
    device_bytes=10**10,
    free_bytes=10**12,
    notes=("weights are not here",),
)


@pytest.fixture
def answer(monkeypatch, minimal):
    def run(found=FOUND, **changes):
        monkeypatch.setattr(module, "estimate", lambda *_, **__: replace(found, **changes))
        return command.run(load_config(minimal), QUIET)

    return run


def test_the_table_tells_clips_disk_memory_and_time(answer):
    rows = answer().rows
    assert ("dataset", "webdataset, 5 tars") in rows
    assert ("clips", "310 in 5 shards, 1.0 GB") in rows
    assert ("prompts", "270 dataset, 5 automatic") in rows
    assert ("source videos", "3 deinterlaced, 2 PQ to SDR") in rows
    assert ("  clips", "275 to be written, 10 already there") in rows
    assert ("  skipped", "25 (25 too_short)") in rows
    assert ("  disk", "2.8 GB, 10.0 MB a clip") in rows
    assert rows.index(("teacher, masks", "from one pass")) > rows.index(
        ("masks", "name depends on weights not downloaded yet")
    )
    assert ("  work", "550 TFLOP, 2 TFLOP a clip") in rows
    assert ("  time", "18 min 20 s at 500 GFLOP/s, both estimated") in rows
    assert ("disk", "5.5 GB to be written, 1.0 TB free") in rows


def test_the_teachers_forms_stand_side_by_side(answer):
    rows = answer().rows
    start = rows.index(("teacher forms", "for 285 clips"))
    assert rows[start + 1 : start + 5] == [
        ("  teacher float16", "19.4 GB, 68.0 MB a clip"),
        ("  teacher int8", "9.7 GB, 34.0 MB a clip, chosen"),
        ("  gram_flow float16", "about 855.0 MB, 3.0 MB a clip, compressed"),
        ("  gram_flow uint8", "1.1 GB, 4.0 MB a clip"),
    ]
    told = json.loads(json.dumps(answer().data))["forms"]
    assert [encoding["bytes"] for encoding in told] == [285 * m * 10**6 for m in (68, 34, 3, 4)]
    assert [encoding["chosen"] for encoding in told] == [False, True, False, False]
    assert answer(forms=()).rows == [row for row in rows if row not in rows[start : start + 5]]


def test_the_size_of_a_compressed_store_is_about(answer):
    rows = answer(kinds=(replace(TEACHER, compressed=True),)).rows
    assert ("  disk", "about 2.8 GB, 10.0 MB a clip, compressed") in rows
    assert ("disk", "about 2.8 GB to be written, 1.0 TB free") in rows


def test_json_holds_every_skipped_clip_and_number(answer):
    told = json.loads(json.dumps(answer().data))
    assert len(told["teacher"]["skipped"]) == 25
    assert told["bytes"] == 2 * 275 * 10**7
    assert told["passes"][0]["memory_bytes"] == 2 * 10**9
    assert told["seconds"] == 1100


def test_what_is_skipped_is_listed_and_cut(answer):
    notes = answer().notes
    assert notes[0] == "teacher would skip clip/0: too_short (3 frames)"
    assert notes[20] == "… and 5 more; --json lists them"
    assert notes[21] == "weights are not here"
    assert answer().exit_code == 0


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"free_bytes": 10**9}, "has 1.0 GB free, but 5.5 GB would be written"),
        ({"device_bytes": 10**9}, "teacher and masks would take 2.0 GB of memory"),
        ({"clips_probed": 100}, "headers of 100 clips in evenly spaced shards"),
        ({"kinds": (replace(TEACHER, clips=75),)}, "25% of teacher would be skipped"),
    ],
)
def test_what_will_not_fit_is_a_warning(answer, changes, warning):
    assert not any(warning in note for note in answer().notes)
    assert any(warning in note for note in answer(**changes).notes)
    assert any(warning in note for note in answer(**changes).data["warnings"])


def test_what_is_not_known_is_said(answer):
    unknown = replace(TEACHER, bytes_per_clip=None)
    (one,) = FOUND.passes
    rows = answer(kinds=(unknown,), passes=(replace(one, cost=None, flops=None),)).rows
    assert ("  disk", "unknown") in rows
    assert ("  memory, time", "unknown") in rows
    assert ("disk", "at least 0 B to be written, 1.0 TB free") in rows


def test_the_demo_is_not_drawn_for_an_estimate(tmp_path):
    config = load_config("demo", [f"demo.root={tmp_path}/demo"])
    with pytest.raises(ConfigError, match="generated by the first command"):
        command.run(config, QUIET)
    assert not (tmp_path / "demo").exists()
