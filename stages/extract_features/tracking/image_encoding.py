"""Runs SAM2's image encoder over a clip's frames, each once; for `two_way_tracking`."""

# Legend: T frame of a batch, S side of SAM2's square input, N position on a level, C channel.

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from stages.extract_features.tracking.encoded_frames import EncodedFrames, FrameStore
from stages.extract_features.tracking.sam2_inputs import normalise_for_sam2


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
