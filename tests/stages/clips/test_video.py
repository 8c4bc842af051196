import numpy as np
import pytest

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


def test_what_cannot_be_read_is_a_value_error(tmp_path):
    with pytest.raises(VideoError):
        read_video(b"nothing")
    assert issubclass(VideoError, ValueError)
