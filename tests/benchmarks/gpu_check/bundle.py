"""Wheels for a machine with a GPU but no network: this project, and what its Python lacks.

    python -m tests.benchmarks.gpu_check.bundle --out build/gpu-bundle [--there packages.txt]

Run it in the environment of requirements.lock, whose versions the wheels have. The file names what
the other machine has, one package a line, as `pip list --format=freeze` prints it; without one,
the packages in `USUALLY_THERE` are expected. What is there is not brought, whatever its version.
`make gpu-check BUNDLE=build/gpu-bundle` installs the wheels there, beside its packages.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from zipfile import ZIP_LZMA, ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[3]
EXTRAS = ("adamw8bit",)
"""Extras whose packages a part measures."""
MAX_MIB = 60
USUALLY_THERE = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "tensorboard",
    "sentencepiece",
    "protobuf",
    "numpy",
    "scipy",
    "matplotlib",
    "pillow",
    "fsspec",
    "pyyaml",
    "packaging",
    "tqdm",
    "filelock",
    "regex",
    "requests",
    "typing-extensions",
    "setuptools",
    "wheel",
    "psutil",
    "ninja",
    "einops",
    "rich",
    "typer",
    "pytest",
    "pytest-timeout",
    "hypothesis",
)
"""Packages of an image for PyTorch; what they need themselves is taken to be there too."""
_GLIBC_MINORS = range(35, 4, -1)
_OF_A_GPU = re.compile(r"_(cuda|rocm|xpu)\d*\.so$")
_COMPRESSED_FROM = 4 * 2**20


def project_requirements() -> list[Requirement]:
    """Return the project's requirements, with those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in (*project["dependencies"], *extras)]


def missing_packages(there: Iterable[str], *, python: str) -> dict[str, str]:
    """Walk the requirements of the project, but not of packages that are there.

    Args:
        there: Names of the packages of the other machine.
        python: Its Python, such as 3.12.

    Returns:
        Versions by canonical name, those of this environment.

    Raises:
        PackageNotFoundError: This environment itself lacks one.
    """
    known = {canonicalize_name(name) for name in there}
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: dict[str, str] = {}
    pending = project_requirements()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in known or name in found:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        found[name] = metadata.version(name)
        pending += map(Requirement, metadata.requires(name) or ())
    return dict(sorted(found.items()))


def too_old(there: Mapping[str, str]) -> list[str]:
    """Return `name version, needs …` of packages there that the project's bounds exclude."""
    versions = {canonicalize_name(name): version for name, version in there.items() if version}
    return [
        f"{requirement.name} {version}, needs {requirement.specifier}"
        for requirement in project_requirements()
        if (version := versions.get(canonicalize_name(requirement.name))) is not None
        and not requirement.specifier.contains(version, prereleases=True)
    ]


def read_there(file: Path | None) -> dict[str, str]:
    """Return versions by name from lines `name` or `name==version`; empty where unknown."""
    lines = USUALLY_THERE if file is None else file.read_text(encoding="utf-8").split("\n")
    stripped = [line.strip() for line in lines]
    named = [line for line in stripped if line and not line.startswith("#")]
    # Of one installed from a file, `name @ file:…` is printed.
    pairs = [line.partition(" @ ")[0].partition("==") for line in named]
    return {name: version for name, _, version in pairs}


def fetch_wheel(name: str, version: str, folder: Path, *, python: str) -> Path:
    """Download a package's wheel for the other machine; build it where there is none.

    Raises:
        SystemExit: There is only a source package, whose wheel fits this Python alone.
    """
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in _GLIBC_MINORS]
    before = set(folder.iterdir())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    where = ["--no-deps", f"--python-version={python}", "--implementation=cp", *platforms]
    wanted = f"{name}=={version}"
    download = [*pip, "download", "--only-binary=:all:", *where, "--dest", str(folder), wanted]
    if subprocess.run(download, capture_output=True).returncode:
        build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
        no_operators = {"DS_BUILD_OPS": "0", "SAM2_BUILD_CUDA": "0"}
        subprocess.run([*build, wanted], check=True, env=os.environ | no_operators)
    (wheel,) = set(folder.iterdir()) - before
    if not _fits(wheel, python):
        raise SystemExit(
            f"{wheel.name} was built here and does not fit Python {python} on another machine; "
            f"run this with Python {python}"
        )
    return wheel


def _fits(wheel: Path, python: str) -> bool:
    tags = parse_wheel_filename(wheel.name)[3]
    interpreter = f"cp{python.replace('.', '')}"
    return any(
        tag.interpreter in (interpreter, "py3", "py2.py3") or tag.abi in ("abi3", "none")
        for tag in tags
    )


def build_own_wheel(folder: Path) -> None:
    """Build the wheel of this project, without the demo's weights: `make` runs in a checkout."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would add to it
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("sam2videox-*.whl")
    with _repacked(wheel) as unpacked:
        for weights in unpacked.glob("stages/demo/pretrained/**/*.safetensors"):
            weights.unlink()


def keep_one_cuda(wheel: Path, cuda: str) -> None:
    """Of a wheel that brings a library for every CUDA, keep the one of `cuda`, such as 130."""
    with _repacked(wheel) as unpacked:
        libraries = [file for file in unpacked.rglob("*.so") if _OF_A_GPU.search(file.name)]
        others = [file for file in libraries if not file.name.endswith(f"_cuda{cuda}.so")]
        if len(others) == len(libraries):
            raise SystemExit(f"{wheel.name} has no library for CUDA {cuda}; set --cuda")
        for library in others:
            library.unlink()


@contextmanager
def _repacked(wheel: Path) -> Iterator[Path]:
    """The folder of a wheel's files, which is packed into the wheel again."""
    command = [sys.executable, "-m", "wheel"]
    with tempfile.TemporaryDirectory() as name:
        unpack = [*command, "unpack", "--dest", name, str(wheel)]
        subprocess.run(unpack, stdout=subprocess.DEVNULL, check=True)
        (unpacked,) = Path(name).iterdir()
        yield unpacked
        pack = [*command, "pack", "--dest-dir", str(wheel.parent), str(unpacked)]
        subprocess.run(pack, stdout=subprocess.DEVNULL, check=True)


def compress(wheel: Path) -> None:
    """Compress a wheel's files by LZMA, which pip reads too and which makes libraries smaller."""
    smaller = wheel.with_suffix(".unfinished")
    with ZipFile(wheel) as source, ZipFile(smaller, "w", ZIP_LZMA) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    smaller.replace(wheel)


def main() -> None:
    """Build the wheels and say what they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle")
    parser.add_argument("--there", type=Path, help="names of the other machine's packages")
    parser.add_argument("--python", default="3.12", help="the other machine's Python")
    parser.add_argument("--cuda", default="130", help="the other machine's CUDA, such as 130")
    options = parser.parse_args()
    there = read_there(options.there)
    for line in too_old(there):
        print(f"warning: the other machine has {line}")
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("*.whl"):
        old.unlink()
    for name, version in missing_packages(there, python=options.python).items():
        wheel = fetch_wheel(name, version, options.out, python=options.python)
        if name == "bitsandbytes":
            keep_one_cuda(wheel, options.cuda)
        if wheel.stat().st_size > _COMPRESSED_FROM:
            compress(wheel)
    build_own_wheel(options.out)
    wheels = sorted(options.out.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{total:6.1f} MiB  {len(wheels)} wheels in {options.out}")
    if total > MAX_MIB:
        raise SystemExit(
            f"the bundle is larger than {MAX_MIB} MiB; name the other machine's packages with "
            "--there, so that fewer are brought"
        )


if __name__ == "__main__":
    main()
