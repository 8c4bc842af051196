"""Folders of runs, written as training writes them."""

import json

import pytest

RUN = {"settings": {}, "provenance": {"command": "train <fast>"}, "processes": 2}
CONFIG = """train:
  steps: 40
  method: lora
  objectives: [lgf, mask]
  batch_size: 8
model:
  path: some/model
"""


def losses(steps):
    def by_timestep(step):
        seen = [None if (step + part) % 3 else float(step + part) for part in range(10)]
        counts = [0 if value is None else 2 for value in seen]
        return {"count": counts, "diffusion": seen, "lgf": seen, "mask": seen}

    return [
        {
            "step": step,
            "loss": 2.0 / step,
            "diffusion": 1.0 / step,
            "auxiliary": {"lgf": 3.0 / step, "mask": 4.0},
            "grad_norm": 0.5,
            "lr": 1e-4,
            "by_timestep": by_timestep(step),
        }
        for step in range(1, steps + 1)
    ]


def performance(steps):
    return [
        {
            "step": step,
            "seconds": 2.0,
            "wait_seconds": 0.5,
            "clips_per_second": 4.0,
            "peak_memory_bytes": 3_000_000_000,
            "share_of_peak": None,
        }
        for step in range(1, steps + 1)
    ]


def validation(step):
    return {
        "step": step,
        "clips": 3,
        "diffusion": 1.0 / (step + 1),
        "auxiliary": {"lgf": None, "mask": 2.0},
        "by_timestep": {
            "timestep": [100, 900],
            "diffusion": [1.0, 2.0],
            "lgf": [None, None],
            "mask": [1.0, 3.0],
        },
    }


@pytest.fixture
def make_run(tmp_path):
    """Write a run: make_run(steps, **files) -> its folder."""

    def make(steps=40, name="a run", **files):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(RUN))
        (folder / "config.yaml").write_text(CONFIG)
        rows = {
            "losses": losses(steps),
            "performance": performance(steps),
            "validation": [validation(0), validation(steps)],
        } | files
        for file, lines in rows.items():
            text = "".join(json.dumps(row) + "\n" for row in lines)
            (folder / f"{file}.jsonl").write_text(text)
        return folder

    return make


@pytest.fixture
def draw():
    """Leave a drawing in a run: draw(folder, step, prompts), each file of its own bytes."""

    def make(folder, step, prompts, size=30):
        place = folder / "samples" / f"step-{step:06d}"
        place.mkdir(parents=True)
        for number in range(len(prompts)):
            (place / f"{number}.mp4").write_bytes(f"{step}/{number}".encode().ljust(size))
        about = {"step": step, "prompts": prompts, "denoising_steps": 5, "guidance": 6.0}
        (place / "samples.json").write_text(json.dumps(about | {"seed": 0}))

    return make
