"""Questions of a preference page, and the folder that holds it.

<folder>/
    index.html       the page to give to people; opens without network
    videos/          the videos under names that do not tell their model
    key.json         which video is whose; not to be given to people
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from cache_schema.atomic_io import make_directories, write_atomic
from stages.clips import copy_without_tags, read_video, write_video
from stages.clips.fingerprints import hash_parts
from stages.evaluate.preference.page import PageQuestion, preference_page
from stages.evaluate.videos import Side, Video, pair_videos
from stages.files.text import read_object

PAGE_FILE = "index.html"
KEY_FILE = "key.json"
VIDEOS = "videos"
_PLAYABLE = (".mp4", ".webm")
"""Suffixes of videos that browsers play."""
_TILES = 4
"""Tiles per height and width of a broken video, which all change places."""

# Legend: T frame, H W pixels, C colour (RGB).


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Two videos of one prompt and seed, of which people choose the better one."""

    id: str
    left: str
    """Name of the model; both are equal in an attention check."""
    right: str
    prompt: str
    """The prompt, or the videos' name if they have none."""
    check: Literal["left", "right"] | None
    """In an attention check the side that is intact; the other one is broken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    question: Question
    left: Path
    right: Path


def write_preference(sides: Sequence[Side], out: Path, *, checks: int, seed: int) -> list[Question]:
    """Write the page, its videos and its key.

    Args:
        sides: Two or more models' videos; every two of them are compared.
        out: The folder; must not exist or be empty.
        checks: Attention checks: a video beside a copy of it whose parts have changed places.
        seed: Decides order, places and checks.

    Returns:
        The questions in the order in which they are asked.

    Raises:
        ValueError: Two sides have the same name or no pair, browsers cannot play a video, or the
            folder is not empty.
        VideoError: A video cannot be copied, or one for a check cannot be decoded.
    """
    names = [side.name for side in sides]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"a comparison needs two or more models of different names, got {names}")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name another folder")
    rng = random.Random(seed)
    drawn = _compare(sides, rng)
    make_directories(out / VIDEOS)
    for video in _chosen(sides, checks, rng):
        # Never first: people get used to the page on a real question.
        drawn.insert(rng.randint(1, len(drawn)), _check(video, out, rng))
    numbered = [
        _Drawn(question=_renamed(one.question, f"q{number:04d}"), left=one.left, right=one.right)
        for number, one in enumerate(drawn, start=1)
    ]
    questions = [one.question for one in numbered]
    page_id = hash_parts([json.dumps([asdict(question) for question in questions]), str(seed)])
    shown = []
    for one in numbered:
        places = {}
        for place, path in (("left", one.left), ("right", one.right)):
            name = hash_parts([page_id, one.question.id, place]) + path.suffix
            # The tags of sampled videos name the weights.
            copy_without_tags(path, out / VIDEOS / name)
            places[place] = f"{VIDEOS}/{name}"
        shown.append(PageQuestion(id=one.question.id, prompt=one.question.prompt, **places))
    for broken in (out / VIDEOS).glob("broken-*"):
        broken.unlink()
    key = {
        "page": page_id,
        "models": names,
        "questions": [asdict(question) for question in questions],
    }
    write_atomic(out / KEY_FILE, (json.dumps(key, indent=1) + "\n").encode())
    write_atomic(out / PAGE_FILE, preference_page(page_id, shown).encode("utf-8", "replace"))
    return questions


def _compare(sides: Sequence[Side], rng: random.Random) -> list[_Drawn]:
    drawn = []
    for first, second in combinations(sides, 2):
        pairs, _ = pair_videos(first, second)
        if not pairs:
            raise ValueError(
                f"{first.folder} and {second.folder} have no videos of the same prompt and seed"
            )
        for pair in pairs:
            names, videos = [first.name, second.name], list(pair)
            if rng.random() < 0.5:
                names.reverse()
                videos.reverse()
            for video in videos:
                _check_playable(video)
            question = Question(
                id="", left=names[0], right=names[1], prompt=_prompt(pair[0]), check=None
            )
            drawn.append(_Drawn(question=question, left=videos[0].path, right=videos[1].path))
    rng.shuffle(drawn)
    return drawn


def _check_playable(video: Video) -> None:
    if video.path.suffix.lower() not in _PLAYABLE:
        raise ValueError(f"browsers may not play {video.path}; write {' or '.join(_PLAYABLE)}")


def _prompt(video: Video) -> str:
    return video.key if video.prompt is None else video.prompt


def _renamed(question: Question, name: str) -> Question:
    return Question(**{**asdict(question), "id": name})


def _chosen(sides: Sequence[Side], checks: int, rng: random.Random) -> list[tuple[Side, Video]]:
    everything = [(side, video) for side in sides for video in side.videos]
    return rng.sample(everything, min(checks, len(everything)))


def _check(chosen: tuple[Side, Video], out: Path, rng: random.Random) -> _Drawn:
    """An attention check; its broken copy is written to the folder of videos."""
    side, video = chosen
    frames_THWC, fps = read_video(video.path)
    broken = out / VIDEOS / f"broken-{rng.getrandbits(64):016x}.mp4"
    write_video(broken, tiles_moved(frames_THWC), fps)
    intact: Literal["left", "right"] = "left" if rng.random() < 0.5 else "right"
    paths = (video.path, broken) if intact == "left" else (broken, video.path)
    question = Question(id="", left=side.name, right=side.name, prompt=_prompt(video), check=intact)
    return _Drawn(question=question, left=paths[0], right=paths[1])


def tiles_moved(frames_THWC: np.ndarray) -> np.ndarray:
    """Break a video so that nobody can prefer it: rows and columns of tiles in reverse order.

    Args:
        frames_THWC: uint8 [T, H, W, 3].

    Returns:
        The same, with height and width cropped to multiples of 8.
    """
    _, height, width, _ = frames_THWC.shape
    tile_height, tile_width = height // _TILES // 2 * 2, width // _TILES // 2 * 2
    rows = [
        slice(number * tile_height, (number + 1) * tile_height) for number in range(_TILES)[::-1]
    ]
    columns = [
        slice(number * tile_width, (number + 1) * tile_width) for number in range(_TILES)[::-1]
    ]
    return np.concatenate(
        [
            np.concatenate([frames_THWC[:, row, column] for column in columns], axis=2)
            for row in rows
        ],
        axis=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """Which video of a page is whose."""

    page: str
    models: tuple[str, ...]
    questions: dict[str, Question]
    """By id, in the order in which they are asked."""


def read_key(path: Path) -> Key:
    """Read key.json.

    Raises:
        ValueError: It is not a key, or damaged.
    """
    content = read_object(path, page=str, models=list, questions=list)
    try:
        questions = [Question(**fields) for fields in content["questions"]]
    except TypeError as error:
        raise ValueError(f"{path} is not the key of a preference page ({error})") from error
    models = tuple(content["models"])
    for question in questions:
        texts = (question.id, question.left, question.right, question.prompt)
        known = question.left in models and question.right in models
        if not all(isinstance(text, str) for text in texts) or not known:
            raise ValueError(
                f"{path} is damaged: question {question.id!r:.20} is not of its models"
            )
        if question.check not in ("left", "right", None):
            raise ValueError(f"{path} is damaged: the check of {question.id!r:.20} names no side")
    return Key(page=content["page"], models=models, questions={one.id: one for one in questions})
