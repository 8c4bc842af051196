"""Training samples from the cache, random by their number alone; the training loop reads them.

A sample's number decides its clip, its draw from the VAE's posterior, its noise and its timestep,
so one run gives the same samples on any number of processes, and after a resume.

Legend: B clip, F latent frame, C channel, H W latent, L text token, D width, T map of the teacher.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stages.base_facts import BaseFacts
from stages.train_student.config import WorkerStart
from stages.train_student.data.order import clip_of_sample, seed_of_sample
from stages.train_student.data.stores import JoinedStores
from stages.train_student.model_inputs import image_condition, pad_in_front


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one forward pass needs, on the host until `to`."""

    keys: tuple[str, ...]
    clean_BFCHW: Tensor
    """Scaled latents x0, float32, padded in front where the model asks for it."""
    noise_BFCHW: Tensor
    timestep_B: Tensor
    """int64."""
    text_BLD: Tensor
    """float16, as stored."""
    image_BFCHW: Tensor | None
    """First frame's scaled latents, then zeros; None for text-to-video."""
    teacher: Mapping[str, Tensor] | None
    """The teacher's arrays by name, as stored, with B in front: `Teacher.arrays`; None without an
    auxiliary loss."""
    teacher_valid_BT: Tensor | None
    """bool, the maps that show the tracked subject; None without an auxiliary loss."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the copy overlaps work if the host memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; `DataLoader` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, Mapping):
                changed[field.name] = {name: change(tensor) for name, tensor in value.items()}
        return replace(self, **changed)


class CachedSamples(Dataset[Batch]):
    """Samples by number, as batches of one clip."""

    def __init__(self, stores: JoinedStores, facts: BaseFacts, seed: int) -> None:
        self._stores = stores
        self._facts = facts
        self._seed = seed

    def __getitem__(self, sample: int) -> Batch:
        """Read and draw sample number `sample`.

        Raises:
            CacheError: the clip's data is damaged.
        """
        stores, facts = self._stores, self._facts
        key = stores.keys[clip_of_sample(sample, len(stores.keys), self._seed)]
        generator = torch.Generator().manual_seed(seed_of_sample(sample, self._seed))
        steps = facts.scheduler["num_train_timesteps"]
        timestep_1 = torch.randint(0, steps, (1,), generator=generator)
        arrays = {name: torch.from_numpy(a) for name, a in stores.latents.read(key).items()}
        clean_FCHW = facts.latent_scale * draw(arrays["mean"], arrays["std"], generator)
        clean_FCHW = pad_in_front(clean_FCHW, facts.padding(len(clean_FCHW)))
        noise_FCHW = torch.randn(clean_FCHW.shape, generator=generator)
        image_FCHW = None
        if facts.image_to_video:
            image_1CHW = draw(arrays["image_mean"], arrays["image_std"], generator)
            image_FCHW = image_condition(facts.image_latent_scale * image_1CHW, len(clean_FCHW))
        text_LD = torch.from_numpy(stores.text.read(key)["embeds"])
        teacher = valid_BT = None
        if stores.teacher is not None:
            teacher = _one_clip(stores.teacher.read(key))
            valid_BT = teacher.pop("valid") != 0
        return Batch(
            keys=(key,),
            clean_BFCHW=clean_FCHW[None],
            noise_BFCHW=noise_FCHW[None],
            timestep_B=timestep_1,
            text_BLD=text_LD[None],
            image_BFCHW=None if image_FCHW is None else image_FCHW[None],
            teacher=teacher,
            teacher_valid_BT=valid_BT,
        )


def _one_clip(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Each array as a batch of one."""
    return {name: torch.from_numpy(array)[None] for name, array in arrays.items()}


def draw(mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """A draw from the VAE's posterior, float32: mean + std * noise."""
    return mean.float() + std.float() * torch.randn(mean.shape, generator=generator)


def join_batches(batches: Sequence[Batch]) -> Batch:
    """One batch of several, in their order."""
    first = batches[0]
    if len(batches) == 1:
        return first
    tensors: dict[str, Any] = {}
    for field in fields(Batch):
        values = [getattr(batch, field.name) for batch in batches]
        if isinstance(values[0], Tensor):
            tensors[field.name] = torch.cat(values)
        elif isinstance(values[0], Mapping):
            tensors[field.name] = {n: torch.cat([v[n] for v in values]) for n in values[0]}
    keys = tuple(key for batch in batches for key in batch.keys)
    return replace(first, keys=keys, **tensors)


def load_batches(
    samples: CachedSamples,
    numbers: Iterable[list[int]],
    *,
    workers: int,
    start: WorkerStart = "fork",
    pin_memory: bool,
) -> Iterator[Batch]:
    """Batches of those samples, in order, read by `workers` processes (0: by this one).

    Args:
        start: how the processes are started.
        pin_memory: put what they read into page-locked memory, whence it is copied faster.
    """
    loader: DataLoader[Batch] = DataLoader(
        samples,
        batch_sampler=numbers,
        num_workers=workers,
        multiprocessing_context=start if workers else None,
        collate_fn=join_batches,
        pin_memory=pin_memory,
        # Workers' seeds come from here: the global generator stays as a checkpoint restored it.
        generator=torch.Generator(),
    )
    return iter(loader)
