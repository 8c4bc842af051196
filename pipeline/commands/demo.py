"""`demo`: all steps, from generating the data to a sampled video and an image of the cache."""

from collections.abc import Callable, Iterator

from pipeline.commands import extract, inspect, sample, train
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import CommandResult
from stages.progress import Progress

Step = Callable[[Progress], CommandResult]


def steps(config: RunConfig) -> Iterator[tuple[str, Step]]:
    """Yield the demo's commands by name, each to be run before the next one is requested.

    Raises:
        ConfigError: The configuration has no demo section.
    """
    if config.demo is None:
        raise ConfigError("the configuration has no demo section; use --config demo")
    yield "extract", lambda progress: extract.run(config, progress)
    yield "train", lambda progress: train.run(config, progress)
    yield (
        "sample",
        lambda progress: sample.run(
            config,
            progress,
            sample.SampleOptions(prompts=[_first_caption(config)], run_dir=config.train.run_dir),
        ),
    )
    yield "inspect", lambda progress: inspect.run(config, progress)


def summary(results: dict[str, CommandResult]) -> CommandResult:
    """Summarise the demo: held-out losses, and the paths of the video, image and report."""
    video = results["sample"].data["videos"][0]["video"]
    picture = results["inspect"].data["picture"]
    page = results["train"].data["page"]
    made = [("sampled video", video), ("picture of the cache", picture)]
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


def _first_caption(config: RunConfig) -> str:
    from stages.clips import open_dataset

    for shard in open_dataset(config.data).shards:
        for record in shard.records():
            caption = getattr(record, "caption", None)
            if caption:
                return str(caption)
    raise ValueError(
        f"no clip of {config.data.path} has a caption to sample a video from; add one, or run "
        "sam2vx-pipeline sample --prompt …"
    )
