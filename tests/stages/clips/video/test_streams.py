"""Reading a part of a file as if it were a file of its own."""

import io

import pytest

from stages.clips.dataset.tars import tar_records
from stages.clips.video.decoding import read_video
from stages.clips.video.streams import FilePart, open_source

WHOLE = bytes(range(256)) * 40


@pytest.fixture
def part(tmp_path):
    (tmp_path / "whole").write_bytes(WHOLE)
    return FilePart(tmp_path / "whole", 100, 5000)


def test_a_part_reads_like_its_bytes(part):
    expected = io.BytesIO(WHOLE[100:5100])
    with open_source(part) as found:
        for offset, whence, size in [
            (0, 0, 10),
            (4990, 0, 100),
            (-7, 2, 50),
            (3, 1, 4),
            (6000, 0, 4),
            (17, 0, -1),
        ]:
            assert found.seek(offset, whence) == expected.seek(offset, whence)
            assert found.read(size) == expected.read(size)
            assert found.tell() == expected.tell()
        with pytest.raises((ValueError, OSError)):
            found.seek(-1)


def test_a_video_in_a_tar_is_decoded_where_it_lies(tools, tmp_path):
    frames_THWC = tools.counting_frames(9)
    video = tools.encode(frames_THWC)
    tools.write_tar(tmp_path / "t.tar", [("a.mp4", video), ("a.txt", b"a"), ("b.mp4", video)])
    for record in tar_records(tmp_path / "t.tar", key_prefix=""):
        assert isinstance(record.video, FilePart)
        assert record.video.size == len(video)
        found_THWC, _ = read_video(record.video)
        expected_THWC, _ = read_video(video)
        assert (found_THWC == expected_THWC).all()


def test_listing_a_tar_reads_none_of_its_videos(tools, tmp_path, monkeypatch):
    size = 3 << 20
    members = [(f"{n}.{suffix}", bytes(size)) for n in range(3) for suffix in ("mp4",)]
    members += [(f"{n}.txt", b"walks") for n in range(3)]
    path = tools.write_tar(tmp_path / "t.tar", members)
    read = []
    original = io.FileIO.readinto

    class Counting(io.FileIO):
        def readinto(self, buffer):
            read.append(original(self, buffer))
            return read[-1]

    monkeypatch.setattr("stages.clips.dataset.tars.io.FileIO", Counting)
    records = list(tar_records(path, key_prefix=""))
    assert [record.caption for record in records] == ["walks"] * 3
    assert 0 < sum(read) < size / 10
