"""Runs the tests marked gpu; the last line of output is one JSON object with their outcomes."""

import json
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2] / "gpu"


class Outcomes:
    """Counts outcomes, and keeps the names of tests that failed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: when it was called, or where it did not get so far."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)


def main() -> None:
    """Run and print."""
    outcomes = Outcomes()
    options = ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    code = pytest.main([*options, str(TESTS)], plugins=[outcomes])
    counts = {name: outcomes.counts[name] for name in ("passed", "failed", "skipped")}
    print(json.dumps({"name": "tests", **counts, "failures": outcomes.failures}))
    raise SystemExit(int(code))


if __name__ == "__main__":
    main()
