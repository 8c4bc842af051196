"""A tiny TorchScript network that is called as StyleGAN-V's I3D."""

from pathlib import Path

import torch


class TinyI3D(torch.nn.Module):
    """Called as StyleGAN-V's I3D; five logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(3, 5, (2, 8, 8), stride=(2, 8, 8))

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> torch.Tensor:
        x = x.float()
        if resize:
            size = [x.size(2), 64, 64]  # the real one: 224
            x = torch.nn.functional.interpolate(x, size=size, mode="trilinear", align_corners=False)
        if rescale:
            x = x / 255 * 2 - 1
        logits = self.conv(x).mean([2, 3, 4])
        return logits if return_features else torch.softmax(logits, dim=1)


def save_tiny_i3d(path: Path) -> TinyI3D:
    """Write the TorchScript file; returns the module it was made from."""
    torch.manual_seed(0)
    module = TinyI3D().eval()
    torch.jit.script(module).save(str(path))
    return module
