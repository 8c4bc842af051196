"""A training whose run folder another process has taken over: it stops, and harms nothing."""

import errno
import fcntl
import os
from contextlib import ExitStack

import pytest

from cache_schema import LockLost, LockUnsupported
from stages.train_student.checkpoints.records import complete_checkpoints
from stages.train_student.run_folder import RunLock


def files_of(run_dir):
    return {
        path.relative_to(run_dir): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts
    }


class Thief:
    """Deletes the lock and takes the folder, as another process would, the n-th time a function is
    called: before it, or after it."""

    def __init__(self, run_dir):
        self.run_dir, self.stack, self.found = run_dir, ExitStack(), None

    def comes(self, monkeypatch, function, number=1, *, after=False):
        module, _, name = function.rpartition(".")
        owner = pytest.importorskip(module)
        original, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            calls.append(None)
            if len(calls) == number and not after:
                self.steal()
            result = original(*args, **kwargs)
            if len(calls) == number and after:
                self.steal()
            return result

        monkeypatch.setattr(owner, name, call)

    def steal(self):
        (self.run_dir / ".lock").unlink()
        self.stack.enter_context(RunLock(self.run_dir))
        with (self.run_dir / "losses.jsonl").open("a") as file:
            file.write('{"step": 9}\n')
        for step in (4, 9):
            theirs = self.run_dir / "checkpoints" / f"checkpoint-{step}" / "theirs"
            theirs.parent.mkdir(parents=True, exist_ok=True)
            theirs.touch()
        self.found = files_of(self.run_dir)


@pytest.fixture
def thief(tmp_path):
    thief = Thief(tmp_path / "run")
    with thief.stack:
        yield thief


def assert_stops(train, thief):
    with pytest.raises(
        LockLost, match=rf"{thief.run_dir} stops here.*\.lock.*same command resumes"
    ):
        train(thief.run_dir, checkpoints_kept=1)
    left = files_of(thief.run_dir)
    changed = {path for path, content in thief.found.items() if left.get(path) != content}
    assert not changed
    new = {path.name for path in left.keys() - thief.found.keys()}
    assert not new & {"run.json", "config.yaml", "heads.safetensors", "finished.json"}
    assert not any(name.endswith(".complete.json") for name in new)


SAVING = "stages.train_student.checkpoints.checkpointing"
TRAIN = "stages.train_student.train"


@pytest.mark.parametrize(
    ("function", "number", "after"),
    [
        ("stages.train_student.setup.hash_transformer", 1, True),
        (f"{TRAIN}.plan_resume", 1, False),
        (f"{TRAIN}.build_student", 1, False),
        (f"{TRAIN}.update", 3, False),
        (f"{TRAIN}.save_checkpoint", 2, False),
        (f"{SAVING}.sync_tree", 1, False),
        (f"{SAVING}.sync_tree", 2, False),
        (f"{SAVING}.write_record", 2, True),
        (f"{TRAIN}.export_weights", 1, False),
        ("stages.train_student.checkpoints.export.sync_tree", 1, False),
        ("stages.train_student.checkpoints.export._write", 1, True),
        (f"{TRAIN}.export_weights", 1, True),
        (f"{TRAIN}.keep_newest", 1, True),
    ],
)
def test_a_training_that_lost_its_folder_changes_nothing_in_it(
    train, thief, monkeypatch, function, number, after
):
    thief.comes(monkeypatch, function, number, after=after)
    assert_stops(train, thief)


def test_the_rows_of_the_other_process_are_not_cut_off_when_resuming(train, thief, monkeypatch):
    train(thief.run_dir, steps=2)
    (thief.run_dir / "finished.json").unlink()
    thief.comes(monkeypatch, f"{TRAIN}.build_student")
    assert_stops(train, thief)


def test_the_same_command_resumes_once_the_other_process_has_ended(train, thief, monkeypatch):
    with monkeypatch.context() as patch:
        thief.comes(patch, f"{TRAIN}.update", 3)
        assert_stops(train, thief)
    assert [one.step for one in complete_checkpoints(thief.run_dir / "checkpoints")] == [2]
    with pytest.raises(ValueError, match=f"another process is training in {thief.run_dir}"):
        train(thief.run_dir)
    thief.stack.close()
    assert train(thief.run_dir).resumed_from == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_folder_that_cannot_be_locked_is_refused_at_the_start(
    train, monkeypatch, tmp_path, number
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(LockUnsupported, match=rf"{tmp_path}.*{os.strerror(number)}.*mount it"):
        train(tmp_path)
    assert list(tmp_path.iterdir()) == []
