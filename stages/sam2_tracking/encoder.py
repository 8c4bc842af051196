"""A tracker's image encoder, run once per frame, and storage of its outputs.

Outputs are kept on the accelerator, in host memory, or in a temporary file.
"""

# Legend: T frame, S side of SAM2's square input, N position on a level of the image encoder
# (row-major), B frame of a batch, C channel.

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import numpy as np
import torch

from stages.sam2_tracking.inputs import normalise
from stages.sam2_tracking.model import EncodedImages, TrackerModel

KeepEncoded = Literal["device", "host", "disk"]
"""Where encoded frames are stored until they are tracked."""


class FrameStore(Protocol):
    """Storage of each frame's levels, in the order they were appended."""

    def __len__(self) -> int:
        """Return the number of frames."""

    def append(self, levels_NC: Sequence[torch.Tensor]) -> None:
        """Copy one frame's levels from the device; they may be views of a batch."""

    def read(self, index: int) -> list[torch.Tensor]:
        """Return one frame's levels [N, C] on the device."""

    def close(self) -> None:
        """Free the memory or the file."""


class EncodedFrames:
    """A clip's encoded frames, shared by all tracks of the clip. Close it after the last track.

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
        """Return the levels of some frames on the device.

        Args:
            indices: Positions in the clip, in any order; one may occur several times.

        Returns:
            [N, B, C] for each level, highest resolution first, B in the order of `indices`.
        """
        return gather_levels([(self, index) for index in indices])

    def read(self, index: int) -> list[torch.Tensor]:
        """Return the levels [N, C] of one frame on the device.

        Raises:
            IndexError: `index` is out of range.
        """
        if not 0 <= index < self.num_frames:
            raise IndexError(f"no frame {index} of a clip of {self.num_frames} frames")
        return self._frames.read(index)

    def close(self) -> None:
        """Free the frames, and the temporary file if there is one."""
        self._frames.close()

    def __enter__(self) -> "EncodedFrames":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def gather_levels(picks: Sequence[tuple[EncodedFrames, int]]) -> list[torch.Tensor]:
    """Return a batch of frames from one or several clips; each frame is read once.

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
    """Return an empty store.

    Args:
        keep: Where the frames are stored.
        device: Device that frames are copied from, and to when read.
        dtype: Storage dtype.
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
    """Frames on the accelerator."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._frames: list[list[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._frames)

    def append(self, levels_NC: Sequence[torch.Tensor]) -> None:
        # Copied, because a view would keep the whole batch alive.
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
    """Frames in host memory; page-locked if the device is a GPU, so that copies are asynchronous.

    One allocation per frame and level: torch rounds page-locked allocations up to powers of two,
    which SAM2's levels are and a whole clip's are not.
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
            # The copy may not have finished when this returns. Only the device reads the values
            # again, in the same stream, so the read is ordered after the copy.
            kept_NC.copy_(level_NC, non_blocking=True)
            frame.append(kept_NC)
        self._frames.append(frame)

    def read(self, index: int) -> list[torch.Tensor]:
        return [level_NC.to(self._device, non_blocking=True) for level_NC in self._frames[index]]

    def close(self) -> None:
        self._frames.clear()


class _OnDisk:
    """Frames in an unlinked temporary file, frame by frame and level by level.

    Plain reads and writes: pages of a memory map would count as this process's memory.
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
                f"{self._bytes_per_frame()} bytes per frame (extract.teacher.keep_encoded=disk); "
                "set TMPDIR to use another folder"
            )
            raise
        self._num_frames += 1

    def read(self, index: int) -> list[torch.Tensor]:
        # A new buffer each time: the previous copy to the GPU may still be running, and torch does
        # not reuse page-locked memory before it has finished.
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


def encode_frames(
    model: TrackerModel,
    frames_TSS3: np.ndarray,
    store: FrameStore,
    *,
    device: torch.device,
    frames_per_batch: int,
    arithmetic: Callable[[], AbstractContextManager[Any]],
) -> EncodedFrames:
    """Encode frames into an empty store, which is closed on failure.

    Args:
        model: The network.
        frames_TSS3: uint8, at least one.
        store: Receives the levels, batch by batch.
        device: The network's.
        frames_per_batch: Frames per pass.
        arithmetic: Returns the context (autocast) in which the encoder runs.

    Raises:
        ValueError: There are no frames, or torch.compile fails.
    """
    if not len(frames_TSS3):
        raise ValueError("there are no frames to encode")
    try:
        for start in range(0, len(frames_TSS3), frames_per_batch):
            batch_TSS3 = frames_TSS3[start : start + frames_per_batch]
            images_T3SS = normalise(batch_TSS3, device, model.pixel_mean, model.pixel_std)
            images = _encode_batch(model, images_T3SS, arithmetic)
            for t in range(len(batch_TSS3)):
                store.append([level_NTC[:, t] for level_NTC in images.levels_NBC])
    except BaseException:
        store.close()
        raise
    positions_NBC = images.positions_NBC[:, :1].clone()
    return EncodedFrames(store, positions_NBC=positions_NBC, sizes=images.sizes)


def _encode_batch(
    model: TrackerModel,
    images_T3SS: torch.Tensor,
    arithmetic: Callable[[], AbstractContextManager[Any]],
) -> EncodedImages:
    try:
        with arithmetic():
            return model.encode_images(images_T3SS)
    except RuntimeError as error:
        if not _is_from_compiler(error):
            raise
        raise ValueError(
            f"torch.compile cannot compile the tracker's image encoder on this machine ({error}); "
            "set extract.teacher.compile=false"
        ) from error


def _is_from_compiler(error: RuntimeError) -> bool:
    # Imported here, because it takes seconds.
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)
