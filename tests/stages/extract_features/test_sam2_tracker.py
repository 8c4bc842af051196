"""Building SAM2: official configurations, checkpoints, image sizes, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from stages.extract_features.sam2_tracker import (
    build_sam2,
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


@pytest.mark.parametrize("made_for", ["sam2.1_hiera_t", "sam2_hiera_s"])
def test_a_checkpoint_for_another_model_names_the_one_it_fits(
    made_for: str, tmp_path: Path
) -> None:
    torch.save({"model": build_sam2(made_for, None).state_dict()}, tmp_path / "weights.pt")
    for other in ("sam2.1_hiera_s", "sam2_hiera_t"):
        with pytest.raises(ValueError, match=f"set extract.teacher.config={made_for}$"):
            build_sam2(other, tmp_path / "weights.pt")


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


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Malicious()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="is not a readable PyTorch checkpoint"):
        build_sam2("sam2.1_hiera_t", tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_a_missing_checkpoint_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"download sam2\.1_hiera_large\.pt"):
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
