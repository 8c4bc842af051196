"""SAM2's image encoder over a clip's frames, each once, and storage of its outputs.

Outputs wait on the accelerator, in host memory, or in a file.
"""

# Legend: N position on a level of the image encoder (row-major), B frame of a batch, C channel.

import tempfile

# Legend: T frame of a batch, S side of SAM2's square input, N position on a level, C channel.
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import numpy as np
import torch

from stages.sam2_tracking.inputs import normalise_for_sam2

KeepEncoded = Literal["device", "host", "disk"]
"""Where encoded frames wait."""


class FrameStore(Protocol):
    """The levels of each frame, in the order they were appended."""

    def __len__(self) -> int:
        """How many frames there are."""

    def append(self, levels_NC: Sequence[torch.Tensor]) -> None:
        """Copy one frame's levels from the device; what is given may be a view of a batch."""

    def read(self, index: int) -> list[torch.Tensor]:
        """One frame's levels [N, C], on the device."""

    def close(self) -> None:
        """Let go of everything."""


class EncodedFrames:
    """A clip's encoded frames; every track of the clip reads them. Close it when they are done.

    Args:
        frames: The levels of every frame, highest resolution first.
        positions_NBC: Position encoding of the last level, the same for every frame; B is 1.
        sizes: Height and width of each level.
    """

    def __init__(
        self,
        frames: FrameStore,
        *,
        positions_NBC: torch.Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        self._frames = frames
        self.positions_NBC = positions_NBC
        self.sizes = tuple(sizes)

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self._frames)

    def levels_at(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """The levels of some frames, on the device.

        Args:
            indices: Positions in the clip, in any order; one may occur several times.

        Returns:
            [N, B, C] for each level, highest resolution first, B in the order of `indices`.
        """
        return gather_levels([(self, index) for index in indices])

    def read(self, index: int) -> list[torch.Tensor]:
        """The levels [N, C] of one frame, on the device.

        Raises:
            IndexError: The clip has no such frame.
        """
        if not 0 <= index < self.num_frames:
            raise IndexError(f"frame {index} of a clip of {self.num_frames} frames")
        return self._frames.read(index)

    def close(self) -> None:
        """Let go of the frames, and of the file where they are in one."""
        self._frames.close()

    def __enter__(self) -> "EncodedFrames":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def gather_levels(picks: Sequence[tuple[EncodedFrames, int]]) -> list[torch.Tensor]:
    """One batch of frames, of one clip or of several; each is read once.

    Args:
        picks: Clip and position in it, in the order of the batch.

    Returns:
        [N, B, C] for each level.
    """
    read: dict[tuple[int, int], list[torch.Tensor]] = {}
    for encoded, index in picks:
        if (id(encoded), index) not in read:
            read[id(encoded), index] = encoded.read(index)
    frames = [read[id(encoded), index] for encoded, index in picks]
    if len(frames) == 1:
        return [level_NC[:, None] for level_NC in frames[0]]
    return [torch.stack(level_BNC).transpose(0, 1) for level_BNC in zip(*frames, strict=True)]


def open_store(keep: KeepEncoded, device: torch.device, dtype: torch.dtype) -> FrameStore:
    """An empty store.

    Args:
        keep: Where the frames wait.
        device: Where they come from, and go to when they are read.
        dtype: The format in which they are kept.
    """
    match keep:
        case "device":
            return _OnDevice(dtype)
        case "host":
            return _OnHost(device, dtype)
        case "disk":
            return _OnDisk(device, dtype)
    raise ValueError(f"keep_encoded must be device, host or disk, got {keep!r}")


class _OnDevice:
    """As they come."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._frames: list[list[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._frames)

    def append(self, levels_NC: Sequence[torch.Tensor]) -> None:
        # Copied, because a view would keep the whole batch.
        self._frames.append(
            [
                level_NC.to(self._dtype, copy=True, memory_format=torch.contiguous_format)
                for level_NC in levels_NC
            ]
        )

    def read(self, index: int) -> list[torch.Tensor]:
        return self._frames[index]

    def close(self) -> None:
        self._frames.clear()


class _OnHost:
    """In the host's memory; page-locked where the device is a GPU, so that copies do not wait.

    One allocation per frame and level: torch rounds page-locked memory up to powers of two, which
    SAM2's levels are and a clip's are not.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._frames: list[list[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._frames)

    def append(self, levels_NC: Sequence[torch.Tensor]) -> None:
        frame = []
        for level_NC in levels_NC:
            kept_NC = torch.empty(
                level_NC.shape, dtype=self._dtype, pin_memory=self._device.type == "cuda"
            )
            # The device may still be at it when this returns; only the device reads it again, in
            # the same stream, so that it comes later there.
            kept_NC.copy_(level_NC, non_blocking=True)
            frame.append(kept_NC)
        self._frames.append(frame)

    def read(self, index: int) -> list[torch.Tensor]:
        return [level_NC.to(self._device, non_blocking=True) for level_NC in self._frames[index]]

    def close(self) -> None:
        self._frames.clear()


class _OnDisk:
    """In an unlinked temporary file, one frame after the other, each its levels one by one.

    Plain reads and writes: a memory map would count as this process's memory as it is read.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open until close()
        self._num_frames = 0
        self._shapes: list[torch.Size] = []

    def __len__(self) -> int:
        return self._num_frames

    def append(self, levels_NC: Sequence[torch.Tensor]) -> None:
        self._shapes = [level_NC.shape for level_NC in levels_NC]
        self._file.seek(self._num_frames * self._bytes_per_frame())
        try:
            for level_NC in levels_NC:
                values_NC = level_NC.to("cpu", self._dtype).contiguous()
                self._file.write(values_NC.flatten().view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            error.add_note(
                f"writing encoded frames to a temporary file in {tempfile.gettempdir()}: "
                f"{self._bytes_per_frame()} bytes a frame (extract.teacher.keep_encoded=disk); "
                "TMPDIR names another folder"
            )
            raise
        self._num_frames += 1

    def read(self, index: int) -> list[torch.Tensor]:
        # A fresh buffer each time: the copy to a GPU may still be going on at the next read, and
        # torch does not hand page-locked memory out again before.
        buffer = torch.empty(
            self._bytes_per_frame(), dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )
        self._file.seek(index * len(buffer))
        if self._file.readinto(buffer.numpy().data) != len(buffer):
            raise OSError(f"the temporary file of encoded frames ends within frame {index}")
        levels_NC = []
        for level, shape in zip(buffer.split(self._level_bytes()), self._shapes, strict=True):
            values_NC = level.view(self._dtype).reshape(shape)
            levels_NC.append(values_NC.to(self._device, non_blocking=True))
        return levels_NC

    def close(self) -> None:
        self._file.close()

    def _level_bytes(self) -> list[int]:
        return [shape.numel() * self._dtype.itemsize for shape in self._shapes]

    def _bytes_per_frame(self) -> int:
        return sum(self._level_bytes())


def compile_image_encoder(model: Any) -> None:
    """Have a SAM2Base's image encoder compiled, in place, when it is next used."""
    # The last batch of a clip is often smaller: a second fixed shape beats one of unknown size.
    model.image_encoder.compile(dynamic=False)


def encode_frames(
    model: Any,
    frames_TSS3: np.ndarray,
    store: FrameStore,
    *,
    frames_per_batch: int,
    arithmetic: Callable[[], AbstractContextManager[Any]],
) -> EncodedFrames:
    """Encode frames into an empty store; it is closed when that fails.

    Args:
        model: A SAM2Base.
        frames_TSS3: uint8, at least one.
        store: Where the levels go, a batch at a time.
        frames_per_batch: Frames per pass.
        arithmetic: Makes the context in which the encoder runs.

    Raises:
        ValueError: There is no frame, or torch.compile fails.
    """
    if not len(frames_TSS3):
        raise ValueError("there are no frames to encode")
    try:
        for start in range(0, len(frames_TSS3), frames_per_batch):
            batch_TSS3 = frames_TSS3[start : start + frames_per_batch]
            positions_NBC, sizes = _encode_batch(model, batch_TSS3, store, arithmetic)
    except BaseException:
        store.close()
        raise
    return EncodedFrames(store, positions_NBC=positions_NBC, sizes=sizes)


def _encode_batch(
    model: Any,
    frames_TSS3: np.ndarray,
    store: FrameStore,
    arithmetic: Callable[[], AbstractContextManager[Any]],
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    images_T3SS = normalise_for_sam2(frames_TSS3, model.device)
    try:
        with arithmetic():
            outputs = model.forward_image(images_T3SS)
    except RuntimeError as error:
        if not _is_from_compiler(error):
            raise
        raise ValueError(
            f"torch.compile cannot compile SAM2's image encoder on this machine ({error}); "
            "set extract.teacher.compile=false"
        ) from error
    _, levels_NTC, positions_NTC, sizes = model._prepare_backbone_features(outputs)
    for t in range(len(frames_TSS3)):
        store.append([level_NTC[:, t] for level_NTC in levels_NTC])
    return positions_NTC[-1][:, :1].clone(), sizes


def _is_from_compiler(error: RuntimeError) -> bool:
    # Importing it takes seconds, which only those who compile should wait.
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)
