"""Files of an export: from the run, from a checkpoint, for other programs, and refusals."""

import json
import os

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stages.sample_videos.runs import LORA_FILES, find_export
from stages.train_student.checkpoints import weights
from stages.train_student.checkpoints.export import ExportSummary, export_checkpoint
from stages.train_student.parallel.ema import SavedAverage

QUIET = {"report_to": [], "checkpoint_every": 9}
SLOW = pytest.mark.slow


def files_of(folder):
    """Every tensor and the metadata of an export."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name, "metadata"] = file.metadata()
        found |= {(path.name, name): value for name, value in load_file(path).items()}
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        equal = value == other[name] if name[1] == "metadata" else torch.equal(value, other[name])
        assert equal, name


EIGHT_BIT = {"method": "full", "optimizer": {"name": "adamw8bit"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": {"zero_stage": 2}, "lora": {"dora": True}},
        {"deepspeed": {"zero_stage": 3, "precision": "bf16"}, "method": "full"},
        pytest.param({"deepspeed": {"zero_stage": 0}}, marks=SLOW),
        pytest.param({"deepspeed": {"zero_stage": 1, "precision": "bf16"}}, marks=SLOW),
        pytest.param({"deepspeed": {"zero_stage": 1}, "method": "full"}, marks=SLOW),
        pytest.param({"deepspeed": {"zero_stage": 3}}, marks=SLOW),
        pytest.param(EIGHT_BIT | {"deepspeed": {"zero_stage": 3}}, marks=SLOW),
        pytest.param(EIGHT_BIT | {"deepspeed": {"zero_stage": 2}}, marks=SLOW),
    ],
)
def test_a_checkpoint_gives_what_the_run_exported(train, tmp_path, changes):
    if "name" in changes.get("optimizer", {}):
        pytest.importorskip("bitsandbytes")
    train(tmp_path, steps=2, ema={"decay": 0.5}, **QUIET, **changes)
    at_the_end = files_of(tmp_path / "export")
    method = changes.get("method", "lora")
    summary = export_checkpoint(tmp_path, 2, None)
    folder = tmp_path / "export-2"
    numbers = sum(v.numel() for n, v in at_the_end.items() if n[1] != "metadata")
    assert summary == ExportSummary(
        folder=folder,
        method=method,
        step=2,
        weights="average",
        form="diffusers",
        transformer="CogVideoXTransformer3DModel",
        parameters=numbers,
    )
    same(files_of(folder), at_the_end)
    about = json.loads((folder / "export.json").read_text())
    assert (about["step"], about["weights"]) == (2, "average")
    last = export_checkpoint(tmp_path, 2, tmp_path / "last", which="last")
    assert last.weights == "last"
    differing = files_of(tmp_path / "last")
    assert any(
        not torch.equal(v, differing[n]) for n, v in at_the_end.items() if n[1] != "metadata"
    )
    with SavedAverage(tmp_path / "checkpoints" / "checkpoint-2", 1) as saved:
        for name, value in _by_parameter(at_the_end, method).items():
            average = saved.read(name, 0, value.numel()).view(value.shape)
            if ".lora_B." in name:
                average *= 2 / 4  # alpha / rank, which the export holds in this factor
            assert torch.equal(value, average.to(value.dtype)), name


def _by_parameter(files, method):
    found = {}
    for (_, name), value in files.items():
        if name == "metadata":
            continue
        name = name.removeprefix("transformer.")
        if method == "lora":
            name = name.replace(".weight", ".default.weight")
            name = name.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")
        found[f"transformer.{name}"] = value
    return found


@SLOW
@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": {"zero_stage": 2}, "lora": {"dora": True}},
        {"deepspeed": {"zero_stage": 3, "precision": "bf16"}, "method": "full"},
        {"deepspeed": {"zero_stage": 3}, "lora": {"dora": True}},
        {"deepspeed": {"zero_stage": 0}},
    ],
)
def test_two_ranks_export_what_one_does(train_ranks, train, tmp_path, changes):
    changes = {"steps": 2, "ema": {"decay": 0.5}} | QUIET | changes
    answer = train_ranks(tmp_path / "two", processes=2, **changes)
    assert not any(answer.codes), answer.errors
    export_checkpoint(tmp_path / "two", None, tmp_path / "again")
    two = files_of(tmp_path / "two" / "export")
    same(files_of(tmp_path / "again"), two)
    train(tmp_path / "one", **changes)
    one = files_of(tmp_path / "one" / "export")
    assert two.keys() == one.keys()
    for name, value in two.items():
        if name[1] != "metadata":
            torch.testing.assert_close(value, one[name], rtol=1e-2, atol=2e-3)


@SLOW
def test_two_ranks_with_moments_in_eight_bits_export_their_weights(train_ranks, tmp_path):
    """One rank's would differ: its moments are rounded in other blocks."""
    pytest.importorskip("bitsandbytes")
    changes = EIGHT_BIT | {"deepspeed": {"zero_stage": 3}, "steps": 2} | QUIET
    answer = train_ranks(tmp_path / "two", processes=2, **changes)
    assert not any(answer.codes), answer.errors
    export_checkpoint(tmp_path / "two", None, tmp_path / "again")
    same(files_of(tmp_path / "again"), files_of(tmp_path / "two" / "export"))


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_adapters_are_exported_for_other_programs(train, tmp_path, form):
    """Beside the run's own export, which `sample` reads; the values are the same."""
    train(tmp_path, steps=2, lora={"alpha": 2.5}, **QUIET)
    summary = export_checkpoint(tmp_path, None, None, form=form)
    assert (summary.folder, summary.form) == (tmp_path / f"export-{form}", form)
    assert export_checkpoint(tmp_path, 2, None, form=form).folder.name == f"export-2-{form}"
    one = load_file(tmp_path / "export" / LORA_FILES["diffusers"])
    other = load_file(summary.folder / LORA_FILES[form])
    factors = [v for name, v in other.items() if not name.endswith(".alpha")]
    assert len(one) == len(factors)
    totals = [sorted(v.double().abs().sum().item() for v in vs) for vs in (one.values(), factors)]
    assert totals[0] == totals[1]


def test_a_whole_transformer_is_exported_for_diffusers_alone(train, tmp_path):
    train(tmp_path, steps=1, method="full", **QUIET)
    with pytest.raises(ValueError, match=r"--format kohya is for LoRA adapters"):
        export_checkpoint(tmp_path, None, None, form="kohya")


def test_files_of_a_run_have_the_mode_of_the_umask(train, tmp_path):
    before = os.umask(0o027)
    try:
        for method in ("lora", "full"):
            train(tmp_path / method, steps=2, method=method, ema={"decay": 0.5}, **QUIET)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len([file for file in files if file.suffix == ".safetensors"]) >= 5
    # DeepSpeed leaves a script of its own among them.
    modes = {file.stat().st_mode & 0o777 for file in files if file.suffix != ".py"}
    assert modes == {0o640}


def test_the_heads_stay_with_the_run(train, tmp_path):
    train(tmp_path, steps=1, **QUIET)
    heads = load_file(tmp_path / "heads.safetensors")
    assert heads
    assert all(name.startswith("lgf.") for name in heads)
    assert all(".lora_" in name for _, name in files_of(tmp_path / "export") if name != "metadata")


def test_a_large_transformer_is_written_in_several_files(train, monkeypatch, tmp_path):
    train(tmp_path, steps=1, method="full", **QUIET)
    whole = load_file(tmp_path / "export/transformer/diffusion_pytorch_model.safetensors")
    written = []
    save = weights.save_tensors

    def save_and_note(tensors, path, metadata):
        written.append(sum(value.nbytes for value in tensors.values()))
        save(tensors, path, metadata)

    monkeypatch.setattr(weights, "LARGEST_FILE", "40KB")
    monkeypatch.setattr(weights, "save_tensors", save_and_note)
    export_checkpoint(tmp_path, None, tmp_path / "parts")
    assert len(written) > 3
    assert max(written) <= 40_000
    loaded = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "parts", subfolder="transformer"
    )
    assert loaded.state_dict().keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in loaded.state_dict().items())


def test_learned_positions_are_exported_too(tiny, train, tmp_path):
    """They are a buffer: saved with the model, but not trained."""
    transformer = tiny.tiny_transformer(
        in_channels=2 * tiny.LATENT[1], use_learned_positional_embeddings=True
    )
    base = tiny.save_pipeline(tmp_path / "base", transformer=transformer)
    cache = tiny.write_cache(tmp_path / "cache", image=True)
    for method in ("full", "lora"):
        run = tmp_path / method
        train(run, base=base, cache_root=cache, steps=1, method=method, **QUIET)
        export_checkpoint(run, 1, None)
        at_the_end = files_of(run / "export")
        same(files_of(run / "export-1"), at_the_end)
        names = [name for _, name in at_the_end]
        assert ("patch_embed.pos_embedding" in names) == (method == "full")


class TestRefusals:
    @pytest.fixture(scope="class")
    def run(self, train, tmp_path_factory):
        run = tmp_path_factory.mktemp("refusals") / "run"
        train(run, steps=2, checkpoint_every=1, report_to=[])
        return run

    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match="there is no run at"):
            export_checkpoint(tmp_path, None, None)

    def test_a_step_without_checkpoint_names_those_there_are(self, run):
        with pytest.raises(ValueError, match=r"no complete checkpoint of step 7; .* of 2, 1"):
            export_checkpoint(run, 7, None)

    def test_no_best_checkpoint(self, run):
        with pytest.raises(ValueError, match=r"no best checkpoint: it needs train\.keep_best"):
            export_checkpoint(run, "best", None)

    def test_no_average(self, run, tmp_path):
        with pytest.raises(ValueError, match=r"keeps no average .*--weights last"):
            export_checkpoint(run, 2, tmp_path / "out", which="average")
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_is_no_export_is_not_replaced(self, run, tmp_path):
        (tmp_path / "mine.txt").touch()
        with pytest.raises(ValueError, match="exists and is not an export"):
            export_checkpoint(run, None, tmp_path)
        assert (tmp_path / "mine.txt").exists()
        export_checkpoint(run, 1, tmp_path / "out")
        export_checkpoint(run, 2, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "export.json").read_text())["step"] == 2

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_damage_to_an_export_is_found_before_it_is_used(self, train, tmp_path, method):
        train(tmp_path, steps=1, method=method, **QUIET)
        assert find_export(tmp_path).method == method
        (file,) = (tmp_path / "export").rglob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-5] ^= 0x20
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"is damaged: {file.name} has the CRC-32C .* again"):
            find_export(tmp_path)
        record = tmp_path / "export" / "export.json"
        record.write_text(json.dumps({"step": 1, "weights": "last"}))
        with pytest.raises(ValueError, match=r"export.json has no checksums"):
            find_export(tmp_path)

    def test_a_torn_checkpoint(self, run, tmp_path):
        """Run last: it damages the run."""
        state = run / "checkpoints/checkpoint-2/mp_rank_00_model_states.pt"
        state.write_bytes(state.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"no complete checkpoint of step 2; complete .* of 1"):
            export_checkpoint(run, 2, tmp_path / "out")
        assert export_checkpoint(run, None, tmp_path / "out").step == 1
        for record in (run / "checkpoints").glob("*.json"):
            record.unlink()
        with pytest.raises(ValueError, match="has no complete checkpoint; let the run reach one"):
            export_checkpoint(run, None, tmp_path / "out")
