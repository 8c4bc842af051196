"""Incomplete weights, and weights of another model, are refused from headers alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from stages.config import BaseModelConfig
from stages.demo.build import PRETRAINED
from stages.dry_run.extract_stores import planned_passes
from stages.extract_features.config import ExtractConfig
from stages.extract_features.kinds import make_extractions
from stages.files.weight_checks import check_weights, load_model
from stages.sam2_tracking.checkpoints import read_checkpoint
from stages.students.weights import (
    check_base_weights,
    load_tokenizer,
    model_class_of,
    parts_are_here,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234567\n"
PARTS = {
    "text_encoder": ("model.safetensors", "encoder.final_layer_norm.weight"),
    "vae": ("diffusion_pytorch_model.safetensors", "encoder.conv_in.conv.bias"),
    "transformer": ("diffusion_pytorch_model.safetensors", "proj_out.bias"),
}


@pytest.fixture
def base(tmp_path):
    """The demo's pretrained pipeline, of the official classes and file formats."""
    return shutil.copytree(PRETRAINED / "cogvideox", tmp_path / "base")


@pytest.fixture(params=PARTS)
def part(request):
    return request.param


def changed(base, part, change):
    """Rewrite a part's weights: change(tensors) -> tensors."""
    file = base / part / PARTS[part][0]
    save_file(change(load_file(file)), file, {"format": "pt"})


def refused(base, part, message):
    """By header before anything is loaded, and where it is loaded."""
    with pytest.raises(ValueError, match=message):
        check_base_weights(base, (part,))
    with pytest.raises(ValueError, match=message):
        load_model(model_class_of(part, base), base / part)


def test_whole_parts_pass_and_are_loaded_with_their_values(base, part):
    stored = check_weights(model_class_of(part, base), base / part)
    tensors = load_file(base / part / PARTS[part][0])
    assert {name: one.shape for name, one in stored.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }
    loaded = load_model(model_class_of(part, base), base / part).state_dict()
    assert all(torch.equal(loaded[name], value.to(loaded[name])) for name, value in tensors.items())


def test_keys_with_a_prefix_are_refused(base, part):
    changed(base, part, lambda tensors: {f"model.{n}": value for n, value in tensors.items()})
    count = len(load_file(base / part / PARTS[part][0]))
    refused(base, part, rf"{part} do not match .* missing: \d+ \(.*unknown: {count} \(model\.")


def test_a_missing_tensor_is_named(base, part):
    name = PARTS[part][1]
    changed(base, part, lambda tensors: {n: v for n, v in tensors.items() if n != name})
    refused(base, part, rf"tensors missing: 1 \({name}\); download")


def test_a_tensor_too_many_is_named(base, part):
    changed(base, part, lambda tensors: tensors | {"extra.weight": torch.zeros(2)})
    refused(base, part, r"tensors unknown: 1 \(extra\.weight\); download")


def test_a_tensor_of_another_shape_is_named(base, part):
    name = PARTS[part][1]
    changed(base, part, lambda tensors: tensors | {name: torch.zeros(3)})
    refused(base, part, rf"tensors of another shape: 1 \({name}")


def test_a_git_lfs_pointer_is_told_as_one(base, part):
    (base / part / PARTS[part][0]).write_text(POINTER)
    refused(base, part, r"safetensors is a git-lfs pointer.*git lfs pull")


def test_a_configuration_that_is_a_pointer(base, part):
    (base / part / "config.json").write_text(POINTER)
    refused(base, part, r"config\.json is a git-lfs pointer")


def test_a_file_cut_short(base, part):
    file = base / part / PARTS[part][0]
    file.write_bytes(file.read_bytes()[:-5])
    refused(base, part, "is damaged or cut short")


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (
            ".fp16.safetensors",
            r"has no .*, only a variant of the weights \(.*\.fp16\.safetensors\)",
        ),
        (".bin", r"only .*\.bin: weights are read only from safetensors; download those"),
        (None, r"has no .*\.safetensors; download the model again"),
    ],
)
def test_other_files_than_the_weights(base, part, suffix, message):
    file = base / part / PARTS[part][0]
    if suffix is None:
        file.unlink()
    else:
        file.rename(file.with_name(file.name.removesuffix(".safetensors") + suffix))
    refused(base, part, message)


def in_shards(base, part):
    """Split a part's weights in two files and an index, as the hub has large ones."""
    single = base / part / PARTS[part][0]
    stem, tensors = single.name.removesuffix(".safetensors"), load_file(single)
    single.unlink()
    names, weight_map = sorted(tensors), {}
    for number, half in ((1, names[::2]), (2, names[1::2])):
        file = f"{stem}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, base / part / file, {"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (base / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_weights_in_shards_pass(base, part):
    tensors = in_shards(base, part)
    check_base_weights(base, (part,))
    loaded = load_model(model_class_of(part, base), base / part).state_dict()
    assert all(torch.equal(loaded[name], value.to(loaded[name])) for name, value in tensors.items())


def test_a_missing_shard_is_named(base, part):
    in_shards(base, part)
    next((base / part).glob("*-00002-of-*")).unlink()
    refused(base, part, r"lacks 1 of the 2 weight files .*index\.json: .*-00002-of-00002")
    assert not parts_are_here(BaseModelConfig(path="someone/model"), base, (part,))


def test_a_stale_file_beside_shards_is_refused(base, part):
    file = base / part / PARTS[part][0]
    kept = file.read_bytes()
    in_shards(base, part)
    file.write_bytes(kept)
    refused(base, part, "holds both .* delete the one that is stale")


@pytest.mark.parametrize("names", [("shared",), ("encoder.embed_tokens",), ("shared", "both")])
def test_the_text_encoders_tied_weight_may_have_either_name(base, names):
    weight = load_file(base / "text_encoder" / "model.safetensors")["shared.weight"]

    def rename(tensors):
        rest = {name: value for name, value in tensors.items() if name != "shared.weight"}
        if "both" in names:
            rest["encoder.embed_tokens.weight"] = weight.clone()
        return rest | {f"{names[0]}.weight": weight}

    changed(base, "text_encoder", rename)
    check_base_weights(base, ("text_encoder",))
    loaded = load_model(T5EncoderModel, base / "text_encoder", dtype=torch.float32)
    assert torch.equal(loaded.get_input_embeddings().weight, weight.float())


def test_a_whole_t5_may_serve_as_text_encoder(base):
    """Its decoder is left out, as the class itself says."""
    changed(base, "text_encoder", lambda t: t | {"decoder.block.0.weight": torch.zeros(2)})
    check_base_weights(base, ("text_encoder",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no vocabulary"),
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "git-lfs pointer"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "spiece.model").write_text(POINTER), "git-lfs pointer"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(base, change, message):
    assert len(load_tokenizer(base)) > 100
    change(base / "tokenizer")
    with pytest.raises(ValueError, match=message):
        check_base_weights(base, ("tokenizer",))


def test_a_tokenizer_of_another_model_is_refused(base):
    config = base / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 30}))
    with pytest.raises(ValueError, match="the text encoder's vocab_size is 30"):
        check_base_weights(base, ("tokenizer",))


def test_a_sam2_checkpoint_that_is_a_pointer(tmp_path):
    (tmp_path / "sam2.pt").write_text(POINTER)
    with pytest.raises(ValueError, match=r"sam2\.pt is a git-lfs pointer"):
        read_checkpoint(tmp_path / "sam2.pt")


@pytest.mark.parametrize(("kind", "part"), [("text", "text_encoder"), ("latents", "vae")])
@pytest.mark.parametrize("look", ["run", "dry run"])
def test_extraction_refuses_before_any_work(base, clips_config, kind, part, look):
    name = PARTS[part][1]
    changed(base, part, lambda tensors: {n: v for n, v in tensors.items() if n != name})
    config, model = ExtractConfig(kinds=(kind,)), BaseModelConfig(path=str(base))
    with pytest.raises(ValueError, match=rf"missing: 1 \({name}\)"):
        if look == "run":
            make_extractions(config, clips_config.sizes, model)
        else:
            planned_passes(config, clips_config, model)


@pytest.fixture
def clips_config(tmp_path):
    from stages.clips import ClipsConfig

    return ClipsConfig(path=tmp_path, num_frames=9, height=64, width=96)
