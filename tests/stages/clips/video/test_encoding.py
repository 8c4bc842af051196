import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from stages.clips import VideoError, encode_video, read_video, write_video


def test_a_written_video_reads_back(tools, tmp_path):
    frames = np.stack([np.roll(tools.corner_frame(32, 48), shift, axis=1) for shift in range(7)])
    path = tmp_path / "new" / "a.mp4"
    write_video(path, frames, 8)
    back, fps = read_video(path)
    assert back.shape == frames.shape and fps == 8
    inside = (slice(None), slice(20, 30), slice(30, 44))
    assert np.abs(back[inside].astype(int) - frames[inside]).mean() < 6
    assert [entry.name for entry in path.parent.iterdir()] == ["a.mp4"]
    assert read_video(path.read_bytes())[0].shape == frames.shape


def test_equal_frames_give_equal_bytes(tools):
    frames = tools.counting_frames(6)
    assert encode_video(frames, 8) == encode_video(frames, 8)


HASH_ENCODED_AND_DECODED = """
import ctypes, hashlib, sys
from pathlib import Path
import av
import numpy as np
from stages.clips import encode_video, read_video

if len(sys.argv) > 1:
    (libavutil,) = (Path(av.__file__).parents[1] / "av.libs").glob("libavutil*.so*")
    ctypes.CDLL(str(libavutil)).av_force_cpu_flags(int(sys.argv[1], 0))
rng = np.random.default_rng(0)
for height, width in ((64, 96), (50, 66)):
    blocks = rng.integers(0, 256, (24, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    frames = blocks.repeat(8, 1).repeat(8, 2)[:, :height, :width]
    encoded = encode_video(frames, 8)
    print(hashlib.sha256(encoded).hexdigest(), hashlib.sha256(read_video(encoded)[0]).hexdigest())
"""


def hashes_in_another_process(*arguments, **environment):
    repository = str(Path(__file__).parents[4])
    environment = {**os.environ, "PYTHONPATH": repository, **environment}
    command = [sys.executable, "-c", HASH_ENCODED_AND_DECODED, *arguments]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()


def test_what_freed_memory_held_changes_no_byte_and_no_pixel():
    # glibc fills what is allocated and freed with a byte that follows from the value.
    results = [hashes_in_another_process(MALLOC_PERTURB_=value) for value in ("0", "85", "170")]
    assert results[0] == results[1] == results[2] and len(results[0]) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="looks for PyAV's bundled libavutil.so")
def test_instruction_sets_change_no_byte_and_no_pixel():
    no_simd, sse2_at_most = "0", "0x1b"
    expected = hashes_in_another_process()
    assert hashes_in_another_process(no_simd) == expected
    assert hashes_in_another_process(sse2_at_most) == expected


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (12, 34, 250), (128, 128, 128)])
def test_colours_are_stored_by_bt709_and_the_file_says_so(colour):
    frames = np.full((3, 32, 48, 3), colour, np.uint8)
    encoded = encode_video(frames, 8, crf=0)
    with av.open(io.BytesIO(encoded)) as container:
        (frame, *_) = container.decode(video=0)
    assert frame.colorspace == Colorspace.ITU709 and frame.color_range == ColorRange.MPEG
    assert frame.color_primaries == ColorPrimaries.BT709 and frame.color_trc == ColorTrc.BT709
    red, green, blue = np.array(colour) / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    chroma = 224 * (blue - luma) / 1.8556 + 128, 224 * (red - luma) / 1.5748 + 128
    planes = frame.to_ndarray()  # rows of Y, then of U, then of V
    stored = planes[0, 0], planes[32, 0], planes[40, 0]
    np.testing.assert_allclose(stored, (219 * luma + 16, *chroma), rtol=0, atol=1)
    # With each of the three within 1, blue is within 1.16 + 2.11 and its own rounding.
    assert np.abs(read_video(encoded)[0].astype(int) - frames).max() <= 3


def test_a_failed_write_leaves_the_old_file(tools, tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, tools.counting_frames(3), 8)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="even"):
        write_video(path, tools.counting_frames(3, 31, 48), 8)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("frames", "fps", "name"),
    [
        (np.zeros((0, 32, 48, 3), np.uint8), 8, "a.mp4"),
        (np.zeros((2, 32, 48, 3), np.float32), 8, "a.mp4"),
        (np.zeros((32, 48, 3), np.uint8), 8, "a.mp4"),
        (np.zeros((2, 32, 48, 3), np.uint8), 0, "a.mp4"),
        (np.zeros((2, 32, 48, 3), np.uint8), 8, "a.avi"),
    ],
)
def test_what_cannot_be_written_is_refused(frames, fps, name, tmp_path):
    with pytest.raises(ValueError):
        write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_written_video_has_the_mode_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_video(tmp_path / "a.mp4", np.zeros((2, 32, 48, 3), np.uint8), 8)
    finally:
        os.umask(before)
    assert (tmp_path / "a.mp4").stat().st_mode & 0o777 == mode


def test_what_cannot_be_read_is_a_value_error(tmp_path):
    with pytest.raises(VideoError):
        read_video(b"nothing")
    assert issubclass(VideoError, ValueError)
