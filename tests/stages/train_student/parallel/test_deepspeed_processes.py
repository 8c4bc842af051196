"""Engines in processes of their own, against plain PyTorch in this one."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.students.registry import read_configs
from stages.train_student.model.loading import load_transformer
from stages.train_student.model.student import Student
from stages.train_student.parallel.deepspeed import why_no_nvme
from tests.free_port import free_port

SCRIPT = Path(__file__).with_name("engine_in_subprocess.py")
ROOT = Path(__file__).parents[4]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
STEPS = 3
RATE = 1e-2


def settings(stage=2, *, precision="fp32", name="adamw", **deepspeed):
    return {
        "method": "full",
        "optimizer": {"name": name, "warmup_steps": 2, "learning_rate": RATE},
        "deepspeed": {"zero_stage": stage, "precision": precision, **deepspeed},
    }


def request_of(cases, base, out):
    """Path of the request; deepspeed's launcher would not keep the quotes of an argument."""
    path = out.with_name("request.json")
    path.write_text(json.dumps({"base": str(base), "out": str(out), "cases": cases}))
    return str(path)


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def wait(*processes):
    """Wait for all; when one fails, end the rest and show why."""
    try:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()


def start(command, **more):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(**more), **pipes)


def run(cases, base, folder, *, ranks=1, **more):
    """Each rank's results of the cases, made one after the other by the same processes."""
    out = folder / "results.json"
    if ranks > 1:
        for case in cases:
            case["port"] = free_port()
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [*TORCHRUN, "--standalone", f"--nproc-per-node={ranks}"]
    wait(start([*launcher, str(SCRIPT), request_of(cases, base, out)], **more))
    return [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def by_hand(base_model):
    """Losses and norms of plain PyTorch: whole batches, one process, no engine."""
    script = runpy.run_path(str(SCRIPT))
    clips_of, loss_of = script["clips_of"], script["loss_of"]
    configs = read_configs(base_model)
    transformer = load_transformer(base_model, torch.float32)
    student = Student(transformer)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=1e-4
    )
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 2)
        loss = loss_of(student, configs, clips_of(step), "cpu", torch.float32)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def test_every_stage_on_two_ranks_makes_the_steps_of_plain_pytorch(base_model, by_hand, tmp_path):
    cases = [{"steps": STEPS, "train": settings(stage)} for stage in range(4)]
    whole = {"steps": STEPS, "train": settings(3), "zero_init": False}
    ranks = run([*cases, whole], base_model, tmp_path, ranks=2)
    for results in ranks:
        for result in results:
            np.testing.assert_allclose(result["losses"], by_hand[0], rtol=2e-6)
            np.testing.assert_allclose(result["norms"], by_hand[1], rtol=2e-5)
            assert result["rates"] == [RATE / 2, RATE, RATE], "whatever the number of processes"
        assert results[-1]["digest"] == results[3]["digest"], "sharing out weights changes none"
    assert [result["digest"] for result in ranks[0]] == [result["digest"] for result in ranks[1]]


@pytest.mark.slow
def test_zero_3_never_holds_the_model_on_a_rank(tiny, base_model, tmp_path):
    large = tiny.tiny_transformer(num_attention_heads=16, attention_head_dim=64, num_layers=5)
    model_bytes = 2 * sum(p.numel() for p in large.parameters())
    largest = 2 * max(p.numel() for p in large.parameters())
    assert model_bytes > 8 * largest
    base = tiny.save_pipeline(tmp_path / "large", transformer=large)
    # In bf16, since float32 weights would be pages of the file, which count for nobody.
    lora = settings(3, precision="bf16") | {"method": "lora", "lora": {"rank": 1}}
    cases = [
        {"steps": 1, "train": lora},  # so that what is imported on the way is there
        {"steps": 0, "train": lora, "base": str(base)},
        {"steps": 0, "train": lora, "base": str(base), "zero_init": False},
    ]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for _, shared, whole in run(cases, base_model, tmp_path, ranks=2, **malloc):
        assert shared["digest"] == whole["digest"]
        assert shared["peak"] < 0.75 * model_bytes, "half of it, and one parameter at a time"
        assert whole["peak"] > model_bytes, "the measure sees a model that is there"


def resumed(label, folder, **changes):
    """A training that saves after two steps of four, and one that goes on from there."""
    train = settings(**changes)
    saved = str(folder / label)
    return [
        {"steps": 4, "train": train, "save": saved, "save_after": 2},
        {"steps": 4, "train": train, "load": saved, "start": 2},
    ]


def check_resumed(results, rtol=2e-6, losses=None):
    """Pairs of `resumed` agree to the last bit, and all of them train as the first does."""
    for whole, rest in zip(results[::2], results[1::2], strict=True):
        assert rest["losses"] == whole["losses"][2:]
        assert rest["digest"] == whole["digest"]
        np.testing.assert_allclose(whole["losses"][:3], losses, rtol=rtol)


@pytest.mark.slow
def test_8_bit_moments_train_and_resume_to_the_last_bit(base_model, by_hand, tmp_path):
    cases = [
        case
        for stage in range(4)
        for case in resumed(f"stage{stage}", tmp_path, stage=stage, name="adamw8bit")
    ]
    (results,) = run(cases, base_model, tmp_path)
    check_resumed(results, rtol=2e-3, losses=by_hand[0])
    assert results[0]["losses"] != by_hand[0], "they are rounded"


@pytest.mark.slow
def test_8_bit_moments_on_two_ranks(base_model, by_hand, tmp_path):
    cases = [
        case
        for stage in (2, 3)
        for case in resumed(f"stage{stage}", tmp_path, stage=stage, name="adamw8bit")
    ]
    for results in run(cases, base_model, tmp_path, ranks=2):
        check_resumed(results, rtol=2e-3, losses=by_hand[0])


@pytest.mark.slow
def test_what_waits_in_host_memory_trains_and_resumes_the_same(base_model, by_hand, tmp_path):
    cases = [
        *resumed("two", tmp_path, stage=2, offload_optimizer="cpu"),
        *resumed("both", tmp_path, stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
    ]
    (results,) = run(cases, base_model, tmp_path)
    check_resumed(results, losses=by_hand[0])


@pytest.mark.slow
def test_what_waits_on_a_disk_trains_the_same(base_model, by_hand, tmp_path):
    if (reason := why_no_nvme()) is not None:
        pytest.skip(reason)
    disk = tmp_path / "disk"
    disk.mkdir()
    on_disk = {"stage": 3, "nvme_path": str(disk)}
    optimizer = settings(offload_optimizer="nvme", **on_disk)
    both = settings(offload_optimizer="nvme", offload_parameters="nvme", **on_disk)
    cases = [{"steps": STEPS, "train": optimizer}, {"steps": STEPS, "train": both}]
    (results,) = run(cases, base_model, tmp_path)
    for result in results:
        np.testing.assert_allclose(result["losses"], by_hand[0], rtol=2e-6)
    assert not [path for path in disk.rglob("*") if path.is_file()], "nothing stays on the disk"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_machines_make_the_steps_of_one(base_model, by_hand, tmp_path, launcher):
    """Two agents that meet over the network, as on two machines."""
    out = tmp_path / "results.json"
    case = {"steps": STEPS, "train": settings(2)}
    port = free_port()
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    agents = []
    for node in range(2):
        if launcher == "torchrun":
            command = [
                *TORCHRUN,
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--node-rank",
                str(node),
            ]
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
        else:
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts)]
            command += ["--no_ssh", "--node_rank", str(node), "--master_addr", "127.0.0.1"]
            command += ["--master_port", str(port)]
        agents.append(start([*command, str(SCRIPT), request_of([case], base_model, out)]))
    wait(*agents)
    for rank in range(2):
        (result,) = json.loads(out.with_suffix(f".{rank}").read_text())
        np.testing.assert_allclose(result["losses"], by_hand[0], rtol=2e-6)
