"""The preference page in a real browser: keys, progress, and the answers it gives back."""

import html
import json
import re
import shutil
import subprocess

import pytest

from stages.evaluate.preference.answers import read_sheet
from stages.evaluate.preference.page import PageQuestion, preference_page
from stages.evaluate.preference.questions import Key, Question

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

NAMES = ("q1", "q2", "q3")
KEY = Key(
    page="a1b2",
    models=("a", "b"),
    questions={
        name: Question(id=name, left="a", right="b", prompt=name, check=None) for name in NAMES
    },
)
PRESS = """
const press = (key, target = document) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
"""


@pytest.fixture
def browse(tmp_path):
    """Returns a function that runs a script in the page; the script's result as JSON."""

    def run(script, storage="{}"):
        questions = [
            PageQuestion(id=name, prompt=f"prompt <{name}>", left="l.mp4", right="r.mp4")
            for name in NAMES
        ]
        page = preference_page("a1b2", questions)
        page = page.replace(
            "<script>\nconst data",
            f"<script>try {{ localStorage.setItem('preference-a1b2', {json.dumps(storage)}) }} "
            "catch (error) { }</script><script>\nconst data",
        )
        page = page.replace(
            "</body>",
            f"<pre id='result'></pre><script>{PRESS}{{ {script}\n"
            "document.getElementById('result').textContent = JSON.stringify(result); }</script>"
            "</body>",
        )
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        done = subprocess.run(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--dump-dom",
                f"file://{file}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stderr[-2000:]
        return json.loads(html.unescape(found[1]))

    return run


def test_keys_answer_and_the_answers_are_read_back(browse, tmp_path):
    found = browse(
        """
        press("ArrowLeft"); press("ArrowDown"); press("ArrowRight");
        document.getElementById("rater").value = "Ann";
        const result = { sheet: collected(), done: !document.getElementById("done").hidden };
        """
    )
    assert found["done"]
    (tmp_path / "answers.json").write_text(json.dumps(found["sheet"]))
    sheet = read_sheet(tmp_path / "answers.json", KEY)
    assert sheet.rater == "Ann"
    assert sheet.choices == {"q1": "left", "q2": "tie", "q3": "right"}


def test_back_changes_an_answer_and_goes_on_where_one_is_open(browse):
    found = browse(
        """
        press("ArrowLeft"); press("ArrowLeft"); press("b"); press("b"); press("ArrowRight");
        const result = { answers, at: current };
        """
    )
    choices = {name: answer["choice"] for name, answer in found["answers"].items()}
    assert choices == {"q1": "right", "q2": "left"}
    assert found["at"] == 2


def test_progress_is_kept_and_resumed(browse):
    stored = {"q1": {"choice": "left", "seconds": 2}}
    found = browse(
        """
        const before = current;
        press("ArrowDown");
        const result = { before, stored: localStorage.getItem("preference-a1b2") };
        """,
        storage=json.dumps(stored),
    )
    assert found["before"] == 1
    assert json.loads(found["stored"])["q2"]["choice"] == "tie"


def test_buttons_and_text_are_shown(browse):
    found = browse(
        """
        document.getElementById("choose-tie").click();
        const result = { answers, prompt: document.getElementById("prompt").textContent,
          count: document.getElementById("count").textContent,
          left: document.getElementById("left").getAttribute("src") };
        """
    )
    assert found["answers"]["q1"]["choice"] == "tie"
    assert found["prompt"] == "prompt <q2>"
    assert "2 of 3" in found["count"]
    assert found["left"] == "l.mp4"


def test_keys_in_the_name_are_letters(browse):
    found = browse(
        """
        press("ArrowLeft", document.getElementById("rater"));
        const result = Object.keys(answers).length;
        """
    )
    assert found == 0
