"""TorchScript networks: features of the module they were made from, and files that are refused."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.video_features.torchscript import TorchScriptNetwork

CPU = torch.device("cpu")


def save(module: torch.nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def copy_with(source: Path, target: Path, members: dict[str, bytes]) -> Path:
    """Copy an archive with members replaced or added; names without the archive's root."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        added = {f"{root}/{name}": data for name, data in members.items()}
        for name in old.namelist():
            new.writestr(name, added.pop(name) if name in added else old.read(name))
        for name, data in added.items():
            new.writestr(name, data)
    return target


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


class TestFeatures:
    def test_are_the_logits_of_the_module_in_eager_mode(self, tiny_i3d, clips):
        path, module = tiny_i3d
        network = TorchScriptNetwork(path, clips, None)
        frames = np.random.default_rng(0).integers(0, 256, (16, 48, 64, 3), dtype=np.uint8)
        found = network.load(CPU)(frames)
        # Resized after scaling, frame by frame: both are linear, so the order does not matter.
        scaled = torch.from_numpy(frames).double().permute(0, 3, 1, 2) / 127.5 - 1
        resized = torch.nn.functional.interpolate(scaled, size=(64, 64), mode="bilinear")
        with torch.no_grad():
            expected = module.conv.double()(resized.permute(1, 0, 2, 3)[None]).mean((2, 3, 4))[0]
            module.conv.float()
        assert found.dtype == np.float32 and found.shape == (5,)
        assert found == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)

    def test_frames_default_to_16_and_can_be_set(self, tiny_i3d, clips):
        path, _ = tiny_i3d
        assert TorchScriptNetwork(path, clips, None).protocol.clips.num_frames == 16
        assert TorchScriptNetwork(path, clips, 32).protocol.clips.num_frames == 32

    def test_protocol_names_everything(self, tiny_i3d, clips):
        text = TorchScriptNetwork(tiny_i3d[0], clips, None).protocol.text
        for part in ("i3d_torchscript.pt", "SHA-256", "16 frames", "8 fps", "48x64", "224x224"):
            assert part in text


class TestRefused:
    def test_a_missing_file(self, clips, tmp_path):
        with pytest.raises(ValueError, match=r"there is no file .*i3d_torchscript\.pt"):
            TorchScriptNetwork(tmp_path / "gone.pt", clips, None)

    @pytest.mark.parametrize("kind", ["pickle", "state_dict", "old_torch_save", "text", "empty"])
    def test_files_that_are_no_torchscript_are_not_unpickled(self, kind, clips, tmp_path):
        path, touched = tmp_path / "network.pt", tmp_path / "touched"
        if kind == "pickle":
            path.write_bytes(pickle.dumps(Touch(touched)))
        elif kind == "state_dict":
            torch.save({"a": Touch(touched)}, path)
        elif kind == "old_torch_save":
            torch.save({"a": Touch(touched)}, path, _use_new_zipfile_serialization=False)
        else:
            path.write_text("no network" if kind == "text" else "")
        with pytest.raises(ValueError, match="pickles are not read"):
            TorchScriptNetwork(path, clips, None)
        assert not touched.exists()

    @pytest.mark.parametrize("member", ["data.pkl", "constants.pkl"])
    def test_code_in_the_archives_own_pickles_does_not_run(self, member, tiny_i3d, clips, tmp_path):
        touched = tmp_path / "touched"
        evil = pickle.dumps(Touch(touched), protocol=2)
        path = copy_with(tiny_i3d[0], tmp_path / "evil.pt", {member: evil})
        with pytest.raises(ValueError, match="is no working TorchScript"):
            TorchScriptNetwork(path, clips, None)
        assert not touched.exists()

    @pytest.mark.parametrize("member", ["extra/weights.pkl", "model.pt", "other.pickle"])
    def test_an_archive_with_another_pickle(self, member, tiny_i3d, clips, tmp_path):
        path = copy_with(tiny_i3d[0], tmp_path / "more.pt", {member: pickle.dumps(1)})
        with pytest.raises(ValueError, match="no part of a TorchScript archive"):
            TorchScriptNetwork(path, clips, None)

    def test_programs_that_access_files(self, clips, tmp_path):
        class Writer(torch.nn.Module):
            def forward(
                self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool
            ) -> torch.Tensor:
                torch.save(x, "written")
                return x

        path = save(Writer(), tmp_path / "writer.pt")
        with pytest.raises(ValueError, match=r"calls torch\.save"):
            TorchScriptNetwork(path, clips, None)

    def test_a_git_lfs_pointer(self, clips, tmp_path):
        path = tmp_path / "network.pt"
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(ValueError, match="git-lfs pointer"):
            TorchScriptNetwork(path, clips, None)

    def test_a_damaged_archive(self, tiny_i3d, clips, tmp_path):
        data = tiny_i3d[0].read_bytes()
        path = tmp_path / "short.pt"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=r"short\.pt"):
            TorchScriptNetwork(path, clips, None)

    def test_another_call(self, clips, tmp_path):
        class Plain(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        path = save(Plain(), tmp_path / "plain.pt")
        with pytest.raises(ValueError, match="forward takes x, but not rescale, resize"):
            TorchScriptNetwork(path, clips, None)

    def test_another_output(self, clips, tmp_path):
        class Maps(torch.nn.Module):
            def forward(
                self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool
            ) -> torch.Tensor:
                return x.float()

        path = save(Maps(), tmp_path / "maps.pt")
        with pytest.raises(ValueError, match=r"returned \[1, 3, 16, 64, 64\] for one clip"):
            TorchScriptNetwork(path, clips, None)

    def test_too_few_frames_for_the_network(self, tiny_i3d, clips):
        with pytest.raises(ValueError, match=r"failed on frames of shape \(1, 64, 64, 3\)"):
            TorchScriptNetwork(tiny_i3d[0], clips, 1)
