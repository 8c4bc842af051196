"""Whole trainings in this process."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stages.train_student.data.dataset import CachedSamples


def losses(run_dir):
    return (run_dir / "losses.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tiny, train, tmp_path_factory):
    """A run of six steps without interruption."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    progress = tiny.Lines()
    return run_dir, train(run_dir, steps=6, progress=progress), progress.lines


def test_a_run_leaves_what_it_says(whole):
    run_dir, summary, lines = whole
    assert summary.steps_done == 6
    assert summary.resumed_from is None
    assert not summary.already_finished
    rows = [json.loads(line) for line in losses(run_dir).splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [row["lr"] for row in rows[:3]] == [0.005, 0.01, 0.01]
    for row in rows:
        assert row["loss"] == pytest.approx(
            row["diffusion"] + 0.5 * row["auxiliary"]["lgf"], rel=1e-5
        )
    assert (summary.first.loss, summary.last.loss) == (rows[0]["loss"], rows[-1]["loss"])
    about = json.loads((run_dir / "run.json").read_text())
    assert about["processes"] == 1
    assert about["provenance"] == {"made by": "a test"}
    assert about["stores"]["teacher"]["folder"].startswith("teacher-")
    assert about["left_out"] == {
        "not_in_every_store": {"text": 0, "latents": 0, "teacher": 0},
        "skipped": {"text": {}, "latents": {}, "teacher": {}},
        "manifest": None,
        "named": 0,
    }
    assert json.loads((run_dir / "finished.json").read_text()) == {"steps": 6, "export": "export"}
    assert load_file(run_dir / "heads.safetensors")["lgf.smooth.taps_3C"].shape == (3, 8)
    kept = sorted(path.name for path in (run_dir / "checkpoints").glob("*.complete.json"))
    assert kept == [f"checkpoint-{step}.complete.json" for step in (2, 4, 6)]
    shown = [line.split() for line in lines]
    assert [line[0] for line in shown if line[0].isdigit()] == ["1", "2", "4", "6"]


def test_the_curves_reach_tensorboard(whole):
    run_dir, _, _ = whole
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    written = [event.value for event in board.Scalars("train/lgf")]
    rows = [json.loads(line) for line in losses(run_dir).splitlines()]
    np.testing.assert_allclose(written, [row["auxiliary"]["lgf"] for row in rows], rtol=1e-6)


def test_training_teaches(train, tmp_path):
    summary = train(tmp_path, steps=30, checkpoint_every=30, gradient_checkpointing=False)
    assert summary.last.auxiliary["lgf"] < 0.5 * summary.first.auxiliary["lgf"]


def test_a_resumed_run_has_the_same_losses_to_the_last_bit(whole, train, tmp_path):
    train(tmp_path / "run", steps=4)
    summary = train(tmp_path / "run", steps=6)
    assert summary.resumed_from == 4
    assert losses(tmp_path / "run") == losses(whole[0])
    left = load_file(tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors")
    right = load_file(whole[0] / "export" / "pytorch_lora_weights.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": {"zero_stage": 0}},
        {"deepspeed": {"zero_stage": 3, "precision": "bf16"}, "method": "full"},
        pytest.param(
            {"deepspeed": {"zero_stage": 1, "precision": "bf16"}, "method": "full"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"deepspeed": {"zero_stage": 2, "offload_optimizer": "cpu"}}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"deepspeed": {"zero_stage": 3}, "objectives": []},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_engine_resumes_to_the_last_bit(train, tmp_path, changes):
    train(tmp_path / "whole", steps=2, checkpoint_every=9, **changes)
    train(tmp_path / "parts", steps=1, checkpoint_every=9, **changes)
    summary = train(tmp_path / "parts", steps=2, checkpoint_every=9, **changes)
    assert summary.resumed_from == 1
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_micro_batches_make_the_same_step(train, whole, tmp_path):
    train(tmp_path, steps=2, micro_batch_size=2)
    together = [json.loads(line) for line in losses(tmp_path).splitlines()]
    apart = [json.loads(line) for line in losses(whole[0]).splitlines()]
    for left, right in zip(together, apart[:2], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_zero_stages_agree(train, whole, tmp_path, stage):
    train(tmp_path, steps=2, checkpoint_every=9, deepspeed={"zero_stage": stage})
    expected = [json.loads(line) for line in losses(whole[0]).splitlines()][:2]
    found = [json.loads(line) for line in losses(tmp_path).splitlines()]
    for name in ("loss", "grad_norm"):
        left, right = [row[name] for row in found], [row[name] for row in expected]
        np.testing.assert_allclose(left, right, rtol=1e-4)


def test_a_finished_run_is_not_run_again(whole, train):
    before = losses(whole[0])
    summary = train(whole[0], steps=6)
    assert summary.already_finished
    assert summary.seconds_per_step is None
    assert losses(whole[0]) == before


FORMS = {
    "float16": ({"radius": 1}, {}, 1e-3),
    "uint8": ({"radius": 2}, {"loader_workers": 1}, 1e-2),
    "int8 features": (None, {}, 1e-2),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_teacher_teaches_the_same_and_resumes_to_the_last_bit(
    tiny, train, tmp_path, form
):
    """Compared with float16 features; these few channels and tokens are the hardest for bytes."""
    flow, changes, near = FORMS[form]
    tiny.write_inputs(tmp_path)
    features = tiny.write_teacher(tmp_path)
    if flow is None:
        other = tiny.write_teacher(tmp_path, "int8")
        changes = {"stores": {"teacher": other.name}}
    else:
        other = tiny.write_gram_flow(tmp_path, form, **flow)
        changes = changes | {"teacher_form": "gram_flow"}
    settings = {"cache_root": tmp_path, "checkpoint_every": 9}
    reference = tmp_path / "features"
    train(reference, steps=6, stores={"teacher": features.name}, **settings)
    train(tmp_path / "whole", steps=6, **settings, **changes)
    train(tmp_path / "parts", steps=4, **settings, **changes)
    assert train(tmp_path / "parts", steps=6, **settings, **changes).resumed_from == 4
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    found, expected = (
        [json.loads(line) for line in losses(run).splitlines()]
        for run in (tmp_path / "whole", reference)
    )
    for left, right in zip(found, expected, strict=True):
        assert left["auxiliary"] == pytest.approx(right["auxiliary"], rel=near)
        assert left["diffusion"] == pytest.approx(right["diffusion"], rel=1e-5)
    about = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert other.name in [store["folder"] for store in about["stores"].values()]
    assert about["settings"]["train.teacher_form"] == ("features" if flow is None else "gram_flow")


def test_another_form_is_another_run(tiny, whole, train, tmp_path):
    tiny.write_inputs(tmp_path)
    tiny.write_gram_flow(tmp_path)
    with pytest.raises(ValueError, match=r"train.teacher_form was 'features', is 'gram_flow'"):
        train(whole[0], cache_root=tmp_path, steps=7, teacher_form="gram_flow")


def test_other_settings_in_the_same_folder_are_refused_and_named(whole, train):
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01, is 0\.5.*run_dir"):
        train(whole[0], steps=6, optimizer={"learning_rate": 0.5})


def test_a_torn_checkpoint_is_never_loaded(whole, train, lines, tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, steps=4)
    checkpoints = run_dir / "checkpoints"
    biggest = max((checkpoints / "checkpoint-4").iterdir(), key=lambda file: file.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:-1])
    (checkpoints / "checkpoint-5").mkdir()
    (checkpoints / "checkpoint-5" / "mp_rank_00_model_states.pt").write_bytes(b"half")
    summary = train(run_dir, steps=6, progress=lines)
    assert summary.resumed_from == 2
    for why in ("it is incomplete", "its files differ from its record"):
        assert sum(why in line for line in lines.lines) == 1
    assert losses(run_dir) == losses(whole[0])


def test_old_checkpoints_are_dropped(train, tmp_path):
    train(tmp_path, steps=3, checkpoint_every=1, checkpoints_kept=2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*"))
    assert left == [
        "checkpoint-2",
        "checkpoint-2.complete.json",
        "checkpoint-3",
        "checkpoint-3.complete.json",
    ]


def test_clips_left_out_are_told(tiny, train, lines, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys=("a", "b", "c"))
    tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES, keys=("a", "b"))
    summary = train(
        tmp_path / "run",
        cache_root=tmp_path,
        progress=lines,
        objectives=[],
        steps=1,
    )
    assert lines.lines[0] == "training on 2 clips; left out, not in every store: 1 of text"
    assert summary.excluded == {"text": 1, "latents": 0}
    assert summary.last.auxiliary == {}


def test_what_invalid_maps_hold_never_matters(tiny, train, tmp_path):
    """The same losses to the last bit, whether lost frames hold noise, zeros or huge values."""
    tiny.write_inputs(tmp_path)
    lost = np.arange(tiny.FRAMES) > 5

    def hold(content):
        def change(key, arrays):
            features = np.where(lost[:, None, None, None], content, arrays["features"])
            return {"features": features.astype(np.float16), "valid": (~lost).astype(np.uint8)}

        return change

    runs = []
    for name, content in (("zeros", 0.0), ("huge", 6e4)):
        store = tiny.write_store(
            tmp_path, "teacher", tiny.teacher_shapes(), values={"n": name}, change=hold(content)
        )
        stores = {"teacher": store.name}
        train(tmp_path / name, cache_root=tmp_path, steps=2, checkpoint_every=9, stores=stores)
        runs.append(losses(tmp_path / name))
    assert runs[0] == runs[1]
    assert json.loads(runs[0].splitlines()[0])["auxiliary"]["lgf"] > 0


def test_clips_named_in_a_manifest_are_not_trained_on(train, lines, monkeypatch, tmp_path):
    seen = set()
    read = CachedSamples.__getitem__

    def read_and_note(self, sample):
        batch = read(self, sample)
        seen.update(batch.keys)
        return batch

    monkeypatch.setattr(CachedSamples, "__getitem__", read_and_note)
    manifest = tmp_path / "bad.jsonl"
    manifest.write_text('{"key": "clip/1", "why": "a cut"}\n{"key": "clip/4"}\n')
    run_dir = tmp_path / "run"
    summary = train(
        run_dir,
        progress=lines,
        leave_out=str(manifest),
        objectives=[],
        steps=2,
    )
    assert seen == {"clip/0", "clip/2", "clip/3"}
    assert lines.lines[0] == f"training on 3 clips; left out by {manifest}: 2"
    assert (summary.clips, summary.excluded_by_name) == (3, 2)
    about = json.loads((run_dir / "run.json").read_text())
    assert about["left_out"]["manifest"] == str(manifest)
    assert about["left_out"]["named"] == 2
    moved = manifest.rename(tmp_path / "moved.jsonl")
    again = {"leave_out": str(moved), "objectives": []}
    assert train(run_dir, steps=2, **again).already_finished
    moved.write_text('{"key": "clip/1"}\n')
    with pytest.raises(ValueError, match=r"a run on 3 clips, .* 1 to train on .*'clip/4'"):
        train(run_dir, steps=3, **again)


def test_wrong_settings_are_refused_before_any_weight_is_loaded(train, monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("stages.train_student.model.loading.load_transformer", never)
    with pytest.raises(ValueError, match=r"train.block must be under 2"):
        train(tmp_path, block=2)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def die(tmp_path):
    """Kills a process that holds the folder; its loader's process outlives it."""
    from stages.train_student.run_folder import RunLock

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with RunLock(tmp_path):
            loader = os.fork()
            os.write(writing, str(loader).encode() if loader else b"")
            signal.pause()
    loader = int(os.read(reading, 100))
    alive = [child]

    def kill():
        os.kill(alive[0], signal.SIGKILL)
        os.waitpid(alive.pop(), 0)

    yield kill
    if alive:
        kill()
    os.kill(loader, signal.SIGKILL)
    os.close(reading)
    os.close(writing)


def test_one_training_per_folder_but_a_killed_one_is_followed_at_once(train, die, tmp_path):
    with pytest.raises(ValueError, match="another process is training"):
        train(tmp_path)
    die()
    assert train(tmp_path, steps=1).steps_done == 1


def test_a_base_model_with_a_tensor_missing_is_refused_before_the_run_begins(
    base_model, train, tmp_path
):
    base = shutil.copytree(base_model, tmp_path / "base")
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: 1 \(proj_out\.bias\)"):
        train(tmp_path / "run", base=base)
    assert not (tmp_path / "run").exists()
