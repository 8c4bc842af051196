"""One thread in every test's process, and in those it starts: results are then the same to the last
bit wherever they are compared, and processes do not wait for each other's threads.
"""

import os

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
