from types import SimpleNamespace

import pytest
import torch

from cache_schema import CacheError, CorruptClip, StoreReader, StoreUnreachable
from stages.students.registry import read_configs
from stages.train_student.data import dataset
from stages.train_student.data.dataset import (
    ATTEMPTS,
    CachedSamples,
    join_batches,
    read_or_replace,
)
from stages.train_student.data.loader import BatchLoader
from stages.train_student.data.order import clip_of_sample
from tests.stages.train_student.data.joined import join_stores


@pytest.fixture
def damaged_cache(tiny, tmp_path):
    """Clip 2's features are cut short, clip 4's latents gone."""
    tiny.write_cache(tmp_path)
    for file in files_of(tmp_path, "teacher-*/shards/*/features/c.2.*"):
        file.write_bytes(file.read_bytes()[:-4])
    for file in files_of(tmp_path, "latents-*/shards/*/std/c.4.*"):
        file.unlink()
    return tmp_path


def files_of(root, pattern):
    return list(root.glob(pattern))


def samples_of(root, base_model, seed=3):
    stores = join_stores(root)
    return CachedSamples([stores], read_configs(base_model), seed=seed, batch_size=2)


def test_another_clip_stands_in_and_the_rest_of_the_sample_stays(damaged_cache, cache, base_model):
    whole, hurt = samples_of(cache, base_model), samples_of(damaged_cache, base_model)
    replaced = 0
    for sample in range(10):
        key = f"clip/{clip_of_sample(sample, 5, 3)}"
        batch, as_it_was = hurt[sample], whole[sample]
        assert as_it_was.damaged == ()
        assert batch.timestep_B == as_it_was.timestep_B
        assert torch.equal(batch.noise_BFCHW, as_it_was.noise_BFCHW)
        if key in ("clip/2", "clip/4"):
            replaced += 1
            assert batch.keys[0] not in ("clip/2", "clip/4")
            assert batch.damaged[0].key == key
            assert "is damaged" in batch.damaged[0].message
        else:
            assert batch.keys == (key,)
            assert batch.damaged == ()
            assert torch.equal(batch.clean_BFCHW, as_it_was.clean_BFCHW)
    assert replaced == 4


def test_the_same_clip_stands_in_whoever_reads_and_whenever(damaged_cache, base_model):
    numbers = [[0, 1], [2, 3], [4, 5]]
    first, again = samples_of(damaged_cache, base_model), samples_of(damaged_cache, base_model)
    loaded = list(BatchLoader(again, iter(numbers), workers=1, pin_memory=False))
    for batch, group in zip(loaded, numbers, strict=True):
        expected = join_batches([first[number] for number in group])
        assert (batch.keys, batch.damaged) == (expected.keys, expected.damaged)
    assert {clip.key for batch in loaded for clip in batch.damaged} >= {"clip/2", "clip/4"}


def test_stand_ins_are_spread_over_the_clips(monkeypatch):
    def read(stores, key):
        if key == "0":
            raise CorruptClip("0")
        return {}

    monkeypatch.setattr(dataset, "read_clip", read)
    stores = SimpleNamespace(keys=list("01234"))
    chosen = [read_or_replace(stores, 0, sample=sample, seed=0)[0] for sample in range(400)]
    assert all(70 < chosen.count(key) < 130 for key in "1234")


def test_a_cache_of_damaged_clips_stops_after_some(monkeypatch):
    tried = []

    def read(stores, key):
        tried.append(key)
        raise CorruptClip(f"clip {key} is damaged")

    monkeypatch.setattr(dataset, "read_clip", read)
    with pytest.raises(CorruptClip, match=rf"^{ATTEMPTS} of {ATTEMPTS} clips .*is damaged"):
        read_or_replace(SimpleNamespace(keys=[*map(str, range(99))]), 0, sample=0, seed=0)
    assert len(tried) == ATTEMPTS


def test_a_cache_that_cannot_be_reached_is_an_error(cache, base_model, monkeypatch):
    samples = samples_of(cache, base_model)

    def unreachable(self, key, arrays=None):
        raise StoreUnreachable("no answer")

    monkeypatch.setattr(StoreReader, "read", unreachable)
    with pytest.raises(StoreUnreachable):
        samples[0]


def test_a_damaged_store_stops_before_any_clip_is_read(tiny, tmp_path):
    tiny.write_cache(tmp_path)
    (settings,) = tmp_path.glob("teacher-*/store.json")
    settings.write_bytes(settings.read_bytes()[:-9])
    with pytest.raises(CacheError):
        join_stores(tmp_path)
