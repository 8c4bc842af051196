"""Which wheels a machine without a network needs."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.benchmarks.gpu_check.bundle import (
    USUALLY_THERE,
    compress,
    missing_packages,
    project_requirements,
    read_there,
    too_old,
)


def test_what_is_there_and_what_only_that_needs_is_not_brought() -> None:
    found = missing_packages(USUALLY_THERE, python="3.12")
    assert not set(found) & {canonicalize_name(name) for name in USUALLY_THERE}
    assert {"sam2", "diffusers", "deepspeed", "zarr", "av", "bitsandbytes"} <= set(found)
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in found)
    assert found["zarr"] == metadata.version("zarr")


def test_everything_needed_is_there_or_brought() -> None:
    have = {canonicalize_name(name) for name in USUALLY_THERE}
    found = missing_packages(USUALLY_THERE, python="3.12")
    environment = {"python_version": "3.12", "extra": ""}
    needed = [*project_requirements()]
    for name in found:
        needed += map(Requirement, metadata.requires(name) or ())
    for one in needed:
        if one.marker is None or one.marker.evaluate(environment):
            assert canonicalize_name(one.name) in have | set(found)


def test_versions_that_the_bounds_exclude_are_named(tmp_path: Path) -> None:
    file = tmp_path / "packages.txt"
    file.write_text(
        "# pip list --format=freeze\ntorch==1.0\nnumpy==2.5.2\nprotobuf\nav @ file:///a==b\n\n"
    )
    there = read_there(file)
    assert there == {"torch": "1.0", "numpy": "2.5.2", "protobuf": "", "av": ""}
    (line,) = too_old(there)
    assert line.startswith("torch 1.0, needs ")


def test_a_compressed_wheel_installs(tmp_path: Path) -> None:
    name, info = "made_up-1.0-py3-none-any.whl", "made_up-1.0.dist-info"
    with ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr("made_up.py", "VALUE = 7\n" * 1000)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")
    compress(tmp_path / name)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(site), str(tmp_path / name)], check=True)
    assert (site / "made_up.py").read_text() == "VALUE = 7\n" * 1000
