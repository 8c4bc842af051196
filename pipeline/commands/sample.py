"""`sample`: a video from the base pipeline and a run's weights."""

import json
import re
from pathlib import Path
from typing import Any

from pipeline.commands.assets import make_missing_assets
from pipeline.config import ConfigError, RunConfig
from pipeline.console import Answer, in_time
from pipeline.provenance import provenance
from stages.progress import Progress


def run(
    config: RunConfig,
    progress: Progress,
    *,
    prompt: str,
    image: Path | None = None,
    out: Path | None = None,
    run_dir: Path | None = None,
    base_only: bool = False,
) -> Answer:
    """Draw a video; beside it a JSON file says how.

    Args:
        config: The whole configuration.
        progress: Told of the steps.
        prompt: What to draw.
        image: The first frame, for image-to-video.
        out: The mp4; None makes a name from run, prompt and seed in `config.outputs`.
        run_dir: The run; None takes the one that finished last, of this base model, beside
            `config.train.run_dir`.
        base_only: Draw without any run's weights.
    """
    if base_only and run_dir is not None:
        raise ConfigError("--base draws without a run; leave --run out")
    if out is not None and out.suffix != ".mp4":
        raise ConfigError(f"--out must end in .mp4, got {out}")
    from stages.sample_videos.sampling import sample_video, takes_image

    make_missing_assets(config, progress)
    if takes_image(config.model) and image is None:
        raise ConfigError(f"{config.model.path} makes video from an image; name one with --image")
    if not takes_image(config.model) and image is not None:
        raise ConfigError(f"{config.model.path} makes video from text alone; leave --image out")
    if not base_only and run_dir is None:
        run_dir = _newest_run(config)
    if out is None:
        words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "video"
        source = run_dir.name if run_dir else "base"
        out = config.outputs / f"{source}-{words}-seed{config.sample.seed}.mp4"
    summary = sample_video(
        config.sample,
        config.model,
        config.data,
        run_dir=run_dir,
        prompt=prompt,
        image=image,
        out=out,
        progress=progress,
    )
    data: dict[str, Any] = {
        "video": str(summary.out),
        "prompt": prompt,
        "image": None if image is None else str(image),
        "run": None if run_dir is None else str(run_dir),
        "weights": summary.weights,
        "model": config.model.path,
        "num_frames": summary.num_frames,
        "height": summary.height,
        "width": summary.width,
        "fps": summary.fps,
        "sample": config.sample.model_dump(mode="json"),
        "seconds": round(summary.seconds, 3),
    }
    beside = out.with_suffix(".json")
    beside.write_text(json.dumps(data | {"made_with": provenance()}, indent=1) + "\n", "utf-8")
    size = f"{summary.num_frames} frames of {summary.width}x{summary.height}"
    return Answer(
        title=f"sampled with {config.name}",
        rows=[
            ("prompt", prompt),
            ("weights", str(run_dir) if run_dir else "the base model's own"),
            ("video", f"{size} at {summary.fps:g} frames/s"),
            ("steps, guidance", f"{config.sample.steps}, {config.sample.guidance:g}"),
            ("seed", str(config.sample.seed)),
            ("time", in_time(summary.seconds)),
        ],
        data=data,
        notes=[str(summary.out)],
    )


def _newest_run(config: RunConfig) -> Path:
    from stages.sample_videos.runs import newest_finished_run

    runs = config.train.run_dir.parent
    newest = newest_finished_run(runs, config.model)
    if newest is None:
        raise ValueError(
            f"no finished run of {config.model.path} in {runs}; run sam2vx-pipeline train, name a "
            "run with --run, or draw from the base model alone with --base"
        )
    return newest
