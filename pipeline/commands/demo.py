"""`demo`: the whole road, from drawing the data to a sampled video and a picture."""

from collections.abc import Callable, Iterator

from pipeline.commands import extract, inspect, sample, train
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import Answer
from stages.progress import Progress

Step = Callable[[Progress], Answer]


def steps(config: RunConfig) -> Iterator[tuple[str, Step]]:
    """Yield the commands of the road by name, each to be carried out before the next is asked for.

    Raises:
        ConfigError: The configuration has no demo section.
    """
    if config.demo is None:
        raise ConfigError("the demo needs a demo section; use --config demo")
    yield "extract", lambda progress: extract.run(config, progress)
    yield "train", lambda progress: train.run(config, progress)
    yield (
        "sample",
        lambda progress: sample.run(
            config, progress, prompts=[_first_caption(config)], run_dir=config.train.run_dir
        ),
    )
    yield "inspect", lambda progress: inspect.run(config, progress)


def summary(answers: dict[str, Answer]) -> Answer:
    """Sum the road up: what training did to the held-out clips, and where there is what to see."""
    video = answers["sample"].data["video"]
    picture = answers["inspect"].data["picture"]
    page = answers["train"].data["page"]
    made = [("sampled video", video), ("picture of the cache", picture)]
    if page is not None:
        made.append(("page of the training", page))
    trained = answers["train"].data["figures"]
    held_out = [
        (name, f"{figure['value']} ({figure['note']})")
        for name, figure in trained.items()
        if name.startswith("held-out")
    ]
    return Answer(
        title="the demo is done",
        rows=[*held_out, *made],
        data={name: answer.data for name, answer in answers.items()},
        notes=[path for _, path in made],
    )


def _first_caption(config: RunConfig) -> str:
    from stages.clips import open_dataset

    for shard in open_dataset(config.data).shards:
        for record in shard.records():
            caption = getattr(record, "caption", None)
            if caption:
                return str(caption)
    raise ValueError(f"no clip of {config.data.path} has a caption to draw a video from")
