import pytest

from cache_schema import CacheError
from stages.base_facts import read_base_facts
from stages.clips.config import ClipsConfig
from stages.train_student.stores import check_stores, join_stores


@pytest.fixture(scope="module")
def facts(base_model):
    return read_base_facts(base_model)


def test_clips_are_joined_by_key_and_the_rest_is_counted(tiny, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys=("c", "a", "b"))
    tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES, keys=("b", "d", "c"))
    tiny.write_store(tmp_path, "teacher", {"features": (9, 2, 3, 4)}, keys=("c",))
    with_teacher = join_stores(tmp_path, {}, with_teacher=True)
    assert with_teacher.keys == ("c",)
    assert with_teacher.left_out == {"text": 2, "latents": 2, "teacher": 0}
    without = join_stores(tmp_path, {}, with_teacher=False)
    assert without.keys == ("b", "c")
    assert without.left_out == {"text": 1, "latents": 1}


def test_no_common_clip_is_an_error(tiny, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys=("a",))
    tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES, keys=("b",))
    with pytest.raises(ValueError, match=r"no clip is in every store.*text 1, latents 1"):
        join_stores(tmp_path, {}, with_teacher=False)


def test_a_missing_kind_says_what_to_run(tiny, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT})
    with pytest.raises(CacheError, match=r"no latents store.*extract-features"):
        join_stores(tmp_path, {}, with_teacher=False)


def test_of_several_stores_one_is_chosen_by_name(tiny, tmp_path):
    tiny.write_cache(tmp_path)
    other = tiny.write_store(tmp_path, "teacher", {"features": (3, 2, 3, 4)})
    with pytest.raises(CacheError, match=r"train.stores.teacher"):
        join_stores(tmp_path, {}, with_teacher=True)
    chosen = join_stores(tmp_path, {"teacher": other.name}, with_teacher=True)
    assert chosen.teacher_maps == 3
    with pytest.raises(ValueError, match="names 'techer'"):
        join_stores(tmp_path, {"techer": other.name}, with_teacher=True)


def test_fitting_stores_pass(tiny, tmp_path, facts):
    for maps in (9, 3):
        cache = tiny.write_cache(tmp_path / str(maps), maps=maps)
        check_stores(join_stores(cache, {}, with_teacher=True), facts, tiny.CLIPS)


@pytest.mark.parametrize(
    ("kind", "shapes", "told"),
    [
        ("latents", {"mean": (3, 4, 8, 6), "std": (3, 4, 8, 6)}, r"latents-.*\(3, 4, 8, 6\)"),
        ("latents", {"mean": (3, 4, 4, 6)}, "no array 'std'"),
        ("text", {"embeds": (4, 16)}, r"text-.*\(4, 16\)"),
        ("teacher", {"features": (9, 4, 3, 10)}, r"grid of \(4, 3\) tokens"),
        ("teacher", {"features": (5, 2, 3, 10)}, "5 maps per clip"),
    ],
)
def test_a_store_of_another_size_is_refused(tiny, tmp_path, facts, kind, shapes, told):
    tiny.write_cache(tmp_path)
    wrong = tiny.write_store(tmp_path, kind, shapes, values={"other": True})
    stores = join_stores(tmp_path, _choose(tmp_path, {kind: wrong.name}), with_teacher=True)
    with pytest.raises(ValueError, match=told):
        check_stores(stores, facts, tiny.CLIPS)


def _choose(root, chosen):
    found = {path.name.split("-")[0]: path.name for path in sorted(root.iterdir())}
    return found | chosen


def test_image_to_video_needs_the_first_frames_latents(tiny, tmp_path):
    base = tiny.save_pipeline(tmp_path / "base", transformer=tiny.tiny_transformer(in_channels=8))
    stores = join_stores(tiny.write_cache(tmp_path / "cache"), {}, with_teacher=False)
    with pytest.raises(ValueError, match="no array 'image_mean'"):
        check_stores(stores, read_base_facts(base), tiny.CLIPS)


def test_learned_positions_hold_for_one_size(tiny, tmp_path):
    base = tiny.save_pipeline(
        tmp_path / "base",
        transformer=tiny.tiny_transformer(sample_height=8, use_learned_positional_embeddings=True),
    )
    stores = join_stores(tiny.write_cache(tmp_path / "cache"), {}, with_teacher=False)
    with pytest.raises(ValueError, match="at one size alone, 64x48"):
        check_stores(stores, read_base_facts(base), tiny.CLIPS)


def test_latents_of_a_vae_with_another_scale_are_refused(tiny, tmp_path, facts):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT})
    tiny.write_store(
        tmp_path, "latents", tiny.LATENT_SHAPES, values={"base": {"scaling_factor": 1.15}}
    )
    with pytest.raises(ValueError, match=r"scaling_factor is 1.15"):
        check_stores(join_stores(tmp_path, {}, with_teacher=False), facts, tiny.CLIPS)


def test_teacher_and_latents_of_differently_cut_clips_are_refused(tiny, tmp_path, facts):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT})
    tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES, values={"clips": {"fps": 8.0}})
    tiny.write_store(
        tmp_path, "teacher", {"features": (9, 2, 3, 4)}, values={"clips": {"fps": 16.0}}
    )
    stores = join_stores(tmp_path, {}, with_teacher=True)
    with pytest.raises(ValueError, match="the same frames"):
        check_stores(stores, facts, tiny.CLIPS)


def test_other_clip_sizes_are_refused(tiny, cache, facts):
    longer = ClipsConfig(path="unused", num_frames=17, height=tiny.HEIGHT, width=tiny.WIDTH)
    with pytest.raises(ValueError, match="num_frames"):
        check_stores(join_stores(cache, {}, with_teacher=True), facts, longer)
