"""Features of a set of clips, kept on disk by the content of each clip.

    {folder}/{protocol digest}/protocol.json            what the features depend on
                               {SHA-256}.safetensors    features_ND of some clips, and their hashes

A clip is found again by the hash of its video (`stages.clips.fingerprints`), so that a renamed clip
is not computed again, a changed one is, and several sets share one folder. A file is named by the
hash of its bytes, written whole or not at all, and never changed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cache_schema.atomic_io import make_directories, write_atomic
from stages.clips import BadRecord, ClipRecord, ClipSkipped, load_clip
from stages.clips.fingerprints import NO_VIDEO, hash_video
from stages.extract_features.extraction import release_memory
from stages.progress import Progress
from stages.video_features.network import FeatureNetwork, FeatureProtocol

# Legend: N clip, D feature.

_CLIPS_PER_FILE = 128
"""Clips whose features are lost at most if the process is killed."""

_SUFFIX = ".safetensors"
_PROTOCOL_FILE = "protocol.json"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipFeatures:
    """Features of a set of clips by one network."""

    features_ND: np.ndarray
    """float32, in the order of the clips; finite."""
    problems: Mapping[str, str]
    """Why clips have no features, by key."""


def features_of_clips(
    records: Iterable[ClipRecord | BadRecord],
    network: FeatureNetwork,
    folder: Path,
    *,
    device: torch.device,
    name: str,
    total: int,
    progress: Progress,
) -> ClipFeatures:
    """Compute the features of clips; those that are in the folder are read.

    Clips that are undecodable, or shorter than the network's frames, have a problem instead.

    Args:
        records: The clips.
        network: The network; it is loaded only if features are missing.
        folder: Folder of the features of all networks.
        device: Device of the network.
        name: Label of the progress bar.
        total: Number of clips.
        progress: Shows a bar.

    Raises:
        ValueError: A file in the folder is damaged, or the network fails on a clip.
    """
    known = _Kept(folder, network.protocol)
    found: list[np.ndarray] = []
    problems: dict[str, str] = {}
    compute = None
    try:
        with progress.task(f"{name}: features", total, unit="clips") as task:
            for record in records:
                try:
                    if isinstance(record, BadRecord):
                        raise ClipSkipped(record.reason, record.detail)
                    video_hash = _hash_of(record)
                    if video_hash not in known:
                        clip = load_clip(record, network.protocol.clips)
                        compute = compute or network.load(device)
                        known.add(video_hash, _finite(compute(clip.frames_THWC)))
                    found.append(known[video_hash])
                except ClipSkipped as skipped:
                    problems[record.key] = str(skipped)
                task.advance()
    finally:
        known.write()
        if compute is not None:
            compute = None
            release_memory()
    return ClipFeatures(
        features_ND=np.stack(found) if found else np.zeros((0, 0), np.float32), problems=problems
    )


def _hash_of(record: ClipRecord) -> str:
    video_hash = hash_video(record.video)
    if video_hash == NO_VIDEO:
        raise ClipSkipped("undecodable", "the file cannot be read")
    return video_hash


def _finite(features_D: np.ndarray) -> np.ndarray:
    if not np.isfinite(features_D).all():
        raise ClipSkipped("bad_features", "the network's features are NaN or infinite")
    return features_D


class _Kept:
    """Features by the hash of the video: those on disk, and new ones that are written in parts."""

    def __init__(self, folder: Path, protocol: FeatureProtocol) -> None:
        self._folder = folder / protocol.digest
        self._protocol = protocol
        self._new: dict[str, np.ndarray] = {}
        self._features: dict[str, np.ndarray] = {}
        if self._folder.is_dir():
            for file in sorted(self._folder.glob(f"*{_SUFFIX}")):
                self._features |= _read(file)

    def __contains__(self, video_hash: str) -> bool:
        return video_hash in self._features

    def __getitem__(self, video_hash: str) -> np.ndarray:
        return self._features[video_hash]

    def add(self, video_hash: str, features_D: np.ndarray) -> None:
        self._features[video_hash] = self._new[video_hash] = features_D
        if len(self._new) == _CLIPS_PER_FILE:
            self.write()

    def write(self) -> None:
        """Write the features that are not on disk."""
        if not self._new:
            return
        make_directories(self._folder)
        protocol = json.dumps(self._protocol.settings, indent=1) + "\n"
        _write(self._folder / _PROTOCOL_FILE, protocol.encode())
        hashes = np.frombuffer("".join(self._new).encode(), np.uint8).reshape(len(self._new), -1)
        data = save({"features": np.stack(list(self._new.values())), "videos": hashes.copy()})
        _write(self._folder / f"{hashlib.sha256(data).hexdigest()}{_SUFFIX}", data)
        self._new = {}


def _write(file: Path, data: bytes) -> None:
    # Another evaluation may write to the folder at the same time.
    write_atomic(file, data, temporary=file.with_name(f".{uuid4().hex}.partial"))


def _read(file: Path) -> dict[str, np.ndarray]:
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != file.stem:
        raise ValueError(f"{file} is damaged; delete it, and its features are computed again")
    try:
        tensors = load(data)
        hashes, features_ND = tensors["videos"], tensors["features"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} holds no features ({error}); remove it") from error
    return {
        row.tobytes().decode(): features_D
        for row, features_D in zip(hashes, features_ND, strict=True)
    }
