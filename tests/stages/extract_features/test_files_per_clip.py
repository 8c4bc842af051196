"""Number of files per clip, for every kind of store."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cache_schema
from cache_schema import ArraySpec, StoreSettings, StoreWriter
from stages.clips import ClipsConfig
from stages.extract_features.config import (
    ExtractConfig,
    Kind,
    LatentsConfig,
    TeacherConfig,
    VisualConfig,
)
from stages.extract_features.latents import latents_arrays
from stages.extract_features.teacher.stores import subject_settings
from stages.extract_features.text import text_arrays
from stages.extract_features.visual.encoder import VisualLayout
from stages.extract_features.visual.extraction import visual_settings
from stages.students.cogvideox.configs import CogVideoXConfigs
from stages.teacher_store.config import GramFlowConfig
from tests.fingerprints import fingerprint_of

FEWEST: Mapping[Kind, int] = {
    "text": 1,
    "latents": 2,
    "teacher": 2,
    "gram_flow": 2,
    "masks": 3,
    "visual": 2,
}
MOST: Mapping[Kind, int] = {**FEWEST, "latents": 4, "teacher": 3, "gram_flow": 7, "visual": 3}


def arrays_of_all_kinds(
    teacher: TeacherConfig, gram_flow: GramFlowConfig, *, image_to_video: bool
) -> dict[Kind, dict[str, ArraySpec]]:
    """With the defaults of everything that is not given."""
    clips = ClipsConfig(path=Path("clips"))
    transformer = {
        "in_channels": 32 if image_to_video else 16,
        "out_channels": 16,
        "max_text_seq_length": 226,
        "text_embed_dim": 4096,
    }
    vae = {"latent_channels": 16}
    base = CogVideoXConfigs(folder=Path("base"), transformer=transformer, vae=vae, scheduler={})
    tracked = subject_settings(teacher, clips, {}, gram_flow=gram_flow, channels=256, stride=16)
    layout = VisualLayout(
        model_class=None,
        own=SimpleNamespace(model_type="dinov2", hidden_size=768),
        image_size=(420, 630),
        grid=(30, 45),
        frames_per_map=1,
        maps=49,
        window=None,
    )
    visual = VisualConfig(dtype=teacher.dtype)
    return {
        "visual": visual_settings(visual, clips, layout, checkpoint_sha256="").arrays,
        "text": text_arrays(base),
        "latents": latents_arrays(LatentsConfig(), clips, base),
        **{kind: settings.arrays for kind, settings in tracked.items()},
    }


def files_per_clip(folder: Path, kind: str, arrays: Mapping[str, ArraySpec]) -> int:
    """What a second clip adds to a shard, with the arrays of one value each."""
    small = {name: replace(spec, shape=(1,) * len(spec.shape)) for name, spec in arrays.items()}
    writer = StoreWriter.open(
        folder, StoreSettings(kind=kind, arrays=small, values={}), provenance={}
    )
    ones = {name: np.ones(spec.shape, spec.dtype) for name, spec in small.items()}
    counts = []
    for clips in (["a"], ["b", "c"]):
        with writer.shard(clips[0], source="") as shard:
            for key in clips:
                shard.add(key, ones, fingerprint=fingerprint_of(key))
            shard.commit()
        counts.append(sum(1 for _ in (writer.path / "shards" / clips[0]).rglob("*")))
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("teacher", "gram_flow", "image_to_video", "expected"),
    [
        (TeacherConfig(), GramFlowConfig(), False, FEWEST),
        (TeacherConfig(dtype="int8"), GramFlowConfig(pairs="crossed", dtype="uint8"), True, MOST),
    ],
    ids=["fewest", "most"],
)
def test_a_clip_costs_a_file_an_array(
    tmp_path: Path,
    teacher: TeacherConfig,
    gram_flow: GramFlowConfig,
    image_to_video: bool,
    expected: Mapping[Kind, int],
) -> None:
    arrays = arrays_of_all_kinds(teacher, gram_flow, image_to_video=image_to_video)
    found = {kind: files_per_clip(tmp_path, kind, arrays[kind]) for kind in arrays}
    assert found == expected


def test_the_kinds_of_a_default_extraction_cost_eight_files_a_clip() -> None:
    assert sum(FEWEST[kind] for kind in ExtractConfig().kinds) == 8


def test_the_readme_lists_the_files_of_every_kind() -> None:
    text = Path(cache_schema.__file__).with_name("README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([0-9]+) \| ([0-9]+)", text, flags=re.M)
    assert {kind: (int(few), int(most)) for kind, few, most in rows} == {
        kind: (FEWEST[kind], MOST[kind]) for kind in FEWEST
    }
