"""Dataset layouts: supported ones are read, others are reported with a conversion command."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.clips import ClipRecord, load_clip, open_dataset


@pytest.mark.parametrize("listed", ["videos.txt", "video.txt"])
@pytest.mark.parametrize("told", ["prompts.txt", "prompt.txt", "captions.txt", "caption.txt"])
def test_captions_and_videos_in_two_lists(captions, told, listed, fill, config):
    """CogVideo's and finetrainers' `--caption_column prompts.txt --video_column videos.txt`."""
    root = fill(
        {
            "videos/b.mp4": "",
            "videos/a.mp4": "",
            told: "\ufeffA bear, eine Bärin.\r\nA dog\u2028runs.\n\n",
            listed: "videos/b.mp4\nvideos/a.mp4",
        }
    )
    expected = {"videos/b": "A bear, eine Bärin.", "videos/a": "A dog\u2028runs."}
    assert captions(config(path=root)) == expected
    assert captions(config(path=root / listed, clips_per_shard=1)) == expected
    layout = open_dataset(config(path=root)).layout
    assert layout == f"{told} and {listed}, line by line"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("A dog.\n", "has 1 lines and .*videos.txt has 2"),
        ("A dog.\nA cat.\nA bear.\n", "has 3 lines"),
        ("A dog.\n\nA cat.\n", "has 3 lines"),
        ("\nA dog.\n", r"blank lines \(1\)"),
    ],
)
def test_lists_of_other_lengths_are_never_paired(texts, words, fill, config):
    root = fill({"a.mp4": "", "b.mp4": "", "prompts.txt": texts, "videos.txt": "a.mp4\nb.mp4\n"})
    with pytest.raises(ValueError, match=words):
        open_dataset(config(path=root))


def test_two_lists_of_captions_are_refused(fill, config):
    root = fill({"a.mp4": "", "prompts.txt": "A", "captions.txt": "B", "videos.txt": "a.mp4"})
    with pytest.raises(ValueError, match=r"prompts\.txt, captions\.txt, videos\.txt"):
        open_dataset(config(path=root))


def test_a_bad_line_of_a_list_spoils_no_other(fill, config):
    names = "../a.mp4\nb.mp4\nb.mp4\nc.mp4"
    root = fill({"prompts.txt": b"A\nB\nC\n\xff", "videos.txt": names})
    (shard,) = open_dataset(config(path=root)).shards
    found = list(shard.records())
    assert [getattr(record, "caption", "bad") for record in found] == ["bad", "B", "bad", "bad"]
    assert "line 3" in found[2].detail and "UTF-8" in found[3].detail


def test_patterns_of_tars(captions, tools, video, config, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(12):
            members = [("x.mp4", video), ("x.txt", f"{folder}{number}".encode())]
            tools.write_tar(tmp_path / folder / f"{number:05d}.tar", members)
            (tmp_path / folder / f"._{number:05d}.tar").write_bytes(b"a Mac's")
    whole = open_dataset(config(path=tmp_path / "a"))
    assert whole.layout == "webdataset, 12 tars"
    for pattern, numbers in (
        ("a/*.tar", range(12)),
        ("a/{00000..00003}.tar", range(4)),
        ("a/{00009..00011}.tar", (9, 10, 11)),
        ("a/0000[12].tar", (1, 2)),
        ("a/00{001,010}.tar", (1, 10)),
        ("a/0000{1,{3..4}}.tar", (1, 3, 4)),
    ):
        shards = open_dataset(config(path=tmp_path / pattern)).shards
        # Named as in the whole folder, so that stores fit.
        chosen = [whole.shards[number] for number in numbers]
        assert [(s.name, s.source) for s in shards] == [(s.name, s.source) for s in chosen]
    both = open_dataset(config(path=tmp_path / "{a,b}" / "{00000..00001}.tar"))
    assert [shard.source for shard in both.shards] == [
        "a/00000.tar", "a/00001.tar", "b/00000.tar", "b/00001.tar"
    ]  # fmt: skip
    assert len({shard.name for shard in both.shards}) == 4
    assert sorted(captions(config(path=tmp_path / "{a,b}" / "{00000..00001}.tar")).values()) == [
        "a0", "a1", "b0", "b1"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"2 of its files are missing: .*00012\.tar, .*00013\.tar"):
        open_dataset(config(path=tmp_path / "a" / "{00010..00013}.tar"))
    with pytest.raises(ValueError, match="matches no file"):
        open_dataset(config(path=tmp_path / "a" / "1*.tar"))
    with pytest.raises(ValueError, match="only tars"):
        (tmp_path / "a" / "lion.mp4").write_bytes(video)
        open_dataset(config(path=tmp_path / "a" / "*"))
    with pytest.raises(ValueError, match="over 100,000 files"):
        open_dataset(config(path=tmp_path / "{0..999}{0..999}{0..9}.tar"))


def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder(captions, fill, config):
    root = fill({"a.mp4": "", "a.txt": "A"}, folder="clips [new] {1}")
    assert captions(config(path=root)) == {"a": "A"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("column", ["text", "prompt"])
def test_captions_in_another_column(captions, name, column, fill, config):
    rows = [
        {"file_name": "a.mp4", column: "A dog.", "fps": "24"},
        {"file_name": "b.mp4", column: "B"},
    ]
    if name.endswith("csv"):
        text = f"file_name,{column},fps\na.mp4,A dog.,24\nb.mp4,B,\n"
    else:
        text = "\n".join(map(json.dumps, rows))
    root = fill({"a.mp4": "", "b.mp4": "", name: text})
    assert captions(config(path=root)) == {"a": "A dog.", "b": "B"}
    words = f"{name}; captions from its {column}; fields not read: fps"
    assert open_dataset(config(path=root)).layout == words


def test_a_caption_column_goes_before_others_in_the_whole_file(captions, fill, config):
    rows = [{"file_name": "a.mp4", "caption": "A"}, {"file_name": "b.mp4", "text": "B"}]
    root = fill({"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert captions(config(path=root)) == {"a": "A", "b": None}
    rows = [{"file_name": "a.mp4", "prompt": "A"}, {"file_name": "b.mp4", "text": "B"}]
    root = fill({"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    with pytest.raises(ValueError, match="text and prompt; rename one of them to caption"):
        open_dataset(config(path=root))


def test_a_metadata_file_may_have_any_name(captions, fill, config):
    root = fill({"a.mp4": "", "train.jsonl": '{"file_name": "a.mp4", "caption": "A"}'})
    assert captions(config(path=root / "train.jsonl")) == {"a": "A"}


AMBIGUOUS = {
    "metadata and captions": {
        "metadata.csv": "file_name,caption\na.mp4,A\n",
        "a.mp4": "",
        "a.txt": "B",
    },
    "both metadata": {
        "metadata.csv": "file_name,caption\na.mp4,A\n",
        "metadata.jsonl": '{"file_name": "a.mp4", "caption": "B"}',
    },
    "lists and captions": {"prompts.txt": "A", "videos.txt": "a.mp4", "a.mp4": "", "a.txt": "B"},
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_where_two_layouts_fit_both_are_named_and_each_can_be_chosen(captions, name, fill, config):
    root = fill(AMBIGUOUS[name])
    with pytest.raises(ValueError, match="several datasets") as told:
        open_dataset(config(path=root))
    paths = re.findall(r"data\.path='([^']*)'", str(told.value))
    assert [captions(config(path=Path(path)))["a"] for path in paths] in (["A", "B"], ["B", "A"])


def test_tars_beside_metadata_are_refused(tools, fill, config):
    root = fill({"metadata.csv": "file_name,caption\na.mp4,A\n"})
    tools.write_tar(root / "0.tar", [])
    with pytest.raises(ValueError, match=r"1 tar: data\.path='.*/\*\.tar'; metadata\.csv: "):
        open_dataset(config(path=root))


def command_of(error: pytest.ExceptionInfo) -> str:
    found = re.search(
        r"((?:gunzip|python|cp|for|ffmpeg) .*?)(?: and set |\. Expected|$)", str(error.value)
    )
    assert found
    return found[1]


def run(command: str) -> None:
    subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, check=True)


@pytest.mark.parametrize("names", [["0.tar.gz"], ["0.tar.gz", "1.tar.gz"], ["0.tgz"]])
def test_compressed_tars_come_with_the_command_that_unpacks_them(
    captions, names, fill, tools, video, config, tmp_path
):
    tar = tools.write_tar(tmp_path / "t", [("x.mp4", video), ("x.txt", b"X")]).read_bytes()
    root = fill({name: gzip.compress(tar) for name in names}, folder="my data")
    for path in (root, root / names[0]):
        with pytest.raises(ValueError, match="compressed") as told:
            open_dataset(config(path=path))
    with pytest.raises(ValueError) as told:
        open_dataset(config(path=root))
    run(command_of(told))
    assert list(captions(config(path=root)).values()) == ["X"] * len(names)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '[{"file_name": "a.mp4", "caption": "Ä"}]'),
        ("metadata.csv", "file_name;caption\na.mp4;Ä\n"),
        ("metadata.csv", 'file_name\tcaption\na.mp4\t"Ä"\n'),
    ],
)
def test_lists_in_other_dialects_come_with_the_command_that_writes_them_anew(
    captions, name, content, fill, config
):
    root = fill({"a.mp4": "", name: content}, folder="my data")
    with pytest.raises(ValueError) as told:
        open_dataset(config(path=root))
    run(command_of(told))
    anew = re.search(r"set data\.path=(.*)$", str(told.value))[1]
    assert captions(config(path=Path(anew))) == {"a": "Ä"}


def test_labels_beside_videos_come_with_the_command_that_joins_them(captions, fill, config):
    root = fill({"videos/1.mp4": "", "labels/1.txt": "A"}, folder="my data")
    with pytest.raises(ValueError, match="side by side") as told:
        open_dataset(config(path=root))
    run(command_of(told))
    assert captions(config(path=root / "videos")) == {"1": "A"}


@pytest.mark.parametrize("name", ["clips/{}/0.jpg", "clips/480p/{}/0.jpg", "{}/0.jpg"])
def test_folders_of_frames_come_with_the_command_that_encodes_them(name, fill, config):
    root = fill(
        {name.format(clip).replace("0.jpg", f"{i}.jpg"): "x" for clip in "ab" for i in (0, 1)}
    )
    with pytest.raises(ValueError, match=r"contains a video as \.jpg files") as told:
        open_dataset(config(path=root))
    command = command_of(told)
    assert command.startswith(f"for d in {(root / name).parent.parent}/*/; do ffmpeg ")
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "it is empty"),
        ({"a.xyz": "x", "b.xyz": "x"}, r"it contains 2 \.xyz"),
        ({"train.jsonl": "{}", "x.bin": "x"}, r"if so, set data\.path=.*train\.jsonl"),
        ({"train-0.parquet": "x"}, r"parquet, .*to_json.* .*/metadata\.jsonl .*/train-0\.parquet"),
        ({"inner/metadata.jsonl": "{}"}, r"subfolders contain datasets: data\.path=.*inner"),
        ({"0.jpg": "x", "1.jpg": "x"}, r"ffmpeg -framerate 24 .*data\.mp4"),
        ({"clips.zip": "x"}, r"unzip .*clips\.zip"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_no_dataset_is_told_by_what_it_holds(files, words, fill, config, tmp_path):
    root = fill(files)
    root.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=f"(?s)no dataset at data.path .*{words}.*metadata.jsonl"):
        open_dataset(config(path=root))


def test_records_of_every_layout_are_alike(fill, tools, video, config, tmp_path):
    fields = {"caption": "A", "subject": "a dog", "box_xyxy": [2, 3, 20, 30]}
    beside = fill({"a.mp4": "", "a.json": json.dumps(fields)}, folder="beside")
    listed = fill({"a.mp4": "", "metadata.jsonl": json.dumps(fields | {"file_name": "a.mp4"})})
    tar = tools.write_tar(
        tmp_path / "t.tar", [("a.mp4", video), ("a.json", json.dumps(fields).encode())]
    )
    for path in (beside, listed, tar):
        (shard,) = open_dataset(config(path=path)).shards
        (record,) = shard.records()
        assert isinstance(record, ClipRecord)
        assert (record.caption, record.phrase) == ("A", "a dog")
        assert record.prompts[0].box_xyxy == (2.0, 3.0, 20.0, 30.0)
        load_clip(record, config())
