"""Files of generated videos: names, formats, the record beside each, and what is there already.

    <folder>/
        {prompt}-{seed}.mp4      or .gif, or a folder of PNG images
        {prompt}-{seed}.json     its record: prompt, seed, settings, checksums of the files

A video is kept if its record has the same settings and its files are intact, so that a batch can be
resumed. The record is written first: a video without one was not written here.
"""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import google_crc32c
import numpy as np
from PIL import Image

from cache_schema import JSON
from cache_schema.atomic_io import make_directories, write_atomic
from stages.clips import encode_video
from stages.clips.fingerprints import hash_parts
from stages.files.checksums import FileChecksum, checksums_from_json, describe_damage
from stages.files.text import read_object
from stages.sample_videos.requests import VideoRequest

# Legend: T frame, H W pixels, C colour (RGB).

VideoFormat = Literal["mp4", "gif", "frames"]
"""mp4 is H.264; frames is a folder of PNG images."""

_MAX_PROMPT_BYTES = 180
"""Longest prompt in a file name, in UTF-8; file systems allow 255 bytes for the whole name."""
_HASH_DIGITS = 6
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f\ud800-\udfff]+|^[.\-\s]+|\s+$")
"""What a file name should not contain: separators, control characters, a leading dot or dash."""


class OtherVideoError(ValueError):
    """A file has the name of a video, but is another one."""


def file_stem(request: VideoRequest) -> str:
    """File name `{prompt}-{seed}`, as VBench expects; a prompt that no file can have is changed.

    Characters that file names cannot have become `_`, long prompts are cut, and a hash of the whole
    prompt is appended.
    """
    readable = _UNSAFE.sub("_", request.prompt)
    readable = readable.encode()[:_MAX_PROMPT_BYTES].decode(errors="ignore")
    if readable != request.prompt:
        digest = hashlib.sha256(request.prompt.encode(errors="surrogateescape")).hexdigest()
        readable += f"-{digest[:_HASH_DIGITS]}"
    return f"{readable}-{request.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Where a video belongs, and how it is to be made."""

    request: VideoRequest
    folder: Path
    stem: str
    """File name without suffix; it may contain dots."""
    form: VideoFormat
    made_from: Mapping[str, JSON]
    """Everything that changes its pixels."""

    @property
    def video(self) -> Path:
        """The file, or the folder of images."""
        return self.folder / (self.stem if self.form == "frames" else f"{self.stem}.{self.form}")

    @property
    def record(self) -> Path:
        """The JSON file beside it."""
        return self.folder / f"{self.stem}.json"

    def is_done(self) -> bool:
        """Whether the video is there, intact, and made from the same.

        Raises:
            OtherVideoError: There is a file of this name that was made otherwise.
        """
        record = self._read_record()
        if record is None:
            if self.video.exists():
                raise OtherVideoError(f"{self.video} exists, without a record of its settings")
            return False
        if record.made_from == self.made_from:
            files = record.of(self.video.name)
            return bool(files) and not any(
                describe_damage(self.folder / name, checksum) for name, checksum in files.items()
            )
        for form in get_args(VideoFormat):
            for name in record.of(replace(self, form=form).video.name):
                if (path := self.folder / name).exists():
                    raise OtherVideoError(f"{path} exists, with {self._change(record)}")
        return False

    def _read_record(self) -> "_Record | None":
        if not self.record.exists():
            return None
        try:
            found = read_object(self.record, made_from=dict, files=dict)
            return _Record(found["made_from"], checksums_from_json(found["files"]))
        except ValueError as error:
            raise OtherVideoError(
                f"{self.record} exists, and is not the record of a sampled video ({error})"
            ) from error

    def _change(self, record: "_Record") -> str:
        differing = [
            f"{name} {record.made_from.get(name)!r} instead of {value!r}"
            for name, value in self.made_from.items()
            if record.made_from.get(name) != value
        ]
        return ", ".join(differing) or "other settings"

    def write(self, frames_THWC: np.ndarray, fps: float, about: Mapping[str, JSON]) -> None:
        """Write the video and its record, replacing what is there.

        Args:
            frames_THWC: uint8 [T, H, W, 3].
            fps: Frames per second.
            about: Further members of the record; not part of the video's own tags.
        """
        title = self.request.prompt.encode("utf-8", "backslashreplace").decode()
        tags = {"title": title, "comment": _json_text(self.made_from)}
        files = dict(_encoded(self.video.name, self.form, frames_THWC, fps, tags))
        record = {
            "video": self.video.name,
            "prompt": self.request.prompt,
            "seed": self.request.seed,
            "image": None if self.request.image is None else str(self.request.image),
            "made_from": self.made_from,
            **about,
            "files": {
                **self._kept_files(),
                **{name: asdict(_checksum(data)) for name, data in files.items()},
            },
        }
        make_directories(self.folder)
        write_atomic(self.record, f"{_json_text(record, indent=1)}\n".encode())
        for name, data in files.items():
            make_directories((self.folder / name).parent)
            write_atomic(self.folder / name, data)

    def _kept_files(self) -> dict[str, Any]:
        """Files of the same video in other formats; deletes those of other videos of this name."""
        try:
            record = self._read_record()
        except OtherVideoError:
            record = None
        if self.video.is_dir():
            shutil.rmtree(self.video)  # images of a longer video would stay
        kept = {}
        for form in set(get_args(VideoFormat)) - {self.form}:
            other = replace(self, form=form).video
            if record is not None and (files := record.of(other.name)):
                if record.made_from == self.made_from:
                    kept.update({name: asdict(checksum) for name, checksum in files.items()})
                elif other.is_dir():
                    shutil.rmtree(other)
                else:
                    other.unlink(missing_ok=True)
        return kept


def _json_text(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON that UTF-8 can encode, undecodable file names included."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class _Record:
    """What a record says of the files beside it."""

    made_from: Mapping[str, JSON]
    files: Mapping[str, FileChecksum]

    def of(self, video: str) -> dict[str, FileChecksum]:
        """The files of a video, or of a folder of images."""
        return {
            name: checksum
            for name, checksum in self.files.items()
            if name == video or (name.startswith(f"{video}/") and name.count("/") == 1)
        }


def check_format(form: VideoFormat, fps: float) -> None:
    """Check that a format can show a frame rate (`ValueError`)."""
    if form == "gif" and fps > 50:  # browsers play delays below 20 ms at 10 frames/s
        raise ValueError(f"a GIF shows at most 50 frames/s, got {fps:g}; write an mp4 instead")


def _encoded(
    name: str, form: VideoFormat, frames_THWC: np.ndarray, fps: float, tags: Mapping[str, str]
) -> Iterator[tuple[str, bytes]]:
    """The files of a video: name relative to the output folder, and contents."""
    if form == "mp4":
        yield name, encode_video(frames_THWC, fps, tags=tags)
    elif form == "gif":
        yield name, _encode_gif(frames_THWC, fps, comment=tags["comment"])
    else:
        for index, frame_HWC in enumerate(frames_THWC):
            image = io.BytesIO()
            Image.fromarray(frame_HWC).save(image, format="PNG")
            yield f"{name}/{index:05d}.png", image.getvalue()


def _encode_gif(frames_THWC: np.ndarray, fps: float, *, comment: str) -> bytes:
    """Encode a looping GIF; its delays are multiples of 10 ms that keep the rate on average."""
    ends_cs = [round(100 * (index + 1) / fps) for index in range(len(frames_THWC))]
    delays_cs = np.diff([0, *ends_cs])
    first, *others = (Image.fromarray(frame_HWC) for frame_HWC in frames_THWC)
    data = io.BytesIO()
    first.save(
        data,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=[int(delay) * 10 for delay in delays_cs],
        loop=0,
        comment=comment.encode(),
    )
    return data.getvalue()


def _checksum(data: bytes) -> FileChecksum:
    return FileChecksum(len(data), f"{google_crc32c.value(data):08x}")


def settings_hash(settings: Mapping[str, JSON]) -> str:
    """Hash of JSON values, 8 digits; names the folder of the videos made with them."""
    return hash_parts([json.dumps(dict(settings), sort_keys=True)])[:8]


def unfinished(outputs: Sequence[Output], *, overwrite: bool) -> list[Output]:
    """The videos that are still to be generated.

    Args:
        outputs: All videos.
        overwrite: Generate those whose names are taken by other videos, too.

    Raises:
        OtherVideoError: A name is taken, and `overwrite` is false.
    """
    missing = []
    for output in outputs:
        try:
            if not output.is_done():
                missing.append(output)
        except OtherVideoError:
            if not overwrite:
                raise
            missing.append(output)
    return missing
