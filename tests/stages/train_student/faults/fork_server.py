"""Runs trainings of one or more ranks, each in a fork of this process, which has all imported.

A line of JSON asks for a run, a line of JSON answers. A rank may be killed at a file operation
(`kill_points.py`), in a step or at a moment; the other ranks then get what torchrun gives them:
SIGTERM, and SIGKILL if they do not end. `spoil` spoils steps of all ranks (`faulty_steps.py`).
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.free_port import free_port

GRACE_S = 1.5


def main():
    _import_everything()
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)


def _import_everything():
    from diffusers import CogVideoXTransformer3DModel  # noqa: F401

    from stages.train_student import train  # noqa: F401
    from stages.train_student.parallel.deepspeed import import_deepspeed

    import_deepspeed()
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    from stages.train_student.validation import validation

    validation.write_report = lambda run_dir: None  # curves take seconds, and are tested apart


def _serve(request):
    folder = Path(request["train"]["run_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    size = request["processes"]
    port = free_port()
    start = time.monotonic()
    ranks = {_fork(rank, size, port, request): rank for rank in range(size)}
    codes = _wait(ranks, request, start)
    told = [_read(_file(folder, rank, "json")) for rank in range(size)]
    errors = [_read(_file(folder, rank, "txt")) for rank in range(size)]
    return {
        "codes": [codes[rank] for rank in range(size)],
        "told": [json.loads(text) if text else None for text in told],
        "errors": "\n".join(errors)[-6000:],
        "seconds": time.monotonic() - start,
    }


def _fork(rank, size, port, request):
    child = os.fork()
    if child:
        return child
    code = 1
    folder = Path(request["train"]["run_dir"])
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        descriptor = os.open(
            _file(folder, rank, "txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
        )
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        _file(folder, rank, "json").unlink(missing_ok=True)
        _train(rank, folder, request)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(rank, folder, request):
    from kill_points import KillPoints

    from stages.clips.config import ClipsConfig
    from stages.config import BaseModelConfig
    from stages.progress import SilentProgress
    from stages.train_student.config import TrainConfig
    from stages.train_student.train import train_student

    class Lines(SilentProgress):
        def __init__(self):
            self.lines = []

        def log(self, text):
            self.lines.append(text)

    fault = request["fault"] if (request["fault"] or {}).get("rank") == rank else {}
    points = KillPoints(folder, fault.get("operation"))
    if "step" in fault:
        _die_in_step(fault["step"])
    if request["spoil"]:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import faulty_steps

        faulty_steps.spoil(request["spoil"])
    if request["look"]:
        _look_at_states(rank, folder)
    points.watch()
    progress = Lines()
    summary = train_student(
        TrainConfig(**request["train"]),
        ClipsConfig(**request["clips"]),
        BaseModelConfig(path=request["base"]),
        Path(request["cache"]),
        resolved_config={},
        provenance={},
        progress=progress,
    )
    told = {
        "steps": summary.steps_done,
        "resumed_from": summary.resumed_from,
        "operations": points.count,
        "lines": progress.lines,
    }
    _file(folder, rank, "json").write_text(json.dumps(told))


def _die_in_step(number):
    from stages.train_student.step import TrainingStep

    make = TrainingStep.__call__

    def die_or_make(self, student, batch, step):
        if step + 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, student, batch, step)

    TrainingStep.__call__ = die_or_make


def _look_at_states(rank, folder):
    """Write down all weights and moments, whole, after loading and before saving."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from stages.train_student import train

    def states(engine):
        found = {}
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                if engine.zero_optimization_stage() == 0:
                    found[f"{name}/{moment}"] = engine.optimizer.state[parameter][moment]
                else:
                    found[f"{name}/{moment}"] = safe_get_full_optimizer_state(parameter, moment)
            whole = safe_get_full_fp32_param(parameter)
            found[f"{name}/fp32"] = parameter if whole is None else whole
        rates = {"rate": torch.tensor(engine.get_lr()), "step": torch.tensor(engine.global_steps)}
        return {name: value.detach().cpu().clone() for name, value in (found | rates).items()}

    resume, save = train.resume, train.save_checkpoint

    def resume_and_look(engine, *rest, **options):
        done = resume(engine, *rest, **options)
        if done:
            content = states(engine)
            if rank == 0:
                torch.save(content, folder.parent / f"{folder.name}-loaded-{done}.pt")
        return done

    def look_and_save(engine, config, step, *rest, **options):
        content = states(engine)
        if rank == 0:
            torch.save(content, folder.parent / f"{folder.name}-saved-{step}.pt")
        return save(engine, config, step, *rest, **options)

    train.resume, train.save_checkpoint = resume_and_look, look_and_save


def _wait(ranks, request, start):
    """Exit codes by rank; -9 is a SIGKILL."""
    fault = request["fault"] or {}
    codes, ended_at, sent = {}, None, set()
    while ranks:
        now = time.monotonic() - start
        for process, rank in list(ranks.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                del ranks[process]
                if codes[rank] and ended_at is None:
                    ended_at = now
        for process, rank in ranks.items():
            if fault.get("rank") == rank and now > fault.get("after_s", now):
                os.kill(process, signal.SIGKILL)
            if ended_at is not None and process not in sent:
                os.kill(process, signal.SIGTERM)
                sent.add(process)
            late = ended_at is not None and now > ended_at + GRACE_S
            if late or now > request["timeout_s"]:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return codes


def _file(folder, rank, kind):
    """Beside the run's folder: what a rank prints, and what it tells when done."""
    return folder.with_name(f"{folder.name}.rank{rank}.{kind}")


def _read(path):
    return path.read_text() if path.is_file() else ""


if __name__ == "__main__":
    main()
