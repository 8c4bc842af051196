"""Opens the network that the settings name."""

from pathlib import Path

from stages.clips import ClipsConfig
from stages.video_features.config import FeaturesConfig
from stages.video_features.network import FeatureNetwork
from stages.video_features.torchscript import TorchScriptNetwork
from stages.video_features.video_transformers import VideoTransformer

_TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts")


def open_network(config: FeaturesConfig, clips: ClipsConfig) -> FeatureNetwork | None:
    """Check the network's files; a hub id is downloaded.

    Args:
        config: The network; None is returned if it names none.
        clips: Size and rate of the clips.

    Raises:
        ValueError: As `TorchScriptNetwork` and `VideoTransformer`.
    """
    if config.network is None:
        return None
    path = Path(config.network).expanduser()
    if path.is_file() or path.suffix in _TORCHSCRIPT_SUFFIXES:
        return TorchScriptNetwork(path, clips, config.num_frames)
    return VideoTransformer(config, clips)
