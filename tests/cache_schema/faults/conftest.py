"""How many faults of each kind are injected: a sample, or with --full-faults all of them."""

import pytest

FAULTS = {
    # argument of a test: (sample, all)
    "kill": (10, 150),
    "timed_kill": (3, 50),
    "kill_of_repair": (5, 50),
    "flip": (60, 1000),
    "free_pages": (6, 48),
    "free_inodes": (4, 40),
    "copy": (12, 120),
    "crowd": (1, 6),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Number the faults; a test's own number is its seed."""
    position = int(metafunc.config.getoption("--full-faults"))
    for name, counts in FAULTS.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, range(counts[position]))
