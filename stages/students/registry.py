"""Which family of students a pipeline folder is of, by the class in its model_index.json."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from stages.config import Expert
from stages.files.weight_checks import read_config
from stages.students.cogvideox.configs import CogVideoXConfigs
from stages.students.student import StudentConfigs, transformer_part
from stages.students.wan.configs import WanConfigs

STUDENTS: tuple[type[StudentConfigs], ...] = (CogVideoXConfigs, WanConfigs)
"""The families. A pipeline without a class in its index is taken for one of the first."""

BASE_CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
"""Files that `read_configs` requires; it reads `TEXT_ENCODER_CONFIG` too if present."""

TEXT_ENCODER_CONFIG = "text_encoder/config.json"


def supported_pipelines() -> list[str]:
    """Names of the supported pipeline classes."""
    return [name for student in STUDENTS for name in student.PIPELINES]


def student_of_pipeline(name: str) -> type[StudentConfigs] | None:
    """The family of a pipeline class; None if no family has it."""
    return next((student for student in STUDENTS if name in student.PIPELINES), None)


def student_of_transformer(name: str) -> type[StudentConfigs]:
    """The family of a transformer class.

    Raises:
        ValueError: No family has it.
    """
    for student in STUDENTS:
        if name in student.COMPONENTS["transformer"][1]:
            return student
    raise ValueError(f"{name} is the transformer of no supported model; use a newer version")


def blocks_of(transformer: nn.Module) -> nn.ModuleList:
    """The blocks of a student's transformer."""
    student = student_of_transformer(type(transformer).__name__)
    blocks: nn.ModuleList = getattr(transformer, student.BLOCKS)
    return blocks


def read_model_index(folder: Path) -> tuple[dict[str, Any], type[StudentConfigs]]:
    """Read model_index.json, find its family, and check that every component is of a known class.

    Raises:
        ValueError: model_index.json is missing or damaged, or names an unsupported class.
    """
    file = folder / "model_index.json"
    index = read_config(file)
    name = index.get("_class_name")
    student = student_of_pipeline(name) if isinstance(name, str) else None
    if student is None:
        raise ValueError(
            f"{file}: the base model {folder} is a {name}; model.path must be one of "
            f"{supported_pipelines()}"
        )
    student.check_index(file, index)
    for part, value in index.items():
        if part.startswith("_") or part in student.INDEX_OPTIONS or value == [None, None]:
            continue
        library, classes = student.COMPONENTS.get(part, ("", ()))
        if value not in [[library, one] for one in classes]:
            expected = " or ".join(f"{library}.{one}" for one in classes) or "no such component"
            raise ValueError(
                f"{file}: {part} is {value!r}, expected {expected}; model.path must be a "
                f"{student.FAMILY} pipeline of the official classes"
            )
    return index, student


def student_at(folder: Path) -> type[StudentConfigs]:
    """The family of the pipeline in a folder.

    Raises:
        ValueError: As `read_model_index`.
    """
    return read_model_index(folder)[1]


def image_parts(folder: Path) -> tuple[str, ...]:
    """Folders of a pipeline that encode a first frame besides the VAE.

    Raises:
        ValueError: As `read_model_index`.
    """
    index, _ = read_model_index(folder)
    names = ("image_encoder", "image_processor")
    return tuple(name for name in names if index.get(name, [None, None]) != [None, None])


def has_two_transformers(folder: Path) -> bool:
    """Whether a pipeline switches between two transformers.

    Raises:
        ValueError: As `read_model_index`.
    """
    return read_model_index(folder)[0].get("boundary_ratio") is not None


def read_configs(folder: Path, expert: Expert | None = None) -> StudentConfigs:
    """Read the configuration files of a diffusers pipeline folder.

    Values missing from a file are filled in from the defaults of its diffusers class.

    Args:
        folder: The pipeline.
        expert: Which of two transformers to read; None reads the first, or the only one.

    Raises:
        ValueError: a file is missing or invalid, the folder is not a supported pipeline, or an
            expert is named of a pipeline with one transformer.
    """
    index, student = read_model_index(folder)
    boundary_ratio = index.get("boundary_ratio")
    if expert is not None and boundary_ratio is None:
        raise ValueError(
            f"model.expert={expert} is for models with two transformers, such as Wan 2.2 A14B; "
            f"{folder} has one: set model.expert=null"
        )
    text_encoder = folder / TEXT_ENCODER_CONFIG
    files = {Path(name).parent.name: folder / name for name in BASE_CONFIGS}
    files["transformer"] = folder / transformer_part(expert) / "config.json"
    configs = student(
        folder=folder,
        text_encoder=read_config(text_encoder) if text_encoder.is_file() else None,
        boundary_ratio=boundary_ratio,
        expert=expert,
        **{part: _read(file, student) for part, file in files.items()},
    )
    configs.check()
    return configs


def with_blocks(configs: StudentConfigs, num_blocks: int) -> StudentConfigs:
    """The same model with another number of blocks."""
    return replace(configs, transformer=configs.transformer | {"num_layers": num_blocks})


def _read(path: Path, student: type[StudentConfigs]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; the base model must be a {student.FAMILY} pipeline in diffusers "
            "format"
        )
    # Imported late: it takes 2 s and 170 MB, and not every command needs a base model.
    import diffusers

    stored = read_config(path)
    name = stored.get("_class_name")
    if name not in student.COMPONENTS[path.parent.name][1]:
        raise ValueError(
            f"{path} describes a {name}; a {student.FAMILY} pipeline has "
            f"{' or '.join(student.COMPONENTS[path.parent.name][1])}"
        )
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    for key, default in defaults.items():
        if not _fits(stored.get(key, default), default):
            raise ValueError(
                f"{path}: {key} is {stored[key]!r}, expected a value such as {default!r}; download "
                "the model again"
            )
    return defaults | stored


def _fits(value: Any, default: Any) -> bool:
    """Whether a stored value has the type of the library's default."""
    if default is None or value is None:
        return True
    if isinstance(default, float):
        return type(value) in (int, float)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple)
    return type(value) is type(default)
