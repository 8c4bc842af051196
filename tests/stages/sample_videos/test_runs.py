import json
from pathlib import Path

import pytest
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.config import BaseModelConfig
from stages.sample_videos.loading import add_lora
from stages.sample_videos.runs import (
    BASE_SETTING,
    LORA_FILE,
    export_hash,
    find_export,
    is_run,
    newest_finished_run,
    runs_in,
)
from stages.students.weights import hash_transformer

BASE = BaseModelConfig(path="base")


def test_the_newest_run_is_the_one_that_finished_last(tmp_path, finish):
    finish(tmp_path / "b", 200)
    last = finish(tmp_path / "a", 300)
    finish(tmp_path / "c", 100)
    (tmp_path / "unfinished" / "export").mkdir(parents=True)
    (tmp_path / "finished.json").touch()
    assert newest_finished_run(tmp_path, BASE) == last


def test_runs_of_other_base_models_do_not_count(tmp_path, finish):
    ours = finish(tmp_path / "a", 100)
    finish(tmp_path / "b", 200, model="another")
    (finish(tmp_path / "c", 300) / "config.yaml").unlink()
    (finish(tmp_path / "d", 400) / "config.yaml").write_text("model: [")
    assert newest_finished_run(tmp_path, BASE) == ours


def test_a_base_model_on_this_machine_is_told_by_its_weights(tmp_path, base, finish):
    ours = finish(tmp_path / "a", 100, model="moved")
    settings = {BASE_SETTING: hash_transformer(Path(base.path))}
    (ours / "run.json").write_text(json.dumps({"settings": settings}))
    replaced = finish(tmp_path / "b", 200, model=base.path)
    (replaced / "run.json").write_text(json.dumps({"settings": {BASE_SETTING: "0" * 16}}))
    (finish(tmp_path / "c", 300, model=base.path) / "run.json").write_text("[]")
    assert newest_finished_run(tmp_path, base) == ours


def test_two_experts_are_named_by_the_folder_of_both(tmp_path, finish):
    low = finish(tmp_path / "low-noise", 300)
    assert newest_finished_run(tmp_path, BASE) == low
    finish(tmp_path / "high-noise", 200)
    assert newest_finished_run(tmp_path, BASE) == tmp_path
    other = finish(tmp_path / "other", 400)
    assert newest_finished_run(tmp_path, BASE) == other


def test_a_folder_stands_for_the_runs_of_the_experts_in_it(tmp_path):
    assert not is_run(tmp_path) and runs_in(tmp_path) == [tmp_path]
    for expert in ("low-noise", "high-noise"):
        (tmp_path / expert).mkdir()
    assert not is_run(tmp_path)
    (tmp_path / "low-noise" / "run.json").touch()
    assert is_run(tmp_path) and runs_in(tmp_path) == [tmp_path / "low-noise"]
    (tmp_path / "high-noise" / "run.json").touch()
    assert runs_in(tmp_path) == [tmp_path / "high-noise", tmp_path / "low-noise"]
    (tmp_path / "run.json").touch()
    assert runs_in(tmp_path) == [tmp_path]


def test_there_may_be_no_finished_run(tmp_path):
    (tmp_path / "unfinished").mkdir()
    assert newest_finished_run(tmp_path, BASE) is None
    assert newest_finished_run(tmp_path / "nowhere", BASE) is None


def test_an_export_tells_its_method(lora_run, full_run):
    assert find_export(full_run()).method == "full"
    lora = find_export(lora_run(rank=2))
    assert lora.method == "lora"
    assert {shape[0] for name, shape in lora.lora_shapes.items() if "lora_A" in name} == {2}


def test_the_hash_of_adapters_is_of_what_they_compute(lora_run):
    run = lora_run()
    file = run / "export" / LORA_FILE
    found = export_hash(find_export(run))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    reversed_header = {"__metadata__": dict(reversed(metadata.items()))} | header
    written = json.dumps(reversed_header, separators=(",", ":")).encode().ljust(length)
    assert len(written) == length
    assert written != data[8 : 8 + length]
    file.write_bytes(data[:8] + written + data[8 + length :])
    assert export_hash(find_export(run)) == found

    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, file, metadata)
    changed = export_hash(find_export(run))
    assert changed != found
    assert export_hash(find_export(lora_run("stronger", alpha=8.0))) not in (found, changed)


def test_a_missing_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no run at"):
        find_export(tmp_path / "nowhere")


def test_a_run_without_export_is_an_error(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"has no export/ yet; finish it .*export --run"):
        find_export(tmp_path / "run")


def test_two_kinds_of_weights_in_one_export_are_an_error(lora_run, full_run):
    lora_run("both")
    with pytest.raises(ValueError, match="both adapters and a transformer"):
        find_export(full_run("both"))


def test_a_damaged_adapter_file_is_an_error(lora_run):
    run = lora_run()
    file = run / "export" / LORA_FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        find_export(run)


def test_adapters_whose_strength_is_unknown_are_an_error(lora_run):
    """Without alpha, loaders take alpha = rank: twice too strong at rank 128, alpha 64."""
    run = lora_run()
    file = run / "export" / LORA_FILE
    save_file(load_file(file), file)
    with pytest.raises(ValueError, match="has no alpha"):
        find_export(run)


DEEP = "[" * 100_000
METADATA = {
    "no JSON": ("{", "is not JSON"),
    "too deep": (DEEP, "is not JSON"),
    "a list": ("[]", "must be an object of settings, got a list"),
    "a text with alpha in it": ('"alpha"', "must be an object of settings, got a str"),
    "alpha of another module": ({"text_encoder.lora_alpha": 1.0}, "has no alpha"),
    "alpha as text": ({"transformer.lora_alpha": "4"}, "lora_alpha .* positive number, got '4'"),
    "alpha that is no number": ({"transformer.lora_alpha": None}, "positive number, got None"),
    "alpha without end": ('{"transformer.lora_alpha": Infinity}', "positive number, got inf"),
    "true as alpha": ({"transformer.lora_alpha": True}, "positive number, got True"),
    "no rank": ({"transformer.lora_alpha": 4.0}, r"transformer\.r .* positive number, got None"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_malformed_metadata_of_adapters_are_an_error(lora_run, kind):
    stored, message = METADATA[kind]
    run = lora_run()
    file = run / "export" / LORA_FILE
    text = stored if isinstance(stored, str) else json.dumps(stored)
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message) as raised:
        find_export(run)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(("setting", "value"), [("r", 3), ("unheard_of", 1)])
def test_settings_that_diffusers_or_peft_refuse_are_an_error(bases, lora_run, setting, value):
    run = lora_run()
    file = run / "export" / LORA_FILE
    with safe_open(file, framework="pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    metadata[f"transformer.{setting}"] = value
    about = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    save_file(load_file(file), file, about)
    pipeline = CogVideoXPipeline.from_pretrained(bases / "t2v")
    with pytest.raises(ValueError, match=rf"cannot load .*{LORA_FILE}"):
        add_lora(pipeline, find_export(run))
