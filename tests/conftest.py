"""One thread in every test's process, and in those it starts: results are then the same to the last
bit wherever they are compared, and processes do not wait for each other's threads.
"""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

# Hypothesis otherwise fails an example that takes over 200 ms, as one does on a busy machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-faults",
        action="store_true",
        help="inject every fault of tests/cache_schema/faults, not a sample: minutes, not seconds",
    )


@pytest.fixture
def no_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and an empty cache of the model hub, whose folder is returned."""
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def refuse(*_: object) -> None:
        raise OSError("a test reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    return cache


@pytest.fixture(scope="module", autouse=True)
def no_old_garbage() -> None:
    """Let garbage collections, which stage one makes at its end, pass over what was there before.

    Libraries and tests are millions of objects, over which one collection takes most of a second.
    """
    gc.collect()
    gc.freeze()
