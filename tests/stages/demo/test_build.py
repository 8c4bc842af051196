import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.clips import ClipRecord, ClipsConfig, load_clip, open_dataset, read_video
from stages.demo import DemoConfig, demo_paths, draw_clip, ensure_demo
from stages.progress import SilentProgress


def settings(root: Path, **changes) -> tuple[DemoConfig, ClipsConfig]:
    demo = DemoConfig(root=root, num_clips=3, clips_per_tar=2)
    clips = ClipsConfig(path=root / "clips", num_frames=9, height=64, width=96)
    return demo.model_copy(update=changes), clips


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[DemoConfig, ClipsConfig]:
    demo, clips = settings(tmp_path_factory.mktemp("demo") / "root")
    ensure_demo(demo, clips, progress=SilentProgress())
    return demo, clips


def test_the_clips_are_a_dataset_that_loads(demo):
    _config, clips = demo
    shards = open_dataset(clips).shards
    assert [shard.num_clips() for shard in shards] == [2, 1]
    for seed, record in enumerate(record for shard in shards for record in shard.records()):
        assert isinstance(record, ClipRecord)
        drawn = draw_clip(seed, num_frames=9, height=64, width=96, fps=8.0)
        clip = load_clip(record, clips)
        assert clip.caption == drawn.caption
        assert np.array_equal(clip.prompts[0].mask_HW, drawn.mask_HW)
        assert np.abs(clip.frames_THWC.astype(int) - drawn.frames_THWC).mean() < 8


def test_the_parts_lie_where_it_says_and_are_made_once(demo):
    config, clips = demo
    before = checksums(config.root)
    paths = ensure_demo(config, clips, progress=SilentProgress())
    assert paths == demo_paths(config.root)
    assert paths.base_model.joinpath("model_index.json").is_file()
    assert paths.sam2_checkpoint.is_file() and paths.sam2_config.is_file()
    assert checksums(config.root) == before
    assert not list(config.root.rglob(".*.partial"))


def test_equal_settings_make_equal_bytes_in_another_folder(demo, tmp_path):
    config, clips = demo
    ensure_demo(config.model_copy(update={"root": tmp_path}), clips, progress=SilentProgress())
    assert checksums(config.root) == checksums(tmp_path)


def test_leftovers_of_a_killed_maker_are_swept(demo, tmp_path):
    config, clips = settings(tmp_path)
    (tmp_path / ".clips.partial").mkdir()
    (tmp_path / ".clips.partial" / "00009.tar").write_bytes(b"half")
    ensure_demo(config, clips, progress=SilentProgress())
    assert sorted(file.name for file in (tmp_path / "clips").iterdir()) == [
        "00000.tar", "00001.tar", "made_with.json",
    ]  # fmt: skip


def test_copies_of_earlier_weights_are_not_taken(demo, tmp_path):
    config, clips = settings(tmp_path)
    ensure_demo(config, clips, progress=SilentProgress(), parts=["sam2"])
    record = tmp_path / "models" / "sam2" / "made_with.json"
    record.write_text(json.dumps({"weights": "0123456789abcdef"}))
    with pytest.raises(ValueError, match="remove the folder to rebuild it"):
        ensure_demo(config, clips, progress=SilentProgress(), parts=["sam2"])


@pytest.mark.parametrize(
    ("changes", "name"), [({"seed": 1}, "seed"), ({"image_to_video": True}, "image_to_video")]
)
def test_parts_made_with_other_settings_are_not_taken(demo, changes, name):
    config, clips = demo
    with pytest.raises(ValueError, match=name):
        ensure_demo(config.model_copy(update=changes), clips, progress=SilentProgress())


def test_foreign_folders_are_not_taken(tmp_path):
    config, clips = settings(tmp_path)
    (tmp_path / "clips").mkdir()
    with pytest.raises(ValueError, match="not made by the demo"):
        ensure_demo(config, clips, progress=SilentProgress())


def test_mask_video_and_joints_are_in_the_tar(demo, tmp_path):
    import tarfile

    config, _ = demo
    with tarfile.open(config.root / "clips" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:4] == [
            "biped-000000.joints.json", "biped-000000.mask.png", "biped-000000.mp4",
            "biped-000000.txt",
        ]  # fmt: skip
        tar.extractall(tmp_path, filter="data")
    truth = json.loads((tmp_path / names[0]).read_text())
    assert np.shape(truth["joints_xy"])[0] == 9
    assert np.asarray(Image.open(tmp_path / names[1])).shape == (64, 96)
    assert read_video(tmp_path / names[2])[0].shape == (9, 64, 96, 3)


def test_a_wan_is_built_beside_what_is_there(demo):
    from stages.students.registry import read_configs

    config, clips = demo
    before = checksums(config.root)
    of_wan = config.model_copy(update={"student": "wan"})
    paths = ensure_demo(of_wan, clips, progress=SilentProgress())
    assert paths == demo_paths(config.root, "wan")
    assert read_configs(paths.base_model).FAMILY == "Wan"
    assert before.items() <= checksums(config.root).items()
    ensure_demo(of_wan, clips, progress=SilentProgress())


def test_the_image_to_video_demo_has_the_pretrained_vae_and_a_pipeline_that_loads(tmp_path):
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXImageToVideoPipeline

    config, clips = settings(tmp_path, image_to_video=True)
    folder = ensure_demo(config, clips, progress=SilentProgress()).base_model
    assert isinstance(
        CogVideoXImageToVideoPipeline.from_pretrained(folder), CogVideoXImageToVideoPipeline
    )
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    clip = draw_clip(0, num_frames=1, height=128, width=192)
    pixels = torch.from_numpy(clip.frames_THWC).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert (restored - pixels).square().mean() < 0.3 * pixels.var()
