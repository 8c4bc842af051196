"""Tiny networks of the official classes, with random weights, as folders and files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def _spread(model: Any) -> Any:
    """Random weights large enough that positions and attention matter."""
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if value.ndim > 1 or "embed" in name:
            nn.init.normal_(value, std=0.3)
    return model


@pytest.fixture(scope="session")
def vision_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of DINO, CLIP and DINOv2 by setting, as the hub has them."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTModel,
    )

    root = tmp_path_factory.mktemp("vision")
    small: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "intermediate_size": 24, "image_size": 224, "patch_size": 32}
    text = {**small, "intermediate_size": 24, "vocab_size": 9, "max_position_embeddings": 4}
    models = {
        "dino": ViTModel(
            ViTConfig(**small, intermediate_size=24, image_size=224, patch_size=16),
            add_pooling_layer=False,
        ),
        "clip": CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)),
        "dinov2": Dinov2Model(Dinov2Config(**small, mlp_ratio=2, image_size=518, patch_size=14)),
    }
    for name, model in models.items():
        _spread(model).save_pretrained(root / name)
    return {name: root / name for name in models}


class _Middle(nn.Module):
    """In place of AMT-S: the mean of both frames, at a time."""

    def forward(
        self, first: torch.Tensor, second: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        return (1 - time) * first + time * second


class _Colours(nn.Module):
    """In place of DreamSim: the mean colour, without the batch's axis as DreamSim gives it."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.mean(dim=(2, 3)).squeeze()


@pytest.fixture
def amt_file(tmp_path: Path) -> Path:
    """A trace with AMT-S's signature, made at another size than it runs at."""
    pair = torch.rand(2, 1, 3, 160, 192)
    path = tmp_path / "amt-s.pt"
    torch.jit.trace(_Middle(), (*pair, torch.full((1, 1, 1, 1), 0.5))).save(str(path))
    return path


@pytest.fixture
def dreamsim_file(tmp_path: Path) -> Path:
    """A trace with DreamSim's signature."""
    path = tmp_path / "dreamsim.pt"
    torch.jit.trace(_Colours(), torch.rand(1, 3, 224, 224)).save(str(path))
    return path


class FakeRaft(nn.Module):
    """In place of torchvision's RAFT: flow is the difference of the frames it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(
        self, first: torch.Tensor, second: torch.Tensor, num_flow_updates: int = 12
    ) -> list[torch.Tensor]:
        flow = self.scale * (second - first)[:, :2]
        return [flow * step for step in range(1, num_flow_updates + 1)]


@pytest.fixture
def raft_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Weights of a fake RAFT, whose class stands in for torchvision's."""
    import sys
    from types import ModuleType

    module = ModuleType("torchvision.models.optical_flow")
    raft_large: Callable[..., FakeRaft] = lambda *, weights, progress: FakeRaft()  # noqa: E731
    module.raft_large = raft_large  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", module)
    path = tmp_path / "raft.pth"
    torch.save(FakeRaft().state_dict(), path)
    return path
