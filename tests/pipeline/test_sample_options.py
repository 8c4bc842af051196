"""Options of `sample` that set configuration values."""

from pathlib import Path

import pytest

from pipeline.commands import sample
from tests.pipeline.test_cli import DEMO, invoke, stub


class TestSample:
    def test_options_are_settings_under_a_shorter_name(self, monkeypatch):
        calls = stub(monkeypatch, sample)
        result = invoke(
            *("sample", *DEMO, "-p", "a dog", "--steps", "9", "--guidance", "3.5", "--fps", "12"),
            *("--size", "17x64x96", "--lora-scale", "0.5", "--scheduler", "dpm", "--dynamic-cfg"),
            *("--offload", "model", "--tile", "sample.steps=4"),
        )
        assert result.exit_code == 0, result.stderr
        found = calls[0][0].sample
        assert (found.steps, found.guidance, found.fps) == (9, 3.5, 12)
        assert (found.num_frames, found.height, found.width) == (17, 64, 96)
        assert (found.lora_scale, found.scheduler, found.dynamic_cfg) == (0.5, "dpm", True)
        assert (found.offload, found.tiling) == ("model", True)

    def test_without_options_the_settings_stay(self, monkeypatch):
        calls = stub(monkeypatch, sample)
        invoke("sample", *DEMO, "-p", "a dog", "sample.tiling=true", "sample.dynamic_cfg=true")
        found = calls[0][0].sample
        assert found.tiling and found.dynamic_cfg
        assert (found.steps, found.height) == (20, None)

    def test_height_and_width_leave_the_length(self, monkeypatch):
        calls = stub(monkeypatch, sample)
        invoke("sample", *DEMO, "-p", "a dog", "--size", "64x96", "--frames", "33")
        found = calls[0][0].sample
        assert (found.num_frames, found.height, found.width) == (33, 64, 96)

    def test_the_rest_is_handed_on(self, monkeypatch, tmp_path):
        calls = stub(monkeypatch, sample)
        (tmp_path / "p.txt").write_text("a cat")
        invoke(
            *("sample", *DEMO, "-p", "a dog", "-p", "a bird", "--seed", "3", "--seed", "4"),
            *("--prompt-file", str(tmp_path / "p.txt"), "--num", "2", "--format", "gif"),
            *("--compare", "base", "--out", "videos", "--overwrite", "--base"),
        )
        assert calls[0][1] == sample.SampleOptions(
            prompts=["a dog", "a bird"],
            prompt_file=tmp_path / "p.txt",
            seeds=[3, 4],
            num=2,
            base_only=True,
            compare="base",
            out=Path("videos"),
            form="gif",
            overwrite=True,
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--size", "big"], "is FxHxW, such as 49x480x720, or HxW, got big"),
            (["--size", "64"], "is FxHxW"),
            (["--size", "17x64x96", "--frames", "9"], "remove --frames"),
            (["--frames", "13"], "num_frames must be 8N+1, got 13"),
            (["--size", "17x60x96"], "sample.height must be a multiple of 16, got 60"),
            (["--seed", "-1"], "--seed"),
            (["--num", "0"], "--num"),
        ],
    )
    def test_what_cannot_be_is_bad_usage(self, monkeypatch, arguments, message):
        calls = stub(monkeypatch, sample)
        result = invoke("sample", *DEMO, "-p", "a dog", *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())
        assert not calls
