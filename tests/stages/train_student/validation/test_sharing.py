"""How the ranks share the videos drawn during training."""

import json
import threading
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from stages.train_student.config import TrainConfig
from stages.train_student.parallel.process_group import World
from stages.train_student.validation import samples as module
from stages.train_student.validation.samples import TrainingSamples

PROMPTS = tuple(f"prompt {number}" for number in range(5))
FRAMES, HEIGHT, WIDTH = 4, 16, 16


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_each_rank_makes_as_many_videos_and_each_video_counts_once(
    size, tiny, monkeypatch, tmp_path
):
    """Ranks are threads; a video is as bright as its prompt's number says."""
    drawn, written, gathered = Counter(), [], [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def generate(pipeline, clips, *, prompt_embeds, **options):
        drawn[threading.current_thread().name] += 1
        return np.full((FRAMES, HEIGHT, WIDTH, 3), prompt_embeds.item(), np.float32)

    def gather(world, value):
        gathered[world.rank] = value
        barrier.wait()
        return list(gathered)

    monkeypatch.setattr(module, "image_parts", lambda *_: ())
    monkeypatch.setattr(module, "resolve_base_model", lambda *_: tmp_path)
    monkeypatch.setattr(module, "live_pipeline", lambda *_, **__: nullcontext())
    monkeypatch.setattr(module, "eval_mode", lambda *_: nullcontext())
    monkeypatch.setattr(module, "generate_video", generate)
    monkeypatch.setattr(module, "gather", gather)
    monkeypatch.setattr(module, "on_first_rank", lambda world, do: do() if world.is_first else None)
    monkeypatch.setattr(module, "write_video", lambda path, *_: written.append(path.name))
    (tmp_path / "samples" / "step-000003").mkdir(parents=True)

    def draw(rank):
        run = SimpleNamespace(
            config=TrainConfig(run_dir=tmp_path, samples={"prompts": PROMPTS, "guidance": 1.0}),
            clips=SimpleNamespace(sizes=[tiny.CLIPS]),
            configs=SimpleNamespace(folder=tmp_path),
            model=None,
            dtype=torch.float32,
            world=World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu")),
        )
        embeds = {prompt: torch.tensor(n / 10) for n, prompt in enumerate(PROMPTS)}
        TrainingSamples(run, embeds)(nn.Linear(1, 1), 3, lambda text: None)

    threads = [threading.Thread(target=draw, args=(rank,), name=str(rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(drawn.values()) == {-(-len(PROMPTS) // size)}, "as ZeRO 3 requires"
    assert len(drawn) == size
    assert sorted(written) == [f"{number}.mp4" for number in range(len(PROMPTS))]
    record = json.loads((tmp_path / "samples" / "step-000003" / "samples.json").read_text())
    assert record["prompts"] == list(PROMPTS)
    brightness = [of_video["brightness"] for of_video in record["scores"]]
    expected = [round(255 * number / 10) / 255 for number in range(len(PROMPTS))]
    assert brightness == pytest.approx(expected, abs=1 / 255)
