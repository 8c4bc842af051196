"""TorchScript is loaded; pickles, text and damaged files are refused with what to do."""

import pickle
import zipfile

import pytest
import torch

from stages.files.torchscript import check_torchscript, load_torchscript

CPU = torch.device("cpu")


class Half(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.factor * x


@pytest.fixture
def half(tmp_path):
    path = tmp_path / "half.pt"
    torch.jit.trace(Half(), torch.ones(2)).save(path)
    return path


def open_torchscript(path):
    check_torchscript(path, remedy="export it again")
    return load_torchscript(path, CPU, remedy="export it again")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_a_trace_is_loaded_for_evaluation(half):
    model = open_torchscript(half)
    assert torch.equal(model(torch.arange(3.0)), torch.tensor([0.0, 0.5, 1.0]))
    assert not model.training


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("no network"), "is not a TorchScript archive"),
        (lambda path: path.write_bytes(pickle.dumps(Bomb())), "is not a TorchScript archive"),
        (lambda path: torch.save(Bomb(), path), "holds no TorchScript program"),
        (lambda path: torch.save(Half().state_dict(), path), "holds no TorchScript program"),
    ],
)
def test_what_is_not_torchscript_is_refused_unread(tmp_path, write, message):
    path = tmp_path / "model.pt"
    write(path)
    with pytest.raises(ValueError, match=message) as raised:
        open_torchscript(path)
    assert str(path) in str(raised.value)


def test_damaged_files_are_refused(half, tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes(half.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a TorchScript archive"):
        open_torchscript(cut)
    partial = tmp_path / "partial.pt"
    with zipfile.ZipFile(half) as whole, zipfile.ZipFile(partial, "w") as part:
        for name in whole.namelist():
            if not name.endswith("/data.pkl"):
                part.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match=r"no working TorchScript .*export it again"):
        open_torchscript(partial)
