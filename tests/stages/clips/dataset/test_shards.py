"""Shards of a dataset: names, sizes, keys."""

from pathlib import Path

import pytest

from stages.clips import (
    BadRecord,
    ClipRecord,
    input_shard_name,
    open_dataset,
    retry_shard_name,
    select_clips,
)


def test_store_shards_lead_back_to_the_dataset(tools, config, tmp_path):
    for name in ("a.tar", "b.tar", "a-retry1.tar"):
        tools.write_tar(tmp_path / name, [])
    dataset = open_dataset(config())
    names = [shard.name for shard in dataset.shards]
    assert {"a", "b"} < set(names)
    # The third would be taken for the retry of the first.
    assert retry_shard_name("a", 1) == "a-retry1" and "a-retry1" not in names
    for name in names:
        assert input_shard_name(name, dataset) == name
        assert input_shard_name(retry_shard_name(name, 12), dataset) == name
    for other in ("c", "c-retry1", "a-retry", "a-retryx", "-retry1", "a-retry1-retry2"):
        assert input_shard_name(other, dataset) is None


def test_shards_know_their_size(video, tools, config, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.mp4").write_bytes(video)
    rows = [{"file_name": "a.mp4"}, {"file_name": "absent.mp4"}, b"{"]
    tools.write_jsonl(tmp_path / "rows", rows)
    (shard,) = open_dataset(config(path=tmp_path / "rows")).shards
    assert shard.num_bytes() == len(video)
    path = tools.write_tar(tmp_path / "t.tar", [("a.mp4", video)])
    (shard,) = open_dataset(config(path=path)).shards
    assert shard.num_bytes() == path.stat().st_size


def test_shards_are_tars_in_order_with_safe_stable_unique_names(video, tools, config, tmp_path):
    for name in ("b.tar", "a b.tar", "A.tar", "a.tar", "ünder.tar", "00.part.tar"):
        tools.write_tar(tmp_path / name, [("x.mp4", video)])
    shards = open_dataset(config()).shards
    names = [shard.name for shard in shards]
    assert [shard.source for shard in shards] == sorted(entry.name for entry in tmp_path.iterdir())
    assert "b" in names
    assert len({name.lower() for name in names}) == 6
    assert all(name.isascii() and name.replace("-", "").isalnum() for name in names)
    assert names == [shard.name for shard in open_dataset(config()).shards]
    assert len(tools.by_key(tools.read_all(config()))) == 6
    single = open_dataset(config(path=tmp_path / "b.tar")).shards
    assert [shard.name for shard in single] == ["b"]


def test_unusable_keys_become_bad_records_under_usable_ones(video, tools, config, tmp_path):
    names = ["bell\x07.mp4", "k" * 1500 + ".mp4", "sur\udcffrogate.mp4", "snö.mp4"]
    tools.write_tar(tmp_path / "t.tar", [(name, video) for name in names])
    records = tools.read_all(config())
    assert [type(record) for record in records] == [BadRecord] * 3 + [ClipRecord]
    assert records[3].key == "t/snö"
    for record in records:
        assert record.key.isprintable() and len(record.key.encode()) <= 1024


def test_wrong_places_say_what_is_expected(tools, config, tmp_path):
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        with pytest.raises(ValueError, match=r"metadata\.jsonl"):
            open_dataset(config(path=path))
    (tmp_path / "metadata.csv").write_text("name\nx\n")
    with pytest.raises(ValueError, match="file_name"):
        open_dataset(config())
    tools.write_jsonl(tmp_path, [{"file_name": "a.mp4"}])
    with pytest.raises(ValueError, match="several"):
        open_dataset(config())


def test_opening_a_dataset_opens_no_tar(config, tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"no tar")
    assert len(open_dataset(config()).shards) == 1


def test_selected_clips_keep_their_shards_and_records(two_shards):
    whole = open_dataset(two_shards)
    found = select_clips(whole, ["00001/clip003", "nowhere"])
    (shard,) = found.shards
    assert (shard.name, shard.source, shard.num_clips()) == ("00001", "00001.tar", 1)
    assert [record.key for record in shard.records()] == ["00001/clip003"]
    assert select_clips(whole, []).shards == ()
