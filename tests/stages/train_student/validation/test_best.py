"""Which checkpoint is the best, and that it stays while others go."""

import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.files.checksums import checksum_of
from stages.train_student.checkpoints.best import best_step, read_best, write_best
from stages.train_student.checkpoints.records import (
    Checkpoint,
    checkpoint_folder,
    checkpoints_of,
    complete_checkpoints,
    delete_checkpoint,
    keep_newest,
    write_record,
)
from stages.train_student.config import TrainConfig
from stages.train_student.validation.best import BestKeeper, check_keep_best

PROMPTS = ["a biped walks", "a quadruped runs"]
LOSS, PRESENCE = "validation/diffusion", "samples/limb_presence"
LOSSES: dict[str, Any] = {
    "keep_best": LOSS,
    "validation": {"clips": 3, "every": 1, "timesteps": (500,)},
}
SAMPLES = {"prompts": PROMPTS, "every": 1, "scores": ("figures",)}


class FakeRun:
    """The files of a run that its best checkpoint follows from."""

    def __init__(self, run_dir, lines, **changes):
        self.config = TrainConfig(run_dir=run_dir, checkpoint_every=1, **LOSSES | changes)
        self.run_dir, self.root, self.lines = run_dir, checkpoints_of(run_dir), lines
        self.keeper = BestKeeper(
            self.config,
            check_keep_best(self.config),
            held_out=3,
            check=lambda: None,
            progress=lines,
        )

    def save(self, step):
        folder = checkpoint_folder(self.root, step)
        folder.mkdir(parents=True)
        (folder / "weights.pt").write_bytes(b"weights")
        files = {"weights.pt": checksum_of(folder / "weights.pt")}
        write_record(
            Checkpoint(
                folder=folder, step=step, world_size=1, zero_stage=1, planned_steps=9, files=files
            )
        )

    def drop_old(self, step, kept=1):
        keep_newest(self.root, kept, step, best=best_step(self.run_dir))

    def validate(self, step, value, clips=3):
        number = value if math.isfinite(value) else None
        row = {"step": step, "clips": clips, "diffusion": number, "auxiliary": {}}
        row["by_timestep"] = {"timestep": [500], "diffusion": [number]}
        with (self.run_dir / "validation.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def sample(self, step, *values, name="limb_presence", **changes):
        """An ellipsis leaves out the score, as where a video shows no figure."""
        folder = self.run_dir / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        scores = [{} if value is ... else {name: value} for value in values]
        record = {"step": step, "scores": scores} | self.config.samples.as_recorded() | changes
        (folder / "samples.json").write_text(json.dumps(record))

    def saved(self):
        return sorted(found.step for found in complete_checkpoints(self.root))


@pytest.fixture
def fake_run(tmp_path, lines):
    def make(**changes):
        return FakeRun(tmp_path, lines, **changes)

    return make


@pytest.fixture
def losses(fake_run):
    """Held-out losses, of which the lowest is the best."""
    return fake_run()


@pytest.fixture
def samples(fake_run):
    """Scores of two samples, of which the highest mean is the best."""
    return fake_run(keep_best=PRESENCE, samples=SAMPLES)


def test_the_lowest_held_out_loss_is_the_best_and_the_base_model_does_not_count(losses):
    losses.validate(0, 0.5)
    losses.keeper.after_step(0)
    assert read_best(losses.run_dir) is None
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0)):
        losses.save(step)
        losses.validate(step, value)
        losses.keeper.after_step(step)
    best = read_best(losses.run_dir)
    assert (best.step, best.curve, best.value, best.before_training) == (2, LOSS, 1.0, 0.5)
    assert losses.lines.lines == [
        "best checkpoint: step 1, validation/diffusion 3 (base model: 0.5)",
        "best checkpoint: step 2, validation/diffusion 1 (step 1: 3, base model: 0.5)",
        "best checkpoint still: step 2, validation/diffusion 1 (step 3: 2, base model: 0.5)",
    ]


@pytest.mark.parametrize(
    ("name", "best"), [("limb_presence", 2), ("limb_length_error", 3), ("side_swaps", 3)]
)
def test_the_direction_is_that_of_the_score(fake_run, name, best):
    run = fake_run(keep_best=f"samples/{name}", samples=SAMPLES)
    for step, values in enumerate([(0.5, 0.6), (0.9, 0.4), (0.2, 0.6)], 1):
        run.save(step)
        run.sample(step, *values, name=name)
        run.keeper.after_step(step)
    found = read_best(run.run_dir)
    assert found.step == best
    assert found.value == pytest.approx({2: 0.65, 3: 0.4}[best])


@pytest.mark.parametrize("missing", [None, ...])
def test_a_step_whose_videos_lack_the_score_is_never_the_best(samples, missing):
    """The mean of its other video, 1.0, would be the highest."""
    samples.save(1)
    samples.sample(1, 0.5, 0.6)
    samples.keeper.after_step(1)
    samples.save(2)
    samples.sample(2, 1.0, missing)
    samples.keeper.after_step(2)
    assert best_step(samples.run_dir) == 1
    assert samples.lines.lines[-1] == (
        "step 2 cannot be the best checkpoint: samples/limb_presence is missing for 1 of 2 videos"
    )


@pytest.mark.parametrize(
    ("value", "clips", "why"), [(math.nan, 3, "NaN or infinite"), (0.1, 2, "of 2 held-out clips")]
)
def test_a_loss_that_is_nan_or_of_fewer_clips_is_never_the_best(losses, value, clips, why):
    for step, (one, count) in enumerate([(2.0, 3), (value, clips)], 1):
        losses.save(step)
        losses.validate(step, one, count)
        losses.keeper.after_step(step)
    assert best_step(losses.run_dir) == 1
    assert why in losses.lines.lines[-1]


def test_samples_of_other_settings_are_not_compared(samples):
    """As where a run is resumed with other prompts: the values of before mean something else."""
    samples.save(1)
    samples.sample(1, 1.0, 1.0, prompts=["a biped walks", "an arm waves"])
    samples.save(2)
    samples.sample(2, 0.1, 0.1)
    samples.keeper.after_step(2)
    assert best_step(samples.run_dir) == 2


def test_what_the_run_reports_elsewhere_is_not_repeated(samples):
    """Held-out losses may be computed more often than samples."""
    samples.save(1)
    samples.validate(1, 0.1)
    samples.keeper.after_step(1)
    assert (best_step(samples.run_dir), samples.lines.lines) == (None, [])


OTHER = {"keep_best": PRESENCE, "samples": SAMPLES}
CHANGES = {
    "gone": (lambda run: delete_checkpoint(checkpoint_folder(run.root, 2)), {}, 3, "is gone"),
    "torn": (
        lambda run: (checkpoint_folder(run.root, 2) / "weights.pt").write_bytes(b"half"),
        {},
        3,
        "cannot be used: its files differ from its record",
    ),
    "resumed before it": (lambda run: None, {"done": 1}, 1, "the run resumes after step 1"),
    "other curve": (
        lambda run: FakeRun(run.run_dir, run.lines, **OTHER).sample(3, 0.5, 0.5),
        OTHER,
        3,
        "train.keep_best is samples/limb_presence now",
    ),
    "other timesteps": (
        lambda run: None,
        {"validation": LOSSES["validation"] | {"timesteps": (100,)}},
        None,
        "is of other train.validation.timesteps; there is none now",
    ),
    "its record lost": (
        lambda run: (run.run_dir / "validation.jsonl").unlink(),
        {},
        None,
        "its value is no longer recorded",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_best_checkpoint_that_cannot_be_chosen_any_more_is_reported(losses, fake_run, change):
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0)):
        losses.save(step)
        losses.validate(step, value)
        losses.keeper.after_step(step)
    damage, changes, expected, why = CHANGES[change]
    damage(losses)
    again = fake_run(**{name: value for name, value in changes.items() if name != "done"})
    again.keeper.start(changes.get("done", 3))
    assert best_step(again.run_dir) == expected
    warning = again.lines.lines[-1]
    assert "warning: the best checkpoint was step 2, validation/diffusion 1, but" in warning
    assert why in warning


def test_a_resume_that_changes_nothing_says_nothing(losses):
    losses.save(1)
    losses.validate(1, 3.0)
    losses.keeper.after_step(1)
    said = list(losses.lines.lines)
    losses.keeper.start(1)
    assert losses.lines.lines == said


@pytest.mark.parametrize("content", [b'{"step": 1}', b"{", b'{"step": 1, "curve": "x"}'])
def test_a_damaged_record_is_named_and_made_again_by_a_resume(losses, content):
    losses.save(1)
    losses.validate(1, 3.0)
    losses.keeper.after_step(1)
    file = losses.run_dir / "best.json"
    whole = file.read_bytes()
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"best\.json"):
        read_best(losses.run_dir)
    losses.keeper.start(1)
    assert file.read_bytes() == whole
    assert "best.json" in losses.lines.lines[-1]
    write_best(losses.run_dir, None)
    assert best_step(losses.run_dir) is None


VALUES = st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan]), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(values=VALUES, kept=st.integers(1, 2), kills=st.sets(st.integers(0, 30)))
def test_wherever_a_run_is_killed_the_best_is_complete_and_stays(values, kept, kills):
    """Against the lowest value of a list; a kill restarts from the newest checkpoint."""

    class Silent:
        def log(self, text):
            pass

    operations = itertools.count()

    class KilledError(Exception):
        pass

    def maybe_killed():
        if next(operations) in kills:
            raise KilledError

    with tempfile.TemporaryDirectory() as folder:
        run = FakeRun(Path(folder), Silent())
        scored = set()

        def score(step):
            if step not in scored:
                run.validate(step, values[step - 1])
                scored.add(step)
                maybe_killed()
            run.keeper.after_step(step)

        def train():
            done = max(run.saved(), default=0)
            run.keeper.start(done)
            maybe_killed()
            if done:
                score(done)
            for step in range(done + 1, len(values) + 1):
                maybe_killed()
                run.save(step)
                maybe_killed()
                run.drop_old(step, kept)
                check(step)
                maybe_killed()
                score(step)
            run.drop_old(len(values), kept)

        def check(step):
            best = best_step(run.run_dir)
            assert best is None or best in run.saved()
            known = [n for n in scored if n <= step and not math.isnan(values[n - 1])]
            if known:
                assert min(known, key=lambda n: (values[n - 1], n)) in run.saved()

        finished = False
        while not finished:
            try:
                train()
                finished = True
            except KilledError:
                check(max(run.saved(), default=0))
        number = len(values)
        known = [n for n in range(1, number + 1) if not math.isnan(values[n - 1])]
        best = min(known, key=lambda n: (values[n - 1], n)) if known else None
        assert best_step(run.run_dir) == best
        newest = set(range(max(1, number - kept + 1), number + 1))
        assert set(run.saved()) == newest | ({best} if best else set())


REFUSED = {
    "no such curve": ({"keep_best": "validation/los"}, r"no curve of this run; choose one of vali"),
    "an objective of another run": ({"keep_best": "validation/repa"}, "no curve of this run"),
    "no clips": ({"keep_best": LOSS}, r"no clips are held out; set train\.validation\.clips"),
    "no samples": ({"keep_best": PRESENCE}, r"no samples; set train\.samples\.prompts"),
    "group not computed": (
        {"keep_best": PRESENCE, "samples": SAMPLES | {"scores": ("vbench",)}},
        r"add figures to train\.samples\.scores, now \[vbench\]",
    ),
    "no direction": (
        {"keep_best": "samples/contrast", "samples": {"prompts": PROMPTS}},
        "neither higher nor lower is better; choose one of .*samples/limb_presence",
    ),
    "of tracks": (
        {"keep_best": "samples/subject_kept", "samples": {"prompts": PROMPTS}},
        "needs SAM2 and is computed only by sam2vx-pipeline evaluate",
    ),
    "of a network": (
        {"keep_best": "samples/subject_consistency", "samples": SAMPLES | {"scores": ("vbench",)}},
        "needs a network of VBench and is computed only by sam2vx-pipeline evaluate",
    ),
    "of no figure": (
        {"keep_best": PRESENCE, "samples": SAMPLES | {"prompts": ["a lion"]}},
        r"names no biped, .*: a lion; change train\.samples\.prompts",
    ),
    "losses between checkpoints": (
        LOSSES | {"checkpoint_every": 2},
        r"validation\.every is 1, train\.checkpoint_every 2.*train\.checkpoint_every=1",
    ),
    "samples between checkpoints": (
        {"keep_best": PRESENCE, "samples": SAMPLES | {"every": 3}, "checkpoint_every": 2},
        r"samples\.every is 3, train\.checkpoint_every 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_curve_that_cannot_choose_a_checkpoint_is_refused_before_any_work(train, tmp_path, case):
    changes, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
