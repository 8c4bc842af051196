"""Number of injected faults of each kind: a sample, or all of them with --full-faults."""

import pytest

FAULTS = {
    # argument of a test: (sample, all)
    "kill": (8, 150),
    "timed_kill": (3, 50),
    "kill_of_repair": (4, 50),
    "flip": (40, 1000),
    "fuzz": (39, 2600),
    "free_pages": (4, 48),
    "free_inodes": (3, 40),
    "copy": (9, 120),
    "crowd": (1, 6),
    "lost_lock": (5, 150),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Number the faults; a test's own number is its seed."""
    position = int(metafunc.config.getoption("--full-faults"))
    for name, counts in FAULTS.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, range(counts[position]))
