"""Where encoded frames wait changes nothing, and bounds what is held."""

import tempfile
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.encoder import (
    EncodedFrames,
    KeepEncoded,
    gather_levels,
    open_store,
)
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.tracker import Tracker, TrackRequest
from tests.bfloat16_attention import NEEDS_BFLOAT16_ATTENTION

SIZE = 128
CPU = torch.device("cpu")
KEEP: tuple[KeepEncoded, ...] = ("device", "host", "disk")


def random_frames(num_frames: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed)
    return noise.integers(0, 255, (num_frames, SIZE, SIZE, 3), dtype=np.uint8)


def box() -> Sam2Prompt:
    return Sam2Prompt(
        points_1P2=torch.tensor([[[30.0, 40.0], [90.0, 100.0]]]),
        point_labels_1P=torch.tensor([[2, 3]], dtype=torch.int32),
    )


def filled(keep: Any, dtype: torch.dtype, seed: int = 0) -> EncodedFrames:
    """Four frames of two levels, appended as views of a batch, as the encoder gives them."""
    store = open_store(keep, CPU, dtype)
    noise = torch.Generator().manual_seed(seed)
    levels_NTC = [torch.randn(12, 4, 2, generator=noise), torch.randn(3, 4, 8, generator=noise)]
    for t in range(4):
        store.append([level_NTC[:, t] for level_NTC in levels_NTC])
    return EncodedFrames(store, positions_NBC=torch.zeros(3, 1, 8), sizes=((3, 4), (1, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", KEEP)
def test_frames_are_read_as_they_were_written(keep: str, dtype: torch.dtype) -> None:
    noise = torch.Generator().manual_seed(0)
    levels_NTC = [torch.randn(12, 4, 2, generator=noise), torch.randn(3, 4, 8, generator=noise)]
    with filled(keep, dtype) as encoded:
        assert encoded.num_frames == 4
        for indices in ([2], [3, 0, 3], [0, 1, 2, 3]):
            for read_NBC, level_NTC in zip(encoded.levels_at(indices), levels_NTC, strict=True):
                assert torch.equal(read_NBC, level_NTC[:, indices].to(dtype))


def test_frames_of_several_clips_make_one_batch() -> None:
    clips = [filled("disk", torch.float32, seed=seed) for seed in range(2)]
    picks = [(clips[1], 3), (clips[0], 0), (clips[1], 3)]
    batch = gather_levels(picks)
    for level, read_NBC in enumerate(batch):
        expected = [clip.levels_at([index])[level] for clip, index in picks]
        assert torch.equal(read_NBC, torch.cat(expected, dim=1))


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("index", [4, -1])
def test_a_frame_that_is_not_there_is_an_error(keep: str, index: int) -> None:
    with pytest.raises(IndexError, match=f"frame {index} of a clip of 4 frames"):
        filled(keep, torch.float32).levels_at([index])


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16", marks=NEEDS_BFLOAT16_ATTENTION)]
)
def test_where_frames_wait_changes_no_bit(precision: Any, tiny_sam2: tuple[Path, Path]) -> None:
    frames_TSS3 = random_frames(4)
    tracks = []
    for keep in KEEP:
        tracker = Tracker(build_sam2(*tiny_sam2), precision=precision, keep_encoded=keep)
        with tracker.encode(frames_TSS3) as encoded:
            request = TrackRequest(encoded=encoded, prompt=box(), order=range(4))
            tracks.append([frame for (frame,) in tracker.track([request])])
    for track in tracks[1:]:
        for ours, theirs in zip(track, tracks[0], strict=True):
            assert torch.equal(ours.mask_logits_HW, theirs.mask_logits_HW)
            for kind, feature in ours.features.items():
                assert torch.equal(feature, theirs.features[kind])


@pytest.mark.parametrize("frames_per_batch", [3, 4])
def test_encoding_several_frames_at_once_changes_rounding_only(
    frames_per_batch: int, tiny_sam2: tuple[Path, Path]
) -> None:
    frames_TSS3 = random_frames(7)
    model = build_sam2(*tiny_sam2)
    single = Tracker(model, precision="fp32").encode(frames_TSS3)
    batched = Tracker(model, precision="fp32", frames_per_batch=frames_per_batch).encode(
        frames_TSS3
    )
    assert single.sizes == batched.sizes == ((32, 32), (16, 16), (8, 8))
    assert batched.num_frames == 7
    torch.testing.assert_close(single.positions_NBC, batched.positions_NBC)
    for ours, theirs in zip(batched.levels_at(range(7)), single.levels_at(range(7)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


def test_no_frames_are_refused(tiny_sam2: tuple[Path, Path]) -> None:
    tracker = Tracker(build_sam2(*tiny_sam2), precision="fp32")
    with pytest.raises(ValueError, match="no frames to encode"):
        tracker.encode(random_frames(0))


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages that tensors made meanwhile refer to; now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.references: Counter[int] = Counter()
        self.bytes_now = 0
        self.bytes_most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return outputs

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        self.references[address] += 1
        if self.references[address] == 1:
            self.bytes_now += size
            self.bytes_most = max(self.bytes_most, self.bytes_now)
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self.references[address] -= 1
        if self.references[address] == 0:
            self.bytes_now -= size


def peak_bytes(tracker: Tracker, num_frames: int, *, tracked: bool) -> int:
    """Of the tensors that are alive at once while a clip is encoded and tracked."""
    frames_TSS3 = np.repeat(random_frames(1), num_frames, axis=0)
    with _LiveBytes() as live, tracker.encode(frames_TSS3) as encoded:
        order = range(num_frames)[::-1]
        request = TrackRequest(encoded=encoded, prompt=box(), order=order)
        for _ in tracker.track([request]) if tracked else ():
            pass
    return live.bytes_most


@pytest.mark.parametrize(
    ("shorter", "longer"), [(18, 24), pytest.param(20, 500, marks=pytest.mark.slow)]
)
def test_the_memory_on_the_accelerator_does_not_grow_with_the_clip(
    shorter: int, longer: int, tiny_sam2: tuple[Path, Path]
) -> None:
    """Both lengths fill the bank, which holds 16 steps."""
    model = build_sam2(*tiny_sam2)
    disk = Tracker(model, precision="fp32", keep_encoded="disk")
    before, after = (peak_bytes(disk, length, tracked=True) for length in (shorter, longer))
    assert after - before < 0.01 * before
    # What is measured does see the frames where they are kept.
    device = Tracker(model, precision="fp32", keep_encoded="device")
    before, after = (peak_bytes(device, length, tracked=False) for length in (shorter, longer))
    bytes_per_frame = 4 * (32 * 32 * 4 + 16 * 16 * 8 + 8 * 8 * 32)
    assert after - before == pytest.approx((longer - shorter) * bytes_per_frame, rel=0.02)


def test_the_file_is_gone_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    encoded = filled("disk", torch.float32)
    assert list(tmp_path.iterdir()) == []  # it has no name from the start
    encoded.close()
    with pytest.raises(ValueError, match="closed file"):
        encoded.levels_at([0])


def test_a_full_disk_names_the_folder_and_the_setting(
    monkeypatch: pytest.MonkeyPatch, tiny_sam2: tuple[Path, Path]
) -> None:
    opened: list[Any] = []

    def full(*arguments: Any, **settings: Any) -> Any:
        opened.append(open("/dev/full", "w+b", buffering=0))  # noqa: PTH123, SIM115
        return opened[0]

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    tracker = Tracker(build_sam2(*tiny_sam2), precision="fp32", keep_encoded="disk")
    with pytest.raises(OSError, match="No space left") as caught:
        tracker.encode(random_frames(1))
    assert "extract.teacher.keep_encoded=disk" in caught.value.__notes__[0]
    assert opened[0].closed
