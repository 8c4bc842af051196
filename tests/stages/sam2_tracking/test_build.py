"""Building SAM2: official configurations, checkpoints, image sizes, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from stages.sam2_tracking.build import (
    build_sam2,
    check_sam2,
    find_checkpoint,
    load_sam2_config,
    official_configs,
)

OFFICIAL = [
    f"{version}_hiera_{size}" for version in ("sam2", "sam2.1") for size in ("b+", "l", "s", "t")
]


def test_every_official_configuration_is_known_by_its_name() -> None:
    assert sorted(official_configs()) == sorted(OFFICIAL)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_settings_are_those_of_the_stock_predictor(name: str) -> None:
    import sam2.build_sam  # noqa: F401 - registers the configurations with hydra
    from hydra import compose

    folder = name.split("_")[0]
    stock = compose(
        config_name=f"configs/{folder}/{name}.yaml",
        overrides=[
            # As sam2.build_sam.build_sam2_video_predictor composes them.
            "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
            "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
            "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
            "++model.binarize_mask_from_pts_for_mem_enc=true",
        ],
    )
    assert load_sam2_config(name) == OmegaConf.to_container(stock.model, resolve=True)


def test_the_image_size_reaches_prompts_and_rotary_positions(
    tiny_sam2: tuple[Path, Path],
) -> None:
    model = build_sam2(*tiny_sam2, image_size=192)
    assert model.image_size == 192
    assert model.sam_prompt_encoder.image_embedding_size == (12, 12)
    for layer in model.memory_attention.layers:
        assert len(layer.self_attn.freqs_cis) == len(layer.cross_attn_image.freqs_cis) == 144
    assert build_sam2(*tiny_sam2).image_size == 128


def test_the_model_is_ready_to_be_used(tiny_sam2: tuple[Path, Path]) -> None:
    model = build_sam2(*tiny_sam2)
    weights = torch.load(tiny_sam2[1], weights_only=True)["model"]
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_model_does_not_depend_on_the_file_it_came_from(
    tiny_sam2: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "weights.pt"
    copy.write_bytes(tiny_sam2[1].read_bytes())
    model = build_sam2(tiny_sam2[0], copy)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with copy.open("r+b") as file:
        file.write(bytes(copy.stat().st_size))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_in_half_precision_become_float32(
    tiny_sam2: tuple[Path, Path], tmp_path: Path
) -> None:
    weights = torch.load(tiny_sam2[1], weights_only=True)["model"]
    halves = {name: value.half() for name, value in weights.items()}
    torch.save({"model": halves}, tmp_path / "half.pt")
    model = build_sam2(tiny_sam2[0], tmp_path / "half.pt")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, halves[name].float())


def test_on_the_meta_device_there_are_shapes_alone(tiny_sam2: tuple[Path, Path]) -> None:
    model = build_sam2(tiny_sam2[0], None, device="meta")
    weights = torch.load(tiny_sam2[1], weights_only=True)["model"]
    assert all(value.is_meta for value in model.state_dict().values())
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }


def test_a_check_tells_what_the_model_gives_without_loading_it(
    tiny_sam2: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", loading)
    facts = check_sam2(*tiny_sam2, image_size=192)
    assert (facts.hidden_dim, facts.mem_dim) == (32, 16)
    assert facts.config_name == str(tiny_sam2[0])
    assert facts.config == load_sam2_config(tiny_sam2[0], image_size=192)


def test_a_checkpoint_of_no_official_model_needs_its_configuration(
    tiny_sam2: tuple[Path, Path],
) -> None:
    with pytest.raises(ValueError, match=r"none of the official .* set extract\.teacher\.config"):
        check_sam2(None, tiny_sam2[1])


def test_something_must_be_given() -> None:
    with pytest.raises(ValueError, match="neither a SAM2 configuration nor a checkpoint"):
        build_sam2(None, None)


def test_a_checkpoint_may_be_a_path(tiny_sam2: tuple[Path, Path]) -> None:
    assert find_checkpoint(str(tiny_sam2[1])) == tiny_sam2[1]


class _Hub:
    """Stands in for huggingface_hub's download."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[str, str, bool]] = []

    def __call__(self, hub_id: str, file: str, *, local_files_only: bool) -> str:
        self.calls.append((hub_id, file, local_files_only))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.mark.parametrize("download", [True, False])
def test_a_checkpoint_may_be_an_official_hub_id(
    download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _Hub(tmp_path / "cached.pt")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    found = find_checkpoint("facebook/sam2.1-hiera-large", download=download)
    assert found == tmp_path / "cached.pt"
    assert hub.calls == [
        ("facebook/sam2.1-hiera-large", "sam2.1_hiera_large.pt", not download),
    ]


@pytest.mark.parametrize(
    ("download", "message"),
    [
        (True, r"could not be downloaded \(no route\); .*hf download facebook/sam2-hiera-tiny"),
        (False, r"downloads are disabled; .*checkpoint=checkpoints/sam2_hiera_tiny\.pt"),
    ],
)
def test_a_failed_download_says_how_to_get_the_file(
    download: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub = _Hub(LocalEntryNotFoundError("no route"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    with pytest.raises(ValueError, match=message):
        find_checkpoint("facebook/sam2-hiera-tiny", download=download)


@pytest.mark.parametrize("name", ["absent.pt", "someone/sam2-finetuned"])
def test_a_name_that_is_neither_lists_the_official_ids(name: str) -> None:
    message = rf"{name} is not a file on this machine.*facebook/sam2\.1-hiera-large"
    with pytest.raises(ValueError, match=message):
        find_checkpoint(name)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: name the \.pt or \.safetensors"):
        find_checkpoint(str(tmp_path))


def test_a_checkpoint_that_fits_no_official_model_says_so(
    tiny_sam2: tuple[Path, Path],
) -> None:
    with pytest.raises(ValueError, match="it fits none of the official configurations"):
        build_sam2("sam2.1_hiera_t", tiny_sam2[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "is not a readable PyTorch checkpoint"),
        ({"weights": {}}, r"it must hold \{'model': state dict\}"),
        ({"model": {"step": 3}}, r"it must hold \{'model': state dict\}"),
        ([1, 2], r"it must hold \{'model': state dict\}"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    content: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        build_sam2("sam2.1_hiera_t", file)


def test_safetensors_give_the_model_of_the_same_weights(
    tiny_sam2: tuple[Path, Path], tmp_path: Path
) -> None:
    config, checkpoint = tiny_sam2
    official = torch.load(checkpoint, weights_only=True)["model"]
    for name, dtype in (("full", torch.float32), ("half", torch.float16)):
        file = tmp_path / f"{name}.safetensors"
        save_file({key: value.to(dtype) for key, value in official.items()}, file)
        loaded = build_sam2(config, file).state_dict()
        for key, value in build_sam2(config, checkpoint).state_dict().items():
            assert loaded[key].dtype == value.dtype
            assert torch.equal(loaded[key], value.to(dtype).to(value.dtype))


def test_safetensors_are_checked_like_official_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        build_sam2("sam2.1_hiera_t", file)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="does not fit the SAM2 configuration"):
        build_sam2("sam2.1_hiera_t", file)


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Malicious()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="is not a readable PyTorch checkpoint"):
        build_sam2("sam2.1_hiera_t", tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_has_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no SAM2 checkpoint at .*absent\.pt"):
        build_sam2("sam2.1_hiera_l", tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("trainer: {}", "has no `model` section"),
        ("- 1", "has no `model` section"),
        ("model: {_target_: os.system, command: 'true'}", "builds os.system"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sam2_config(tmp_path / "config.yaml")


def _official_with(path: str, value: Any, file: Path) -> Path:
    config = OmegaConf.load(official_configs()["sam2.1_hiera_t"])
    OmegaConf.update(config, path, value, force_add=True)
    OmegaConf.save(config, file)
    return file


_ATTACK = {"_target_": "sam2.build_sam.torch.utils.collect_env.run", "command": "touch ran"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.anything", _ATTACK, r"model\.anything builds sam2\.build_sam\.torch\.utils"),
        ("model.memory_encoder.fuser.layer", _ATTACK, r"fuser\.layer builds sam2\.build_sam"),
        ("model.a", {"b": [[1, {"c": _ATTACK}]]}, r"model\.a\.b\[0\]\[1\]\.c builds"),
        ("model._target_", "sam2.build_sam.torch.hub.load", "builds sam2.build_sam.torch.hub"),
        ("model._target_", ["os.system"], r"builds \['os.system'\]"),
        ("model._args_", [_ATTACK], "model has the key '_args_', which is not supported"),
        ("model.memory_encoder._partial_", True, "model.memory_encoder has the key '_partial_'"),
        ("model._recursive_", False, "model has the key '_recursive_'"),
        ("model._convert_", "all", "model has the key '_convert_'"),
        ("model.num_maskmem", "${oc.env:HOME}", "references are not supported"),
        ("model.image_encoder.trunk.weights_path", "w.pt", r"trunk\.weights_path loads a file"),
        ("defaults", ["other"], "a `defaults` list, which is not supported"),
    ],
)
def test_a_configuration_builds_official_classes_of_its_values_alone(
    path: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = _official_with(path, value, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=message):
        build_sam2(file, None, device="meta")
    assert not (tmp_path / "ran").exists()


def test_aliases_of_a_configuration_are_counted_before_they_are_followed(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    rows += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "config.yaml").write_text("\n".join([*rows, "model: {a: *a8}"]))
    with pytest.raises(ValueError, match="is not valid YAML: line 6: more than 1048576 values"):
        load_sam2_config(tmp_path / "config.yaml")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"sam2.1_hiera_x is neither .*sam2.1_hiera_l, "):
        load_sam2_config("sam2.1_hiera_x")


def test_a_configuration_of_something_else_is_refused(tmp_path: Path) -> None:
    config = OmegaConf.load(official_configs()["sam2.1_hiera_t"])
    config.model.pop("num_maskmem")
    config.model._target_ = "sam2.modeling.memory_encoder.Fuser"
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"cannot be built: .*memory_encoder\.Fuser"):
        build_sam2(tmp_path / "config.yaml", None)
    config.model.pop("memory_attention")
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"is incomplete: .*memory_attention"):
        build_sam2(tmp_path / "config.yaml", None)
