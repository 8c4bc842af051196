"""The tiny CogVideoX folder of the training tests."""

import pytest

from tests.stages.train_student.conftest import save_pipeline


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("base"))
