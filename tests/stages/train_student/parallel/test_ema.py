"""The average of the weights: against its recursion in float64, and shared over ranks."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from stages.students.registry import read_configs
from stages.train_student.config import TrainConfig
from stages.train_student.parallel.ema import (
    SavedAverage,
    WeightAverage,
    check_average,
    effective_decay,
)
from stages.train_student.parallel.process_group import World

CPU = torch.device("cpu")


def world(rank=0, size=1):
    return World(rank=rank, local_rank=rank, size=size, device=CPU)


class Weights(nn.Module):
    """Parameters of the given sizes, the last of them frozen."""

    def __init__(self, sizes):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)
        self.weights[-1].requires_grad_(False)


def as_zero_3(sizes, rank, ranks):
    """The same weights as DeepSpeed's ZeRO 3 parts them: equal parts, the last ones padded."""
    module = Weights(sizes)
    for parameter in module.weights:
        whole, size = parameter.detach().clone(), -(-parameter.numel() // ranks)
        padded = torch.cat([whole, torch.full((size * ranks - whole.numel(),), torch.nan)])
        local = padded[rank * size : (rank + 1) * size]
        parameter.ds_id, parameter.ds_numel = 0, whole.numel()
        parameter.partition_numel = lambda size=size: size
        parameter._z3_optimizer = SimpleNamespace(get_local_fp32_param=lambda p, x=local: x)
    return module


def as_zero_2(sizes, rank, ranks):
    """The same weights as ZeRO 1 and 2 part them: laid end to end, then cut."""
    module = Weights(sizes)
    trained = list(module.weights)[:-1]
    flat = torch.cat([p.detach() for p in trained])
    size = -(-flat.numel() // ranks)
    offset = 0
    for parameter in trained:
        low, high = (
            max(offset, rank * size),
            min(offset + parameter.numel(), (rank + 1) * size),
        )
        parameter._hp_mapping = None
        if low < high:
            address = SimpleNamespace(start=low - offset, numel=high - low)
            part = flat[low:high].clone()
            parameter._hp_mapping = SimpleNamespace(
                lp_fragment_address=address, get_hp_fragment=lambda x=part: x
            )
        offset += parameter.numel()
    return module


MADE = {"whole": lambda sizes, rank, ranks: Weights(sizes), "2": as_zero_2, "3": as_zero_3}
SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=6)


@settings(max_examples=25)
@given(sizes=SIZES, wrote=st.integers(1, 4), reads=st.integers(1, 4), kinds=st.data())
def test_any_number_of_ranks_reads_what_any_other_wrote(
    tmp_path_factory, sizes, wrote, reads, kinds
):
    """Each trained element is in one share, of every ZeRO stage, and comes back where it was."""
    writer, reader = (kinds.draw(st.sampled_from(sorted(MADE))) for _ in range(2))
    folder = tmp_path_factory.mktemp("average")
    shares = 0
    for rank in range(wrote):
        share = WeightAverage(MADE[writer](sizes, rank, wrote), 0.9, world(rank, wrote))
        share.updates = 7
        share.save(folder)
        shares += sum(len(t) for t in share._averages)
    assert shares == sum(sizes[:-1])
    expected = Weights(sizes)
    with SavedAverage(folder, wrote) as saved:
        for number, size in enumerate(sizes[:-1]):
            found = saved.read(f"weights.{number}", 0, size)
            assert torch.equal(found, expected.weights[number].detach())
        assert f"weights.{len(sizes) - 1}" not in saved, "what is not trained is not averaged"
    folder2 = tmp_path_factory.mktemp("again")
    for rank in range(reads):
        share = WeightAverage(MADE[reader](sizes, rank, reads), 0.9, world(rank, reads))
        for average in share._averages:
            average.fill_(torch.nan)
        share.load(folder, wrote)
        assert share.updates == 7
        share.save(folder2)
    with SavedAverage(folder2, reads) as saved:
        for number, size in enumerate(sizes[:-1]):
            found = saved.read(f"weights.{number}", 0, size)
            assert torch.equal(found, expected.weights[number].detach())


def test_the_average_is_a_weighted_mean_of_all_steps():
    """Closed form: each step's weights count (1 - its decay) times the decays after it."""
    module = Weights([50, 3])
    average = WeightAverage(module, 0.8, world())
    seen = [module.weights[0].detach().double().clone()]
    for step in range(30):
        module.weights[0].data.normal_(mean=step)
        seen.append(module.weights[0].detach().double().clone())
        average.update()
    decays = [min(0.8, (1 + n) / (10 + n)) for n in range(30)]
    shares = [1.0, *(1 - decay for decay in decays)]
    for step, decay in enumerate(decays):
        shares[: step + 1] = [share * decay for share in shares[: step + 1]]
    assert sum(shares) == pytest.approx(1.0)
    expected = sum(share * weights for share, weights in zip(shares, seen, strict=True))
    torch.testing.assert_close(average._averages[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_decay_rises_to_what_was_asked_for():
    decays = [effective_decay(0.99, n) for n in range(2000)]
    assert decays[0] == 0.1
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_bf16_weights_are_averaged_in_float32():
    module = Weights([8, 1]).bfloat16()
    average = WeightAverage(module, 0.999, world())
    for _ in range(200):
        average.update()
    module.weights[0].data += 1e-2 * module.weights[0].data.abs().max()
    start = average._averages[0].clone()
    average.update()
    assert average._averages[0].dtype == torch.float32
    assert (average._averages[0] != start).any(), "in bf16 a step this small would be lost"


ENGINES = [
    {"deepspeed": {"zero_stage": 2}},
    {"deepspeed": {"zero_stage": 3, "precision": "bf16"}, "method": "full"},
    pytest.param({"deepspeed": {"zero_stage": 0}}, marks=pytest.mark.slow),
    pytest.param({"deepspeed": {"zero_stage": 1, "precision": "bf16"}}, marks=pytest.mark.slow),
    pytest.param({"deepspeed": {"zero_stage": 2, "precision": "bf16"}}, marks=pytest.mark.slow),
    pytest.param({"deepspeed": {"zero_stage": 3}}, marks=pytest.mark.slow),
    pytest.param(
        {"deepspeed": {"zero_stage": 2, "offload_optimizer": "cpu"}}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("changes", ENGINES)
def test_a_run_averages_the_float32_weights_of_every_step(
    tiny, base_model, train, tmp_path, changes
):
    changes = {"report_to": [], "checkpoint_every": 1, "checkpoints_kept": 9} | changes
    train(tmp_path, steps=3, ema={"decay": 0.3}, **changes)
    config = TrainConfig(**tiny.train_settings(tmp_path, **changes))
    expected = {n: w.double() for n, w in initial_weights(config, base_model, tiny).items()}
    for step in range(3):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step + 1}"
        weights = float32_weights(folder, config.deepspeed.zero_stage)
        decay = min(0.3, (1 + step) / (10 + step))
        assert expected.keys() <= weights.keys()
        for name, average in expected.items():
            average.mul_(decay).add_(weights[name].double(), alpha=1 - decay)
        with SavedAverage(folder, 1) as saved:
            assert saved.updates == step + 1
            for name, average in expected.items():
                found = saved.read(name, 0, average.numel()).view(average.shape)
                torch.testing.assert_close(found.double(), average, rtol=1e-5, atol=1e-7)


def initial_weights(config, base_model, tiny):
    """The transformer's, before the first step."""
    from stages.train_student.model.loading import build_student
    from stages.train_student.parallel.deepspeed import weights_dtype

    student = build_student(
        config,
        read_configs(base_model),
        weights_dtype(config.deepspeed),
        heads=lambda: None,
        world=world(),
        zero_init=False,
    )
    return {n: p.detach() for n, p in student.named_parameters() if p.requires_grad}


def float32_weights(folder, zero_stage):
    """As DeepSpeed's own script reads them, where it can."""
    state = folder / "mp_rank_00_model_states.pt"
    if zero_stage == 0:
        return torch.load(state, weights_only=True)["module"]
    if zero_stage == 1:  # it does not know the files of bf16's own optimizer
        (file,) = folder.glob("*_optim_states.pt")
        flat = torch.load(file, weights_only=False)["optimizer_state_dict"]
        (flat,) = flat["single_partition_of_fp32_groups"]
        (shapes,) = torch.load(state, weights_only=True)["param_shapes"]
        found, offset = {}, 0
        for name, shape in shapes.items():
            found[name] = flat[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
        return found
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(
        str(folder.parent), tag=folder.name, exclude_frozen_parameters=True
    )


def test_a_resumed_run_exports_the_same_average_to_the_last_bit(train, tmp_path):
    changes = {"ema": {"decay": 0.5}, "report_to": [], "checkpoint_every": 9}
    train(tmp_path / "whole", steps=4, **changes)
    train(tmp_path / "parts", steps=2, **changes)
    assert train(tmp_path / "parts", steps=4, **changes).resumed_from == 2
    left, right = (
        load_file(tmp_path / run / "export" / "pytorch_lora_weights.safetensors")
        for run in ("whole", "parts")
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    about = json.loads((tmp_path / "parts" / "export" / "export.json").read_text())
    assert (about["step"], about["weights"]) == (4, "average")


def test_averaging_weights_that_lie_on_a_disk_is_refused(tmp_path):
    nvme = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": tmp_path}
    check_average(TrainConfig(deepspeed=nvme))
    with pytest.raises(ValueError, match=r"train\.ema\.decay needs .* set it to cpu or none"):
        check_average(TrainConfig(deepspeed=nvme, ema={"decay": 0.9}))


def test_another_models_average_is_refused(tmp_path):
    WeightAverage(Weights([4, 1]), 0.9, world()).save(tmp_path)
    with pytest.raises(ValueError, match=r"holds 4 of the elements 0 to 6 of weights\.0"):
        WeightAverage(Weights([6, 1]), 0.9, world()).load(tmp_path, 1)


def test_a_share_that_is_missing_or_damaged_is_told(tmp_path):
    WeightAverage(Weights([4, 1]), 0.9, world()).save(tmp_path)
    average = WeightAverage(Weights([4, 1]), 0.9, world())
    with pytest.raises(ValueError, match=r"rank_00001\.safetensors is missing"):
        average.load(tmp_path, 2)
    file = tmp_path / "weight_average_rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged"):
        average.load(tmp_path, 1)
