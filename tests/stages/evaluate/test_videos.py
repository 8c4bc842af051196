"""Folders of videos: prompts, seeds and pairs."""

import json

import pytest

from stages.evaluate.videos import open_side, pair_videos


@pytest.fixture
def folder(tmp_path):
    """Returns a function that makes a folder of empty videos, some with a sampling record."""

    def make(name, *files, **records):
        root = tmp_path / name
        for file in (*files, *(f"{stem}.mp4" for stem in records)):
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        for stem, (prompt, seed) in records.items():
            (root / f"{stem}.json").write_text(json.dumps({"prompt": prompt, "seed": seed}))
        return root

    return make


def test_prompts_come_from_the_record_or_from_the_name(folder):
    root = folder("a", "a dog runs-3.mp4", "deep/plain.mp4", lgf=("a cat", 7))
    found = {
        video.key: (video.prompt, video.number, video.path) for video in open_side("a", root).videos
    }
    assert found == {
        "a dog runs-3": ("a dog runs", 3, root / "a dog runs-3.mp4"),
        "deep/plain": (None, None, root / "deep" / "plain.mp4"),
        "lgf": ("a cat", 7, root / "lgf.mp4"),
    }


def test_pairs_share_prompt_and_seed_or_their_name(folder):
    first = open_side(
        "first", folder("first", "x/same.mp4", "a dog-0.mp4", "a dog-1.mp4", run=("a cat", 7))
    )
    second = open_side(
        "second",
        folder("second", "x/same.mp4", "a dog-1.mp4", "a dog-2.mp4", base=("a cat", 7)),
    )
    pairs, alone = pair_videos(first, second)
    assert [(one.key, other.key) for one, other in pairs] == [
        ("a dog-1", "a dog-1"),
        ("run", "base"),
        ("x/same", "x/same"),
    ]
    assert sorted(alone) == ["a dog-0", "a dog-2"]


def test_two_videos_of_one_prompt_and_seed_are_refused(folder):
    root = folder("a", one=("a cat", 7), two=("a cat", 7))
    with pytest.raises(ValueError, match=r"2 videos of prompt 'a cat' and seed 7: one and two"):
        open_side("a", root)


@pytest.mark.parametrize(("make", "message"), [(False, "is not a folder"), (True, "no videos")])
def test_a_folder_without_videos_is_refused(tmp_path, make, message):
    if make:
        (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=message):
        open_side("a", tmp_path / "none")


@pytest.mark.parametrize("other", ["one.MP4", "one.mov"])
def test_two_videos_of_one_name_are_refused(folder, other):
    with pytest.raises(ValueError, match=r"one\.(mp4|MP4) and one\.(mp4|mov)"):
        open_side("a", folder("a", "one.mp4", other))


def test_a_damaged_record_is_named(folder):
    root = folder("a", one=("a cat", 7))
    (root / "one.json").write_text("{")
    with pytest.raises(ValueError, match=r"one\.json is not JSON"):
        open_side("a", root)
