"""Changes that do and do not affect a fingerprint."""

import os

import numpy as np
import pytest

from stages.clips.fingerprints import (
    NO_VIDEO,
    hash_parts,
    hash_prompts,
    hash_video,
    source_hashes,
    video_hashes,
)
from stages.clips.records import SubjectPrompt
from stages.clips.video.streams import FilePart

KIB = 1024


@pytest.mark.parametrize("size", [0, 1, 40 * KIB, 48 * KIB, 48 * KIB + 1, 300 * KIB])
def test_a_video_is_the_same_wherever_it_lies(tmp_path, size):
    video = np.random.default_rng(size).bytes(size)
    path, tar = tmp_path / "a.mp4", tmp_path / "t.tar"
    path.write_bytes(video)
    tar.write_bytes(bytes(1000) + video + bytes(1000))
    found = hash_video(video)
    assert len(found) == 16
    assert found == hash_video(path) == hash_video(FilePart(tar, 1000, size))
    os.utime(path, (0, 0))
    assert found == hash_video(path)
    assert found != hash_video(video + b"\0")


@pytest.mark.parametrize("size", [48 * KIB, 300 * KIB, 300 * KIB + 1])
def test_a_change_at_the_start_the_middle_or_the_end_is_seen(size):
    video = bytearray(np.random.default_rng(0).bytes(size))
    before = hash_video(bytes(video))
    for place in (0, 16 * KIB - 1, size // 2, size - 16 * KIB, size - 1):
        video[place] ^= 1
        assert hash_video(bytes(video)) != before
        video[place] ^= 1
    assert hash_video(bytes(video)) == before


def test_a_large_video_is_read_in_three_samples(tmp_path):
    path = tmp_path / "a.mp4"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    assert hash_video(path) != NO_VIDEO


def test_what_cannot_be_read_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "absent.mp4", tmp_path, tmp_path / "pipe.mp4"):
        assert hash_video(path) == NO_VIDEO


def test_pieces_are_told_apart_by_their_bounds():
    many = [[], [None], [""], ["", ""], ["a", "b"], ["ab"], ["ab", None], ["a", "b", ""]]
    assert len({hash_parts(parts) for parts in many}) == len(many)


def test_prompts_are_told_apart():
    mask_HW = np.zeros((4, 6), bool)
    mask_HW[1, 2] = True
    points, labels = np.array([[1.0, 2.0]]), np.array([1])
    two = np.array([[1.0, 2.0], [3.0, 2.0]])
    many = [
        [],
        [SubjectPrompt(mask_HW=mask_HW)],
        [SubjectPrompt(mask_HW=mask_HW.T)],
        [SubjectPrompt(mask_HW=mask_HW.reshape(6, 4))],
        [SubjectPrompt(mask_HW=mask_HW)] * 2,
        [SubjectPrompt(box_xyxy=(1, 2, 3, 4))],
        [SubjectPrompt(box_xyxy=(1, 2, 3, 5))],
        [SubjectPrompt(points_xy=points, point_labels=labels)],
        [SubjectPrompt(points_xy=two, point_labels=np.array([1, 1]))],
        [SubjectPrompt(points_xy=two, point_labels=np.array([1, 0]))],
    ]
    assert len({hash_prompts(prompts) for prompts in many}) == len(many)


def test_the_halves_are_the_digits_of_either_part():
    column = np.array([b"0" * 16 + b"a" * 16, b"1" * 16 + b"b" * 16], "S32")
    assert source_hashes(column).tolist() == [b"0" * 16, b"1" * 16]
    assert video_hashes(column[::-1]).tolist() == [b"b" * 16, b"a" * 16]
