"""The page of a run."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stages.train_student.report import write_report
from stages.train_student.report.figures import figures
from stages.train_student.report.page import PageVideo, embed, select_videos, videos
from stages.train_student.report.records import SampleVideo, read_run


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text outside of styles."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.text = [], ""
        self._style = False
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        self.text += "" if self._style else data

    def attributes(self, tag, name):
        return [found[name] for element, found in self.elements if element == tag and name in found]

    def svgs(self):
        head = "data:image/svg+xml;base64,"
        return [
            ElementTree.fromstring(base64.b64decode(source.removeprefix(head)))
            for source in self.attributes("img", "src")
        ]


NO_CURVES = {"steps": 0, "validation": []}
NASTY = "<script>alert('&')</script>"


def test_a_page_carries_everything_within_itself(make_run, draw):
    folder = make_run()
    draw(folder, 0, ["a cat", "a dog"])
    draw(folder, 20, ["a cat", "a dog"])
    draw(folder, 40, ["a cat", "a dog"])
    page = Page(write_report(folder))
    sources = [*page.attributes("img", "src"), *page.attributes("video", "src")]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    assert not page.attributes("a", "href")
    videos = [base64.b64decode(source.split(",")[1]) for source in page.attributes("video", "src")]
    assert [video.strip() for video in videos] == [b"0/0", b"40/0", b"0/1", b"40/1"]
    for svg in page.svgs():
        linked = [value for e in svg.iter() for name, value in e.items() if name.endswith("href")]
        assert all(value.startswith("#") for value in linked)


def test_every_kind_of_number_has_its_curve(make_run):
    page = Page(write_report(make_run()))
    titles = page.attributes("img", "alt")
    assert [title for title in titles if "timestep" not in title] == [
        *("Diffusion loss", "Mask"),  # held out; lgf was no number at any time
        *("Total loss", "Diffusion loss", "Local Gram Flow", "Mask"),
        *("Norm of the gradient", "Learning rate"),
        *("Seconds a step", "Share of the step spent waiting for data", "Peak memory"),
    ]
    assert len(page.svgs()) == len(titles)
    assert "25.0%" in page.text, "half a second of two is waited"
    assert "1.00" in page.text and "before training" in page.text


def test_text_from_outside_is_shown_as_it_is(make_run, draw):
    clip = {"key": NASTY, "timestep": 3, "diffusion": "nan", "auxiliary": {NASTY: 0.5}}
    folder = make_run(
        **NO_CURVES,
        name="a&b <b>",
        skipped_steps=[{"step": 5, "what": "loss", "clips": [clip]}],
        damaged_clips=[{"step": 6, "key": NASTY, "message": "torn <b>", "gone": False}],
    )
    draw(folder, 0, [NASTY])
    (folder / "config.yaml").write_text(f'train:\n  note: "{NASTY}"\n')
    page = Page(write_report(folder))
    assert not {"script", "b"} & {tag for tag, _ in page.elements}
    assert page.text.count(NASTY) >= 5
    assert "diffusion nan" in page.text
    assert "train <fast>" in page.text


@pytest.mark.parametrize(
    "about", [{"step": NASTY}, {"prompts": {NASTY: 1}}, {"prompts": [["a"]]}, {"step": True}]
)
def test_a_drawing_of_no_step_or_prompts_is_refused(make_run, draw, about):
    folder = make_run(**NO_CURVES)
    draw(folder, 0, ["a prompt"])
    (record,) = folder.glob("samples/*/samples.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | about))
    with pytest.raises(ValueError, match=r"samples\.json is damaged"):
        write_report(folder)


def test_the_step_of_a_drawing_is_escaped():
    sample = SampleVideo(step=NASTY, prompt="a", file=Path("0.mp4"), settings={}, scores={})
    made = videos({"a": [PageVideo(sample=sample, source='"><b>', embedded=True)]})
    assert "<script>" not in made
    assert "<b>" not in made


def test_a_page_holds_no_credentials_and_no_turns_of_direction(make_run):
    url = "http://me:s3cr3t@host/cache"
    folder = make_run(damaged_clips=[{"step": 6, "key": "a\u202eb", "message": url, "gone": True}])
    (folder / "config.yaml").write_text(f"cache: {url}\n")
    page = write_report(folder).read_text()
    assert "s3cr3t" not in page
    assert page.count("http://***@host/cache") == 2
    assert "a\\u202eb" in page


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.json", "[" * 100_000),
        ("config.yaml", "x: &a [*a]"),
        ("config.yaml", "[1]"),
        ("config.yaml", "train: [1]"),
        ("losses.jsonl", "[" * 100_000 + "\n"),
        ("losses.jsonl", '{"step": 1e400}\n'),
        ("losses.jsonl", f'{{"step": {"9" * 5000}}}\n'),
    ],
)
def test_a_record_that_cannot_be_taken_in_is_refused_by_name(make_run, file, text):
    folder = make_run(**NO_CURVES)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=file):
        write_report(folder)


def test_what_is_too_large_is_linked_and_the_newest_goes_first(make_run, draw):
    folder = make_run()
    for step in (0, 40):
        draw(folder, step, ["a cat", "a dog"], size=100)
    chosen = select_videos(read_run(folder).samples)
    shown = embed(chosen, max_bytes=350)
    assert [[one.embedded for one in row] for row in shown.values()] == [
        [True, True],
        [False, True],
    ]
    assert shown["a dog"][0].source == "samples/step-000000/1.mp4"
    assert (folder / shown["a dog"][0].source).is_file()


def test_the_best_checkpoint_is_named_and_its_videos_stand_between_the_others(make_run, draw):
    folder = make_run()
    for step in (0, 10, 20, 30, 40):
        draw(folder, step, ["a cat"])
    best = {"step": 20, "curve": "validation/diffusion", "value": 0.25, "before_training": 1.5}
    (folder / "best.json").write_text(json.dumps(best))
    (folder / "checkpoints" / "checkpoint-20.complete.json").touch()
    page = Page(write_report(folder))
    shown = [base64.b64decode(source.split(",")[1]) for source in page.attributes("video", "src")]
    assert [video.strip() for video in shown] == [b"0/0", b"20/0", b"40/0"]
    assert "step 20, the best checkpoint" in page.text
    assert "validation/diffusion 0.2500; 1.500 before training" in page.text
    (folder / "checkpoints" / "checkpoint-20.complete.json").unlink()
    (figure,) = [one for one in figures(read_run(folder)) if one.name == "best checkpoint"]
    assert (figure.value, figure.note.split("; ")[-1]) == ("step 20", "its checkpoint is gone")


def test_prompts_that_changed_on_the_way_each_show_their_own(make_run, draw):
    folder = make_run()
    draw(folder, 0, ["a cat"])
    draw(folder, 20, ["a dog", "a cat"])
    (folder / "samples" / "step-000030").mkdir()  # begun, not complete
    chosen = select_videos(read_run(folder).samples)
    steps = {prompt: [video.step for video in videos] for prompt, videos in chosen.items()}
    assert steps == {"a cat": [0, 20], "a dog": [20]}


def test_a_run_that_goes_on_can_be_looked_at(make_run):
    folder = make_run(steps=12)
    with (folder / "losses.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    run = read_run(folder)
    assert (run.steps_done, run.planned_steps, len(run.losses)) == (12, 40, 12)
    assert figures(run)[0].note == "of 40"
    (folder / "finished.json").write_text("{}")
    assert figures(read_run(folder))[0].note == "finished"


def test_a_run_that_has_only_begun_has_a_page(make_run):
    folder = make_run(**NO_CURVES)
    page = Page(write_report(folder))
    assert not page.svgs()
    assert "some/model" in page.text


def test_equal_runs_have_equal_pages(make_run, tmp_path):
    folder = make_run(steps=3, validation=[], performance=[])
    first = write_report(folder).read_bytes()
    assert write_report(folder, tmp_path / "other" / "page.html").read_bytes() == first


def test_what_is_no_run_or_damaged_is_refused(make_run, tmp_path):
    with pytest.raises(ValueError, match=r"no training run .*--run"):
        write_report(tmp_path)
    folder = make_run(**NO_CURVES)
    (folder / "losses.jsonl").write_text("{}}\n")
    with pytest.raises(ValueError, match=re.escape("losses.jsonl")):
        write_report(folder)
    assert not (folder / "report.html").exists()


def told(run_dir):
    return {figure.name: figure for figure in figures(read_run(run_dir))}


def performance(*seconds, batch=8):
    return [
        {
            "step": step,
            "seconds": taken,
            "wait_seconds": 0.1 * taken,
            "clips_per_second": batch / taken,
            "peak_memory_bytes": 1,
            "share_of_peak": 0.5 / taken,
        }
        for step, taken in enumerate(seconds, 1)
    ]


@pytest.mark.parametrize("seconds", [(2.0,), (0.5, 4.0), (9.0, 0.1, 0.1, 0.8), (1.0,) * 7])
def test_time_rate_and_total_are_of_one_measurement(make_run, seconds):
    """Whatever the steps took: steps times a step is the total, and clips go with it."""
    found = told(make_run(steps=len(seconds), performance=performance(*seconds)))
    mean = sum(seconds) / len(seconds)
    assert float(found["a step"].value.removesuffix(" s")) == pytest.approx(mean, abs=0.005)
    assert float(found["clips a second"].value) == pytest.approx(8 / mean, rel=1e-3)
    assert f" for {len(seconds)} step" in found["a step"].note
    assert found["clips a second"].note == f"{0.5 / mean:.0%} of the GPUs' peak"
    assert "without validation, samples and checkpoints" in found["a step"].note


def test_the_median_is_told_where_a_few_steps_decide_about_the_mean(make_run):
    found = told(make_run(performance=performance(1.0, 1.0, 1.0, 9.0)))
    assert "; the median is 1.00 s;" in found["a step"].note
    found = told(make_run(name="even", performance=performance(1.0, 1.0, 1.0)))
    assert "median" not in found["a step"].note


@pytest.mark.parametrize(
    ("values", "value", "note"),
    [
        ({0: 0.4, 20: 0.3}, "0.3000", "0.4000 before training"),
        (
            {0: 0.4, 20: 0.125, 40: 0.15},
            "0.1500",
            "0.4000 before training; lowest 0.1250 at step 20, and risen since",
        ),
        (
            {0: 0.2, 20: 0.3},
            "0.3000",
            "0.2000 before training; lowest before training, and risen since",
        ),
        ({10: 0.2, 20: None, 30: 0.1}, "0.1000", "0.2000 at step 10"),
        ({0: 0.2}, "0.2000", "before training"),
    ],
)
def test_held_out_losses_say_where_they_began_and_whether_they_rose(make_run, values, value, note):
    rows = [
        {"step": step, "clips": 3, "diffusion": 1.0, "auxiliary": {"lgf": one}}
        | {"by_timestep": {"timestep": [500], "diffusion": [1.0], "lgf": [one]}}
        for step, one in values.items()
    ]
    found = told(make_run(validation=rows))["held-out lgf loss"]
    assert (found.value, found.note) == (value, note)


def test_the_training_loss_is_a_mean_over_several_steps(make_run):
    found = told(make_run(steps=40))["training loss"]
    assert found.note == "mean of the last 2 steps; 1.500 in the first"
