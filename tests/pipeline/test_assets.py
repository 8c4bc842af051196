"""What of the built-in demo a command makes: what it reads, and no more."""

import pytest

from pipeline.commands import assets, estimate, extract, sample, train
from pipeline.config.load import ConfigError, load_config
from stages.progress import SilentProgress

QUIET = SilentProgress()
ELSEWHERE = {
    "clips": "data.path=clips",
    "cogvideox": "model.path=base",
    "sam2": "extract.teacher.checkpoint=sam2.pt",
}
OWN = [*ELSEWHERE.values(), "extract.teacher.config=null"]
EVERYTHING = ("clips", "cogvideox", "sam2")


class MadeError(Exception):
    """Carries the parts, and keeps the command from going on."""


@pytest.fixture
def stopping(monkeypatch):
    """Parts that would be made, in place of making them."""

    def stop(demo, clips, *, parts, progress):
        raise MadeError(*sorted(parts))

    monkeypatch.setattr("stages.demo.build.ensure_demo", stop)


def made_by(command, tmp_path, *overrides, **options):
    config = load_config("demo", [f"demo.root={tmp_path}/demo", *overrides])
    with pytest.raises(MadeError) as made:
        command.run(config, QUIET, **options)
    return made.value.args


@pytest.mark.parametrize(
    ("command", "options", "parts"),
    [
        (extract, {}, EVERYTHING),
        (train, {}, ("cogvideox",)),
        (sample, {"prompts": ["a dog"]}, ("cogvideox",)),
    ],
)
def test_a_command_makes_what_it_reads(stopping, tmp_path, command, options, parts):
    assert made_by(command, tmp_path, **options) == parts


@pytest.mark.parametrize(
    ("kinds", "parts"),
    [
        ("text", ("clips", "cogvideox")),
        ("latents,text", ("clips", "cogvideox")),
        ("teacher", ("clips", "sam2")),
        ("gram_flow,masks", ("clips", "sam2")),
    ],
)
def test_extraction_makes_the_models_of_the_kinds_that_are_asked_for(
    stopping, tmp_path, kinds, parts
):
    assert made_by(extract, tmp_path, f"extract.kinds=[{kinds}]") == parts


@pytest.mark.parametrize("elsewhere", list(ELSEWHERE))
def test_what_lies_elsewhere_is_not_made(stopping, tmp_path, elsewhere):
    overrides = [ELSEWHERE[elsewhere]]
    overrides += ["extract.teacher.config=null"] if elsewhere == "sam2" else []
    expected = tuple(part for part in EVERYTHING if part != elsewhere)
    assert made_by(extract, tmp_path, *overrides) == expected


def test_nothing_is_made_where_everything_lies_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", [*OWN, "data.num_frames=49"])
    assets.make_missing_assets(config, QUIET, reads=EVERYTHING)
    assert not list(tmp_path.iterdir())


def test_the_demo_is_known_by_its_place_however_it_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", [f"data.path={tmp_path}/x/../demo/clips"])
    assert assets.is_of_demo(config, "clips")


def test_without_a_demo_nothing_is_made(monkeypatch, tmp_path, minimal):
    monkeypatch.chdir(tmp_path)
    assets.make_missing_assets(load_config(minimal), QUIET, reads=EVERYTHING)
    assert not (tmp_path / "demo").exists()


def test_a_dry_run_speaks_of_the_demos_clips_only_where_they_are_read(tmp_path):
    root = f"demo.root={tmp_path}/demo"
    with pytest.raises(ConfigError, match="the demo's clips are drawn by"):
        estimate.run(load_config("demo", [root]), QUIET)
    with pytest.raises(ValueError) as caught:
        estimate.run(load_config("demo", [root, *OWN]), QUIET)
    assert "the demo's" not in str(caught.value)
