"""The site builds without warnings and loads nothing from elsewhere; messages are the code's."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cache_schema
from stages import local_gram_flow

ROOT = Path(__file__).parents[2]
LOADED = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*?(?:src|href)=\"([^\"]*)\"")


def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="make install installs sphinx")
    options = ("-q", "-W", "--keep-going", "-c", "docs", "-b", "html", ".", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pages = [page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")]
    assert len(pages) > 30
    loaded = {address for page in pages for address in LOADED.findall(page)}
    assert "pictures" not in loaded and any(address.endswith("window.png") for address in loaded)
    styles = "".join(style.read_text(encoding="utf-8") for style in tmp_path.rglob("*.css"))
    loaded |= set(re.findall(r"url\(['\"]?([^)'\"]*)", styles))
    loaded |= set(re.findall(r"@import\s+['\"]([^'\"]*)", styles))
    assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []


def strings_of(file: Path) -> str:
    """A module whose string literals are joined; `…` stands for the values in f-strings."""
    joined = re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8"))
    return re.sub(r"\{[^{}]*\}", "…", joined)


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 40
    packages = (ROOT / name for name in ("cache_schema", "stages", "pipeline"))
    strings = "\n".join(strings_of(file) for one in packages for file in one.rglob("*.py"))
    for message in messages:
        parts = (re.escape(part) for part in message.split("…"))
        assert re.search("[^\n]*".join(parts), strings), f"{message!r} is no message of the code"


def documented() -> set[str]:
    """Full names of what the reference has an entry for."""
    names: set[str] = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        module = ""
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)", page.read_text("utf-8"), re.M):
            if directive == "currentmodule":
                module = f"{name}."
            elif directive == "automodule":
                found = vars(sys.modules[name]).values()
                names |= {f"{one.__module__}.{one.__name__}" for one in found if callable(one)}
            else:
                names.add(name if name.startswith(("stages.", "cache_schema.")) else module + name)
    return names


@pytest.mark.parametrize("package", [cache_schema, local_gram_flow])
def test_the_reference_has_every_function_and_class_of_a_package(package: ModuleType) -> None:
    names = documented()
    public = {
        name: {f"{package.__name__}.{name}", f"{value.__module__}.{name}"}
        for name in package.__all__
        if inspect.isclass(value := getattr(package, name)) or inspect.isfunction(value)
    }
    assert len(public) > 15
    assert [name for name, either in public.items() if not either & names] == []


def test_the_reference_has_what_the_examples_import() -> None:
    names = documented()
    examples = "".join(path.read_text("utf-8") for path in ROOT.glob("docs/examples/*.py"))
    imported = [
        f"{module}.{name.strip()}"
        for module, line in re.findall(
            r"^from ((?:stages|cache_schema)\S*) import (.*)$", examples, re.M
        )
        for name in line.split(",")
    ]
    assert len(imported) > 10
    assert [name for name in imported if name not in names] == []
