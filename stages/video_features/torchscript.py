"""TorchScript networks that are called as the I3D of StyleGAN-V.

Written from universome/stylegan-v at 3fecd69 (`src/metrics/frechet_video_distance.py`,
`metric_utils.py`, `src/training/dataset.py`) and universome/fvd-comparison at 33a5552.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.clips import ClipsConfig
from stages.files.hashes import sha256_of_file
from stages.files.torchscript import check_torchscript, load_torchscript
from stages.files.weight_checks import refuse_lfs_pointer
from stages.video_features.network import FeatureFunction, FeatureProtocol, read_at

# Legend: T frame, H W pixels, C colour (RGB), D feature.

NUM_FRAMES = 16
"""Frames per clip of StyleGAN-V's `fvd2048_16f`."""

_ARGUMENTS = ("rescale", "resize", "return_features")
_PROBE_SIDE = 64
"""Height and width of the frames that a network is tried with."""

_REMEDY = (
    "set evaluate.features.network to a file from torch.jit.save, such as StyleGAN-V's "
    "i3d_torchscript.pt"
)


class TorchScriptNetwork:
    """A network called as `network(video, rescale=True, resize=True, return_features=True)`.

    `video` is uint8 [1, C, T, H, W]. The network itself converts its values and size: StyleGAN-V's
    I3D computes x / 255 * 2 - 1 (fvd-comparison, issue 4) and resizes to 224x224; its "features"
    are the 400 logits before the softmax, those of the I3D on tf.hub.

    Args:
        file: From torch.jit.save. It is a program: use files from sources you trust. Files with
            pickles that Python would have to read, or with calls that read or write files, are
            refused; TorchScript's own unpickler creates tensors and the archive's own classes only.
        clips: Size and rate of the clips.
        num_frames: Frames per clip; None takes `NUM_FRAMES`.

    Raises:
        ValueError: The file is missing or not such a network.
    """

    def __init__(self, file: Path, clips: ClipsConfig, num_frames: int | None) -> None:
        if not file.is_file():
            raise ValueError(f"evaluate.features.network: there is no file {file}; {_REMEDY}")
        refuse_lfs_pointer(file)
        check_torchscript(file, remedy=_REMEDY)
        self._file = file
        self._num_frames = num_frames or NUM_FRAMES
        self.protocol = FeatureProtocol(
            network=file.name,
            sha256=sha256_of_file(file),
            clips=read_at(clips, self._num_frames),
            resize="resized and scaled by the network (I3D: to 224x224 and [-1, 1])",
            features="return_features=True (I3D: 400 logits)",
        )
        self._try()

    def _try(self) -> None:
        """Check the arguments and the output, so that no work is lost."""
        forward = load_torchscript(self._file, "cpu", remedy=_REMEDY).forward
        names = [argument.name for argument in forward.schema.arguments]
        if missing := [name for name in _ARGUMENTS if name not in names]:
            raise ValueError(
                f"{self._file}: its forward takes {', '.join(names[1:])}, but not "
                f"{', '.join(missing)}; {_REMEDY}"
            )
        self.load(torch.device("cpu"))(
            np.zeros((self._num_frames, _PROBE_SIDE, _PROBE_SIDE, 3), np.uint8)
        )

    def load(self, device: torch.device) -> FeatureFunction:
        """Load the network; see `FeatureNetwork.load`."""
        network = load_torchscript(self._file, device, remedy=_REMEDY)

        @torch.inference_mode()
        def features_of(frames_THWC: np.ndarray) -> np.ndarray:
            video_CTHW = torch.from_numpy(frames_THWC).permute(3, 0, 1, 2).contiguous()
            try:
                # StyleGAN-V turns TF32 off for I3D.
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                    found = network(video_CTHW[None].to(device), **dict.fromkeys(_ARGUMENTS, True))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(
                    f"{self._file} failed on frames of shape {frames_THWC.shape}: {reason}; "
                    f"{_REMEDY}"
                ) from error
            return _one_vector(found, self._file)

        return features_of


def _one_vector(found: Any, file: Path) -> np.ndarray:
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != 1:
        shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"{file} returned {shape} for one clip, expected [1, D]; {_REMEDY}")
    features_D: np.ndarray = found[0].to("cpu", torch.float32).numpy()
    return features_D
