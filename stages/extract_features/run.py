"""Stage one from end to end: extract every kind for all shards of the dataset."""

from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path

from cache_schema import JSON, StoreReader, StoreWriter
from stages.clips import ClipDataset, ClipsConfig, InputShard, input_shard_name, open_dataset
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.execution.comparison import Comparison, StoreScope
from stages.extract_features.execution.jobs import (
    EarlierStores,
    plan_jobs,
    whole_shard_jobs,
)
from stages.extract_features.execution.local_engine import LocalEngine
from stages.extract_features.execution.ray_engine import RayEngine
from stages.extract_features.execution.ray_worker import WorkerSetup
from stages.extract_features.execution.refresh import compare_and_refresh, compare_one_shard
from stages.extract_features.execution.task import ExtractionTask, run_tasks
from stages.extract_features.extraction import Extraction, bucket_name
from stages.extract_features.fingerprints import fingerprint_of
from stages.extract_features.kinds import make_extractions, resolve_device
from stages.extract_features.summary import (
    FAILURES_FILE,
    ExtractSummary,
    KindSummary,
    failure_manifest_written,
)
from stages.progress import Progress


def extract_features(
    config: ExtractConfig,
    clips: ClipsConfig,
    model: BaseModelConfig,
    cache_root: Path,
    *,
    provenance: dict[str, JSON],
    progress: Progress,
    rank: int = 0,
    world_size: int = 1,
    retry_failed: bool = False,
    refresh_changed: bool = False,
    dataset: ClipDataset | None = None,
) -> ExtractSummary:
    """Write the stores of `config.kinds` for every shard of the dataset.

    Models run one after the other, so that one large model is loaded at a time. With
    `clips.buckets`, sizes run one after the other, each with its own stores; a clip is in the
    stores of one size.

    1. One finished shard is compared with the dataset. If it differs, all finished shards of this
       process's share are.
    2. Unfinished shards are extracted, each compared with the stores first. A partially written
       shard continues after its staged clips.
    3. Each process compares its share of the shards that were finished before the run. Missing
       clips go into retry shards; finished shards are not written again.

    Shards that other processes are writing are waited for, and taken over if such a process ends
    early. Clips that are no longer in the dataset stay in the store. Unusable clips are skipped
    and recorded with a reason; `failures.jsonl` in the cache folder lists them after the run, also
    if it ended with an error.

    Args:
        config: Kinds to extract, and where to run.
        clips: The dataset, and the size, length and frame rate of clips.
        model: The base pipeline whose VAE and text encoder are used.
        cache_root: Folder of the stores; created if missing.
        provenance: Information on the run, recorded in stores that this run creates.
        progress: Shows bars and log lines.
        rank: Rank of this process. Its share is the shards rank, rank + world_size, ...; then it
            continues with shards that others have not finished.
        world_size: Number of processes.
        retry_failed: Retry the skipped clips of finished shards; they go into retry shards.
        refresh_changed: Extract clips again whose source (caption, video or prompt, depending on
            the kind) differs from the store's; the rest of their shards is kept.
        dataset: The clips; None opens `clips.path`. Not with Ray, whose workers open that.

    Raises:
        ValueError: The dataset, base model, SAM2 checkpoint, device or Ray is missing or wrong;
            raised before any work is done. Or a store belongs to another dataset, or holds clips
            from other sources without `refresh_changed`; raised before any work or at the end,
            and extracted clips are kept.
        CacheError: A store is damaged.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1} (world size {world_size}): {rank}")
    if config.engine == "ray" and world_size > 1:
        raise ValueError(
            f"extract.engine=ray starts its own workers, but a launcher started {world_size} "
            "processes; run it without torchrun, or with extract.engine=local"
        )
    if dataset is not None and config.engine == "ray":
        raise ValueError("extract.engine=ray reads data.path only; use extract.engine=local")
    dataset = dataset or open_dataset(clips)
    if rank == 0:
        progress.log(f"dataset: {dataset.layout}")
    engine: RayEngine | LocalEngine
    if config.engine == "ray":
        setup = WorkerSetup(
            config=config,
            clips=clips,
            model=model,
            cache_root=cache_root.expanduser().resolve(),
            folder=Path.cwd(),
        )
        engine = RayEngine(setup, dataset.by_name)
    else:
        device = resolve_device(config.device, rank)
        fingerprint = partial(fingerprint_of, teacher=config.teacher)
        engine = LocalEngine(dataset.by_name, fingerprint, device, rank, world_size)
    extractions = make_extractions(config, clips.sizes, model)
    with engine:
        run = _Run(config, extractions, cache_root, provenance, dataset, rank, world_size, progress)
        with failure_manifest_written(cache_root, progress.log):
            run.run_all(engine, retry_failed=retry_failed, refresh_changed=refresh_changed)
            summaries = run.summaries()
    return ExtractSummary(
        kinds=tuple(summaries),
        dataset=dataset.layout,
        failures=cache_root / FAILURES_FILE,
        notes=tuple(run.comparison.notes(world_size)),
    )


class _Run:
    """One process's run over all stores."""

    def __init__(
        self,
        config: ExtractConfig,
        extractions: Sequence[Extraction],
        cache_root: Path,
        provenance: dict[str, JSON],
        dataset: ClipDataset,
        rank: int,
        world_size: int,
        progress: Progress,
    ) -> None:
        self._config = config
        self._cache_root = cache_root
        self._provenance = provenance
        self._dataset = dataset
        self._rank = rank
        self._world_size = world_size
        self._progress = progress
        self._tasks = [ExtractionTask(extraction) for extraction in extractions]
        self._open_stores()
        self._finished_before = {writer.path: writer.committed() for _, writer in self._stores()}
        self.comparison = Comparison()
        """Comparison of this process's share of the shards that were finished before the run."""

    def run_all(
        self, engine: RayEngine | LocalEngine, *, retry_failed: bool, refresh_changed: bool
    ) -> None:
        """Extract unfinished shards, then the missing clips of shards finished before the run."""
        changed_shards = compare_one_shard(
            self._dataset,
            self._config,
            self._stores(),
            rank=self._rank,
            world_size=self._world_size,
        )
        if changed_shards and not refresh_changed:
            # Raises an error that names all changed clips.
            self._compare_finished(changed_shards, refresh_changed=False)
        for task in self._tasks:
            earlier = self._existing_stores(task, retry_failed)
            task.plan = whole_shard_jobs(self._dataset.shards, task.writers, earlier)
        run_tasks(self._tasks, engine, self._progress)
        if any(self._finished_before.values()):
            changed_shards = {name for task in self._tasks for name in task.report.changed_shards}
            shards = self._compare_finished(changed_shards, refresh_changed=refresh_changed)
            self._open_stores()  # open writers do not see the clips dropped by the comparison
            for task in self._tasks:
                task.plan = plan_jobs(
                    shards,
                    task.writers,
                    self.comparison,
                    size=self._size_index(task),
                    retry_failed=retry_failed,
                )
                task.report.settled_jobs.clear()  # some of their clips may have been dropped
            run_tasks(self._tasks, engine, self._progress)

    def _open_stores(self) -> None:
        for task in self._tasks:
            task.writers = {
                kind: StoreWriter.open(self._cache_root, settings, provenance=self._provenance)
                for kind, settings in task.extraction.settings.items()
            }

    def _stores(self) -> list[tuple[Kind, StoreWriter]]:
        return [entry for task in self._tasks for entry in task.writers.items()]

    def _tasks_of_all_sizes(self, task: ExtractionTask) -> list[ExtractionTask]:
        """Return the tasks with the same kinds, one per size."""
        return [one for one in self._tasks if one.writers.keys() == task.writers.keys()]

    def _size_index(self, task: ExtractionTask) -> int:
        return self._tasks_of_all_sizes(task).index(task)

    def _existing_stores(self, task: ExtractionTask, retry_failed: bool) -> EarlierStores | None:
        paths = {
            kind: tuple(one.writers[kind].path for one in self._tasks_of_all_sizes(task))
            for kind in task.writers
        }
        if not any(self._finished_before[path] for of_kind in paths.values() for path in of_kind):
            return None
        return EarlierStores(
            paths=paths,
            size=self._size_index(task),
            retry_failed=retry_failed,
            teacher=self._config.teacher,
        )

    def _compare_finished(
        self, changed_shards: Set[str], *, refresh_changed: bool
    ) -> list[InputShard]:
        """Compare this process's share of the shards finished before the run, and changed ones."""
        share = self._dataset.shards[self._rank :: self._world_size]
        names = {shard.name for shard in share}
        finished = frozenset[str]().union(*self._finished_before.values())
        before = {input_shard_name(name, self._dataset) for name in finished}
        shards = [
            shard
            for shard in self._dataset.shards
            if shard.name in changed_shards or (shard.name in names and shard.name in before)
        ]
        read = {shard.name for shard in shards}

        def covers(store_shard: str) -> bool:
            name = input_shard_name(store_shard, self._dataset)
            return store_shard in finished and (name is None or name in names)

        self.comparison = compare_and_refresh(
            self._cache_root,
            shards,
            self._config,
            self._stores(),
            StoreScope(
                covers=covers,
                unread=[shard for shard in self._dataset.shards if shard.name not in read],
            ),
            self._progress,
            refresh_changed=refresh_changed,
        )
        return shards

    def summaries(self) -> list[KindSummary]:
        """Summarise every store."""
        return [
            self._summary(kind, writer, task)
            for task in self._tasks
            for kind, writer in task.writers.items()
        ]

    def _summary(self, kind: Kind, writer: StoreWriter, task: ExtractionTask) -> KindSummary:
        """Summarise the store's clips of the dataset, by any writer, and this process's work."""
        writer.write_index()
        writer.write_attributes()
        reader = StoreReader(writer.path)
        of_dataset = {
            name: facts
            for name, facts in reader.shards.items()
            if input_shard_name(name, self._dataset) is not None
        }
        # Shards with old names count too: their clips may be in other shards of the dataset now.
        counted = of_dataset.keys() | self._finished_before[writer.path]
        gone, gone_skipped = 0, frozenset[str]()
        if kind in self.comparison.kinds:
            found = self.comparison.kinds[kind].stores[self._size_index(task)]
            gone, gone_skipped = len(found.gone), found.gone_skipped
        held = sum(facts.num_clips for name, facts in reader.shards.items() if name in counted)
        written = task.report.written[kind]
        return KindSummary(
            kind=kind,
            bucket=bucket_name(task.extraction.size),
            store=writer.path,
            clips_written=written,
            clips_already_there=held - gone - written,
            skipped=tuple(
                clip
                for clip in reader.skipped
                if clip.shard in counted and clip.key not in gone_skipped
            ),
            seconds=task.seconds,
            bytes=sum(facts.num_bytes for facts in of_dataset.values()),
            captions_cut=task.report.captions_cut,
        )
