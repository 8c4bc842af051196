"""`evaluate`: scores of generated videos, and the comparison of two sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.shown_text import first_few
from pipeline.commands.assets import make_missing_assets
from pipeline.commands.evaluate_sides import open_sides, sample_sides
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import CommandResult
from pipeline.environment import local_rank, provenance, provenance_of_run, world_size
from pipeline.failures import TOO_MANY_SKIPPED
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.evaluate.compare import Comparison
    from stages.evaluate.evaluate import Evaluation
    from stages.evaluate.feature_distances import FeatureEvaluation
    from stages.evaluate.reference import Reference
    from stages.evaluate.videos import Side
    from stages.video_features.network import FeatureNetwork
    from stages.video_scores.vbench.networks import VBenchModels


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """What to score: the command's options that are no settings."""

    videos: Path | None = None
    """Folder of generated videos; None samples `run`."""
    run: str | None = None
    """`base`, or the folder of a training run or of an export."""
    against: str | None = None
    """A folder of videos of the same prompts and seeds; with `run` also `base` or a run."""
    prompt_file: Path | None = None
    """Prompts to sample; None takes the held-out clips of the run."""
    reference: Path | None = None
    """Real clips that the videos are measured against: a folder of videos, or a dataset; None takes
    the held-out clips if videos are sampled from their first frames."""
    num: int = 1
    """Videos per prompt, with consecutive seeds."""
    out: Path | None = None
    """Folder for the scores, the page, sampled videos and tracks; None makes one named after the
    videos or the run in `outputs`."""


def run(config: RunConfig, progress: Progress, options: EvaluateOptions) -> CommandResult:
    """Score the videos of a folder or of a run, and compare them with others.

    Raises:
        ConfigError: Options that do not go together, or a launcher started several processes.
        ValueError: A folder is missing or holds no videos, or weights do not fit.
    """
    from stages.evaluate.evaluate import compare_sides, score_side
    from stages.evaluate.frame_scorer import FrameScorer
    from stages.evaluate.output import write_evaluation
    from stages.evaluate.reference import track_reference
    from stages.video_scores.vbench.networks import NO_NETWORKS

    if world_size() > 1:
        raise ConfigError("evaluate runs in one process; start it without torchrun or deepspeed")
    first = options.videos or Path(options.run or "")
    out = options.out or config.outputs / f"evaluation-{first.resolve().name}"
    reference = _reference(config, options)
    network = _network(config)
    vbench = _vbench_models(config) if "vbench" in config.evaluate.scores else None
    if options.run is None:
        sides, failed = open_sides(options), []
    else:
        sampled = sample_sides(config, options, out, progress)
        sides, failed = sampled.sides, sampled.problems
        reference = reference or sampled.reference
    networks = NO_NETWORKS if vbench is None else vbench.load()
    frames = FrameScorer(out / "frame-scores", config.evaluate, networks)
    if "structure" in config.evaluate.scores:
        make_missing_assets(config, progress, reads=("sam2",))
    tracked = None
    if reference is not None and "structure" in config.evaluate.scores:
        tracked = track_reference(
            reference,
            config.extract,
            config.data,
            cache=out / "tracks" / f"reference-{reference.name}",
            temperature=config.train.lgf.temperature,
            provenance=provenance_of_run(),
            progress=progress,
        )
    scored = [
        score_side(
            side,
            config.evaluate,
            config.extract,
            config.data,
            cache=out / "tracks" / f"{role}-{side.folder.resolve().name}",
            frames=frames,
            temperature=config.train.lgf.temperature,
            provenance=provenance_of_run(),
            progress=progress,
            reference=tracked,
        )
        for role, side in zip(("videos", "against"), sides, strict=False)
    ]
    features = None
    if network is not None and (len(sides) == 2 or reference is not None):
        features = _features(config, network, sides, reference, progress)
    evaluation = compare_sides(scored, config.evaluate, tracked, features)
    page = write_evaluation(
        evaluation,
        out,
        settings={
            "scores": list(config.evaluate.scores),
            "seed": config.evaluate.seed,
            "vbench": config.evaluate.vbench.model_dump(mode="json"),
            "teacher": config.extract.teacher.model_dump(mode="json"),
            "gram_flow": config.extract.gram_flow.model_dump(mode="json"),
            "temperature": config.train.lgf.temperature,
            "clips": f"{config.data.num_frames}x{config.data.height}x{config.data.width}",
            "fps": config.data.fps,
        },
        made_with=provenance(),
    )
    return _result(config, evaluation, out, page, failed)


def _vbench_models(config: RunConfig) -> VBenchModels:
    """The networks of VBench's dimensions, checked but not loaded, so that sampling has room."""
    from stages.extract_features.kinds import resolve_device
    from stages.video_scores.vbench.networks import VBenchModels

    device = resolve_device(config.extract.device, local_rank())
    try:
        return VBenchModels(config.evaluate.vbench, device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _reference(config: RunConfig, options: EvaluateOptions) -> Reference | None:
    from stages.evaluate.reference import open_reference

    if options.reference is None:
        return None
    if "structure" not in config.evaluate.scores and config.evaluate.features.network is None:
        scores = ",".join([*config.evaluate.scores, "structure"])
        raise ConfigError(
            "--reference is measured by the scores of structure, which evaluate.scores leaves out; "
            f"set evaluate.scores=[{scores}], or evaluate.features.network"
        )
    given = {"the folder of videos itself": options.videos, "--against": options.against}
    for name, path in given.items():
        if path is not None and Path(path).resolve() == options.reference.resolve():
            raise ConfigError(f"--reference {options.reference} is {name}; name real clips")
    return open_reference(options.reference, config.data)


def _network(config: RunConfig) -> FeatureNetwork | None:
    from stages.video_features.opening import open_network

    try:
        return open_network(config.evaluate.features, config.data)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _features(
    config: RunConfig,
    network: FeatureNetwork,
    sides: Sequence[Side],
    reference: Reference | None,
    progress: Progress,
) -> FeatureEvaluation:
    """The distances over the network's features, which all evaluations keep in one folder."""
    from stages.evaluate.feature_distances import compare_features
    from stages.extract_features.kinds import resolve_device

    return compare_features(
        network,
        sides,
        reference,
        config.evaluate.features,
        folder=config.outputs / "features",
        device=resolve_device(config.extract.device, rank=0),
        seed=config.evaluate.seed,
        progress=progress,
    )


def _result(
    config: RunConfig, evaluation: Evaluation, out: Path, page: Path, failed: Sequence[str]
) -> CommandResult:
    from stages.evaluate.output import summary_of

    names = [one.side.name for one in evaluation.sides]
    rows = [(one.side.name, f"{len(one.side.videos)} videos") for one in evaluation.sides]
    if len(names) == 2:
        rows.append(("pairs", f"{len(evaluation.pairs)}, {len(evaluation.unpaired)} without"))
    for score in evaluation.scores:
        means = " against ".join(mean.text for mean in evaluation.means[score.name])
        rows.append((f"{score.name} ({score.unit})", means))
        if found := evaluation.differences.get(score.name):
            rows.append(("  difference", _difference(found)))
    if evaluation.motion is not None:
        rows.append(("motion distance (MMD^2)", evaluation.motion.text))
    if evaluation.reference is not None:
        reference = evaluation.reference.reference
        rows.append((f"reference {reference.name}", f"{len(reference.captions)} clips"))
        for name, of_sides in evaluation.to_reference.items():
            rows += [
                (f"  {name} of {one.side.name}", distance.text)
                for one, distance in zip(evaluation.sides, of_sides, strict=True)
            ]
    if evaluation.vbench is not None:
        rows += evaluation.vbench.rows
    notes = [
        f"{one.side.name} {key}: {why}"
        for one in evaluation.sides
        for key, why in sorted(one.problems.items())
    ]
    if (features := evaluation.features) is not None:
        rows += [("features", features.protocol.text)]
        rows += [(f"  {name}", text) for name, text in features.rows]
        notes += [f"{name} {key}: {why}" for name, key, why in features.problem_rows]
    elif config.evaluate.features.network is not None:
        notes.append("no feature distances without --against or --reference")
    if evaluation.reference is not None:
        name = evaluation.reference.reference.name
        problems = sorted(evaluation.reference.problems.items())
        notes += [f"{name} {key}: {why}" for key, why in problems]
        notes += [
            f"{one.side.name}: no flow_divergence of {len(one.unmatched)} videos "
            f"({first_few([f'{key}: {why}' for key, why in sorted(one.unmatched.items())], 3)})"
            for one in evaluation.sides
            if one.unmatched
        ]
    if len(names) == 2:
        notes += _washed_out(evaluation)
    if evaluation.vbench is not None:
        notes += evaluation.vbench.notes
    too_many = evaluation.skipped_share > config.evaluate.max_skipped
    if too_many:
        notes.append(
            f"{evaluation.skipped_share:.0%} of the videos lack scores or a partner, more than "
            f"evaluate.max_skipped={config.evaluate.max_skipped:g} allows"
        )
    data: dict[str, Any] = {
        "out": str(out),
        "page": str(page),
        "videos": {
            one.side.name: [str(video.path) for video in one.side.videos]
            for one in evaluation.sides
        },
        "not_sampled": list(failed),
        **summary_of(evaluation),
    }
    return CommandResult(
        title=f"evaluated {' against '.join(names)}",
        rows=rows,
        data=data,
        notes=[*failed, *notes, str(page)],
        exit_code=TOO_MANY_SKIPPED if too_many or failed else 0,
    )


def _washed_out(evaluation: Evaluation) -> list[str]:
    """A note if the videos of the first side are washed out against those of the second."""
    from stages.video_scores.appearance import washed_out

    now, before = (
        {name: means[number].mean for name, means in evaluation.means.items()}
        for number in range(2)
    )
    names = [one.side.name for one in evaluation.sides]
    faded = washed_out(now, before)
    return [f"{names[0]} is washed out against {names[1]}: {', '.join(faded)}"] if faded else []


def _difference(found: Comparison) -> str:
    won = "" if found.win_rate is None else f"; better in {found.win_rate:.0%} of pairs"
    return f"{found.difference.text}{won}"
