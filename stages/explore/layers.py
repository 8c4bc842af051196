"""What a page shows of one clip: frames, masks, principal components, the teacher's Gram flow."""

# Legend: T frame, M map of a store (frame or latent frame), P pair of maps, H W token grid, h w
# pixel of a stored mask, K neighbour, C channel, G fused channel, B clip.

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema import CacheError, StoreReader
from stages.clips import ClipDataset, ClipsConfig
from stages.clips.fingerprints import video_hash_in
from stages.explore.flow_view import FlowView
from stages.explore.pictures import Encoding, Sheet, make_sheet
from stages.explore.stores import KINDS
from stages.inspect_cache.clip_view import frames_of_moments, stored_clips
from stages.inspect_cache.colours import pca_colours
from stages.inspect_cache.drawing import DEFAULT_FPS, load_source_clip
from stages.inspect_cache.overlay import BACKWARD, FORWARD
from stages.local_gram_flow import Directions, radius_of_window, take_directions
from stages.teacher_store.settings import check_both_tracks
from stages.train_student.model.teacher import PairDirection, Teacher, TeacherLayout
from stages.train_student.objectives.config import LgfConfig

MASK_COLOURS = {"forward": FORWARD, "backward": BACKWARD}
"""Colours of the two tracks."""

MASK_HALF = 128
"""A stored mask is 255 times a probability: from this value on it is at least one half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One kind of picture, for all moments of the clip."""

    title: str
    sheet: Sheet
    moments: tuple[int, ...]
    """The clip's frame of each picture."""


@dataclass(kw_only=True, slots=True, eq=False)
class ClipLayers:
    """Pictures and Gram flow of a clip."""

    num_frames: int
    fps: float
    layers: dict[str, Layer] = field(default_factory=dict)
    """By name: `frames`, `mask_forward`, `mask_backward`, and `components_…`."""
    valid_T: np.ndarray | None = None
    """bool, frames on which every track sees its subject; None without masks."""
    flow: FlowView | None = None
    """The teacher's Gram flow, as the loss compares it; None without a teacher."""
    subject_yx: tuple[float, float] = (0.5, 0.5)
    """Centre of the forward mask on the first frame that has one, as fractions of the frame."""
    notes: list[str] = field(default_factory=list)
    """What is missing, and why."""

    def add(self, name: str, title: str, pictures: np.ndarray, encoding: Encoding = "PNG") -> None:
        """Add a layer of uint8 pictures, one per moment."""
        moments = tuple(frames_of_moments(len(pictures), self.num_frames))
        self.layers[name] = Layer(
            title=title, sheet=make_sheet(pictures, encoding), moments=moments
        )


def load_layers(
    readers: Mapping[str, StoreReader],
    key: str,
    shard: str,
    *,
    data: ClipsConfig,
    dataset: ClipDataset | None,
    lgf: LgfConfig,
) -> ClipLayers:
    """Read what the stores and the dataset hold of a clip; what cannot be read becomes a note.

    Args:
        readers: Stores of the clip's size, by kind.
        key: The clip's key; need not be in every store, nor in any.
        shard: Name of its shard.
        data: The dataset's settings, which the stores' own precede.
        dataset: Source of the frames; None if there is none.
        lgf: Window, tracks and pairs of the Gram flow.
    """
    sized = next((readers[kind] for kind in readers if kind != "text"), None)
    clips = data.sizes[0] if sized is None else stored_clips(sized, data)
    found = ClipLayers(num_frames=clips.num_frames, fps=clips.fps or DEFAULT_FPS)
    videos = _videos_of(readers, key)
    first = next(iter(videos), None)
    video = None if first is None else videos[first]
    source = load_source_clip(dataset, clips, shard=shard, key=key, video=video)
    if isinstance(source, str):
        found.notes.append(f"no frames: {source}")
    else:
        found.add("frames", "frames", source.frames_THWC, "JPEG")
    parts: dict[str, Callable[[], None]] = {
        "masks": lambda: _add_masks(found, readers["masks"], key),
        "teacher": lambda: _add_teacher(found, readers["teacher"], key, clips, lgf),
        "gram_flow": lambda: _add_gram_flow(found, readers["gram_flow"], key, clips, lgf),
        "latents": lambda: _add_latents(found, readers["latents"], key),
    }
    for kind, add in parts.items():
        if kind in videos:
            if videos[kind] != video:
                found.notes.append(
                    f"no {kind}: made from another video of this clip than {first}; "
                    "sam2vx-pipeline extract-features --refresh-changed extracts it again"
                )
                continue
            try:
                add()
            except (CacheError, ValueError) as error:
                found.notes.append(f"{kind}: {error}")
    return found


def _videos_of(readers: Mapping[str, StoreReader], key: str) -> dict[str, str]:
    """Hash of the video that each store's entry of a clip was made from, by kind; without text."""
    found = {}
    for kind in KINDS:
        reader = readers.get(kind)
        row = None if reader is None or kind == "text" else reader.keys.find(key)
        if reader is not None and row is not None:
            found[kind] = video_hash_in(reader.fingerprints[row].decode("ascii"))
    return found


def _add_masks(found: ClipLayers, reader: StoreReader, key: str) -> None:
    arrays = reader.read(key)
    _check_valid(arrays, reader)
    found.valid_T = arrays.pop("valid") != 0
    on_Thw = arrays["forward"] >= MASK_HALF
    if on_Thw.any():
        first_hw = on_Thw[on_Thw.any(axis=(1, 2)).argmax()]
        y, x = (float(places.mean()) + 0.5 for places in first_hw.nonzero())
        found.subject_yx = (y / first_hw.shape[0], x / first_hw.shape[1])
    for direction, masks_Thw in arrays.items():
        found.add(f"mask_{direction}", f"{direction} track", masks_Thw)


def _add_latents(found: ClipLayers, reader: StoreReader, key: str) -> None:
    mean_MHWC = reader.read(key, ["mean"])["mean"].transpose(0, 2, 3, 1)
    found.add("components_latents", "latents, principal components", pca_colours(mean_MHWC))


def _add_teacher(
    found: ClipLayers, reader: StoreReader, key: str, clips: ClipsConfig, lgf: LgfConfig
) -> None:
    teacher = _teacher(reader, key, clips)
    fused_MHWG, layout = teacher.features_BTHWG[0], teacher.layout
    shown: dict[Directions, str] = {"fused": "fused features"}
    pairs, directions = lgf.pairs, lgf.directions
    if layout.forward_weight is not None:
        # A track of weight 0 is not in the features.
        shown |= {"forward": "forward features"} if layout.forward_weight > 0 else {}
        shown |= {"backward": "backward features"} if layout.forward_weight < 1 else {}
    elif directions != "fused":
        found.notes.append(f"train.lgf.directions={directions}: the features keep no single track")
        directions = "fused"
    if pairs == "crossed":
        check_both_tracks(reader.settings, reader.name, wanted_by="train.lgf.pairs=crossed")
    valid_M = _valid(teacher)
    for name, title in shown.items():
        taken_MHWG = take_directions(
            fused_MHWG, layout.parts, name, forward_weight=layout.forward_weight or 0.0
        )
        colours = pca_colours(taken_MHWG.numpy(), valid_M)
        found.add(f"components_{name}", f"{title}, principal components", colours)
    flows = teacher.gram_flows(lgf.radius, pairs, directions)
    found.flow = _flow_view(flows, valid_M, found.num_frames)


def _add_gram_flow(
    found: ClipLayers, reader: StoreReader, key: str, clips: ClipsConfig, lgf: LgfConfig
) -> None:
    if found.flow is not None:  # the teacher's features are finer
        return
    teacher = _teacher(reader, key, clips)
    assert teacher.arrays is not None
    stored = radius_of_window(teacher.arrays["gram_flow"].shape[-1])
    radius = min(stored, lgf.radius)
    if radius < lgf.radius:
        found.notes.append(f"Gram flow of radius {radius}, the largest stored")
    crossed = reader.settings.values.get("pairs") == "crossed"
    pairs = "crossed" if crossed else "forward" if lgf.pairs == "crossed" else lgf.pairs
    if pairs != lgf.pairs:
        found.notes.append(f"pairs {pairs} as stored, not train.lgf.pairs={lgf.pairs}")
    flows = teacher.gram_flows(radius, pairs)
    found.flow = _flow_view(flows, _valid(teacher), found.num_frames)


def _flow_view(
    flows: Mapping[PairDirection, Tensor], valid_M: np.ndarray, num_frames: int
) -> FlowView:
    return FlowView(
        by_direction={direction: flow_BPHWK[0] for direction, flow_BPHWK in flows.items()},
        moments=tuple(frames_of_moments(len(valid_M), num_frames)),
        valid_M=valid_M,
    )


def _teacher(reader: StoreReader, key: str, clips: ClipsConfig) -> Teacher:
    arrays = {name: torch.from_numpy(array)[None] for name, array in reader.read(key).items()}
    _check_valid(arrays, reader)
    layout = TeacherLayout.of(reader.settings)
    main = arrays["features" if "features" in arrays else "gram_flow"]
    height, width = clips.token_grid if layout.native else main.shape[2:4]
    return Teacher(
        valid_BT=arrays.pop("valid") != 0,
        arrays=arrays,
        num_frames=clips.num_frames,
        token_grid=(height, width),
        layout=layout,
    )


def _check_valid(arrays: Mapping[str, Any], reader: StoreReader) -> None:
    if "valid" not in arrays:
        raise ValueError(f"{reader.name} does not say which maps are valid; extract it again")


def _valid(teacher: Teacher) -> np.ndarray:
    assert teacher.valid_BT is not None
    valid_M: np.ndarray = teacher.valid_BT[0].numpy()
    return valid_M


def thumbnail_frames(
    readers: Mapping[str, StoreReader],
    key: str,
    shard: str,
    *,
    data: ClipsConfig,
    dataset: ClipDataset | None,
) -> tuple[np.ndarray, float] | None:
    """Frames of a clip for a thumbnail, and their rate: from the dataset, or else the features as
    colours, the latents as colours, or the masks; None if there is nothing to see."""
    sized = next((readers[kind] for kind in readers if kind != "text"), None)
    clips = data.sizes[0] if sized is None else stored_clips(sized, data)
    fps = clips.fps or DEFAULT_FPS
    video = next(iter(_videos_of(readers, key).values()), None)
    source = load_source_clip(dataset, clips, shard=shard, key=key, video=video)
    if not isinstance(source, str):
        return source.frames_THWC, fps
    held = {kind: reader for kind, reader in readers.items() if key in reader}
    if "teacher" in held:
        teacher = _teacher(held["teacher"], key, clips)
        colours = pca_colours(teacher.features_BTHWG[0].numpy(), _valid(teacher))
        return colours, fps * len(colours) / clips.num_frames
    if "latents" in held:
        mean_MHWC = held["latents"].read(key, ["mean"])["mean"].transpose(0, 2, 3, 1)
        return pca_colours(mean_MHWC), fps * len(mean_MHWC) / clips.num_frames
    if "masks" in held:
        masks_Thw = held["masks"].read(key, ["forward"])["forward"]
        return np.repeat(masks_Thw[..., None], 3, axis=-1), fps
    return None
