"""What libraries print at import that concerns nobody here; their real warnings stay."""

import importlib.util
import logging
from pathlib import Path

import pytest

import stages

_NOISY = "bitsandbytes.backends.cpu.ops"


def test_a_missing_kernel_for_4_bit_inference_is_not_told():
    assert stages.__name__ == "stages"
    assert not logging.getLogger(_NOISY).isEnabledFor(logging.WARNING)
    assert logging.getLogger(_NOISY).isEnabledFor(logging.ERROR)
    assert logging.getLogger("bitsandbytes.backends.cpu").isEnabledFor(logging.WARNING)


def test_it_is_all_that_this_module_of_the_library_says():
    found = importlib.util.find_spec("bitsandbytes")
    if found is None:
        pytest.skip("bitsandbytes is not installed")
    module = Path(found.origin).parent / "backends" / "cpu" / "ops.py"
    assert module.read_text(encoding="utf-8").count("logger.") == 1
