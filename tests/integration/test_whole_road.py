"""The commands a newcomer types, in processes of their own, on a demo that is small and quick."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cache_schema import StoreReader
from stages.clips import read_video

SMALL = (
    "demo.num_clips=3",
    "demo.clips_per_tar=2",
    "data.num_frames=9",
    "data.height=64",
    "data.width=96",
    "train.steps=2",
    "train.batch_size=2",
    "train.micro_batch_size=1",
    "train.validation.clips=1",
    "train.samples.steps=2",
    "sample.steps=2",
    "extract.max_skipped=1",
    "evaluate.max_skipped=1",
)


def run(root: Path, command: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pipeline",
            command,
            "--json",
            *arguments,
            f"demo.root={root}",
            *SMALL,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def files(root: Path) -> dict[str, int]:
    """When each finished thing was last written."""
    finished = (
        *("clips", "models", "cache", "runs/lgf/checkpoints", "runs/lgf/export"),
        *("evaluation/videos", "evaluation/tracks"),
    )
    return {
        str(file.relative_to(root)): file.stat().st_mtime_ns
        for part in finished
        for file in (root / part).rglob("*")
        if file.is_file()
    }


def test_demo_walks_the_road_once_and_redoes_nothing(tmp_path: Path) -> None:
    first = run(tmp_path, "demo")
    assert first["extract"]["text"]["clips_written"] == 3
    assert first["train"]["steps_done"] == 2
    trained, base = first["evaluate"]["videos"].values()
    assert len(trained) == len(base) == first["evaluate"]["pairs"] == 6
    frames_THWC, fps = read_video(Path(trained[0]))
    assert (frames_THWC.shape, fps) == ((9, 64, 96, 3), 16)
    assert frames_THWC.std() > 0
    assert "<video" in Path(first["train"]["page"]).read_text(encoding="utf-8")
    assert Path(first["evaluate"]["page"]).read_text(encoding="utf-8").count("<video") == 12
    for step in ("inspect", "overlay"):
        with Image.open(first[step]["picture"]) as picture:
            assert picture.width > 100
    made = files(tmp_path)

    again = run(tmp_path, "demo")
    for kind in ("text", "latents", "teacher", "masks"):
        assert again["extract"][kind]["clips_written"] == 0
    assert again["train"]["already_finished"]
    assert files(tmp_path) == made


@pytest.mark.slow
def test_image_to_video_walks_the_same_road(tmp_path: Path) -> None:
    image = tmp_path / "first.png"
    Image.new("RGB", (96, 64), "tan").save(image)
    demo = ("--config", "demo", "demo.image_to_video=true")
    run(tmp_path, "extract-features", *demo)
    trained = run(tmp_path, "train", *demo, f"train.samples.images=[{image}]")
    assert trained["steps_done"] == 2
    sampled = run(
        tmp_path,
        "sample",
        "--prompt",
        "A biped walks to the left.",
        "--image",
        str(image),
        *demo,
    )
    assert read_video(Path(sampled["videos"][0]["video"]))[0].shape == (9, 64, 96, 3)


@pytest.mark.slow
def test_image_to_video_demo_tracks_its_videos_from_the_clips_masks(tmp_path: Path) -> None:
    answer = run(tmp_path, "demo", "--config", "demo-i2v")
    assert answer["evaluate"]["reference"]["clips"] == 1
    for (video,) in answer["evaluate"]["videos"].values():
        with Image.open(Path(video).with_suffix(".mask.png")) as mask:
            assert mask.size == (96, 64)
    prompts = set()
    for name in ("videos", "against", "reference"):
        (store,) = (tmp_path / "evaluation" / "tracks").glob(f"{name}-*/masks-*")
        reader = StoreReader(store)
        for key in reader.keys:
            prompt: Any = reader.record(key).attributes["prompt"]
            prompts.add((prompt["source"], *prompt["kinds"]))
    assert prompts == {("dataset", "mask")}
