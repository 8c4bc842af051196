"""The files and the table of a training."""

import json
import tracemalloc

import pytest

from stages.train_student.config import TrainConfig
from stages.train_student.logging.rows import (
    DamagedRow,
    LossRow,
    PerformanceRow,
    RowFile,
    SkippedClip,
    SkippedRow,
    StepRows,
    iter_rows,
    read_losses,
)
from stages.train_student.logging.run_log import RunLog


def losses(step):
    return LossRow(
        step=step,
        loss=0.1 + 0.2,
        diffusion=0.25,
        auxiliary={"lgf": 1e-17, "token-relation": 3.0},
        grad_norm=1.0,
        lr=1e-4,
        by_timestep={"count": [1] + [0] * 9, "diffusion": [0.25] + [None] * 9},
    )


def rows(step, *, skipped=None, damaged=()):
    return StepRows(
        performance=PerformanceRow(
            step=step,
            seconds=2.0,
            wait_seconds=0.5,
            clips_per_second=16.0,
            peak_memory_bytes=3,
            share_of_peak=None,
        ),
        losses=losses(step) if skipped is None else None,
        skipped=skipped,
        damaged=damaged,
    )


def spoiled(step):
    clip = SkippedClip(key="a", timestep=7, diffusion="nan", auxiliary={"lgf": 1.0})
    return SkippedRow(step=step, what="loss", clips=(clip,))


def open_log(run_dir, done, progress, report_to=(), log_every=2):
    config = TrainConfig(
        run_dir=run_dir,
        report_to=report_to,
        objectives=("lgf", "token-relation"),
        log_every=log_every,
    )
    return RunLog(config, done, check=lambda: None, progress=progress)


def test_rows_come_back_to_the_last_bit(lines, tmp_path):
    with open_log(tmp_path, 0, lines) as log:
        log.add(rows(1))
        log.sync()
        log.add(rows(2, skipped=spoiled(2)))
        log.add(rows(3, damaged=(DamagedRow(step=3, key="b", message="torn", gone=False),)))
    assert list(read_losses(tmp_path)) == [losses(1), losses(3)]
    assert [row["step"] for row in iter_rows(tmp_path / "performance.jsonl")] == [1, 2, 3]
    (skipped,) = iter_rows(tmp_path / "skipped_steps.jsonl")
    assert skipped["clips"] == [
        {"key": "a", "timestep": 7, "diffusion": "nan", "auxiliary": {"lgf": 1.0}}
    ]
    (damaged,) = iter_rows(tmp_path / "damaged_clips.jsonl")
    assert damaged == {"step": 3, "key": "b", "message": "torn", "gone": False}


def test_a_resumed_log_drops_what_came_after_and_a_torn_line(lines, tmp_path):
    with open_log(tmp_path, 0, lines) as log:
        for step in (1, 2, 3):
            log.add(rows(step))
    before = (tmp_path / "losses.jsonl").read_text().splitlines(keepends=True)
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with open_log(tmp_path, 2, lines) as log:
        assert (tmp_path / "losses.jsonl").read_text() == "".join(before[:2])
        log.add(rows(3))
    assert (tmp_path / "losses.jsonl").read_text() == "".join(before)
    assert [row["step"] for row in iter_rows(tmp_path / "performance.jsonl")] == [1, 2, 3]


def test_opening_a_long_file_of_rows_holds_a_few_of_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"step": step, "text": "é" * 100}) + "\n" for step in range(1, 5001)]
    path.write_text("".join(lines) + '{"step": 50', encoding="utf-8")
    tracemalloc.start()
    RowFile(path, 4000, lambda: None).close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.read_text(encoding="utf-8") == "".join(lines[:4000])
    assert peak < path.stat().st_size / 2


def test_rows_that_two_runs_wrote_are_refused_and_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl has a line of step 2 after one of step 3"):
        RowFile(path, 2, lambda: None)
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("line", ["{", "7", '{"loss": 1}', '{"step": "x"}'])
def test_a_damaged_line_is_told(tmp_path, line):
    (tmp_path / "losses.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"losses.jsonl has a damaged line"):
        list(read_losses(tmp_path))


def test_other_fields_are_told(tmp_path):
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"losses.jsonl has a .* line: diffusion \(Field required"):
        list(read_losses(tmp_path))


def test_what_json_has_no_number_for_is_never_written(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl", 0, lambda: None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.add({"step": 1, "loss": float("nan")})
    file.close()
    assert (tmp_path / "rows.jsonl").read_text() == ""


def test_the_table_names_every_objective_and_shows_every_so_many_steps(lines, tmp_path):
    with open_log(tmp_path, 0, lines, log_every=3) as log:
        for step in range(1, 7):
            log.add(rows(step))
    headings, *shown = lines.lines
    assert headings.split() == [
        *("step", "loss", "diffusion", "lgf", "token-relation", "grad", "norm", "rate", "s/step"),
        "wait",
    ]
    assert [line.split()[0] for line in shown] == ["1", "3", "6"]
    assert shown[0].split()[-3:] == ["1.00e-04", "2.00", "25%"]
    assert {len(line) for line in shown} == {len(headings)}


def test_skipped_steps_and_damaged_clips_are_told(lines, tmp_path):
    damaged = (
        DamagedRow(step=1, key="b", message="torn", gone=False),
        DamagedRow(step=1, key="c", message="dropped", gone=True),
    )
    with open_log(tmp_path, 0, lines) as log:
        log.add(rows(1, skipped=spoiled(1), damaged=damaged))
        log.add(rows(2, damaged=damaged))
    told = [line for line in lines.lines if "'" in line]
    assert told == [
        "warning: clip 'b' cannot be read, using another instead: torn; "
        "run sam2vx-pipeline cache repair after the run",
        "warning: clip 'c' is gone, using another instead: dropped",
        "step 1 skipped: its loss is NaN or infinite; clips 'a'",
    ]


def test_suspects_are_the_clips_that_are_no_number_or_all_of_them():
    good = SkippedClip(key="z", timestep=1, diffusion=1.0, auxiliary={"lgf": 2.0})
    bad = SkippedClip(key="b", timestep=1, diffusion=1.0, auxiliary={"lgf": "inf"})
    assert SkippedRow(step=1, what="loss", clips=(good, bad)).suspects() == ["b"]
    other = SkippedClip(key="a", timestep=1, diffusion=1.0, auxiliary={})
    assert SkippedRow(step=1, what="gradient", clips=(good, other)).suspects() == ["a", "z"]


def test_lines_are_plain_json(lines, tmp_path):
    with open_log(tmp_path, 0, lines) as log:
        log.add(rows(1))
    row = json.loads((tmp_path / "losses.jsonl").read_text())
    assert row["loss"] == 0.30000000000000004
    assert row["auxiliary"]["lgf"] == 1e-17
