"""What the page is told of a clip, as JSON values; texts of the dataset are made visible."""

from collections.abc import Mapping
from typing import Any

from cache_schema.shown_text import visible, without_credentials
from stages.explore.layers import ClipLayers


def shown(text: str) -> str:
    """A text of the dataset as a page shows it: no control characters, no credentials."""
    return visible(without_credentials(text))


def describe_layers(layers: ClipLayers) -> dict[str, Any]:
    """How the pictures of a clip lie on their sheets, and what its Gram flow covers."""
    described = {
        name: {
            "title": layer.title,
            "moments": layer.moments,
            "columns": layer.sheet.columns,
            "width": layer.sheet.width,
            "height": layer.sheet.height,
        }
        for name, layer in layers.layers.items()
    }
    flow = None
    if layers.flow is not None:
        flow = {
            "directions": list(layers.flow.by_direction),
            "shape": list(layers.flow.shape),
            "moments": layers.flow.moments,
            "valid": layers.flow.valid_M.tolist(),
        }
    return {
        "num_frames": layers.num_frames,
        "fps": layers.fps,
        "layers": described,
        "flow": flow,
        "subject": layers.subject_yx,
        "valid": None if layers.valid_T is None else layers.valid_T.tolist(),
        "notes": [shown(note) for note in layers.notes],
    }


def shown_values(value: Any) -> Any:
    """JSON values with every text made visible."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible(name): shown_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown_values(item) for item in value]
    return value
