"""Errors: pickling, and no mention of commands or settings."""

import ast
import pickle
import re
from pathlib import Path

import pytest

import cache_schema
from cache_schema import CorruptClip, Refused
from cache_schema.errors import CacheError

_UPPER_LAYERS = re.compile(
    r"sam2vx-pipeline|extract-features|(?<!\w)--[a-z]"
    r"|\b(train|extract|sample|data|model)\.[a-z_]+\b"
    r"|\bcache (list|verify|repair|drop|merge|copy|derive)\b"
)


@pytest.mark.parametrize(
    "path", sorted(Path(cache_schema.__path__[0]).rglob("*.py")), ids=lambda path: path.stem
)
def test_no_text_names_a_command_or_a_setting(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not _UPPER_LAYERS.search(node.value), (path, node.lineno, node.value)


@pytest.mark.parametrize("kind", [CorruptClip, Refused])
def test_remedies_survive_pickling_without_credentials(kind: type[CacheError | Refused]) -> None:
    error = kind("s3://user:pw@host/x is damaged", remedy="repair", subject="s3://user:pw@host")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "s3://***@host/x is damaged"
    assert (copy.remedy, copy.subject) == ("repair", "s3://***@host")
