"""The demo's trained SAM2 through the sam2 package and through transformers: the same stores."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.sam2_video import modeling_sam2_video

from stages.clips import ClipRecord, ClipsConfig, ClipSkipped
from stages.extract_features.config import TeacherConfig
from stages.extract_features.extraction import Extracted
from stages.extract_features.teacher.extraction import SubjectExtraction
from stages.sam2_tracking.build import build_sam2
from stages.teacher_store.config import GramFlowConfig
from tests.stages.sam2_tracking.transformers_weights import to_transformers

MEMORY_WIDTH = 16


@pytest.fixture
def narrow_memories() -> Iterator[None]:
    """Memory attention with the demo's memories of 16 channels; transformers' own has 64."""
    attention = modeling_sam2_video.Sam2VideoRoPEAttention
    build = attention.__init__

    def narrow(self: Any, config: Any, kv_in_dim: int | None = None, **options: Any) -> None:
        build(self, config, kv_in_dim and MEMORY_WIDTH, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "__init__", narrow)
        yield


def extracted(
    config: TeacherConfig, clips: ClipsConfig, record: ClipRecord
) -> tuple[SubjectExtraction, dict[Any, Extracted]]:
    flow = GramFlowConfig(radius=1)
    extraction = SubjectExtraction(
        config, clips, gram_flow=flow, kinds=("teacher", "gram_flow", "masks")
    )
    with extraction.load_model(torch.device("cpu")) as run:
        [outcome] = run([extraction.prepare(record)])
    assert not isinstance(outcome, ClipSkipped), outcome
    return extraction, dict(outcome)


def test_a_clip_gets_the_same_features_and_masks_in_stores_of_their_own(
    packaged_sam2: Path,
    clips: ClipsConfig,
    record: ClipRecord,
    narrow_memories: None,
    tmp_path: Path,
    assert_close_arrays: Callable[..., None],
) -> None:
    files = packaged_sam2 / "tiny.yaml", packaged_sam2 / "tiny.safetensors"
    to_transformers(build_sam2(*files)).save_pretrained(tmp_path)
    base = TeacherConfig(image_size=128, prompts=("dataset",))
    sam2, ours = extracted(
        base.model_copy(update={"checkpoint": str(files[1]), "config": str(files[0])}),
        clips,
        record,
    )
    transformers, theirs = extracted(
        base.model_copy(update={"checkpoint": str(tmp_path)}), clips, record
    )
    for kind, entry in ours.items():
        assert_close_arrays(kind, entry, theirs[kind])
        assert sam2.settings[kind].folder_name != transformers.settings[kind].folder_name
        assert sam2.settings[kind].arrays == transformers.settings[kind].arrays
    assert "tracker" not in sam2.settings["teacher"].values
    values = transformers.settings["teacher"].values
    assert values["tracker"] == "transformers.Sam2VideoModel"
    assert "sam2_config_sha256" not in values


@pytest.fixture
def assert_close_arrays() -> Callable[..., None]:
    """Features in float16 and similarities in float16 to a few steps, masks to one level of 255."""

    def check(kind: str, ours: Extracted, theirs: Extracted) -> None:
        for name, array in ours.arrays.items():
            other = theirs.arrays[name]
            if name == "valid":
                assert array.all() and np.array_equal(array, other)
                continue
            difference = np.abs(array.astype(np.float64) - other)
            assert difference.max() <= (1 if kind == "masks" else 2e-3), (kind, name)
        ours_quality, theirs_quality = ours.attributes["quality"], theirs.attributes["quality"]
        assert abs(ours_quality - theirs_quality) < 1e-2  # type: ignore[operator]

    return check
