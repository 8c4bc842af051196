import json

import numpy as np
import pytest

from cache_schema import ArraySpec, CacheError, StoreNotFound, StoreSettings, StoreWriter
from stages.clips.config import ClipsConfig
from stages.students.registry import read_configs
from stages.train_student.config import KIND_OF_FORM
from stages.train_student.data.checks import check_stores
from tests.fingerprints import fingerprint_of
from tests.stages.train_student.data.joined import join_stores


@pytest.fixture(scope="module")
def configs(base_model):
    return read_configs(base_model)


def test_clips_are_joined_by_key_and_the_rest_is_counted(tiny, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys=("c", "a", "b"))
    tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES, keys=("b", "d", "c"))
    tiny.write_store(tmp_path, "teacher", tiny.teacher_shapes(), keys=("c",))
    with_teacher = join_stores(tmp_path)
    assert with_teacher.keys == ("c",)
    assert with_teacher.excluded.not_in_every_store == {"text": 2, "latents": 2, "teacher": 0}
    without = join_stores(tmp_path, kinds=())
    assert without.keys == ("b", "c")
    assert without.excluded.not_in_every_store == {"text": 1, "latents": 1}


def test_no_common_clip_is_an_error(tiny, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, keys=("a",))
    tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES, keys=("b",))
    with pytest.raises(ValueError, match=r"no clip is in every store.*text 1, latents 1"):
        join_stores(tmp_path, kinds=())


def test_a_missing_kind_says_what_to_run(tiny, tmp_path):
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT})
    with pytest.raises(CacheError, match="no latents store") as error:
        join_stores(tmp_path, kinds=())
    assert error.value.remedy == "make"


def test_of_several_stores_one_is_chosen_by_name(tiny, tmp_path):
    tiny.write_cache(tmp_path)
    other = tiny.write_store(tmp_path, "teacher", tiny.teacher_shapes(3))
    with pytest.raises(CacheError, match=r"train.stores.teacher"):
        join_stores(tmp_path)
    chosen = join_stores(tmp_path, {"teacher": [other.name]}, kinds=("teacher",))
    assert chosen.teacher_maps == 3
    with pytest.raises(ValueError, match="names 'techer'"):
        join_stores(tmp_path, {"techer": [other.name]}, kinds=("teacher",))


def test_stores_pass_until_the_training_size_is_another(tiny, tmp_path, configs):
    for maps in (9, 3):
        cache = tiny.write_cache(tmp_path / str(maps), maps=maps)
        stores = join_stores(cache)
        check_stores(stores, configs, tiny.CLIPS, radius=1)
        assert stores.teacher_maps == maps
        wider = tiny.CLIPS.model_copy(update={"width": tiny.CLIPS.width + 16})
        with pytest.raises(ValueError, match=r"data\.width need"):
            check_stores(stores, configs, wider, radius=1)


@pytest.mark.parametrize("maps", [9, 3])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_fitting_gram_flow_passes(tiny, cache_with, configs, dtype, maps):
    cache = cache_with(lambda root: tiny.write_gram_flow(root, dtype, maps=maps, radius=2))
    stores = join_stores(cache, kinds=("gram_flow",))
    assert stores.teacher_form == "gram_flow"
    assert stores.teacher_maps == maps
    assert stores.native_parts is None
    assert sorted(stores.readers) == ["gram_flow", "latents", "text"]
    for radius in (1, 2):
        check_stores(stores, configs, tiny.CLIPS, radius=radius)


def test_int8_features_pass(tiny, cache_with, configs):
    stores = join_stores(
        cache_with(lambda root: tiny.write_teacher(root, "int8")), kinds=("teacher",)
    )
    assert stores.teacher_form == "features"
    assert stores.teacher_maps == tiny.FRAMES
    check_stores(stores, configs, tiny.CLIPS, radius=1)


@pytest.fixture
def cache_with(tiny, tmp_path):
    """Text, latents, and what `write` writes."""

    def make(write, latents=None):
        tiny.write_inputs(tmp_path, latents=latents)
        write(tmp_path)
        return tmp_path

    return make


def test_a_window_smaller_than_the_objectives_is_refused_with_three_ways_out(
    tiny, cache_with, configs
):
    cache = cache_with(lambda root: tiny.write_gram_flow(root, radius=2))
    stores = join_stores(cache, kinds=("gram_flow",))
    with pytest.raises(ValueError, match="windows of radius 2") as caught:
        check_stores(stores, configs, tiny.CLIPS, radius=3)
    assert str(stores.teacher.path) in str(caught.value)
    assert "train.lgf.radius=2" in str(caught.value)
    assert "extract.gram_flow.radius=3" in str(caught.value)
    assert "cache derive gram-flow" in str(caught.value)


def test_a_crossed_gram_flow_without_its_second_half_is_refused(tiny, cache_with, configs):
    shapes = {"gram_flow": (8, *tiny.GRID, 9), "valid": (9,)}
    values = {"pairs": "crossed"}
    cache = cache_with(lambda root: tiny.write_store(root, "gram_flow", shapes, values=values))
    stores = join_stores(cache, kinds=("gram_flow",))
    with pytest.raises(ValueError, match="no array 'gram_flow_back'"):
        check_stores(stores, configs, tiny.CLIPS, radius=1)


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({"gram_flow": (8, 4, 3, 9), "valid": (9,)}, r"grid of \(4, 3\) tokens"),
        ({"gram_flow": (9, 2, 3, 9), "valid": (10,)}, "10 maps per clip"),
        ({"gram_flow": (8, 2, 3, 9), "valid": (8,)}, r"valid of \(8,\)"),
        ({"gram_flow": (8, 2, 3, 9)}, "no array 'valid'"),
        ({"gram_flow": (8, 2, 3, 8), "valid": (9,)}, "a window has"),
        ({"flow": (8, 2, 3, 9), "valid": (9,)}, "no array 'gram_flow'"),
    ],
)
def test_a_gram_flow_of_another_size_is_refused(tiny, cache_with, configs, shapes, told):
    cache = cache_with(lambda root: tiny.write_store(root, "gram_flow", shapes))
    stores = join_stores(cache, kinds=("gram_flow",))
    with pytest.raises(ValueError, match=told):
        check_stores(stores, configs, tiny.CLIPS, radius=1)


@pytest.mark.parametrize(
    ("kind", "dtype", "left", "told"),
    [
        ("teacher", "int8", "features", "no array 'scale'"),
        ("gram_flow", "uint8", "gram_flow", "no array 'low'"),
        ("teacher", "float32", "features", "features of float32, not of float16 or int8"),
        ("gram_flow", "int8", "gram_flow", "Gram flow of int8, not of float16 or uint8"),
    ],
)
def test_bytes_without_their_scale_and_other_formats_are_refused(
    tiny, cache_with, configs, kind, dtype, left, told
):
    shape = (9, *tiny.GRID, 10) if kind == "teacher" else (8, *tiny.GRID, 9)
    arrays = {left: ArraySpec(dtype=dtype, shape=shape, dimension_names=tuple("thwc"))}
    arrays["valid"] = ArraySpec(dtype="uint8", shape=(9,), dimension_names=("t",))

    def write(root):
        made = StoreSettings(kind=kind, arrays=arrays, values={})
        with StoreWriter.open(root, made, provenance={}).shard("00000", source="x") as shard:
            shard.add(
                "clip/0",
                {n: np.zeros(s.shape, s.dtype) for n, s in arrays.items()},
                fingerprint=fingerprint_of("clip/0"),
            )
            shard.commit()

    form = "features" if kind == "teacher" else "gram_flow"
    with pytest.raises(ValueError, match=told):
        check_stores(
            join_stores(cache_with(write), kinds=(KIND_OF_FORM[form],)),
            configs,
            tiny.CLIPS,
            radius=1,
        )


def test_a_missing_gram_flow_says_how_it_is_made(tiny, cache):
    with pytest.raises(StoreNotFound, match="no gram_flow store") as caught:
        join_stores(cache, kinds=("gram_flow",))
    for told in ("train.teacher_form=gram_flow", "cache derive gram-flow", "extract.kinds"):
        assert told in str(caught.value)


def test_of_several_gram_flows_one_is_chosen_by_name(tiny, cache_with):
    names = []

    def write(root):
        names.extend(tiny.write_gram_flow(root, radius=r).name for r in (1, 2))

    cache = cache_with(write)
    with pytest.raises(StoreNotFound, match=r"several of the .* set train.stores.gram_flow"):
        join_stores(cache, kinds=("gram_flow",))
    chosen = join_stores(cache, {"gram_flow": [names[1]]}, kinds=("gram_flow",))
    assert chosen.teacher.settings.arrays["gram_flow"].shape[-1] == 25
    with pytest.raises(StoreNotFound, match="no store 'gram_flow-other'") as caught:
        join_stores(cache, {"gram_flow": ["gram_flow-other"]}, kinds=("gram_flow",))
    assert "derive" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "shapes", "told"),
    [
        ("latents", {"mean": (3, 4, 8, 6), "std": (3, 4, 8, 6)}, r"latents-.*\(3, 4, 8, 6\)"),
        ("latents", {"mean": (3, 4, 4, 6)}, "no array 'std'"),
        ("text", {"embeds": (4, 16)}, r"text-.*\(4, 16\)"),
        ("teacher", {"features": (9, 4, 3, 10), "valid": (9,)}, r"grid of \(4, 3\) tokens"),
        ("teacher", {"features": (5, 2, 3, 10), "valid": (5,)}, "5 maps per clip"),
        ("teacher", {"features": (9, 2, 3, 10)}, "no array 'valid'"),
        ("teacher", {"features": (9, 2, 3, 10), "valid": (3,)}, r"valid of \(3,\)"),
    ],
)
def test_a_store_of_another_size_is_refused(tiny, tmp_path, configs, kind, shapes, told):
    tiny.write_cache(tmp_path)
    wrong = tiny.write_store(tmp_path, kind, shapes, values={"other": True})
    stores = join_stores(tmp_path, _choose(tmp_path, {kind: [wrong.name]}), kinds=("teacher",))
    with pytest.raises(ValueError, match=told):
        check_stores(stores, configs, tiny.CLIPS, radius=1)


def _choose(root, chosen):
    found = {path.name.split("-")[0]: [path.name] for path in sorted(root.iterdir())}
    return found | chosen


def test_image_to_video_needs_the_first_frames_latents(tiny, tmp_path):
    base = tiny.save_pipeline(tmp_path / "base", transformer=tiny.tiny_transformer(in_channels=8))
    stores = join_stores(tiny.write_cache(tmp_path / "cache"), kinds=())
    with pytest.raises(ValueError, match="no array 'image_mean'"):
        check_stores(stores, read_configs(base), tiny.CLIPS, radius=1)


@pytest.mark.parametrize("noise", [{}, {"image_noise": {"seed": 0}}, {"image_noise": {"draws": 9}}])
def test_image_latents_that_do_not_say_their_draws_are_refused(tiny, tmp_path, noise):
    base = tiny.save_pipeline(tmp_path / "base", transformer=tiny.tiny_transformer(in_channels=8))
    tiny.write_store(tmp_path / "cache", "text", {"embeds": tiny.TEXT})
    shapes = tiny.LATENT_SHAPES | tiny.IMAGE_SHAPES
    tiny.write_store(tmp_path / "cache", "latents", shapes, values=noise)
    stores = join_stores(tmp_path / "cache", kinds=())
    with pytest.raises(ValueError, match=r"image_noise.draws.*extract latents again"):
        check_stores(stores, read_configs(base), tiny.CLIPS, radius=1)


def test_learned_positions_hold_for_one_size(tiny, tmp_path):
    base = tiny.save_pipeline(
        tmp_path / "base",
        transformer=tiny.tiny_transformer(sample_height=8, use_learned_positional_embeddings=True),
    )
    stores = join_stores(tiny.write_cache(tmp_path / "cache"), kinds=())
    with pytest.raises(ValueError, match="runs only at 9x64x48"):
        check_stores(stores, read_configs(base), tiny.CLIPS, radius=1)


def test_latents_of_a_vae_with_another_scale_are_refused(tiny, tmp_path, configs):
    tiny.write_inputs(tmp_path, latents={"base": {"scaling_factor": 1.15}})
    with pytest.raises(ValueError, match=r"scaling_factor is 1.15"):
        check_stores(join_stores(tmp_path, kinds=()), configs, tiny.CLIPS, radius=1)


def test_teacher_and_latents_of_differently_cut_clips_are_refused(tiny, tmp_path, configs):
    tiny.write_inputs(tmp_path, latents={"clips": {"fps": 8.0}})
    tiny.write_store(tmp_path, "teacher", tiny.teacher_shapes(), values={"clips": {"fps": 16.0}})
    stores = join_stores(tmp_path)
    with pytest.raises(ValueError, match="the same frames"):
        check_stores(stores, configs, tiny.CLIPS, radius=1)


CUT = {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0}


def _native_cache(tiny, root, *, teacher_cut=CUT, parts=2):
    tiny.write_inputs(root, latents={"clips": CUT})
    values = {"clips": teacher_cut, "grid": [5, 5], "grid_source": "native", "parts": parts}
    tiny.write_store(root, "teacher", tiny.teacher_shapes(grid=(5, 5)), values=values)
    return join_stores(root)


def test_features_on_sam2s_own_grid_fit_any_size_of_the_same_shape(tiny, tmp_path, configs):
    stores = _native_cache(tiny, tmp_path, teacher_cut=CUT | {"height": 64, "width": 96})
    check_stores(stores, configs, tiny.CLIPS, radius=1)
    assert stores.native_parts == 2


@pytest.mark.parametrize("change", [{"width": 64}, {"fps": 16.0}, {"num_frames": 17}])
def test_features_on_sam2s_own_grid_of_other_pictures_are_refused(tiny, tmp_path, configs, change):
    stores = _native_cache(tiny, tmp_path, teacher_cut=CUT | change)
    with pytest.raises(ValueError, match="the same frames"):
        check_stores(stores, configs, tiny.CLIPS, radius=1)


def test_a_gram_flow_of_sams_own_grid_fits_any_size_of_the_same_shape(tiny, cache_with, configs):
    """It says how the clips of its features were cut; the flow itself is on the student's grid."""
    cut = CUT | {"height": 64, "width": 96}
    values = {"clips": cut, "grid": list(tiny.GRID), "grid_source": "native", "parts": 2}
    cache = cache_with(
        lambda root: tiny.write_gram_flow(root, values=values), latents={"clips": CUT}
    )
    stores = join_stores(cache, kinds=("gram_flow",))
    assert stores.native_parts is None
    check_stores(stores, configs, tiny.CLIPS, radius=1)
    other = tiny.write_gram_flow(cache, values=values | {"clips": cut | {"fps": 16.0}})
    stores = join_stores(cache, {"gram_flow": [other.name]}, kinds=("gram_flow",))
    with pytest.raises(ValueError, match="the same frames"):
        check_stores(stores, configs, tiny.CLIPS, radius=1)


@pytest.mark.parametrize("parts", [None, 0, 3])
def test_features_on_sam2s_own_grid_need_equal_parts(tiny, tmp_path, configs, parts):
    stores = _native_cache(tiny, tmp_path, parts=parts)
    with pytest.raises(ValueError, match=rf"10 channels .* fall into {parts} parts"):
        check_stores(stores, configs, tiny.CLIPS, radius=1)


def test_features_on_the_students_grid_are_taken_as_they_are(cache):
    assert join_stores(cache).native_parts is None
    assert join_stores(cache, kinds=()).native_parts is None


def test_clips_that_extraction_skipped_are_counted_by_reason(tiny, tmp_path):
    skipped = {"x": "subject_lost", "y": "no_prompt", "z": "subject_lost"}
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, skipped={"x": "no_caption"})
    tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES)
    tiny.write_store(tmp_path, "teacher", tiny.teacher_shapes(), skipped=skipped)
    excluded = join_stores(tmp_path).excluded
    assert excluded.skipped == {
        "text": {"no_caption": 1},
        "latents": {},
        "teacher": {"subject_lost": 2, "no_prompt": 1},
    }
    assert excluded.describe() == [
        "skipped by extraction: 1 of text (no_caption 1), 3 of teacher (subject_lost 2, "
        "no_prompt 1)"
    ]


def test_clips_named_in_a_manifest_are_left_out(tiny, cache, tmp_path):
    manifest = tmp_path / "failures.jsonl"
    lines = [
        {"kind": "teacher", "key": "clip/1", "reason": "subject_lost", "detail": "走る\u2028犬"},
        {"key": "clip/3"},
        {"key": "clip/3"},
        {"key": "never/heard/of"},
    ]
    manifest.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    stores = join_stores(cache, leave_out=manifest)
    assert stores.keys == ("clip/0", "clip/2", "clip/4")
    assert stores.excluded.named == 2
    assert stores.excluded.not_in_every_store == {"text": 0, "latents": 0, "teacher": 0}
    assert stores.excluded.describe() == [f"left out by {manifest}: 2"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2 is not JSON"),
        ('"clip/1"', "line 2 names no clip"),
        ('{"file": "clip/1"}', "line 2 names no clip"),
        ('{"key": 7}', "line 2 names no clip"),
        ('{"key": ""}', "line 2 names no clip"),
    ],
)
def test_a_malformed_manifest_is_refused_by_line(cache, tmp_path, line, told):
    manifest = tmp_path / "mine.jsonl"
    manifest.write_text('{"key": "clip/0"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"mine.jsonl {told}"):
        join_stores(cache, leave_out=manifest)


def test_a_manifest_that_is_missing_is_refused(cache, tmp_path):
    with pytest.raises(ValueError, match=r"train.leave_out .* cannot be read"):
        join_stores(cache, leave_out=tmp_path / "nowhere.jsonl")


def test_a_manifest_that_leaves_nothing_is_refused(tiny, cache, tmp_path):
    manifest = tmp_path / "all.jsonl"
    manifest.write_text("".join(json.dumps({"key": key}) + "\n" for key in tiny.KEYS))
    with pytest.raises(ValueError, match="names every one of the 5 clips"):
        join_stores(cache, leave_out=manifest)


def test_other_clip_sizes_are_refused(tiny, cache, configs):
    longer = ClipsConfig(path="unused", num_frames=17, height=tiny.HEIGHT, width=tiny.WIDTH)
    with pytest.raises(ValueError, match="num_frames"):
        check_stores(join_stores(cache), configs, longer, radius=1)
