"""Files of sampled videos: names, formats, records, and what is kept."""

import dataclasses
import json

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages.clips import read_video
from stages.evaluate.videos import open_side
from stages.sample_videos.outputs import (
    OtherVideoError,
    Output,
    check_format,
    file_stem,
    settings_hash,
    unfinished,
)
from stages.sample_videos.requests import VideoRequest

PROMPT = "A dog runs. It stops."
FRAMES_THWC = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
FORMATS = ("mp4", "gif", "frames")


@pytest.fixture
def output(tmp_path):
    def make(form="mp4", prompt=PROMPT, seed=0, **made_from):
        request = VideoRequest(prompt=prompt, seed=seed)
        settings = {"prompt": prompt, "seed": seed, "steps": 50} | made_from
        return Output(
            request=request,
            folder=tmp_path / "out",
            stem=file_stem(request),
            form=form,
            made_from=settings,
        )

    return make


def written(output, frames_THWC=FRAMES_THWC):
    output.write(frames_THWC, 8.0, {"run": "runs/lgf"})
    return output


class TestNames:
    def test_are_prompt_and_seed_as_vbench_expects(self, output):
        assert output().video.name == "A dog runs. It stops.-0.mp4"
        assert output("frames", seed=4).video.name == "A dog runs. It stops.-4"

    @pytest.mark.parametrize(
        ("prompt", "start"),
        [
            ("a/b", "a_b-"),
            ("../up", "__up-"),
            (".hidden", "_hidden-"),
            ("-rf", "_rf-"),
            ("tab\there", "tab_here-"),
            ("end ", "end_-"),
            ("\udcff", "_-"),
        ],
    )
    def test_leave_out_what_files_cannot_be_named(self, prompt, start):
        stem = file_stem(VideoRequest(prompt=prompt, seed=7))
        assert stem.startswith(start)
        assert stem.endswith("-7")

    @pytest.mark.parametrize("letter", ["x", "é", "走", "\U00020000"])
    def test_are_cut_to_what_a_file_system_takes(self, letter, output, tmp_path):
        outputs = [output(prompt=letter * 500 + end, seed=2**63 - 1) for end in "ab"]
        assert len({one.video for one in outputs}) == 2
        for one in outputs:
            written(one)
            assert one.is_done()

    @given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
    def test_differ_where_prompts_do(self, prompts):
        first, second = (file_stem(VideoRequest(prompt=text, seed=0)) for text in prompts)
        assert first != second
        assert "/" not in first
        assert "\0" not in first
        first.encode()


class TestFormats:
    def test_an_mp4_carries_how_it_was_made(self, output):
        video = written(output()).video
        frames_THWC, fps = read_video(video)
        assert (frames_THWC.shape, fps) == (FRAMES_THWC.shape, 8)
        with av.open(str(video)) as container:
            tags = container.metadata
        assert tags["title"] == PROMPT
        assert json.loads(tags["comment"]) == output().made_from

    @pytest.mark.parametrize(("fps", "total_ms"), [(8.0, 1120), (24.0, 370), (30.0, 300)])
    def test_a_gif_keeps_the_rate_on_average(self, output, fps, total_ms):
        one = output("gif")
        one.write(FRAMES_THWC, fps, {})
        with Image.open(one.video) as image:
            assert image.n_frames == 9
            delays = []
            for index in range(9):
                image.seek(index)
                delays.append(image.info["duration"])
            image.seek(0)
            shown_HWC = np.asarray(image.convert("RGB"))
        assert sum(delays) == pytest.approx(total_ms, abs=10)
        assert max(delays) - min(delays) <= 10
        assert shown_HWC.shape == FRAMES_THWC.shape[1:]

    def test_a_gif_shows_at_most_50_frames_per_second(self):
        check_format("gif", 50.0)
        check_format("mp4", 60.0)
        with pytest.raises(ValueError, match="at most 50 frames/s, got 60"):
            check_format("gif", 60.0)

    def test_frames_are_images_without_loss(self, output):
        folder = written(output("frames")).video
        names = sorted(path.name for path in folder.iterdir())
        assert names == [f"{index:05d}.png" for index in range(9)]
        for name, frame_HWC in zip(names, FRAMES_THWC, strict=True):
            with Image.open(folder / name) as image:
                assert (np.asarray(image) == frame_HWC).all()

    def test_text_that_utf8_cannot_encode_is_written_and_found_again(self, output):
        one = written(output(prompt="a \udcff dog"))
        assert one.is_done()


@pytest.mark.parametrize("form", FORMATS)
class TestResume:
    def test_what_is_there_with_the_same_settings_is_kept(self, output, form):
        one = output(form)
        assert not one.is_done()
        written(one)
        assert one.is_done()
        assert unfinished([one, output(form, seed=1)], overwrite=False) == [output(form, seed=1)]

    def test_other_settings_are_named_and_replaced_only_when_asked(self, output, form):
        written(output(form))
        other = output(form, steps=20, guidance=6.0)
        with pytest.raises(
            OtherVideoError, match=r"exists, with steps 50 instead of 20, guidance None instead"
        ):
            other.is_done()
        with pytest.raises(OtherVideoError):
            unfinished([other], overwrite=False)
        assert unfinished([other], overwrite=True) == [other]
        written(other, FRAMES_THWC[:5])
        assert other.is_done()
        if form == "frames":
            assert len(list(other.video.iterdir())) == 5

    def test_a_damaged_or_missing_file_is_made_again(self, output, form):
        one = written(output(form))
        file = max(one.video.iterdir()) if one.video.is_dir() else one.video
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        assert not one.is_done()
        file.unlink()
        assert not one.is_done()
        written(one)
        assert one.is_done()

    def test_a_record_without_its_video_is_no_video(self, output, form):
        """As a process leaves it that is killed between the two."""
        one = written(output(form))
        record = one.record.read_bytes()
        for file in [*one.video.glob("*"), one.video]:
            file.rmdir() if file.is_dir() else file.unlink()
        assert not one.is_done()
        assert not output(form, steps=20).is_done()
        assert one.record.read_bytes() == record

    def test_a_video_without_a_record_is_somebody_elses(self, output, form):
        one = written(output(form))
        one.record.unlink()
        with pytest.raises(OtherVideoError, match="without a record"):
            one.is_done()
        assert unfinished([one], overwrite=True) == [one]

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", "{}", '{"made_from": {}, "files": {"a": 1}}', '{"mine": 1}']
    )
    def test_a_json_that_is_no_record_is_not_replaced(self, output, form, content):
        one = output(form)
        one.folder.mkdir()
        one.record.write_text(content)
        with pytest.raises(OtherVideoError, match="not the record of a sampled video"):
            one.is_done()
        assert one.record.read_text() == content


class TestSeveralFormats:
    def test_share_one_record(self, output):
        for form in FORMATS:
            written(output(form))
        assert all(output(form).is_done() for form in FORMATS)

    def test_of_another_video_stop_it_or_go_with_it(self, output):
        for form in FORMATS:
            written(output(form))
        for form in FORMATS:
            with pytest.raises(OtherVideoError, match="steps 50 instead of 20"):
                output(form, steps=20).is_done()
        written(output("mp4", steps=20))
        assert sorted(path.name for path in output().folder.iterdir()) == [
            "A dog runs. It stops.-0.json",
            "A dog runs. It stops.-0.mp4",
        ]


def test_a_record_names_no_file_of_another_folder(output, tmp_path):
    one = written(output())
    record = json.loads(one.record.read_text())
    record["files"] = {"../out/A dog runs. It stops.-0.mp4": record["files"][one.video.name]}
    one.record.write_text(json.dumps(record))
    assert not one.is_done()


def test_evaluation_reads_prompt_and_seed(output):
    written(output(seed=3))
    (video,) = open_side("lgf", output().folder).videos
    assert (video.prompt, video.number) == (PROMPT, 3)


def test_the_folder_is_named_by_the_settings():
    settings = {"steps": 50, "weights": "ab"}
    assert settings_hash(settings) == settings_hash(dict(reversed(settings.items())))
    assert settings_hash(settings) != settings_hash(settings | {"steps": 20})


def test_equal_frames_give_equal_files(output, tmp_path):
    first = written(output())
    second = written(dataclasses.replace(first, folder=tmp_path / "again"))
    assert first.video.read_bytes() == second.video.read_bytes()
