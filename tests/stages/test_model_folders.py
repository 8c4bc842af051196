"""What a model's folder says cannot run code, load another model, or build without end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stages.demo.build import PRETRAINED
from stages.files.weight_checks import check_weights, read_config, read_json
from stages.sample_videos.runs import find_export
from stages.students.registry import read_configs, read_model_index
from stages.students.sampler import build_pipeline, pipeline_class
from stages.students.weights import check_base_weights, hash_transformer, load_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The demo's pretrained pipeline, of the official classes and file formats."""
    return Path(shutil.copytree(PRETRAINED / "cogvideox", tmp_path / "base"))


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


CONFIGS = {
    "text_encoder": "text_encoder/config.json",
    "vae": "vae/config.json",
    "transformer": "transformer/config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
}
REFUSED: dict[str, Any] = {
    "auto_map": {"AutoModel": "evil.Model"},
    "custom_pipeline": "evil",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "flash_attention_2",
    "num_layers": 10**9,
    "patch_size": 10**30,
    "nested": {"text_config": [{"auto_map": {"AutoTokenizer": ["evil.T", None]}}]},
    "norm_eps": float("nan"),
    "layer_norm_epsilon": float("inf"),
}


@pytest.mark.parametrize("part", CONFIGS)
@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_run_fetch_or_build_too_much(base: Path, part: Any, field: str) -> None:
    change(base / CONFIGS[part], **{field: REFUSED[field]})
    named = "auto_map" if field == "nested" else field
    with pytest.raises(ValueError, match=rf"config\.json: {named} .*; use the model's official"):
        check_base_weights(base, (part,))


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_encoder", "architectures", ["UMT5EncoderModel"]),
        ("text_encoder", "model_type", "umt5"),
        ("vae", "_class_name", "AutoencoderKLWan"),
        ("transformer", "_class_name", ["evil", "CogVideoXTransformer3DModel"]),
    ],
)
def test_a_part_of_another_class(base: Path, part: Any, field: str, value: Any) -> None:
    change(base / CONFIGS[part], **{field: value})
    with pytest.raises(ValueError, match=rf"config\.json: {field} is .*, expected .*; download"):
        check_base_weights(base, (part,))


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
@pytest.mark.parametrize("value", ["text", [], {}, -1, 0, 1.5, [[1]], None, True, 10**9])
def test_a_configuration_of_any_content_gives_an_error_with_its_path(
    base: Path, part: Any, value: Any
) -> None:
    """Each field in turn; what the library makes of it, if anything, must be the same model."""
    file = base / CONFIGS[part]
    whole = json.loads(file.read_text())
    sized = [key for key in whole if key.endswith(("channels", "_dim", "layers", "d_model"))]
    for key in [*sized, "_class_name", "model_type"]:
        file.write_text(json.dumps(whole | {key: value}))
        try:
            check_base_weights(base, (part,))
        except ValueError as error:
            assert str(base / part) in str(error), key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheduler", ["evil_package", "Scheduler"]),
        ("scheduler", ["diffusers", "EulerDiscreteScheduler"]),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("vae", ["evil", "AutoencoderKLCogVideoX"]),
        ("safety_checker", ["evil", "Checker"]),
        ("transformer", "evil"),
    ],
)
def test_components_of_other_classes(base: Path, name: str, value: Any) -> None:
    change(base / "model_index.json", **{name: value})
    message = (
        rf"model_index\.json: {name} is .*, expected (no such component|diffusers\.|transformers\.)"
    )
    for reads in (read_model_index, read_configs, pipeline_class, build_pipeline):
        with pytest.raises(ValueError, match=message):
            reads(base)


@pytest.mark.parametrize("name", [["evil", "CogVideoXPipeline"], {}, None, "LTXPipeline"])
def test_a_pipeline_of_another_class(base: Path, name: Any) -> None:
    change(base / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=r"model\.path must be one of"):
        pipeline_class(base)


def test_code_in_the_folder_is_not_run(base: Path, tmp_path: Path) -> None:
    """diffusers takes these for the code of a component, and of a custom pipeline not named."""
    for name in ("None.py", "scheduler/diffusers.py"):
        (base / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(ValueError, match=r"cannot be built .*contains custom code"):
            build_pipeline(base, tokenizer=None, text_encoder=None, transformer=None, vae=None)
        (base / name).unlink()
    assert not (tmp_path / "ran").exists()


def test_a_scheduler_of_too_many_steps(base: Path) -> None:
    change(base / "scheduler" / "scheduler_config.json", num_train_timesteps=10**12)
    with pytest.raises(ValueError, match=r"scheduler_config\.json: num_train_timesteps"):
        build_pipeline(base, tokenizer=None, text_encoder=None, transformer=None, vae=None)


def test_an_adapter_in_the_folder_does_not_name_another_model(base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base / "text_encoder", tmp_path / "other"))
    adapter = {"base_model_name_or_path": str(other), "peft_type": "LORA"}
    (base / "text_encoder" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match=r"contains adapter_config\.json"):
        check_base_weights(base, ("text_encoder",))


def test_values_of_another_type_are_named(base: Path) -> None:
    change(base / "transformer" / "config.json", in_channels="16")
    with pytest.raises(ValueError, match=r"config\.json: in_channels is '16', expected a value"):
        read_configs(base)


def test_an_index_of_weights_names_files_of_its_own_folder(base: Path) -> None:
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    index = file.with_name(f"{file.name}.index.json")
    save_file(load_file(file), base / "elsewhere.safetensors")
    file.unlink()
    for name in ("../elsewhere.safetensors", 3, ["a"], ""):
        index.write_text(json.dumps({"weight_map": {"encoder.conv_in.conv.bias": name}}))
        with pytest.raises(
            ValueError, match=r"index\.json: weight_map contains .* not a file name"
        ):
            check_base_weights(base, ("vae",))


def test_large_and_deep_json_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as sparse:
        sparse.truncate(20 << 30)
    with pytest.raises(ValueError, match=r"config\.json has 21,474,836,480 bytes, at most"):
        read_json(file)
    for text in ("[" * 10**4, '{"a":' * 900 + "1" + "}" * 900, '{"a": 1' + "0" * 5000 + "}"):
        file.write_text(text)
        try:
            read_config(file)
        except ValueError as error:
            assert str(file) in str(error)


def header_of(**about: Any) -> bytes:
    header = json.dumps(about).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        (2**63).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little"),
        (10**9).to_bytes(8, "little") + b"{}",
        header_of(w={"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}) + b"1234",
        header_of(w={"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}) + b"1234",
        header_of(w={"dtype": "F32", "shape": [1], "data_offsets": [0, 10**30]}) + b"1234",
        header_of(w={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}) + b"1234",
        header_of(w={"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 4]}) + b"1234",
        header_of(w=[]),
        (10**4).to_bytes(8, "little") + b"[" * 10**4,
        b"",
    ],
)
def test_headers_of_weights_that_say_the_impossible(base: Path, data: bytes) -> None:
    (base / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(data)
    for read in (hash_transformer, lambda folder: check_base_weights(folder, ("transformer",))):
        with pytest.raises(ValueError, match=r"safetensors is damaged or cut short"):
            read(base)


def test_a_header_is_not_read_beyond_the_bound(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.students.weights._MAX_HEADER_BYTES", 10)
    with pytest.raises(ValueError, match=r"safetensors is damaged: a header of [0-9,]+ bytes"):
        hash_transformer(base)


def test_a_tokenizer_without_bound_is_usual(base: Path) -> None:
    change(base / "tokenizer" / "tokenizer_config.json", model_max_length=int(1e30))
    load_tokenizer(base)


def test_the_metadata_of_adapters_import_no_package(tmp_path: Path) -> None:
    import torch

    about = {"r": 1, "lora_alpha": 1, "megatron_config": {"a": 1}, "megatron_core": "evil"}
    stored = json.dumps({f"transformer.{name}": value for name, value in about.items()})
    save_file(
        {"transformer.to_q.lora_A.weight": torch.zeros(1, 1)},
        tmp_path / "pytorch_lora_weights.safetensors",
        {"lora_adapter_metadata": stored},
    )
    with pytest.raises(ValueError, match="would make peft import the package"):
        find_export(tmp_path)


def test_the_official_models_are_taken() -> None:
    from stages.students.official_models import FOLDERS, official_configs

    for name in FOLDERS:
        assert official_configs(name).text_encoder is not None


def test_check_weights_takes_the_demo_models() -> None:
    from transformers import T5EncoderModel

    assert check_weights(T5EncoderModel, PRETRAINED / "cogvideox" / "text_encoder")
