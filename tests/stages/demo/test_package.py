"""The packaged folder, put together from trained models."""

import shutil

import pytest

from stages.demo.build import PRETRAINED
from stages.demo.training.package import package


@pytest.fixture
def trained(tmp_path):
    """Folders as the training scripts leave them, with what is packaged."""
    both, image = PRETRAINED / "cogvideox", PRETRAINED / "cogvideox_image_to_video"
    folders = {name: tmp_path / name for name in ("sam2", "vae", "t2v", "i2v")}
    shutil.copytree(PRETRAINED / "sam2", folders["sam2"])
    shutil.copytree(both / "vae", folders["vae"])
    for name in ("t2v", "i2v"):
        shutil.copytree(both, folders[name])
        (folders[name] / "vae" / "training.json").unlink()
        (folders[name] / "training.pt").touch()
    shutil.copytree(image, folders["i2v"], dirs_exist_ok=True)
    return list(folders.values())


def test_the_packaged_folder_is_put_together_from_the_trained_ones(trained, tmp_path):
    package(*trained, tmp_path / "out")
    files = {
        folder: {
            file.relative_to(folder): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
        for folder in (PRETRAINED, tmp_path / "out")
    }
    assert files[PRETRAINED] == files[tmp_path / "out"]


def test_pipelines_of_different_vaes_are_not_put_together(trained, tmp_path):
    (trained[3] / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"differ in vae.config\.json"):
        package(*trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_training_is_not_packaged(trained, tmp_path):
    (trained[1] / "training.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae.training\.json: run its training script"):
        package(*trained, tmp_path / "out")
