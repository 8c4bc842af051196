"""The block probe: checks, tokens of all blocks in order, linear maps, results.

Every clip passes the transformer once per timestep. Its tokens wait in host memory while one block
after the other is loaded, run on all clips, probed and dropped: weights of one block are in memory.
An interrupted probe passes the blocks again, and skips the fits that are done.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.clips.config import ClipsConfig
from stages.config import BaseModelConfig
from stages.probe_blocks.blockwise import BlockwiseTransformer
from stages.probe_blocks.clips import choose_clips, read_clips
from stages.probe_blocks.config import ProbeConfig
from stages.probe_blocks.fit import LinearProbe, ProbeItem
from stages.probe_blocks.heat_map import draw_heat_map
from stages.probe_blocks.results import (
    BlockLosses,
    ProbeResults,
    none_if_nan,
    open_folder,
    read_block,
    write_block,
    write_results,
)
from stages.progress import Progress
from stages.students.experts import CONFIGURATIONS, trained_configs
from stages.students.hub import resolve_base_model
from stages.students.student import StudentConfigs
from stages.students.weights import check_base_weights, hash_transformer
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch, CachedSamples
from stages.train_student.data.stores import Buckets
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.objectives.build import build_heads
from stages.train_student.objectives.lgf import LocalGramFlow
from stages.train_student.parallel.deepspeed import weights_dtype
from stages.train_student.parallel.process_group import world_from_environment
from stages.train_student.setup import open_checked_stores
from stages.train_student.step import TrainingStep
from stages.train_student.timesteps import check_applied, check_evaluated


def probe_blocks(
    config: ProbeConfig,
    train: TrainConfig,
    clips: ClipsConfig,
    model: BaseModelConfig,
    cache_root: Path | str,
    out: Path,
    *,
    provenance: Mapping[str, Any],
    progress: Progress,
) -> ProbeResults:
    """Probe the base model's blocks, or resume the probe in `out`.

    Args:
        config: the probe's settings.
        train: `lgf`, `teacher_form`, `stores`, `leave_out`, `seed` and the precision apply;
            `objectives` and `block` do not.
        clips: size and length of the clips in the cache.
        model: the base pipeline.
        cache_root: folder of the stores, or its URL.
        out: folder of the results.
        provenance: software versions and the like, saved with the results.

    Raises:
        ValueError: settings contradict each other, the stores or the model, or `out` holds a probe
            with other settings; raised before weights are loaded.
        CacheError: a store is missing or damaged.
        KeyboardInterrupt: stopped; the finished blocks are kept.
    """
    train = train.model_copy(update={"objectives": ("lgf",)})
    configs = trained_configs(model)
    check_settings(config, train, configs)
    stores = open_checked_stores(train, clips, configs, cache_root)
    chosen = choose_clips(config, stores)
    part = configs.transformer_part
    base = resolve_base_model(model, (*CONFIGURATIONS, part))
    check_base_weights(base, (part,))

    samples = CachedSamples(stores.stores, configs, seed=train.seed, batch_size=1)
    batches, excluded = read_clips(samples, chosen, config.timesteps, progress)
    held_out, fitted = (
        [key for key in part if key in batches]
        for part in (chosen[: config.held_out], chosen[config.held_out :])
    )
    for name, keys in (("clips", fitted), ("held_out", held_out)):
        if not keys:
            raise ValueError(
                f"none of the clips of probe.{name} can be used, such as {next(iter(excluded))!r}: "
                f"{next(iter(excluded.values()))}; raise probe.{name}, or extract the clips again"
            )
    device = world_from_environment().device
    probe = linear_probe(config, train, configs, stores, device)
    uniform = {key: probe.uniform_loss(batches[key][0]) for key in held_out}
    _check_uniform(uniform)
    open_folder(out, _settings(config, train, configs, stores, base, fitted, held_out))

    num_blocks = configs.num_blocks
    measured = {
        number: found
        for number in range(num_blocks)
        if (found := read_block(out, number, held_out, len(config.timesteps))) is not None
    }
    wanted = config.blocks or range(num_blocks)
    todo = [number for number in sorted(wanted) if number not in measured]
    if todo:
        progress.log(
            f"fitting on {len(fitted)} clips, measuring on {len(held_out)}; blocks to probe: "
            f"{', '.join(map(str, todo))}; tokens between blocks take "
            f"{token_bytes(batches, train, configs) / 1e9:.2g} GB of host memory"
        )
        dtype = weights_dtype(train.deepspeed)
        transformer = BlockwiseTransformer(base, dtype, device, part=part)
        for found in _measure(todo, transformer, probe, batches, held_out, progress):
            measured[found.block] = found
            write_block(out, found)
    results = ProbeResults(
        timesteps=config.timesteps,
        num_blocks=num_blocks,
        fitted_on=len(fitted),
        excluded=excluded,
        uniform=uniform,
        blocks=tuple(measured[number] for number in sorted(measured)),
    )
    write_results(out, results, draw_heat_map(results), {"made_with": dict(provenance)})
    return results


def _measure(
    todo: Sequence[int],
    transformer: BlockwiseTransformer,
    probe: LinearProbe,
    batches: Mapping[str, Sequence[Batch]],
    held_out: Sequence[str],
    progress: Progress,
) -> Iterator[BlockLosses]:
    """Pass all batches through the blocks up to the last of `todo`; yield the losses of each."""
    passes = sum(map(len, batches.values()))
    measured = sum(len(batches[key]) for key in held_out)
    total = passes * (max(todo) + 2) + len(todo) * (probe.steps + measured)
    with progress.task("probe", total, unit="passes") as task:
        items = []
        for key, of_clip in batches.items():
            for batch in of_clip:
                items.append(ProbeItem(key=key, batch=batch, state=probe.embed(transformer, batch)))
                task.advance()
        for number in range(max(todo) + 1):
            task.note(f"block {number}")
            with transformer.block(number) as block:
                for item in items:
                    transformer.advance(block, item.state)
                    task.advance()
            if number not in todo:
                continue
            task.note(f"block {number}, fitting")
            head, fit_loss = probe.fit(
                [item for item in items if item.key not in held_out], task.advance
            )
            losses: dict[str, list[float | None]] = {key: [] for key in held_out}
            for item in items:
                if item.key in losses:
                    losses[item.key].append(none_if_nan(probe.measure(head, item)))
                    task.advance()
            yield BlockLosses(block=number, fit_loss=none_if_nan(fit_loss), losses=losses)


def check_settings(config: ProbeConfig, train: TrainConfig, configs: StudentConfigs) -> None:
    """Check the settings against each other and the model.

    Raises:
        ValueError: names the setting and valid values.
    """
    blocks = configs.num_blocks
    if len(set(config.blocks)) < len(config.blocks) or not all(
        0 <= block < blocks for block in config.blocks
    ):
        raise ValueError(
            f"probe.blocks must be of 0 to {blocks - 1}, the base model's blocks, without repeats, "
            f"got {list(config.blocks)}; [] is all of them"
        )
    check_applied(train, configs)
    (first, last), drawn = train.lgf.timesteps, configs.trained_timesteps
    check_evaluated(
        "probe.timesteps",
        config.timesteps,
        range(max(first, drawn.start), min(last + 1, drawn.stop)),
        configs,
        where=", where train.lgf.timesteps applies the loss",
    )
    if train.lgf.divergence != "kl":
        raise ValueError(
            "the probe measures the KL divergence; set train.lgf.divergence=kl for it, got "
            f"{train.lgf.divergence}"
        )


def _check_uniform(uniform: Mapping[str, float]) -> None:
    """Check that the teacher says something on the held-out clips (`ValueError`)."""
    for key, loss in uniform.items():
        if not math.isfinite(loss):
            raise ValueError(
                f"the teacher of clip {key!r} is NaN or infinite; extract it again, or name it in "
                "train.leave_out"
            )
    if not any(uniform.values()):
        raise ValueError(
            "the teacher's Gram flow is uniform on every held-out clip, so that there is nothing "
            "to agree with; extract other features (extract.teacher.features)"
        )


def _settings(
    config: ProbeConfig,
    train: TrainConfig,
    configs: StudentConfigs,
    stores: Buckets,
    base: Path,
    fitted: Sequence[str],
    held_out: Sequence[str],
) -> dict[str, Any]:
    """All that determines a block's losses; which blocks are probed does not."""
    return {
        "probe": config.model_dump(mode="json", exclude={"blocks", "clips", "held_out"}),
        "train": {
            "lgf": train.lgf.model_dump(mode="json"),
            "teacher_form": train.teacher_form,
            "precision": train.deepspeed.precision,
            "seed": train.seed,
        },
        "base_weights": hash_transformer(base, configs.transformer_part),
        "transformer": {k: v for k, v in configs.transformer.items() if not k.startswith("_")},
        "scheduler": {k: v for k, v in configs.scheduler.items() if not k.startswith("_")},
        "stores": {kind: reader.settings.hash for kind, reader in stores.readers.items()},
        "fitted_on": list(fitted),
        "held_out": list(held_out),
    }


def linear_probe(
    config: ProbeConfig,
    train: TrainConfig,
    configs: StudentConfigs,
    stores: Buckets,
    device: torch.device,
) -> LinearProbe:
    """Build what fits and measures the blocks, with training's step and objective."""
    assert stores.teacher is not None, "the objective reads a teacher"
    objective = LocalGramFlow(name="lgf", settings=train.lgf, steps=train.steps)
    return LinearProbe(
        config,
        objective,
        TrainingStep(
            configs,
            (objective,),
            layout=TeacherLayout.of(stores.teacher.settings),
            device=device,
            dtype=weights_dtype(train.deepspeed),
        ),
        heads=lambda: linear_heads(train, configs, frame_rate=stores.frame_rate),
        seed=train.seed,
        device=device,
    )


def linear_heads(train: TrainConfig, configs: StudentConfigs, *, frame_rate: bool) -> nn.ModuleDict:
    """Build training's projector without its hidden layers: output layer, skip, time.

    Args:
        frame_rate: whether the teacher has one map per frame.
    """
    lgf = train.lgf.model_copy(update={"projector_widths": train.lgf.projector_widths[-1:]})
    linear = train.model_copy(update={"lgf": lgf})
    return build_heads(linear, configs, None, frame_rate=frame_rate)


def token_bytes(
    batches: Mapping[str, Sequence[Batch]], train: TrainConfig, configs: StudentConfigs
) -> int:
    """Bytes of the tokens of every batch, which are kept between two blocks."""
    tokens = 0
    for of_clip in batches.values():
        _, padded, _, *latent_size = of_clip[0].clean_BFCHW.shape
        grid = configs.token_grid(padded, *latent_size)
        tokens += len(of_clip) * (math.prod(grid) + of_clip[0].text_BLD.shape[1])
    return tokens * configs.width * weights_dtype(train.deepspeed).itemsize
