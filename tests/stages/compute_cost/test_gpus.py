import pytest

from stages.compute_cost.gpus import GPUS, find_gpu, gpu_of_device


@pytest.mark.parametrize(
    ("device", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_device_is_known_by_what_it_calls_itself(device, short):
    assert gpu_of_device(device) == (None if short is None else GPUS[short])


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    for name in ("RTX_4090", "rtx4090", "rtx-4090", "RTX 4090"):
        assert find_gpu(name) is GPUS["rtx-4090"]
    assert find_gpu("a10080gb") is find_gpu("A100-80GB")
    with pytest.raises(ValueError, match="unknown GPU 'h1000'; known GPUs are b200, h200, h100"):
        find_gpu("h1000")
