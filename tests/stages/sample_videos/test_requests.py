"""Prompt files, seeds and images, and the requests made from them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.sample_videos.requests import PromptRow, VideoRequest, make_requests, read_prompt_file


@pytest.fixture
def write(tmp_path):
    (tmp_path / "frame.png").touch()

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_text_file_has_a_prompt_per_line(write):
    path = write("prompts.txt", '\ufeffa dog, "running"\r\n\n  un chien été \n@home\n')
    prompts = ['a dog, "running"', "un chien été", "@home"]
    assert read_prompt_file(path) == [PromptRow(prompt=text) for text in prompts]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "p.csv",
            'seed, prompt ,image\n3,"a dog, two\nlines",frame.png\n,a cat,\n,,\n 4 ,a "bird",\n',
        ),
        (
            "p.jsonl",
            '{"prompt": "a dog, two\\nlines", "seed": 3, "image": "frame.png"}\n\n'
            '{"prompt": "a cat", "seed": null}\n{"prompt": "a \\"bird\\"", "seed": 4}\n',
        ),
    ],
)
def test_tables_name_image_and_seed_too(write, tmp_path, name, content):
    assert read_prompt_file(write(name, content)) == [
        PromptRow(prompt="a dog, two\nlines", seed=3, image=tmp_path / "frame.png"),
        PromptRow(prompt="a cat"),
        PromptRow(prompt='a "bird"', seed=4),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.md", "a dog", r"ends in \.txt, \.csv or \.jsonl, got .*p\.md"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.txt", b"\xff\xfe", "is not UTF-8"),
        ("p.csv", "", "has the columns"),
        ("p.csv", "text\na dog\n", r"has the columns \['text'\], expected"),
        ("p.csv", "prompt,prompt\na,b\n", "has the columns"),
        ("p.csv", "prompt,sead\na dog,3\n", r"line 2: unknown sead; expected prompt, image, seed"),
        ("p.csv", "prompt,seed\na dog, running,3\n", "line 2: 3 cells in 2 columns"),
        ("p.csv", 'prompt,seed\n"a dog,3\na cat,4\n', "line 3: unexpected end of data"),
        ("p.csv", "prompt,seed\na dog,-1\n", "line 2: seed must be an integer of 0 or more"),
        ("p.csv", "prompt,seed\na dog,1.5\n", "line 2: seed must be an integer"),
        ("p.csv", "prompt,seed\n,3\n", "line 2: there is no prompt"),
        ("p.csv", "prompt,image\na dog,gone.png\n", r"line 2: there is no image .*gone\.png"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2 must be an object"),
        ("p.jsonl", '{"prompt": "a"\n', "line 1 is not JSON"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1: there is no prompt"),
        ("p.jsonl", '{"prompt": "a", "seed": true}\n', "line 1: seed must be an integer"),
        ("p.jsonl", '{"prompt": "a", "seed": 9223372036854775808}\n', "line 1: seed must be"),
        ("p.jsonl", '{"prompt": "a", "image": 3}\n', "line 1: image must be a file name"),
    ],
)
def test_a_bad_file_is_refused_and_its_line_named(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_prompt_file(write(name, content))


def test_seeds_count_up_from_the_prompts_own_or_from_the_given_one(tmp_path):
    rows = [PromptRow(prompt="a"), PromptRow(prompt="b", seed=7, image=tmp_path / "b.png")]
    found = make_requests(rows, seeds=[3], num=2, image=tmp_path / "all.png")
    assert [(one.prompt, one.seed, one.image.name) for one in found] == [
        ("a", 3, "all.png"),
        ("a", 4, "all.png"),
        ("b", 7, "b.png"),
        ("b", 8, "b.png"),
    ]


def test_several_seeds_are_used_for_every_prompt():
    found = make_requests([PromptRow(prompt="a")], seeds=[5, 2, 5], num=1, image=None)
    assert found == [VideoRequest(prompt="a", seed=5), VideoRequest(prompt="a", seed=2)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([PromptRow(prompt=" ")], {}, "the prompt is empty"),
        ([PromptRow(prompt="a")], {"seeds": [1, 2], "num": 2}, "--num counts up from one seed"),
        (
            [PromptRow(prompt="a", image=Path(name)) for name in ("x.png", "y.png")],
            {},
            r"two images with seed 0: x\.png and y\.png",
        ),
    ],
)
def test_requests_that_contradict_each_other_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        make_requests(rows, **{"seeds": [0], "num": 1, "image": None} | options)


@given(
    st.lists(
        st.builds(PromptRow, prompt=st.sampled_from("abc"), seed=st.none() | st.integers(0, 3)),
        max_size=6,
    ),
    st.integers(1, 3),
)
def test_every_video_is_listed_once(rows, num):
    found = make_requests(rows, seeds=[1], num=num, image=None)
    pairs = [(one.prompt, one.seed) for one in found]
    expected = {
        (row.prompt, (1 if row.seed is None else row.seed) + n) for row in rows for n in range(num)
    }
    assert set(pairs) == expected
    assert len(pairs) == len(expected)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
            st.none() | st.integers(0, 2**63 - 1),
        ),
        min_size=1,
    )
)
def test_any_prompt_survives_json_lines(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [json.dumps({"prompt": text, "seed": seed}) for text, seed in rows]
    path.write_text("\n".join(lines))
    found = [(row.prompt, row.seed) for row in read_prompt_file(path)]
    assert found == [(text.strip(), seed) for text, seed in rows]
