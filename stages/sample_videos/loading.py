"""Exported weights of a training run in a pipeline.

Loaders in diffusers ignore unknown names, so everything is checked here: trained weights must never
be ignored silently.
"""

from pathlib import Path
from typing import Any

import torch

from stages.files.weight_checks import load_model, read_config
from stages.sample_videos.runs import LORA_FILE, Export
from stages.students.weights import Part, model_class_of

_ADAPTER = "run"
"""Name of the adapters in the pipeline."""


def load_full_transformer(export: Export, base: Path, part: Part, dtype: torch.dtype) -> Any:
    """Load a fully tuned transformer in place of `part` of the base pipeline in folder `base`.

    Raises:
        ValueError: Its architecture differs from the base's, or it is incomplete.
    """
    folder = export.folder / "transformer"
    _check_architecture(folder, base, part)
    try:
        return load_model(model_class_of(part, base), folder, dtype=dtype)
    except ValueError as error:
        raise ValueError(
            f"{folder} is not a complete transformer; export the run again: {error}"
        ) from error


def _check_architecture(folder: Path, base: Path, part: Part) -> None:
    trained = read_config(folder / "config.json")
    expected = read_config(base / part / "config.json")
    differing = [
        f"{name} {trained[name]!r} instead of {expected[name]!r}"
        for name in sorted(trained.keys() & expected.keys())
        if not name.startswith("_") and trained[name] != expected[name]
    ]
    if differing:
        raise ValueError(
            f"{folder} was not trained from the base model {base}: {', '.join(differing)}; name "
            "the model it was trained from as model.path, or another run with --run"
        )


def add_lora(
    pipeline: Any, export: Export, part: Part = "transformer", *, scale: float = 1.0
) -> None:
    """Load a run's adapters into a pipeline and check that all of them were loaded.

    Args:
        pipeline: A diffusers pipeline of the base model.
        export: The adapters.
        part: The transformer that they are of.
        scale: Factor on their effect.

    Raises:
        ValueError: The adapters do not fit the transformer, or diffusers did not load all of them.
    """
    transformer = getattr(pipeline, part)
    _check_adapters(transformer, export)
    second = {"load_into_transformer_2": True} if part == "transformer_2" else {}
    try:
        pipeline.load_lora_weights(
            export.folder,
            weight_name=LORA_FILE,
            adapter_name=_ADAPTER,
            use_safetensors=True,
            local_files_only=True,
            **second,
        )
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"diffusers and peft cannot load {export.folder / LORA_FILE} ({error}): its weights do "
            "not fit the settings in its metadata; export the run again"
        ) from error
    adapted = {_module_of(weight.removeprefix("transformer.")) for weight in export.lora_shapes}
    loaded = {
        name: weight for name, weight in transformer.named_parameters() if f".{_ADAPTER}." in name
    }
    # diffusers gives the image's keys and values of a Wan adapters of zeros if the file has none.
    num_loaded = sum(_module_of(name) in adapted for name in loaded)
    added = [weight for name, weight in loaded.items() if _module_of(name) not in adapted]
    if num_loaded != len(export.lora_shapes) or any(weight.any() for weight in added):
        raise ValueError(
            f"{num_loaded} of {len(export.lora_shapes)} adapter weights in {export.folder} were "
            "loaded into the transformer; the run was not trained from this base model"
        )
    if scale != 1.0:
        transformer.set_adapters([_ADAPTER], [scale])


def _module_of(weight: str) -> str:
    """The adapted module's name."""
    return weight.rpartition(".lora_")[0]


def _check_adapters(transformer: torch.nn.Module, export: Export) -> None:
    sizes = {
        name: (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for weight, shape in export.lora_shapes.items():
        module, _, side = weight.removeprefix("transformer.").rpartition(".lora_")
        found = sizes.get(module)
        if found is None:
            raise ValueError(
                f"{export.folder} adapts {module or weight}, which the base model does not have; "
                "name the model it was trained from as model.path, or another run with --run"
            )
        width = shape[1] if side.startswith("A") else shape[0]
        expected = found[0] if side.startswith("A") else found[1]
        if width != expected:
            raise ValueError(
                f"{export.folder}: {weight} has width {width}, the base model's {module} has "
                f"{expected}; name the model it was trained from as model.path, or another run "
                "with --run"
            )
