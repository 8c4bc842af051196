"""extract.teacher.compile: the compiled image encoder against the plain one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.tracker import Tracker

SIZE = 128


def frames(num_frames: int) -> np.ndarray:
    noise = np.random.default_rng(0)
    return noise.integers(0, 255, (num_frames, SIZE, SIZE, 3), dtype=np.uint8)


def assert_close(compiled: EncodedFrames, plain: EncodedFrames) -> None:
    everything = range(plain.num_frames)
    assert compiled.num_frames == plain.num_frames
    for ours, theirs in zip(
        compiled.levels_at(everything), plain.levels_at(everything), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled.positions_NBC, plain.positions_NBC)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_compiled_encoder_differs_by_rounding_only(tiny_sam2: tuple[Path, Path]) -> None:
    plain = Tracker(build_sam2(*tiny_sam2), precision="fp32")
    compiled = Tracker(build_sam2(*tiny_sam2), precision="fp32", compile=True)
    assert_close(compiled.encode(frames(2)), plain.encode(frames(2)))


def test_the_traced_encoder_equals_the_plain_one(tiny_sam2: tuple[Path, Path]) -> None:
    """Compilation without its last and longest part, the machine code."""
    plain = Tracker(build_sam2(*tiny_sam2), precision="fp32").encode(frames(2))
    traced = Tracker(build_sam2(*tiny_sam2), precision="fp32", frames_per_batch=2)
    traced.model.image_encoder.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    assert_close(traced.encode(frames(2)), plain)


def test_the_encoder_is_what_is_compiled(
    tiny_sam2: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__)
    )
    Tracker(build_sam2(*tiny_sam2), precision="fp32")
    assert compiled == []
    Tracker(build_sam2(*tiny_sam2), precision="fp32", compile=True)
    assert compiled == ["ImageEncoder"]


def test_a_failure_to_compile_names_the_setting(tiny_sam2: tuple[Path, Path]) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    model = build_sam2(*tiny_sam2)
    tracker = Tracker(model, precision="fp32")
    # What compile() leaves behind, with a backend that fails as one without a compiler does.
    model.image_encoder.compile(backend=broken)
    with pytest.raises(ValueError, match=r"(?s)no C\+\+ compiler.*extract\.teacher\.compile=false"):
        tracker.encode(frames(1))


def test_other_errors_of_the_encoder_stay_what_they_are(
    tiny_sam2: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(build_sam2(*tiny_sam2), precision="fp32")

    def out_of_memory(_: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(tracker.model, "forward_image", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        tracker.encode(frames(1))
