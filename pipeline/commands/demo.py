"""`demo`: all steps, from generating the data to the trained model beside its base."""

from collections.abc import Callable, Iterator

from pipeline.commands import evaluate, extract, inspect, train
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import CommandResult
from stages.demo import PROMPTS
from stages.progress import Progress

Step = Callable[[Progress], CommandResult]


def steps(config: RunConfig) -> Iterator[tuple[str, Step]]:
    """Yield the demo's commands by name, each to be run before the next one is requested.

    Raises:
        ConfigError: The configuration has no demo section.
    """
    if config.demo is None:
        raise ConfigError("the configuration has no demo section; use --config demo")
    of_wan = config.demo.student == "wan"  # beside CogVideoX's, in the same root
    options = evaluate.EvaluateOptions(
        run=str(config.train.run_dir),
        against="base",
        # Image-to-video needs first frames, which the run's held-out clips have.
        prompt_file=None if config.demo.image_to_video else PROMPTS,
        out=config.demo.root.expanduser() / ("evaluation-wan" if of_wan else "evaluation"),
    )
    yield "extract", lambda progress: extract.run(config, progress)
    yield "train", lambda progress: train.run(config, progress)
    yield "evaluate", lambda progress: evaluate.run(config, progress, options)
    yield "inspect", lambda progress: inspect.run(config, progress)
    yield "overlay", lambda progress: inspect.run(config, progress, overlay=True)


def summary(results: dict[str, CommandResult]) -> CommandResult:
    """Summarise the demo: held-out losses, and the paths of a video, pictures and pages."""
    videos = results["evaluate"].data["videos"]
    made = [
        ("sampled video", next(iter(videos.values()))[0]),
        ("base and trained", results["evaluate"].data["page"]),
        ("picture of the cache", results["inspect"].data["picture"]),
        ("picture of the tracks", results["overlay"].data["picture"]),
    ]
    page = results["train"].data["page"]
    if page is not None:
        made.append(("training report", page))
    trained = results["train"].data["figures"]
    held_out = [
        (name, f"{figure['value']} ({figure['note']})")
        for name, figure in trained.items()
        if name.startswith("held-out")
    ]
    return CommandResult(
        title="demo finished",
        rows=[*held_out, *made],
        data={name: result.data for name, result in results.items()},
        notes=[path for _, path in made],
    )
