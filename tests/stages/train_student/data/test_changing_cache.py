"""Samples read while the stores change: clips dropped, made again, brought in from elsewhere."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache_schema import ArraySpec, ClipMissing, CorruptClip, StoreSettings, StoreWriter
from cache_schema.maintenance.drop import drop_clips
from cache_schema.maintenance.merge import merge_stores
from stages.students.registry import read_configs
from stages.train_student.data import dataset
from stages.train_student.data.dataset import (
    ATTEMPTS,
    GONE_ATTEMPTS,
    CachedSamples,
    join_batches,
    read_or_replace,
)
from stages.train_student.data.loader import BatchLoader
from stages.train_student.data.order import clip_of_sample
from tests.fingerprints import fingerprint_of
from tests.stages.train_student.data.joined import join_stores

SEED = 3
KINDS = ("text", "latents", "teacher", "gram_flow", "masks")


@pytest.fixture
def changing(tiny, tmp_path):
    tiny.write_cache(tmp_path)
    tiny.write_gram_flow(tmp_path)
    spec = ArraySpec(dtype="uint8", shape=(9, 32, 48), dimension_names=("t", "h", "w"))
    settings = StoreSettings(kind="masks", arrays={"forward": spec}, values={})
    writer = StoreWriter.open(tmp_path, settings, provenance={})
    with writer.shard("00000", source="made up") as shard:
        for number, key in enumerate(tiny.KEYS):
            values = {"forward": np.full(spec.shape, number, np.uint8)}
            shard.add(key, values, fingerprint=fingerprint_of(key))
        shard.commit()
    return tmp_path


def samples_of(root, base_model, kind):
    kinds = ("gram_flow",) if kind == "gram_flow" else ("teacher", "masks")
    stores = join_stores(root, kinds=kinds)
    return CachedSamples([stores], read_configs(base_model), seed=SEED, batch_size=1)


def store_of(root, kind):
    (store,) = root.glob(f"{kind}-*")
    return store


def assert_same(batch, other):
    assert batch.keys == other.keys
    for name in ("clean_BFCHW", "noise_BFCHW", "timestep_B", "text_BLD"):
        assert torch.equal(getattr(batch, name), getattr(other, name))
    for name, values in batch.teacher.items():
        assert torch.equal(values, other.teacher[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_dropped_from_one_kind_is_replaced_and_the_others_are_read_on(
    changing, base_model, kind, workers
):
    samples = samples_of(changing, base_model, kind)
    as_it_was = [samples[number] for number in range(10)]
    numbers = ([number] for number in range(10))
    with BatchLoader(samples, numbers, workers=workers, pin_memory=False) as loader:
        # What the workers have read ahead by now is read again below, after the drop.
        drop_clips(store_of(changing, kind), ["clip/2"], detail="a cut")
        read_ahead = [next(loader) for _ in range(4 * workers)][:10]
    numbers = ([number] for number in range(10))
    with BatchLoader(samples, numbers, workers=workers, pin_memory=False) as loader:
        read = list(loader)
    assert len(read) == 10
    for batch, before in zip(read, as_it_was, strict=True):
        if before.keys == ("clip/2",):
            (gone,) = batch.damaged
            assert (gone.key, gone.gone) == ("clip/2", True)
            assert f"no {kind} of clip 'clip/2'" in gone.message
            assert "dropped (a cut)" in gone.message
            assert batch.keys != before.keys
        else:
            assert batch.damaged == ()
            assert_same(batch, before)
    for batch, before, after in zip(read_ahead, as_it_was, read, strict=False):
        assert_same(batch, after if batch.damaged else before)


def test_the_same_clip_stands_in_whoever_reads(changing, base_model):
    first, again = (samples_of(changing, base_model, "teacher") for _ in range(2))
    drop_clips(store_of(changing, "latents"), ["clip/0", "clip/3"], detail="cuts")
    numbers = [[0, 1], [2, 3], [4, 5], [6, 7]]
    expected = [join_batches([first[number] for number in group]) for group in numbers]
    for workers in (0, 1, 3):
        with BatchLoader(again, iter(numbers), workers=workers, pin_memory=False) as loader:
            for batch, alike in zip(loader, expected, strict=True):
                assert (batch.keys, batch.damaged) == (alike.keys, alike.damaged)
                assert_same(batch, alike)


def test_a_clip_made_again_with_other_values_is_not_joined_with_what_it_was(
    tiny, changing, base_model
):
    samples = samples_of(changing, base_model, "teacher")
    before = [samples[number] for number in range(5)]
    store = store_of(changing, "latents")
    shutil.rmtree(store)

    def change(key, arrays):
        return {name: values + np.float16(key == "clip/1") for name, values in arrays.items()}

    tiny.write_store(changing, "latents", tiny.LATENT_SHAPES, change=change)
    for number in range(5):
        batch = samples[number]
        if before[number].keys == ("clip/1",):
            assert batch.damaged[0].gone
            assert "made again" in batch.damaged[0].message
        else:
            assert_same(batch, before[number])


def test_a_merge_into_the_stores_changes_no_sample(tiny, changing, base_model, tmp_path):
    samples = samples_of(changing, base_model, "teacher")
    before = [samples[number] for number in range(5)]
    other = tmp_path / "other"
    tiny.write_cache(other, keys=("clip/new",))
    for kind in ("text", "latents", "teacher"):
        merge_stores(store_of(changing, kind), [store_of(other, kind)], prefix="more-")
    for number in range(5):
        assert samples[number].damaged == ()
        assert_same(samples[number], before[number])


def stub_clips(monkeypatch, number, read):
    """Stores of so many clips, whose keys are their numbers."""

    def read_clip(stores, key):
        read(int(key))
        return {}

    monkeypatch.setattr(dataset, "read_clip", read_clip)
    return SimpleNamespace(keys=[*map(str, range(number))])


def test_clips_that_are_gone_are_no_damage_however_many_they_are(monkeypatch):
    def read(clip):
        if clip % 50:
            raise ClipMissing(f"clip {clip} was dropped")

    stores = stub_clips(monkeypatch, 500, read)
    for sample in range(20):
        first = clip_of_sample(sample, 500, 0)
        key, _, gone = read_or_replace(stores, first, sample=sample, seed=0)
        assert int(key) % 50 == 0
        assert [(one.key, one.gone) for one in gone] == ([(str(first), True)] if first % 50 else [])


def test_a_cache_without_any_clip_left_stops_with_what_to_do(monkeypatch):
    def read(clip):
        raise ClipMissing(f"clip {clip} was dropped")

    with pytest.raises(ClipMissing, match=rf"^{GONE_ATTEMPTS} clips .*run the same command again"):
        read_or_replace(stub_clips(monkeypatch, 9, read), 0, sample=0, seed=0)


def test_damage_among_clips_that_are_gone_still_stops(monkeypatch):
    met = []

    def read(clip):
        met.append(clip)
        if len(met) % 2:
            raise ClipMissing("dropped")
        raise CorruptClip("damaged")

    with pytest.raises(CorruptClip, match=rf"{ATTEMPTS} of {2 * ATTEMPTS} clips"):
        read_or_replace(stub_clips(monkeypatch, 99, read), 0, sample=0, seed=0)
