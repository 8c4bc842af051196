import os
import sys

import numpy as np
import pytest
import torch

from cache_schema import CorruptClip, StoreReader, StoreWriter
from stages.students.latents import sample_posterior
from stages.students.registry import read_configs
from stages.train_student.config import KIND_OF_FORM
from stages.train_student.data.dataset import CachedSamples, join_batches
from stages.train_student.data.loader import BatchLoader
from stages.train_student.data.order import clip_of_sample
from tests.cache_schema.servers import serving
from tests.stages.train_student.data.joined import join_stores


@pytest.fixture(scope="module")
def configs(base_model):
    return read_configs(base_model)


@pytest.fixture
def samples(cache, configs):
    return from_stores(join_stores(cache), configs)


def from_stores(stores, configs, seed=3):
    return CachedSamples([stores], configs, seed=seed, batch_size=1)


def same(left, right):
    tensors = ("clean_BFCHW", "noise_BFCHW", "timestep_B", "text_BLD", "teacher_valid_BT")
    return (
        left.keys == right.keys
        and left.teacher.keys() == right.teacher.keys()
        and all(torch.equal(left.teacher[name], right.teacher[name]) for name in left.teacher)
        and all(torch.equal(getattr(left, name), getattr(right, name)) for name in tensors)
    )


def test_a_sample_depends_on_its_number_and_seed_alone(samples, cache, configs):
    again = from_stores(join_stores(cache), configs)
    other = from_stores(join_stores(cache), configs, seed=4)
    torch.manual_seed(99)
    assert same(again[7], samples[7])
    assert not torch.equal(samples[7].noise_BFCHW, samples[8].noise_BFCHW)
    assert not torch.equal(samples[7].noise_BFCHW, other[7].noise_BFCHW)


def test_no_loader_process_looks_at_a_store_by_itself(tiny, tmp_path, configs):
    """It could find other clips than the training process, if the store has changed meanwhile."""
    samples = from_stores(join_stores(tiny.write_cache(tmp_path)), configs)
    expected = [samples[number] for number in range(5)]
    for path in [*tmp_path.glob("*/commits"), *tmp_path.glob("*/index.npz")]:
        path.rename(path.with_name("gone"))
    for start in ("fork", "spawn"):
        numbers = [[number] for number in range(5)]
        with BatchLoader(samples, numbers, workers=1, start=start, pin_memory=False) as batches:
            assert all(same(batch, one) for batch, one in zip(batches, expected, strict=True))


def test_arrays_belong_to_the_key(samples, cache):
    stores = join_stores(cache)
    for number in range(10):
        batch = samples[number]
        key = stores.keys[clip_of_sample(number, 5, 3)]
        assert batch.keys == (key,)
        assert (batch.text_BLD[0].numpy() == stores.text.read(key)["embeds"]).all()
        assert (batch.teacher["features"][0].numpy() == stores.teacher.read(key)["features"]).all()
        latents = stores.latents.read(key)
        scaled = (batch.clean_BFCHW[0] / 0.7).numpy()
        assert (abs(scaled - latents["mean"]) <= 6 * latents["std"].astype("float32") + 1e-3).all()
    assert batch.text_BLD.dtype == batch.teacher["features"].dtype == torch.float16


def test_valid_maps_are_those_the_store_says(tiny, tmp_path, configs):
    def mark(key, arrays):
        return arrays | {"valid": (np.arange(tiny.FRAMES) % 5 != int(key[-1])).astype(np.uint8)}

    tiny.write_inputs(tmp_path)
    tiny.write_store(tmp_path, "teacher", tiny.teacher_shapes(), change=mark)
    samples = CachedSamples([join_stores(tmp_path)], configs, seed=3, batch_size=1)
    batch = join_batches([samples[number] for number in range(5)])
    assert batch.teacher_valid_BT.dtype == torch.bool
    for key, valid_T in zip(batch.keys, batch.teacher_valid_BT, strict=True):
        assert valid_T.tolist() == [t % 5 != int(key[-1]) for t in range(tiny.FRAMES)]


def test_draws_follow_the_posterior():
    mean, std = torch.tensor([1.0, -2.0]).half(), torch.tensor([0.5, 0.0]).half()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample_posterior(mean, std, generator) for _ in range(4000)])
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.mean(0), mean.float(), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), std.float(), atol=0.03, rtol=0)


def test_timesteps_cover_the_schedule(cache, configs):
    samples = from_stores(join_stores(cache, kinds=()), configs)
    timesteps = [int(samples[number].timestep_B) for number in range(100)]
    assert 0 <= min(timesteps) < 100
    assert 900 < max(timesteps) <= 999


@pytest.mark.parametrize(
    ("workers", "start"), [(0, "fork"), (1, "fork"), (2, "fork"), (2, "spawn")]
)
def test_loading_keeps_the_order_and_joins_micro_batches(samples, workers, start):
    numbers = [[4, 5], [0, 9], [3]]
    loading = BatchLoader(samples, iter(numbers), workers=workers, start=start, pin_memory=False)
    loaded = list(loading)
    assert len(loaded) == len(numbers)
    for batch, group in zip(loaded, numbers, strict=True):
        assert same(batch, join_batches([samples[number] for number in group]))


def test_image_to_video_samples_hold_the_first_frame(tiny, tmp_path):
    base = tiny.save_pipeline(
        tmp_path / "base",
        transformer=tiny.tiny_transformer(in_channels=8, patch_size_t=2, ofs_embed_dim=16),
        vae=tiny.tiny_vae(invert_scale_latents=True),
    )
    cache = tiny.write_cache(tmp_path / "cache", image=True)
    stores = join_stores(cache, kinds=())
    batch = from_stores(stores, read_configs(base), seed=0)[0]
    assert batch.clean_BFCHW.shape == batch.image_BFCHW.shape == (1, 4, 4, 4, 6)
    assert torch.equal(batch.clean_BFCHW[:, 0], batch.clean_BFCHW[:, 1])
    assert batch.image_BFCHW[:, 1:].abs().max() == 0
    image = stores.latents.read(batch.keys[0])
    chosen = _chosen_draw(batch, image)
    error = (batch.image_BFCHW[0, 0] * 0.7 - torch.from_numpy(image["image_mean"][chosen])).abs()
    assert (error <= 6 * torch.from_numpy(image["image_std"][chosen]).float() + 1e-3).all()
    assert batch.teacher is None
    assert batch.teacher_valid_BT is None


def _chosen_draw(batch, image):
    means = torch.from_numpy(image["image_mean"]).float()
    return int((batch.image_BFCHW[0, 0] * 0.7 - means).square().flatten(1).sum(1).argmin())


def test_each_visit_sees_one_of_the_first_frames_draws_by_its_number(tiny, tmp_path):
    base = tiny.save_pipeline(
        tmp_path / "base",
        transformer=tiny.tiny_transformer(in_channels=8),
        vae=tiny.tiny_vae(invert_scale_latents=True),
    )
    stores = join_stores(tiny.write_cache(tmp_path / "cache", image=True), kinds=())
    samples, again = (from_stores(stores, read_configs(base), seed=0) for _ in range(2))
    chosen = {}
    for number in range(60):
        batch = samples[number]
        assert torch.equal(batch.image_BFCHW, again[number].image_BFCHW)
        image = stores.latents.read(batch.keys[0])
        chosen.setdefault(batch.keys[0], []).append(_chosen_draw(batch, image))
    # 12 visits a clip: one of 3 draws is missed by a clip with a chance of 3 * (2/3)^12, 2%.
    assert sorted({draw for draws in chosen.values() for draw in draws}) == [0, 1, 2]
    assert all(len(set(draws)) > 1 for draws in chosen.values())


def test_a_damaged_clip_stops_the_reading(tiny, tmp_path, configs):
    cache = tiny.write_cache(tmp_path)
    stores = join_stores(cache)
    for file in (stores.teacher.path / "shards").rglob("features/c.*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CorruptClip, match="clip/"):
        from_stores(stores, configs, seed=0)[0]


@pytest.mark.parametrize("form", ["features", "gram_flow"])
def test_the_teachers_arrays_are_handed_on_as_they_are_stored(tiny, tmp_path, configs, form):
    tiny.write_inputs(tmp_path)
    write = tiny.write_teacher if form == "features" else tiny.write_gram_flow
    store = StoreReader(write(tmp_path, "int8" if form == "features" else "uint8"))
    samples = CachedSamples(
        [join_stores(tmp_path, kinds=(KIND_OF_FORM[form],))], configs, seed=3, batch_size=1
    )
    batch = join_batches([samples[number] for number in (0, 1, 2)])
    names = {"features", "scale"} if form == "features" else {"gram_flow", "low", "step"}
    assert batch.teacher.keys() == names
    for row, key in enumerate(batch.keys):
        for name, array in store.read(key, sorted(names)).items():
            stored = batch.teacher[name][row].numpy()
            assert stored.dtype == array.dtype
            assert (stored == array).all()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_a_cache_behind_a_url(tiny, tmp_path, configs, start):
    """The client was in use in this process before its workers were started."""
    stores = {
        "text": tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}),
        "latents": tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES),
        "gram_flow": tiny.write_gram_flow(tmp_path),
    }
    for path in stores.values():
        StoreWriter.open(tmp_path, StoreReader(path).settings, provenance={}).write_index()
    chosen = {kind: [path.name] for kind, path in stores.items()}
    local = CachedSamples(
        [join_stores(tmp_path, kinds=("gram_flow",))], configs, seed=3, batch_size=1
    )
    with serving(tmp_path) as server:
        joined = join_stores(server.url, chosen, kinds=("gram_flow",))
        samples = from_stores(joined, configs)
        assert same(samples[0], local[0])
        numbers = [[n, n + 1] for n in range(0, 8, 2)]
        loading = BatchLoader(samples, numbers, workers=2, start=start, pin_memory=False)
        for batch, group in zip(loading, numbers, strict=True):
            assert same(batch, join_batches([local[number] for number in group]))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_with_workers_nothing_is_read_in_the_training_process(samples, monkeypatch, start):
    """A worker that is spawned does not inherit the trap; one that is forked is told apart."""
    here, read = os.getpid(), StoreReader.read

    def guarded(self, *arguments):
        assert os.getpid() != here, "read in the training process"
        return read(self, *arguments)

    monkeypatch.setattr(StoreReader, "read", guarded)
    loading = BatchLoader(samples, [[0], [1]], workers=1, start=start, pin_memory=False)
    assert len(list(loading)) == 2


class ImportsAfterReading(CachedSamples):
    """Raises with the names of the modules that reading a sample has imported."""

    def __getitem__(self, number):
        super().__getitem__(number)
        raise ImportError(" ".join(sys.modules))


def test_a_spawned_worker_loads_no_model_library(cache, configs):
    """These take seconds and hundreds of megabytes in each process."""
    samples = ImportsAfterReading([join_stores(cache)], configs, seed=3, batch_size=1)
    with (
        BatchLoader(samples, [[0]], workers=1, start="spawn", pin_memory=False) as batches,
        pytest.raises(ImportError) as raised,
    ):
        next(batches)
    imported = str(raised.value).split()
    assert "torch" in imported
    assert {"diffusers", "transformers", "deepspeed", "sam2"}.isdisjoint(imported)
