import json

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
    tiny.write_store(tmp_path, "teacher", tiny.teacher_shapes(), keys=("c",))
    with_teacher = join_stores(tmp_path, {}, with_teacher=True)
    assert with_teacher.keys == ("c",)
    assert with_teacher.left_out.not_in_every_store == {"text": 2, "latents": 2, "teacher": 0}
    without = join_stores(tmp_path, {}, with_teacher=False)
    assert without.keys == ("b", "c")
    assert without.left_out.not_in_every_store == {"text": 1, "latents": 1}


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
    other = tiny.write_store(tmp_path, "teacher", tiny.teacher_shapes(3))
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
        ("teacher", {"features": (9, 4, 3, 10), "valid": (9,)}, r"grid of \(4, 3\) tokens"),
        ("teacher", {"features": (5, 2, 3, 10), "valid": (5,)}, "5 maps per clip"),
        ("teacher", {"features": (9, 2, 3, 10)}, "no array 'valid'"),
        ("teacher", {"features": (9, 2, 3, 10), "valid": (3,)}, r"valid of \(3,\)"),
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
    tiny.write_store(tmp_path, "teacher", tiny.teacher_shapes(), values={"clips": {"fps": 16.0}})
    stores = join_stores(tmp_path, {}, with_teacher=True)
    with pytest.raises(ValueError, match="the same frames"):
        check_stores(stores, facts, tiny.CLIPS)


CUT = {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0}


def _native_cache(tiny, root, *, teacher_cut=CUT, parts=2):
    tiny.write_store(root, "text", {"embeds": tiny.TEXT})
    tiny.write_store(root, "latents", tiny.LATENT_SHAPES, values={"clips": CUT})
    values = {"clips": teacher_cut, "grid": [5, 5], "grid_source": "native", "parts": parts}
    tiny.write_store(root, "teacher", tiny.teacher_shapes(grid=(5, 5)), values=values)
    return join_stores(root, {}, with_teacher=True)


def test_features_on_sam2s_own_grid_fit_any_size_of_the_same_shape(tiny, tmp_path, facts):
    stores = _native_cache(tiny, tmp_path, teacher_cut=CUT | {"height": 64, "width": 96})
    check_stores(stores, facts, tiny.CLIPS)
    assert stores.native_parts == 2


@pytest.mark.parametrize("change", [{"width": 64}, {"fps": 16.0}, {"num_frames": 17}])
def test_features_on_sam2s_own_grid_of_other_pictures_are_refused(tiny, tmp_path, facts, change):
    stores = _native_cache(tiny, tmp_path, teacher_cut=CUT | change)
    with pytest.raises(ValueError, match="the same frames"):
        check_stores(stores, facts, tiny.CLIPS)


@pytest.mark.parametrize("parts", [None, 0, 3])
def test_features_on_sam2s_own_grid_need_equal_parts(tiny, tmp_path, facts, parts):
    stores = _native_cache(tiny, tmp_path, parts=parts)
    with pytest.raises(ValueError, match=rf"10 channels .* fall into {parts} parts"):
        check_stores(stores, facts, tiny.CLIPS)


def test_features_on_the_students_grid_are_taken_as_they_are(cache):
    assert join_stores(cache, {}, with_teacher=True).native_parts is None
    assert join_stores(cache, {}, with_teacher=False).native_parts is None


def test_clips_that_extraction_skipped_are_counted_by_reason(tiny, tmp_path):
    skipped = {"x": "subject_lost", "y": "no_prompt", "z": "subject_lost"}
    tiny.write_store(tmp_path, "text", {"embeds": tiny.TEXT}, skipped={"x": "no_caption"})
    tiny.write_store(tmp_path, "latents", tiny.LATENT_SHAPES)
    tiny.write_store(tmp_path, "teacher", tiny.teacher_shapes(), skipped=skipped)
    left_out = join_stores(tmp_path, {}, with_teacher=True).left_out
    assert left_out.skipped == {
        "text": {"no_caption": 1},
        "latents": {},
        "teacher": {"subject_lost": 2, "no_prompt": 1},
    }
    assert left_out.told() == [
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
    stores = join_stores(cache, {}, with_teacher=True, leave_out=manifest)
    assert stores.keys == ("clip/0", "clip/2", "clip/4")
    assert stores.left_out.named == 2
    assert stores.left_out.not_in_every_store == {"text": 0, "latents": 0, "teacher": 0}
    assert stores.left_out.told() == [f"left out besides, named in {manifest}: 2"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2 is no JSON"),
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
        join_stores(cache, {}, with_teacher=True, leave_out=manifest)


def test_a_manifest_that_is_missing_is_refused(cache, tmp_path):
    with pytest.raises(ValueError, match=r"train.leave_out .* cannot be read"):
        join_stores(cache, {}, with_teacher=True, leave_out=tmp_path / "nowhere.jsonl")


def test_a_manifest_that_leaves_nothing_is_refused(tiny, cache, tmp_path):
    manifest = tmp_path / "all.jsonl"
    manifest.write_text("".join(json.dumps({"key": key}) + "\n" for key in tiny.KEYS))
    with pytest.raises(ValueError, match="names every one of the 5 clips"):
        join_stores(cache, {}, with_teacher=True, leave_out=manifest)


def test_other_clip_sizes_are_refused(tiny, cache, facts):
    longer = ClipsConfig(path="unused", num_frames=17, height=tiny.HEIGHT, width=tiny.WIDTH)
    with pytest.raises(ValueError, match="num_frames"):
        check_stores(join_stores(cache, {}, with_teacher=True), facts, longer)
