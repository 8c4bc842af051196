"""Training samples from the cache, each determined by its number and the run's seed.

A sample's number determines its clip, its draw from the VAE's posterior, its noise and its
timestep, so a run has the same samples on any number of processes, and after resuming.

Legend: B clip, F latent frame, C channel, H W latent, L text token, D width, T map of the teacher
or frame, h w pixels of a stored mask.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from cache_schema import CacheError, ClipChanged, ClipMissing, CorruptClip
from stages.students.latents import sample_posterior
from stages.students.student import StudentConfigs
from stages.train_student.data.order import SampleOrder, hash63, seed_of_sample
from stages.train_student.data.splits import seed_of_held_out
from stages.train_student.data.stores import JoinedStores

ATTEMPTS = 8
"""Maximum damaged clips tried for one sample; so many mean that the cache is damaged."""

GONE_ATTEMPTS = 1000
"""Maximum clips tried for one sample if clips were removed from the cache; enough to find a
remaining one even after 99 of 100 were removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedClip:
    """A clip that could not be read."""

    key: str
    message: str
    """The error, with the file."""
    gone: bool
    """Whether the clip was removed from its store, or rewritten with other values, since the run
    opened it; otherwise it is damaged."""

    @classmethod
    def from_error(cls, error: CacheError, key: str) -> Self:
        """Build from the error that reading the clip raised, one of `UNREADABLE`."""
        return cls(key=key, message=str(error), gone=not isinstance(error, CorruptClip))


UNREADABLE = (CorruptClip, ClipMissing, ClipChanged)
"""Errors of a clip that can be replaced by another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Inputs of one forward pass, on the host until `to`."""

    keys: tuple[str, ...]
    clean_BFCHW: Tensor
    """Scaled latents x0, float32, padded in front if the model needs it."""
    noise_BFCHW: Tensor
    timestep_B: Tensor
    """int64."""
    text_BLD: Tensor
    """float16, as stored."""
    image_BFCHW: Tensor | None
    """The first frame as further channels of the latents; None for text-to-video."""
    image_BLD: Tensor | None = None
    """States of an image encoder, float16, as stored; None if the model takes none."""
    teacher: Mapping[str, Tensor] | None
    """The teacher's stored arrays by name, with a leading B: `Teacher.arrays`; None without an
    auxiliary loss."""
    teacher_valid_BT: Tensor | None
    """bool, maps that show the tracked subject; None without an auxiliary loss."""
    masks: Mapping[str, Tensor] | None = None
    """Stored arrays of the masks store by name, with a leading B: uint8 `forward` and, with two
    directions, `backward` [B, T, h, w], `valid` [B, T]; None unless a loss reads them."""
    visual: Mapping[str, Tensor] | None = None
    """Stored arrays of the visual store by name, with a leading B, among them `valid`; None unless
    a loss reads them."""
    num_frames: int
    """Frames T per clip; the same for the whole batch."""
    damaged: tuple[DamagedClip, ...] = ()
    """Unreadable clips that were replaced in these samples."""

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`, asynchronously if the host memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory."""
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


class CachedSamples:
    """Training samples by number, and held-out clips at any timestep, as batches of one clip."""

    def __init__(
        self,
        buckets: Sequence[JoinedStores],
        configs: StudentConfigs,
        *,
        seed: int,
        batch_size: int,
    ) -> None:
        """Read from the stores.

        Args:
            buckets: joined stores of each size.
            configs: configurations of the base model.
            seed: seed of the run.
            batch_size: samples per step over all ranks; a step's samples are from one bucket.
        """
        self._buckets = tuple(buckets)
        self._configs = configs
        self._drawn = configs.trained_timesteps
        self._seed = seed
        self._order = SampleOrder(
            [len(stores.keys) for stores in buckets], batch_size=batch_size, seed=seed
        )

    @property
    def held_out(self) -> tuple[str, ...]:
        """Keys of the held-out clips, in a fixed order."""
        return tuple(dict.fromkeys(key for stores in self._buckets for key in stores.held_out))

    def __getitem__(self, sample: int) -> Batch:
        """Read sample number `sample` and draw its latents, noise and timestep.

        Raises:
            CacheError: too many clips are damaged to find a replacement, or the cache cannot be
                reached.
        """
        bucket, clip = self._order.locate(sample)
        stores = self._buckets[bucket]
        generator = torch.Generator().manual_seed(seed_of_sample(sample, self._seed))
        drawn = self._drawn
        timestep_1 = torch.randint(drawn.start, drawn.stop, (1,), generator=generator)
        key, arrays, damaged = read_or_replace(stores, clip, sample=sample, seed=self._seed)
        batch = self._make_batch(stores, key, arrays, timestep_1, generator)
        return replace(batch, damaged=damaged)

    def held_out_batch(self, key: str, timestep: int) -> Batch:
        """Read a held-out clip at a timestep, always with the same draw and noise.

        Raises:
            ValueError: the clip is not held out.
            CacheError: its data is damaged, or the cache cannot be reached.
        """
        if key not in self.held_out:
            raise ValueError(f"clip {key!r} is not among the {len(self.held_out)} held out")
        return self.fixed_batches(key, (timestep,))[0]

    def fixed_batches(self, key: str, timesteps: Sequence[int]) -> list[Batch]:
        """Read any clip once: a batch at each timestep, always with the same draw and noise.

        Args:
            key: of a clip with several sizes the first is read.

        Raises:
            ValueError: no bucket has the clip.
            CacheError: its data is damaged, or the cache cannot be reached.
        """
        for stores in self._buckets:
            if key in stores.keys or key in stores.held_out:
                break
        else:
            raise ValueError(f"clip {key!r} is not in the cache")
        arrays = read_clip(stores, key)
        batches = []
        for timestep in timesteps:
            generator = torch.Generator().manual_seed(seed_of_held_out(key, timestep))
            at = torch.tensor([timestep])
            batches.append(self._make_batch(stores, key, arrays, at, generator))
        return batches

    def _make_batch(
        self,
        stores: JoinedStores,
        key: str,
        arrays: Mapping[str, Mapping[str, Tensor]],
        timestep_1: Tensor,
        generator: torch.Generator,
    ) -> Batch:
        """Build a batch of one clip: draw its latents and its noise."""
        configs, latents = self._configs, arrays["latents"]
        clean_FCHW = configs.scale_latents(
            sample_posterior(latents["mean"], latents["std"], generator)
        )
        clean_FCHW = configs.pad_in_front(clean_FCHW)
        noise_FCHW = torch.randn(clean_FCHW.shape, generator=generator)
        image_FCHW = image_LD = None
        if configs.image_to_video:
            image_FCHW, image_LD = configs.condition(latents, len(clean_FCHW), generator)
        teacher = valid_BT = None
        if "teacher" in arrays:
            teacher = {name: array[None] for name, array in arrays["teacher"].items()}
            valid_BT = teacher.pop("valid") != 0
        masks = None
        if "masks" in arrays:
            masks = {name: array[None] for name, array in arrays["masks"].items()}
        visual = None
        if "visual" in arrays:
            visual = {name: array[None] for name, array in arrays["visual"].items()}
        return Batch(
            keys=(key,),
            clean_BFCHW=clean_FCHW[None],
            noise_BFCHW=noise_FCHW[None],
            timestep_B=timestep_1,
            text_BLD=arrays["text"]["embeds"][None],
            image_BFCHW=None if image_FCHW is None else image_FCHW[None],
            image_BLD=None if image_LD is None else image_LD[None],
            teacher=teacher,
            teacher_valid_BT=valid_BT,
            masks=masks,
            visual=visual,
            num_frames=stores.num_frames,
        )


def read_or_replace(
    stores: JoinedStores, clip: int, *, sample: int, seed: int
) -> tuple[str, dict[str, dict[str, Tensor]], tuple[DamagedClip, ...]]:
    """Read a clip or, if it is unreadable, the first readable replacement.

    The replacements depend only on the sample's number and the seed.

    Args:
        clip: index of the sample's own clip.
        sample: number of the sample.
        seed: seed of the run.

    Returns:
        Key and arrays of the clip that was read, and the unreadable clips: the sample's own,
        and the damaged ones among the replacements that were tried.

    Raises:
        CorruptClip: `ATTEMPTS` of the clips tried are damaged.
        ClipMissing: all of `GONE_ATTEMPTS` clips are gone.
        StoreUnreachable: the cache cannot be reached; nothing is known about the clip.
    """
    found: list[DamagedClip] = []
    damaged = 0
    for attempt in range(1, GONE_ATTEMPTS + 1):
        key = stores.keys[clip]
        try:
            return key, read_clip(stores, key), tuple(found)
        except UNREADABLE as error:
            unreadable, last = DamagedClip.from_error(error, key), error
        if attempt == 1 or not unreadable.gone:
            found.append(unreadable)
        damaged += not unreadable.gone
        if damaged == ATTEMPTS:
            raise CorruptClip(
                f"{ATTEMPTS} of {attempt} clips tried in a row cannot be read; the last error: "
                f"{last}",
                remedy=last.remedy,
                subject=last.subject,
            ) from last
        name = f"{seed}/sample/{sample}/instead/{attempt}"
        clip = hash63(name) % len(stores.keys)
    raise ClipMissing(
        f"{GONE_ATTEMPTS} clips in a row were removed or rewritten since the run opened its "
        f"stores; the last error: {last}; run the same command again to continue with the "
        "remaining clips"
    ) from last


def read_clip(stores: JoinedStores, key: str) -> dict[str, dict[str, Tensor]]:
    """Read a clip's stored arrays, by store (text, latents, teacher, masks, visual) and array name.

    Raises:
        CacheError: the clip is damaged or gone, or the cache cannot be reached.
    """
    readers = {
        "latents": stores.latents,
        "text": stores.text,
        "teacher": stores.teacher,
        "masks": stores.masks,
        "visual": stores.visual,
    }
    return {
        name: {array: torch.from_numpy(values) for array, values in reader.read(key).items()}
        for name, reader in readers.items()
        if reader is not None
    }


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches, in order."""
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
    damaged = tuple(clip for batch in batches for clip in batch.damaged)
    return replace(first, keys=keys, damaged=damaged, **tensors)
