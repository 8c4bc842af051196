import json
from collections import Counter

import numpy as np
import pytest

from cache_schema import ArraySpec, StoreNotFound, StoreReader, StoreSettings, StoreWriter
from stages.clips.config import ClipsConfig
from stages.config import BaseModelConfig
from stages.progress import SilentProgress
from stages.students.registry import read_configs
from stages.train_student.config import TrainConfig
from stages.train_student.data.checks import check_stores
from stages.train_student.data.dataset import CachedSamples
from stages.train_student.data.loader import BatchLoader
from stages.train_student.data.open_stores import open_store
from stages.train_student.data.order import micro_batches
from stages.train_student.data.stores import join_buckets
from stages.train_student.train import train_student
from tests.fingerprints import fingerprint_of

SIZES = {"9x32x48": (3, 4, 4, 6), "9x48x32": (3, 4, 6, 4), "17x32x48": (5, 4, 4, 6)}
"""Shapes of the latents."""
KEYS = {"9x32x48": tuple("abcde"), "9x48x32": tuple("fgh"), "17x32x48": tuple("ijkl")}


def clips(*buckets):
    return ClipsConfig(path="unused", buckets=buckets or tuple(SIZES))


def write_size(
    tiny, root, name, *, keys=None, told=True, width=10, maps=None, change=None, latents=None
):
    frames, height, columns = (int(part) for part in name.split("x"))
    keys = KEYS[name] if keys is None else keys
    cut = {"num_frames": frames, "height": height, "width": columns, "fps": 8.0}
    values = {"clips": cut} if told else {}
    shapes = dict.fromkeys(("mean", "std"), SIZES[name])
    tiny.write_store(root, "latents", shapes, keys=keys, values=values | (latents or {}))
    grid = (height // 16, columns // 16)
    return tiny.write_store(
        root,
        "teacher",
        tiny.teacher_shapes(maps or frames, grid, width),
        keys=keys,
        values=values | (change or {}),
    )


def manifest(store):
    return str([list(spec.shape) for spec in StoreReader(store).settings.arrays.values()])


@pytest.fixture(params=[True, False], ids=["settings", "shapes"], scope="module")
def sized_cache(tiny, tmp_path_factory, request):
    """Three sizes that the stores' settings tell apart, or their shapes alone."""
    tmp_path = tmp_path_factory.mktemp("sized")
    every = (key for keys in KEYS.values() for key in keys)
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys=(*every, "z"))
    for name in SIZES:
        write_size(tiny, tmp_path, name, told=request.param)
    return tmp_path


def test_each_size_finds_its_stores(sized_cache, base_model):
    config = clips()
    joined = join_buckets(sized_cache, config.sizes, {}, kinds=("teacher",))
    assert joined.clips == {"9x32x48": 5, "9x48x32": 3, "17x32x48": 4}
    configs = read_configs(base_model)
    for size, stores in zip(config.sizes, joined.stores, strict=True):
        check_stores(stores, configs, size, radius=1)
        assert stores.keys == KEYS[size.size_name]
        assert stores.size == size.size_name
        assert stores.num_frames == size.num_frames
    assert len(joined.readers) == 7
    assert joined.excluded.not_in_every_store == {"text": 1, "latents": 0, "teacher": 0}
    assert joined.describe()[0] == "training on 12 clips (9x32x48: 5, 9x48x32: 3, 17x32x48: 4)"


def test_one_size_of_a_cache_of_several_needs_no_names(sized_cache):
    (size,) = clips("9x48x32").sizes
    joined = join_buckets(sized_cache, (size,), {}, kinds=("teacher",))
    assert joined.clips == {"9x48x32": 3}
    assert sorted(joined.readers) == ["latents", "teacher", "text"]


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_steps_clips_are_of_one_size_whoever_reads_them(sized_cache, base_model, world, micro):
    joined = join_buckets(sized_cache, clips().sizes, {}, kinds=("teacher",))
    configs = read_configs(base_model)
    samples = CachedSamples(joined.stores, configs, seed=0, batch_size=4)
    steps = 9  # three epochs of one step of each size
    keys = [[] for _ in range(steps)]
    for rank in range(world):
        numbers = micro_batches(
            range(steps), batch_size=4, micro_batch_size=micro, rank=rank, world_size=world
        )
        passes = 4 // (world * micro)
        loaded = BatchLoader(samples, numbers, workers=0, pin_memory=False)
        for number, batch in enumerate(loaded):
            assert batch.teacher_valid_BT.shape[1] == batch.num_frames
            keys[number // passes] += batch.keys
    whole = [[samples[4 * step + i].keys[0] for i in range(4)] for step in range(steps)]
    assert [sorted(of_step) for of_step in keys] == [sorted(of_step) for of_step in whole]
    of_size = [
        {name for name, known in KEYS.items() if set(of_step) <= set(known)} for of_step in keys
    ]
    assert Counter(name for names in of_size for name in names) == dict.fromkeys(SIZES, 3)


def test_clips_are_held_out_of_all_sizes_together(sized_cache):
    sizes = clips().sizes
    joined = join_buckets(sized_cache, sizes, {}, kinds=(), held_out=3)
    assert len(joined.held_out) == 3
    assert sum(joined.clips.values()) == 9
    samples = [key for stores in joined.stores for key in stores.held_out]
    assert sorted(samples) == sorted(joined.held_out)
    assert "held out for validation: 3" in joined.describe()


def test_a_clip_held_out_at_one_size_is_so_at_every_size(tiny, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys="abcd")
    for name in ("9x32x48", "17x32x48"):
        write_size(tiny, tmp_path, name, keys="abcd")
    joined = join_buckets(tmp_path, clips("9x32x48", "17x32x48").sizes, {}, kinds=(), held_out=1)
    for stores in joined.stores:
        assert stores.held_out == joined.held_out
        assert joined.held_out[0] not in stores.keys
        assert len(stores.keys) == 3


def test_features_on_sam2s_own_grid_serve_every_size_of_their_shape(tiny, tmp_path):
    """The store of the wide clips is taken for a wide size, though it was cut at another one."""
    made = {}
    for name in ("9x64x96", "9x48x32"):
        frames, height, width = (int(part) for part in name.split("x"))
        cut = {"num_frames": frames, "height": height, "width": width, "fps": 8.0}
        values = {"clips": cut, "grid": [5, 5], "grid_source": "native", "parts": 2}
        shapes = tiny.teacher_shapes(grid=(5, 5))
        made[name] = tiny.write_store(tmp_path, "teacher", shapes, values=values).name
    for size, store in (("9x32x48", "9x64x96"), ("9x96x64", "9x48x32"), ("9x48x32", "9x48x32")):
        (wanted,) = clips(size).sizes
        assert open_store(tmp_path, "teacher", (), size=wanted).name == made[store]
    for size in ("9x32x32", "17x32x48"):
        (wanted,) = clips(size).sizes
        with pytest.raises(StoreNotFound, match="none of the teacher stores"):
            open_store(tmp_path, "teacher", (), size=wanted)


def test_of_several_stores_of_a_size_one_of_each_is_named(tiny, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys="abcdefgh")
    names = []
    for size in ("9x32x48", "9x48x32"):
        for number in (0, 1):
            change = {"number": number}
            named = write_size(tiny, tmp_path, size, change=change, latents=change).name
        names.append(named)
    sizes = clips("9x32x48", "9x48x32").sizes
    told = r"several of the latents .* hold clips of 9x32x48 .*set train.stores.latents"
    with pytest.raises(StoreNotFound, match=told):
        join_buckets(tmp_path, sizes, {}, kinds=("teacher",))
    latents = [
        next(path.name for path in sorted(tmp_path.glob("latents-*")) if shape in manifest(path))
        for shape in ("[3, 4, 4, 6]", "[3, 4, 6, 4]")
    ]
    chosen = {"teacher": names[::-1], "latents": latents}
    joined = join_buckets(tmp_path, sizes, chosen, kinds=("teacher",))
    assert [stores.teacher.name for stores in joined.stores] == names


def test_a_size_without_stores_is_an_error(tiny, sized_cache):
    wanted = clips("9x32x48", "25x32x48").sizes
    with pytest.raises(StoreNotFound, match=r"none of the latents .* 25x32x48 .*extract-features"):
        join_buckets(sized_cache, wanted, {}, kinds=())


def test_a_size_without_clips_is_an_error(tiny, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys="abcdefgh")
    write_size(tiny, tmp_path, "9x32x48")
    write_size(tiny, tmp_path, "9x48x32", keys=())
    sizes = clips("9x32x48", "9x48x32").sizes
    with pytest.raises(ValueError, match=r"9x48x32: no clip is in every store.*data.buckets"):
        join_buckets(tmp_path, sizes, {}, kinds=())


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"width": 12}, "channels 12"),
        ({"maps": 3}, "one map per frame False"),
        ({"change": {"fusion": "average"}}, "fusion 'average'"),
    ],
)
def test_all_sizes_learn_from_one_teacher(tiny, tmp_path, other, told):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys="abcdefgh")
    write_size(tiny, tmp_path, "9x32x48")
    write_size(tiny, tmp_path, "9x48x32", **other)
    with pytest.raises(ValueError, match=told):
        join_buckets(tmp_path, clips("9x32x48", "9x48x32").sizes, {}, kinds=("teacher",))


def test_models_with_learned_positions_know_one_size(tiny, sized_cache, tmp_path):
    base = tiny.save_pipeline(
        tmp_path / "base", transformer=tiny.tiny_transformer(use_learned_positional_embeddings=True)
    )
    configs = read_configs(base)
    config = clips()
    joined = join_buckets(sized_cache, config.sizes, {}, kinds=())
    check_stores(joined.stores[0], configs, config.sizes[0], radius=1)
    for size, stores in list(zip(config.sizes, joined.stores, strict=True))[1:]:
        with pytest.raises(ValueError, match="runs only at 9x32x48"):
            check_stores(stores, configs, size, radius=1)


def write_masks(root, keys, frames=9, area=(32, 48), backward=True):
    spec = ArraySpec(dtype="uint8", shape=(frames, *area), dimension_names=("t", "h", "w"))
    names = ("forward", "backward") if backward else ("forward",)
    valid = ArraySpec(dtype="uint8", shape=(frames,), dimension_names=("t",))
    arrays = dict.fromkeys(names, spec) | {"valid": valid}
    settings = StoreSettings(kind="masks", arrays=arrays, values={})
    writer = StoreWriter.open(root, settings, provenance={})
    with writer.shard("00000", source="made up") as shard:
        for number, key in enumerate(keys):
            made = {name: np.full(spec.shape, number, np.uint8) for name in names}
            shard.add(
                key, made | {"valid": np.ones(frames, np.uint8)}, fingerprint=fingerprint_of(key)
            )
        shard.commit()
    return writer.path


@pytest.mark.parametrize("backward", [True, False])
def test_masks_are_read_where_they_are_needed_alone(tiny, tmp_path, base_model, backward):
    tiny.write_cache(tmp_path)
    write_masks(tmp_path, tiny.KEYS[:4], backward=backward)
    configs = read_configs(base_model)
    without = join_buckets(tmp_path, (tiny.CLIPS,), {}, kinds=("teacher",))
    assert CachedSamples(without.stores, configs, seed=0, batch_size=1)[0].masks is None
    assert without.clips == {"9x32x48": 5}
    joined = join_buckets(tmp_path, (tiny.CLIPS,), {}, kinds=("masks",))
    assert joined.clips == {"9x32x48": 4}
    check_stores(joined.stores[0], configs, tiny.CLIPS, radius=1)
    batch = CachedSamples(joined.stores, configs, seed=0, batch_size=1)[0]
    assert batch.teacher is None
    assert batch.masks["forward"].shape == (1, 9, 32, 48)
    assert int(batch.masks["forward"].max()) == tiny.KEYS.index(batch.keys[0])
    assert ("backward" in batch.masks) is backward
    assert batch.masks["valid"].tolist() == [[1] * 9]


def test_masks_of_other_frames_are_refused(tiny, tmp_path, base_model):
    tiny.write_cache(tmp_path)
    write_masks(tmp_path, tiny.KEYS, frames=17)
    joined = join_buckets(tmp_path, (tiny.CLIPS,), {}, kinds=("masks",))
    with pytest.raises(ValueError, match=r"forward of \(17, 32, 48\)"):
        check_stores(joined.stores[0], read_configs(base_model), tiny.CLIPS, radius=1)


def test_missing_masks_say_who_needs_them(cache, tiny):
    with pytest.raises(StoreNotFound, match=r"no masks store .*foreground_weight.*extract.kinds"):
        join_buckets(cache, (tiny.CLIPS,), {}, kinds=("masks",))


@pytest.mark.parametrize("sized_cache", [True], ids=["settings"], indirect=True)
def test_a_training_on_several_sizes_goes_on_where_it_was(tiny, sized_cache, base_model, tmp_path):
    def train(name, **changes):
        settings = {"batch_size": 2, "validation": {"clips": 2, "every": 100}} | changes
        train_student(
            TrainConfig(**tiny.train_settings(tmp_path / name, **settings)),
            clips(),
            BaseModelConfig(path=str(base_model)),
            sized_cache,
            resolved_config={},
            provenance={},
            progress=SilentProgress(),
        )
        return [
            {name: row[name] for name in ("step", "loss", "diffusion", "auxiliary")}
            for row in map(json.loads, (tmp_path / name / "losses.jsonl").read_text().splitlines())
        ]

    whole = train("whole", steps=6)
    about = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert len(about["held_out"]) == 2
    assert sum(about["clips"].values()) == 10
    train("halves", steps=2)
    assert train("halves", steps=6) == whole
    together = train("together", steps=6, micro_batch_size=2)
    assert [row["loss"] for row in together] == pytest.approx(
        [row["loss"] for row in whole], rel=1e-4
    )
