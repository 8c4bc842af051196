"""Folders of small videos with masks, scored with the tiny SAM2."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.clips import ClipsConfig, write_video
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluate import score_side
from stages.evaluate.frame_scorer import FrameScorer
from stages.evaluate.reference import open_reference, track_reference
from stages.evaluate.videos import open_side
from stages.progress import SilentProgress

FRAMES, HEIGHT, WIDTH = 9, 32, 48
CLIPS = ClipsConfig(path=Path("unused"), num_frames=FRAMES, height=HEIGHT, width=WIDTH, fps=8.0)


@pytest.fixture
def videos(draw_frames, subject_mask, tmp_path):
    """Returns a function that writes videos of a seed, with a mask beside each."""

    def write(folder, *keys, seed=0, height=HEIGHT, width=WIDTH):
        for number, key in enumerate(keys):
            path = tmp_path / folder / f"{key}.mp4"
            write_video(path, draw_frames(FRAMES, height, width, seed=10 * seed + number), 8.0)
            mask = subject_mask(height, width).astype(np.uint8) * 255
            Image.fromarray(mask).save(path.with_suffix(".mask.png"))
        return tmp_path / folder

    return write


@pytest.fixture
def score(extract_config, tmp_path):
    """Returns a function that scores a folder of videos."""

    def run(folder, config=None, *, extract=None, reference=None):
        return score_side(
            open_side(folder.name, folder),
            config or EvaluateConfig(),
            extract or extract_config,
            CLIPS,
            cache=tmp_path / "tracks" / folder.name,
            frames=FrameScorer(tmp_path / "frame-scores", config or EvaluateConfig()),
            temperature=0.1,
            provenance={},
            progress=SilentProgress(),
            reference=reference,
        )

    return run


@pytest.fixture
def track(extract_config, tmp_path):
    """Returns a function that tracks reference clips."""

    def run(path, *, clips=CLIPS):
        return track_reference(
            open_reference(path, clips),
            extract_config,
            clips,
            cache=tmp_path / "tracks" / f"reference-{path.name}",
            temperature=0.1,
            provenance={},
            progress=SilentProgress(),
        )

    return run
