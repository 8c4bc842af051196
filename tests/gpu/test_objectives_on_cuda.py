"""The auxiliary losses on CUDA, against the CPU in float64."""

import pytest
import torch

from stages.train_student.config import TrainConfig
from stages.train_student.model.teacher import Teacher, TeacherLayout
from stages.train_student.objectives.build import build_objectives

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CLIPS, FRAMES, GRID, PARTS, WIDTH = 2, 9, (6, 9), 2, 8
SETTINGS: dict[str, dict[str, object]] = {
    "lgf": {"radius": 2, "directions": "averaged", "foreground_weight": 3.0},
    "lgf crossed": {"radius": 2, "pairs": "crossed", "foreground_weight": 3.0},
    "lgf both, by Triton": {"radius": 2, "pairs": "both", "kernel": "triton"},
    "repa": {},
    "repa, CREPA's and iREPA's": {"neighbour_distance": 2, "spatial_norm": 0.6},
    "token-relation": {},
    "mask": {},
}


def _teacher(native: bool, device: str, dtype: torch.dtype) -> Teacher:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (8, 8) if native else GRID
    parts = torch.randn(CLIPS, FRAMES, rows, columns, PARTS, WIDTH, generator=generator).double()
    fused = (torch.nn.functional.normalize(parts, dim=-1) * 0.5**0.5).flatten(-2)
    valid = torch.ones(CLIPS, FRAMES, dtype=torch.bool)
    valid[1, -1] = False
    mask = (255 * torch.rand(CLIPS, FRAMES, 12, 18, generator=generator)).to(torch.uint8)
    return Teacher(
        arrays={"features": fused.to(device, dtype)},
        valid_BT=valid.to(device),
        masks={"forward": mask.to(device), "valid": valid.to(device, torch.uint8)},
        num_frames=FRAMES,
        token_grid=GRID,
        layout=TeacherLayout(native=native, parts=PARTS, forward_weight=0.5),
    )


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("which", SETTINGS)
def test_losses_and_gradients_equal_the_cpus_in_float64(which: str, native: bool) -> None:
    name = which.split()[0].rstrip(",")
    section = {name.replace("-", "_"): SETTINGS[which]}
    config = TrainConfig.model_validate({"objectives": [name], **section})
    (made,) = build_objectives(config)
    maps = made.num_maps(FRAMES, FRAMES)
    channels = {"repa": PARTS * WIDTH, "mask": 1}.get(name, 5)
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(CLIPS, maps, *GRID, channels, generator=generator).double()
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        given = student.clone().to(device, dtype).requires_grad_()
        loss_B = made(given, _teacher(native, device, dtype))
        loss_B.sum().backward()
        assert given.grad is not None
        results.append((loss_B.detach().cpu().double(), given.grad.cpu().double()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-6)
    difference = (results[1][1] - results[0][1]).norm() / results[0][1].norm()
    assert difference < 1e-3
