"""One thread in every test's process, and in those it starts: results are then the same to the last
bit wherever they are compared, and processes do not wait for each other's threads.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-faults",
        action="store_true",
        help="inject every fault of tests/cache_schema/faults, not a sample: minutes, not seconds",
    )
