"""A saved page: complete in itself, admitted by its own policy, and safe with any caption."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest

from stages.explore.export import saved_page
from stages.progress import SilentProgress
from tests.stages.explore.conftest import HTML, ROWS, open_explorer

KEYS = ["walk/0002", "walk/0001"]


@pytest.fixture(scope="module")
def explorer(cache, tmp_path_factory):
    return open_explorer(cache, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def page(explorer):
    return saved_page(explorer, KEYS, SilentProgress())


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def test_everything_is_inside_and_nothing_is_fetched(page):
    assert 'src="' not in page and 'href="' not in page
    assert re.findall(r"https?://[^\s\"'`]+", page) == ["http://www.w3.org/2000/svg"]


def test_the_policy_admits_exactly_the_pages_own_scripts_and_style(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    texts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    texts += re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    assert len(texts) == 5
    assert re.findall(r"sha256-([^']+)'", policy) == hashes
    assert "default-src 'none'" in policy and "connect-src" not in policy


def test_a_caption_cannot_end_the_script(page):
    clips = data_of(page)["clips"]
    assert [clip["facts"]["key"] for clip in clips] == KEYS
    assert clips[0]["facts"]["caption"] == HTML
    assert "<img src=x" not in page


def test_probabilities_and_motion_are_those_of_the_server(page, explorer):
    layers = explorer.layers(ROWS.index("walk/0001"))
    arrays = data_of(page)["clips"][1]["arrays"]
    shape = tuple(data_of(page)["clips"][1]["facts"]["flow"]["shape"])
    stored = np.frombuffer(base64.b64decode(arrays["probability_forward"]), np.uint8).reshape(shape)
    wanted = layers.flow.window("forward", 4, 1, 2, 0.1)["probability"]
    assert stored[4, 1, 2] / 255 == pytest.approx(wanted, abs=1 / 500)
    motion = np.frombuffer(base64.b64decode(arrays["motion_forward"]), "<f4")
    assert np.array_equal(motion, layers.flow.motion("forward", 0.1).ravel())


@pytest.mark.parametrize(
    ("keys", "words"),
    [([], "1 to 24"), (["walk/0001"] * 25, "1 to 24"), (["walk/7"], "no clip 'walk/7'")],
)
def test_what_cannot_be_saved_is_refused(explorer, keys, words):
    with pytest.raises(ValueError, match=words):
        saved_page(explorer, keys, SilentProgress())
