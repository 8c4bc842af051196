"""Small videos with unusual properties, and datasets made from them."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from stages.clips import (
    BadRecord,
    ClipRecord,
    ClipsConfig,
    ClipSkipped,
    SubjectPrompt,
    load_clip,
    open_dataset,
)

_FINEST = {
    "libx264": {"crf": "1", "threads": "1"},
    "mpeg4": {"qmin": "1", "qmax": "1"},
    "mpeg2video": {"qmin": "1", "qmax": "1"},
}


B_FRAMES = {"bf": "3", "x264-params": "b-adapt=0:scenecut=0:keyint=250"}
"""Options by which x264 makes B-frames of any frames, shown in another order than decoded."""


def encode(
    frames_THWC: np.ndarray,
    *,
    fps: float = 8,
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    container: str = "mp4",
    rotation: int = 0,
    display_matrix: list[int] | None = None,
    pixel_aspect: Fraction | None = None,
    times: list[int] | None = None,
    tick: Fraction = Fraction(1, 1000),
    options: Mapping[str, str] | None = None,
) -> bytes:
    """Encode near-losslessly, with PyAV alone; `times` are presentation times in ticks."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as muxer:
        stream: Any = muxer.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.options = {**_FINEST.get(codec, {}), **(options or {})}
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if pix_fmt == "gray":
            stream.codec_context.color_range = av.video.reformatter.ColorRange.JPEG
        if rotation:
            stream.set_display_rotation(rotation)
        if display_matrix is not None:
            stream.set_display_matrix(display_matrix)
        if times is not None:
            stream.codec_context.time_base = tick
        for index, image in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], tick
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    return out.getvalue()


def counting_frames(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Grey frames whose brightness tells their number: frame i has value 4 i."""
    values = (4 * np.arange(num_frames)).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (num_frames, height, width, 3)).copy()


def numbers_of(frames_THWC: np.ndarray) -> list[int]:
    """The numbers that `counting_frames` wrote."""
    return np.rint(frames_THWC.mean(axis=(1, 2, 3)) / 4).astype(int).tolist()


def corner_frame(height: int, width: int) -> np.ndarray:
    """Quadrants: red top left, green top right, blue bottom left, white bottom right."""
    image = np.zeros((height, width, 3), np.uint8)
    half_y, half_x = height // 2, width // 2
    image[:half_y, :half_x] = (255, 0, 0)
    image[:half_y, half_x:] = (0, 255, 0)
    image[half_y:, :half_x] = (0, 0, 255)
    image[half_y:, half_x:] = 255
    return image


def record_of(video: bytes | Path, *prompts: SubjectPrompt) -> ClipRecord:
    return ClipRecord(key="a", video=video, caption="a thing moves", prompts=prompts)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_jsonl(folder: Path, rows: list[dict[str, Any] | bytes]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path = folder / "metadata.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_all(config: ClipsConfig) -> list[ClipRecord | BadRecord]:
    return [record for shard in open_dataset(config).shards for record in shard.records()]


def by_key(records: list[ClipRecord | BadRecord]) -> dict[str, ClipRecord | BadRecord]:
    assert len({record.key for record in records}) == len(records), "keys must be unique"
    return {record.key: record for record in records}


def outcomes(config: ClipsConfig) -> Iterator[tuple[str, str, str]]:
    """Key, reason or "works", and detail (the caption of a good one) of every record."""
    for shard in open_dataset(config).shards:
        for record in shard.records():
            key = record.key.removeprefix(f"{shard.name}/")
            if isinstance(record, BadRecord):
                yield key, record.reason, record.detail
                continue
            try:
                clip = load_clip(record, config)
            except ClipSkipped as skipped:
                yield key, skipped.reason, skipped.detail
            else:
                assert clip.frames_THWC.shape == (config.num_frames, 32, 48, 3)
                yield key, "works", record.caption or ""


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG")
    return out.getvalue()


@pytest.fixture
def between_good_clips(
    config: Callable[..., ClipsConfig], tmp_path: Path
) -> Callable[..., list[tuple[str, str, str]]]:
    """Reads members between two good clips of one tar; these must be read as if alone."""

    def read(
        members: list[tuple[str | tarfile.TarInfo, bytes]], **changes: Any
    ) -> list[tuple[str, str, str]]:
        clips = config(path=tmp_path / "data", **changes)
        good = encode(counting_frames(clips.num_frames))
        clips.path.mkdir()
        before, after = (
            [(f"{name}.mp4", good), (f"{name}.txt", name.encode())] for name in ("before", "after")
        )
        with tarfile.open(clips.path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in [*before, *members, *after]:
                member = tarfile.TarInfo(name) if isinstance(name, str) else name
                if isinstance(name, str):
                    member.size = len(content)
                tar.addfile(member, io.BytesIO(content) if content else None)
                if member.size and not content:  # a hole: takes no room on the disk
                    tar.offset += -(-member.size // 512) * 512
                    tar.fileobj.seek(tar.offset)
        found = list(outcomes(clips))
        assert found[0] == ("before", "works", "before")
        assert found[-1] == ("after", "works", "after")
        assert open_dataset(clips).shards[0].num_clips() == len(found)
        assert [entry.name for entry in tmp_path.rglob("*")] == ["data", "t.tar"]
        return found[1:-1]

    return read


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ClipsConfig]:
    """A configuration for tiny clips: 9 frames of 32x48 at 8 frames/s."""

    def make(**changes: Any) -> ClipsConfig:
        settings: dict[str, Any] = {
            "path": tmp_path,
            "num_frames": 9,
            "height": 32,
            "width": 48,
            "fps": 8.0,
        }
        return ClipsConfig(**(settings | changes))

    return make


@pytest.fixture
def tools() -> Any:
    """The functions of this file: test modules cannot import one another."""

    class Tools:
        B_FRAMES = B_FRAMES
        encode = staticmethod(encode)
        outcomes = staticmethod(outcomes)
        read_all = staticmethod(read_all)
        by_key = staticmethod(by_key)
        png = staticmethod(png)
        counting_frames = staticmethod(counting_frames)
        numbers_of = staticmethod(numbers_of)
        corner_frame = staticmethod(corner_frame)
        record_of = staticmethod(record_of)
        write_tar = staticmethod(write_tar)
        write_jsonl = staticmethod(write_jsonl)

    return Tools


@pytest.fixture
def video() -> bytes:
    """Nine frames, as long as the clips of `config`."""
    return encode(counting_frames(9))
