"""Trains a student on made-up clips as the JSON file it is given says; the engine's tests start it.

Each case is one training, one after the other. Every rank writes a JSON file with, for each case,
the losses, the norms, the rates, the digest of the trained weights and its own peak of memory.
"""

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import torch

CLIPS, FRAMES, CHANNELS, HEIGHT, WIDTH, TEXT = 4, 3, 4, 4, 6, (8, 16)


def clips_of(step):
    """Inputs and targets of a step's clips, on the CPU."""
    numbers = torch.Generator().manual_seed(step)
    shape = (CLIPS, FRAMES, CHANNELS, HEIGHT, WIDTH)
    return (
        torch.randn(shape, generator=numbers),
        torch.randn(CLIPS, *TEXT, generator=numbers),
        torch.randint(1000, (CLIPS,), generator=numbers),
        torch.randn(shape, generator=numbers),
    )


def loss_of(student, configs, clips, device, dtype):
    noisy, text, timestep, target = (tensor.to(device) for tensor in clips)
    of_clips = configs.transformer_inputs(noisy.to(dtype), text.to(dtype), timestep)
    of_shape = configs.shape_inputs(FRAMES, HEIGHT, WIDTH, torch.device(device))
    velocity, _ = student(of_shape | of_clips, configs.token_grid(FRAMES, HEIGHT, WIDTH))
    return (velocity.float() - target).square().mean()


class PeakMemory:
    """The most memory of this process in use at once, without pages of files."""

    def __enter__(self):
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now():
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no RssAnon in /proc/self/status")


def train(case, base):
    from stages.students.registry import read_configs
    from stages.train_student.config import TrainConfig
    from stages.train_student.model.loading import build_student
    from stages.train_student.parallel.deepspeed import (
        check_engine_settings,
        deepspeed_engine,
        gathered_parameters,
        gradient_norm_before_step,
        weights_dtype,
    )
    from stages.train_student.parallel.process_group import (
        gather,
        process_group,
        world_from_environment,
    )

    config = TrainConfig(batch_size=CLIPS, **case["train"])
    configs = read_configs(Path(base))
    world = world_from_environment()
    check_engine_settings(config)
    dtype = weights_dtype(config.deepspeed)
    result = {"losses": [], "norms": [], "rates": []}
    passes = CLIPS // world.size
    with process_group(world):
        with PeakMemory() as memory:
            student = build_student(
                config,
                configs,
                dtype,
                heads=lambda: None,
                world=world,
                zero_init=case.get("zero_init", True),
            )
            result["parameters"] = sum(
                getattr(p, "ds_numel", p.numel()) for p in student.parameters()
            )
            with deepspeed_engine(student, config, world) as engine:
                start = 0
                if case.get("load"):
                    engine.load_checkpoint(case["load"], tag="saved", load_module_strict=False)
                    start = case["start"]
                for step in range(start, case["steps"]):
                    result["rates"].append(float(engine.get_lr()[0]))
                    clips, total = clips_of(step), 0.0
                    for number in range(passes):
                        index = number * world.size + world.rank
                        part = [tensor[index : index + 1] for tensor in clips]
                        loss = loss_of(engine, configs, part, world.device, dtype)
                        engine.backward(loss)
                        total += float(loss.detach()) / passes
                        norm = gradient_norm_before_step(engine)
                        engine.step()
                    result["losses"].append(sum(gather(world, total)) / world.size)
                    result["norms"].append(norm or float(engine.get_global_grad_norm()))
                    if case.get("save") and step + 1 == case["save_after"]:
                        engine.save_checkpoint(
                            case["save"],
                            tag="saved",
                            save_latest=False,
                            exclude_frozen_parameters=config.method == "lora",
                        )
                digest = hashlib.sha256()
                for parameter in student.parameters():
                    if parameter.requires_grad:
                        with gathered_parameters([parameter]):
                            digest.update(parameter.detach().float().cpu().numpy().tobytes())
                result["digest"] = digest.hexdigest()
        result["peak"] = memory.peak - memory.start
    return result


def main():
    # deepspeed puts --local_rank before it.
    request = json.loads(Path(sys.argv[-1]).read_text())
    results = []
    for case in request["cases"]:
        if "port" in case:
            # A second group at the same address would read what the first left there.
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_PORT"] = str(case["port"])
        results.append(train(case, case.get("base", request["base"])))
    rank = os.environ.get("RANK", "0")
    Path(request["out"]).with_suffix(f".{rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
