"""Error messages of the command line: each remedy of a store's error as a command or setting."""

from typing import get_args

import pytest

from cache_schema import CorruptRecord, Refused, StoreNotFound
from cache_schema.errors import Remedy
from pipeline.failures import error_text

TEXTS = {
    "repair": "run sam2vx-pipeline cache repair 'a b', then extract-features --retry-failed",
    "extract": "extract-features finishes or removes it",
    "copy": "run sam2vx-pipeline cache copy again",
    "by hand": "no command repairs it",
    "rewrite": "run sam2vx-pipeline extract-features with the configuration",
    "make": "run sam2vx-pipeline extract-features",
    "make again": "remove 'a b', and run sam2vx-pipeline extract-features",
    "choose": "set train.stores.teacher to",
    "choose or make": "set train.stores.teacher to the folder of the one to use, or run",
    "prefix": "--prefix second-",
    "drop": "sam2vx-pipeline cache drop",
    "merge": "sam2vx-pipeline cache merge",
}


@pytest.mark.parametrize("remedy", get_args(Remedy))
@pytest.mark.parametrize("kind", [CorruptRecord, StoreNotFound, Refused])
def test_the_command_of_each_remedy_follows_the_message(remedy, kind):
    subject = "teacher" if remedy.startswith("choose") else "a b"
    text = error_text(kind("what is wrong", remedy=remedy, subject=subject))
    assert text.startswith("what is wrong; ")
    assert TEXTS[remedy] in text


def test_an_error_without_a_remedy_is_its_message():
    assert error_text(CorruptRecord("what is wrong")) == "what is wrong"
