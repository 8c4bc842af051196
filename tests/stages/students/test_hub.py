"""Base models that the hub does not hand out."""

import pytest
from huggingface_hub.errors import GatedRepoError

from stages.config import BaseModelConfig
from stages.students.hub import resolve_base_model


def test_a_gated_model_says_where_its_licence_is_accepted(monkeypatch):
    def refuse(*_, **__):
        # Without a response, whose class depends on the hub client's version.
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"is gated: accept its terms at .*/some/model with"):
        resolve_base_model(BaseModelConfig(path="some/model"), ())


def test_an_incomplete_folder_names_both_families(tmp_path):
    with pytest.raises(ValueError, match=r"has no model_index\.json, vae; .* of CogVideoX or Wan"):
        resolve_base_model(BaseModelConfig(path=str(tmp_path)), ("vae",))


def test_a_download_that_was_not_finished_says_so(monkeypatch, tmp_path):
    """What the hub's client returns without a network, after an estimate read the configuration."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"some/model has no vae in .*; is the download complete\?"
    ):
        resolve_base_model(BaseModelConfig(path="some/model"), ("vae",))
