import re
import shlex
from importlib import resources

import pytest
import typer

from pipeline.cli import app
from pipeline.config.load import load_config, preset_names
from stages.files.yaml import parse_yaml
from stages.train_student.objectives.build import kinds_needed

PRESETS = preset_names()
COMMAND = re.compile(r"#\s+((?:sam2vx-pipeline|deepspeed --module pipeline)\s.*)")


def text_of(name):
    return (resources.files("pipeline") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def commands_of(name):
    return [found[1] for line in text_of(name).splitlines() if (found := COMMAND.match(line))]


def test_the_presets_are_those_that_are_promised():
    assert PRESETS == [
        "cogvideox-2b-full",
        "cogvideox-2b-full-token-relation",
        "cogvideox-2b-lora",
        "cogvideox-2b-lora-gram-flow",
        "cogvideox-5b-i2v-lora",
        "cogvideox-5b-i2v-lora-gram-flow",
        "cogvideox-5b-i2v-lora-mask",
        "cogvideox-5b-i2v-lora-plain",
        "cogvideox-5b-lora",
        "cogvideox-5b-lora-crepa",
        "cogvideox-5b-lora-gram-flow",
        "cogvideox-5b-lora-irepa",
        "cogvideox-5b-lora-repa",
        "cogvideox-5b-lora-repa-dinov2",
        "cogvideox-5b-lora-token-relation",
        "cogvideox-5b-lora-videorepa",
        "cogvideox1.5-5b-i2v-lora",
        "cogvideox1.5-5b-lora",
        "demo",
        "demo-i2v",
        "demo-wan",
        "wan2.1-i2v-14b-480p-lora",
        "wan2.1-t2v-1.3b-lora",
        "wan2.1-t2v-14b-lora",
        "wan2.2-i2v-a14b-lora",
        "wan2.2-t2v-a14b-lora",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_under_its_own_name(name):
    assert load_config(name).name == name


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_opens_with_commands_that_parse(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog.png").touch()
    commands = commands_of(name)
    assert len(commands) >= 3
    group = typer.main.get_command(app)
    for command in commands:
        words = shlex.split(command.removeprefix("deepspeed --module pipeline "))
        words = words[1:] if words[0] == "sam2vx-pipeline" else words
        subcommand = group.commands[words[0]]
        parsed = subcommand.make_context(words[0], words[1:]).params
        assert load_config(parsed["config"], parsed.get("overrides") or []).name == name


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_only_what_differs_from_what_it_extends(name):
    """From the preset it extends, or from the defaults."""

    def check(given, config, base, path):
        for key, value in given.items():
            here = f"{path}.{key}"
            field = type(config).model_fields[key]
            below = None if base is None else getattr(base, key)
            if isinstance(value, dict):
                check(value, getattr(config, key), below, here)
            elif base is not None:
                assert getattr(config, key) != below, here
            elif here != ".demo.root":  # written out, since the others refer to it
                assert field.is_required() or getattr(config, key) != field.default, here

    given = parse_yaml(text_of(name))
    extended = given.pop("extends", None)
    check(given, load_config(name), None if extended is None else load_config(extended), "")


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-gram-flow")])
def test_a_preset_for_big_datasets_differs_in_what_is_kept_of_the_teacher(name):
    config, base = load_config(name), load_config(name.removesuffix("-gram-flow"))
    assert config.extract.kinds == ("text", "latents", "gram_flow", "masks")
    assert config.train.teacher_form == "gram_flow"
    assert config.extract.gram_flow.radius >= config.train.lgf.radius
    assert config.train.run_dir != base.train.run_dir
    told, of_base = (one.model_dump(mode="json") for one in (config, base))
    for one in (told, of_base):
        for section, key in (("extract", "kinds"), ("train", "teacher_form"), ("train", "run_dir")):
            del one[section][key]
        del one["name"]
    assert told == of_base


def test_moving_the_demo_moves_all_of_it():
    config = load_config("demo", ["demo.root=/elsewhere"])
    told = config.model_dump(mode="json")
    # Hub ids, which the demo does not use.
    del told["extract"]["teacher"]["grounding"]["model"], told["extract"]["visual"]["checkpoint"]
    del told["train"]["keep_best"]  # the name of a curve
    texts = re.findall(r"'([^']*/[^']*)'", repr(told))
    assert len(texts) >= 7
    assert all(text.startswith("/elsewhere") for text in texts)


@pytest.mark.parametrize("name", [name for name in PRESETS if "demo" not in name])
def test_an_official_preset_has_the_size_batch_and_rate_of_published_training(name):
    config = load_config(name)
    size = config.data.num_frames, config.data.height, config.data.width, config.data.fps
    expected = (81, 768, 1360, 16.0) if "1.5" in name else (49, 480, 720, 8.0)
    assert size == ((81, 480, 832, 16.0) if "wan" in name else expected)
    train = config.train
    if "-full" in name:
        assert (train.method, train.steps, train.batch_size) == ("full", 4000, 32)
        assert train.optimizer.learning_rate == 2e-6
    else:
        assert (train.method, train.steps, train.batch_size) == ("lora", 2000, 32)
        assert train.optimizer.learning_rate == 1e-4
    assert (train.lora.rank, train.lora.alpha) == (128, 64)
    assert train.deepspeed.precision == "bf16"
    teacher = config.extract.teacher
    assert (teacher.precision, teacher.frames_per_batch, teacher.clips_per_batch) == ("bf16", 8, 4)
    as_videorepa = name.endswith(("repa", "-repa-dinov2", "-token-relation"))
    block = 17 if as_videorepa else 18 if "2b" in name else 25
    if "wan" in name:
        block = 18 if "1.3b" in name else 24
    assert train.block == block


@pytest.mark.parametrize(
    ("name", "first"), [("wan2.2-t2v-a14b-lora", 699), ("wan2.2-i2v-a14b-lora", 749)]
)
def test_the_runs_of_two_transformers_lie_in_one_folder(name, first):
    """Where sampling looks for both; timesteps are those of the one that comes first."""
    config, other = load_config(name), load_config(name, ["model.expert=low-noise"])
    assert config.model.expert == "high-noise"
    assert config.train.run_dir.name == "high-noise" and other.train.run_dir.name == "low-noise"
    assert config.train.run_dir.parent == other.train.run_dir.parent
    for timesteps in (config.train.validation.timesteps, config.probe.timesteps):
        assert set(timesteps) <= set(range(first, 1000))


@pytest.mark.parametrize(
    ("name", "objectives"),
    [
        ("cogvideox-5b-i2v-lora-plain", ()),
        ("cogvideox-5b-i2v-lora-mask", ("mask",)),
        ("cogvideox-5b-lora-repa", ("repa",)),
        ("cogvideox-5b-lora-token-relation", ("token-relation",)),
        ("cogvideox-2b-full-token-relation", ("token-relation",)),
        ("cogvideox-5b-lora-repa-dinov2", ("repa",)),
        ("cogvideox-5b-lora-crepa", ("repa",)),
        ("cogvideox-5b-lora-irepa", ("repa",)),
        ("cogvideox-5b-lora-videorepa", ("token-relation",)),
    ],
)
def test_a_preset_to_compare_with_extracts_what_its_loss_reads(name, objectives):
    config = load_config(name)
    assert config.train.objectives == objectives
    assert {"text", "latents", *kinds_needed(config.train)} <= set(config.extract.kinds)
