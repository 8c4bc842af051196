"""Questions of a preference page: pairs, places, checks, and what the page gives away."""

import json
import re
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from stages.clips import VideoError, encode_video, read_video, write_video
from stages.evaluate.preference.questions import read_key, tiles_moved, write_preference
from stages.evaluate.videos import open_side

SHAPE = (3, 32, 48, 3)


@pytest.fixture
def sides(tmp_path):
    """Returns a function that makes models' videos: a brightness per model."""

    def make(prompts=6, **models):
        found = []
        for name, level in models.items():
            for number in range(prompts):
                noise = np.random.default_rng(number).integers(0, 40, SHAPE, dtype=np.uint8)
                write_video(
                    tmp_path / name / f"prompt {number}-0.mp4", noise + np.uint8(level), 8.0
                )
            found.append(open_side(name, tmp_path / name))
        return found

    return make


def data_of(folder):
    page = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page)[1])


def model_of(path):
    """The model whose brightness a video has."""
    return "dark" if read_video(path)[0].mean() < 100 else "bright"


def test_every_pair_is_asked_once_and_the_key_knows_whose_is_whose(sides, tmp_path):
    out = tmp_path / "page"
    questions = write_preference(sides(dark=20, bright=180), out, checks=0, seed=1)
    assert sorted(question.prompt for question in questions) == [f"prompt {n}" for n in range(6)]
    shown = data_of(out)["questions"]
    key = read_key(out / "key.json")
    assert list(key.questions.values()) == questions
    for one in shown:
        question = key.questions[one["id"]]
        assert model_of(out / one["left"]) == question.left
        assert model_of(out / one["right"]) == question.right
    assert {question.left for question in questions} == {"dark", "bright"}, "places are random"


def test_the_page_tells_no_model(sides, tmp_path):
    out = tmp_path / "page"
    write_preference(sides(dark=20, bright=180), out, checks=2, seed=0)
    text = (out / "index.html").read_text(encoding="utf-8")
    names = [path.name for path in (out / "videos").iterdir()]
    assert all(re.fullmatch(r"[0-9a-f]{16}\.mp4", name) for name in names)
    assert len(names) == 2 * 8
    assert not re.search("dark|bright", text + " ".join(names))


def test_copies_have_the_same_frames_but_no_tags(sides, tmp_path):
    models = sides(2, dark=20, bright=180)
    original = models[0].videos[0].path
    frames_THWC, fps = read_video(original)
    tags = {"title": "a prompt", "comment": '{"run": "runs/secret"}'}
    original.write_bytes(encode_video(frames_THWC, fps, tags=tags))
    assert b"secret" in original.read_bytes()
    write_preference(models, tmp_path / "page", checks=0, seed=0)
    copies = list((tmp_path / "page" / "videos").iterdir())
    assert len(copies) == 4
    assert not any(b"secret" in copy.read_bytes() for copy in copies)
    decoded = [read_video(copy) for copy in copies]
    expected = [read_video(video.path) for model in models for video in model.videos]
    for frames_THWC, fps in expected:
        assert any(np.array_equal(frames_THWC, one) and fps == rate for one, rate in decoded)


def test_a_video_that_cannot_be_copied_is_named(sides, tmp_path):
    models = sides(2, dark=20, bright=180)
    models[0].videos[0].path.write_bytes(b"not a video")
    with pytest.raises(VideoError, match=r"prompt 0-0\.mp4 cannot be copied"):
        write_preference(models, tmp_path / "page", checks=0, seed=0)


def test_a_check_is_a_video_beside_its_broken_self(sides, tmp_path):
    out = tmp_path / "page"
    questions = write_preference(sides(dark=20, bright=180), out, checks=3, seed=2)
    checks = [question for question in questions if question.check]
    assert len(checks) == 3
    assert questions[0].check is None
    shown = {one["id"]: one for one in data_of(out)["questions"]}
    for check in checks:
        assert check.left == check.right
        intact_THWC, _ = read_video(out / shown[check.id][check.check])
        other = "right" if check.check == "left" else "left"
        broken_THWC, _ = read_video(out / shown[check.id][other])
        expected_THWC = tiles_moved(intact_THWC).astype(int)
        assert np.abs(broken_THWC.astype(int) - expected_THWC).mean() < 10
        assert np.abs(broken_THWC.astype(int) - intact_THWC.astype(int)).mean() > 10


def test_three_models_are_compared_two_by_two(sides, tmp_path):
    questions = write_preference(sides(a=10, b=90, c=180), tmp_path / "page", checks=0, seed=0)
    counts = Counter(frozenset((question.left, question.right)) for question in questions)
    assert counts == {frozenset(pair): 6 for pair in ("ab", "ac", "bc")}


def test_the_same_seed_makes_the_same_page(sides, tmp_path):
    models = sides(dark=20, bright=180)
    pages = []
    for name, seed in (("one", 4), ("two", 4), ("three", 5)):
        write_preference(models, tmp_path / name, checks=2, seed=seed)
        pages.append((tmp_path / name / "index.html").read_bytes())
    assert pages[0] == pages[1] != pages[2]


def test_a_prompt_cannot_add_to_the_page(sides, tmp_path):
    (dark, bright) = sides(prompts=1, dark=20, bright=180)
    for side in (dark, bright):
        record = side.folder / "prompt 0-0.json"
        record.write_text(json.dumps({"prompt": "</script><script>alert(1)", "seed": 0}))
    models = [open_side(side.name, side.folder) for side in (dark, bright)]
    write_preference(models, tmp_path / "page", checks=0, seed=0)
    assert data_of(tmp_path / "page")["questions"][0]["prompt"] == "</script><script>alert(1)"
    assert "alert(1)" not in re.sub(
        r'id="data">.*?</script>', "", (tmp_path / "page" / "index.html").read_text()
    )


def test_what_cannot_be_compared_is_refused(sides, tmp_path):
    dark, bright = sides(dark=20, bright=180)
    with pytest.raises(ValueError, match="two or more models"):
        write_preference([dark], tmp_path / "page", checks=0, seed=0)
    (tmp_path / "others").mkdir()
    (bright.folder / "prompt 0-0.mp4").rename(tmp_path / "others" / "a dog-0.mp4")
    others = open_side("others", tmp_path / "others")
    with pytest.raises(ValueError, match="no videos of the same prompt and seed"):
        write_preference([dark, others], tmp_path / "page", checks=0, seed=0)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        write_preference([dark, bright], tmp_path / "page", checks=0, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"left": "another"},
        {"check": "middle"},
        {"id": 3},
        {"more": 1},
    ],
)
def test_a_damaged_key_is_refused(sides, tmp_path, change):
    write_preference(sides(dark=20, bright=180), tmp_path / "page", checks=0, seed=0)
    file = tmp_path / "page" / "key.json"
    content = json.loads(file.read_text())
    content["questions"][0] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"key\.json is"):
        read_key(file)


def test_tiles_all_change_places():
    frames_THWC = np.arange(2 * 16 * 24 * 3, dtype=np.uint16).reshape(2, 16, 24, 3)
    moved_THWC = tiles_moved(frames_THWC)
    assert moved_THWC.shape == frames_THWC.shape
    assert (moved_THWC[:, :4, :6] == frames_THWC[:, 12:16, 18:24]).all()


def test_questions_are_plain_data(sides, tmp_path):
    questions = write_preference(sides(dark=20, bright=180), tmp_path / "page", checks=1, seed=0)
    stored = json.loads((tmp_path / "page" / "key.json").read_text())["questions"]
    assert stored == [asdict(question) for question in questions]
