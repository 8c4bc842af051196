"""Entries of one key that were made from different videos or prompts are not trained on."""

import json

import pytest

from cache_schema.maintenance.drop import change_fingerprints
from tests.fingerprints import fingerprint_of
from tests.stages.train_student.data.joined import join_stores

PROMPTED = {"prompts": {"sources": ["dataset"]}, "backward_prompt": "track"}
OTHER = fingerprint_of("another")


@pytest.fixture
def stores(tiny, tmp_path):
    """Text, latents, teacher and masks of four clips."""
    keys = ("a", "b", "c", "d")
    cache = tmp_path / "cache"
    return cache, {
        "text": tiny.write_store(cache, "text", {"embeds": tiny.TEXT}, keys),
        "latents": tiny.write_store(cache, "latents", tiny.LATENT_SHAPES, keys),
        "teacher": tiny.write_store(cache, "teacher", tiny.teacher_shapes(), keys, PROMPTED),
        "masks": tiny.write_store(cache, "masks", {"valid": (9,)}, keys, PROMPTED),
    }


def join(cache, **options):
    return join_stores(cache, kinds=("teacher", "masks"), **options)


@pytest.mark.parametrize("kind", ["text", "latents", "teacher", "masks"])
def test_another_video_in_one_store_is_refused(stores, kind, tmp_path):
    cache, paths = stores
    assert join(cache).keys == ("a", "b", "c", "d")
    mine = fingerprint_of("b")
    change_fingerprints(paths[kind], {"b": mine[:16] + OTHER[16:]})
    with pytest.raises(ValueError, match=r"different videos of 1 of 4 clips: 'b'") as error:
        join(cache)
    assert str(paths[kind]) in str(error.value)
    assert "--refresh-changed" in str(error.value)
    list_ = tmp_path / "leave_out.jsonl"
    list_.write_text(json.dumps({"key": "b"}))
    assert join(cache, leave_out=list_).keys == ("a", "c", "d")


@pytest.mark.parametrize(("kind", "refused"), [("text", False), ("teacher", True)])
def test_other_captions_are_no_concern_and_other_prompts_are(stores, kind, refused):
    cache, paths = stores
    change_fingerprints(paths[kind], {"c": OTHER[:16] + fingerprint_of("c")[16:]})
    if refused:
        with pytest.raises(ValueError, match=r"different prompts of 1 of 4 clips: 'c'"):
            join(cache)
    else:
        assert join(cache).keys == ("a", "b", "c", "d")


def test_prompts_of_stores_that_were_prompted_otherwise_are_not_compared(tiny, stores):
    cache, paths = stores
    keys = ("a", "b", "c", "d")
    grounded = PROMPTED | {"prompts": {"sources": ["grounding"]}}
    other = tiny.write_store(cache, "masks", {"valid": (9,)}, keys, grounded)
    change_fingerprints(other, {"c": OTHER[:16] + fingerprint_of("c")[16:]})
    joined = join(cache, chosen={"masks": [other.name]})
    assert joined.keys == keys
    assert f"{other} was tracked with other prompts than {paths['teacher']}" in joined.warning
    assert join(cache, chosen={"masks": [paths["masks"].name]}).warning is None
