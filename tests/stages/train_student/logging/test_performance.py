"""How a step's time, waiting and operations are told."""

from types import SimpleNamespace

import pytest
import torch

from stages.compute_cost.gpus import GPUS
from stages.train_student.logging import performance
from stages.train_student.logging.performance import DeviceRate, StepClock, device_rate
from stages.train_student.parallel.process_group import World

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def batch(clips, frames=3, height=4, width=6):
    return SimpleNamespace(clean_BFCHW=torch.empty(clips, frames, 4, height, width))


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows 0 and then what the test says."""
    times = iter([0.0, 1.0, 1.5, 2.0, 2.25, 10.0])
    monkeypatch.setattr(performance.time, "perf_counter", lambda: next(times))
    return StepClock()


def test_waiting_is_counted_apart_and_the_rate_is_of_the_whole_step(clock):
    batches = iter("ab")
    assert clock.next(batches) + clock.next(batches) == "ab"
    clock.add_flops(3e9)
    clock.add_flops(2e9)
    row, stop = clock.row(7, clips=40, world=ALONE, peak_flops=1e9, stop=True)
    assert (row.step, row.seconds, row.wait_seconds) == (7, 10.0, 0.75)
    assert row.clips_per_second == 4.0
    assert row.share_of_peak == 0.5
    assert row.peak_memory_bytes > 1e6
    assert stop


def test_what_is_not_known_is_null(clock):
    clock.next(iter("a"))
    clock.next(iter("a"))
    clock.add_flops(None)
    clock.add_flops(1.0)
    row, stop = clock.row(1, clips=1, world=ALONE, peak_flops=1.0, stop=False)
    assert row.share_of_peak is None
    assert not stop


def test_operations_follow_the_size_of_the_batch():
    rate = DeviceRate(flops_per_clip={(3, 4, 6): 5.0, (5, 4, 6): 9.0}, peak_flops=1.0)
    assert rate.model_flops(batch(2)) == 10.0
    assert rate.model_flops(batch(3, frames=5)) == 27.0
    assert rate.model_flops(batch(3, frames=7)) is None


class Size(SimpleNamespace):
    num_latent_frames = 3
    latent_size = (4, 6)


FACTS = SimpleNamespace(padding=lambda frames: frames % 2)
STORES = SimpleNamespace(teacher=None, masks=None, visual=None)


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989e12), ("fp32", 67e12)])
def test_a_known_gpu_gives_its_rate_and_the_cost_of_every_size(monkeypatch, lines, precision, peak):
    cost = SimpleNamespace(model_flops_per_clip=8.0)
    monkeypatch.setattr(performance, "local_gpu", lambda: GPUS["h100"])
    monkeypatch.setattr(performance, "step_cost", lambda *_, **__: cost)
    config = SimpleNamespace(deepspeed=SimpleNamespace(precision=precision))
    rate = device_rate(config, FACTS, [(Size(), STORES)], lines)
    assert rate.flops_per_clip == {(4, 4, 6): 8.0}
    assert rate.peak_flops == pytest.approx(peak)


def test_what_cannot_be_reckoned_never_stops_a_training(monkeypatch, lines):
    def fail(*args, **kwargs):
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr(performance, "step_cost", fail)
    assert device_rate(None, FACTS, [(Size(), STORES)], lines) is None
    assert lines.lines == []
    monkeypatch.setattr(performance, "local_gpu", lambda: GPUS["h100"])
    assert device_rate(None, FACTS, [(Size(), STORES)], lines) is None
    assert "no meta kernel" in lines.lines[0]
