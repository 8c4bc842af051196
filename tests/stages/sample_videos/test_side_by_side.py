"""Two videos combined side by side."""

import numpy as np
import pytest

from stages.clips import encode_video, read_video
from stages.sample_videos.side_by_side import read_side_by_side, side_by_side

LEFT_THWC, RIGHT_THWC = np.random.default_rng(0).integers(0, 255, (2, 5, 32, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("names", [("lgf", "base"), ("走" * 50, "\x1b[31m"), ("", "a")])
def test_both_are_shown_whole_below_their_names(names):
    shown_THWC = side_by_side(LEFT_THWC, RIGHT_THWC, names)
    frames, height, width, _ = shown_THWC.shape
    assert (frames, height % 2, width % 2) == (5, 0, 0)
    assert (shown_THWC[:, -32:, :48] == LEFT_THWC).all()
    assert (shown_THWC[:, -32:, -48:] == RIGHT_THWC).all()
    band_HWC = shown_THWC[0, :-32]
    assert (shown_THWC[:, :-32] == band_HWC).all()
    assert (band_HWC[:, 48:52] == band_HWC[0, 48]).all(), "a name ends where its video does"
    encode_video(shown_THWC, 8.0)


def test_names_are_written_above_their_videos():
    (left_HWC, *_), (right_HWC, *_) = (
        side_by_side(LEFT_THWC, RIGHT_THWC, names)[:, :-32] for names in (("a", ""), ("", "a"))
    )
    assert (left_HWC[:, :48] == right_HWC[:, 52:]).all()
    assert left_HWC[:, :48].std() > 0
    assert left_HWC[:, 52:].std(axis=(0, 1)).max() == 0


def test_sizes_must_agree():
    with pytest.raises(ValueError, match=r"\(5, 32, 48\) and \(4, 32, 48\)"):
        side_by_side(LEFT_THWC, RIGHT_THWC[:4], ("a", "b"))


def test_files_are_read_at_their_rate(tmp_path):
    for name, frames_THWC in (("a", LEFT_THWC), ("b", RIGHT_THWC)):
        (tmp_path / f"{name}.mp4").write_bytes(encode_video(frames_THWC, 12.0))
    shown_THWC, fps = read_side_by_side(tmp_path / "a.mp4", tmp_path / "b.mp4", ("a", "b"))
    assert fps == 12
    assert (shown_THWC[:, -32:, -48:] == read_video(tmp_path / "b.mp4")[0]).all()
