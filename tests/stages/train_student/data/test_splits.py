import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.students.registry import read_configs
from stages.train_student.data.dataset import CachedSamples
from stages.train_student.data.splits import choose_held_out
from tests.stages.train_student.data.joined import join_stores

KEYS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=30, unique=True)


@given(keys=KEYS, count=st.integers(0, 10), random=st.randoms(use_true_random=False))
def test_the_choice_knows_no_order_and_no_buckets(keys, count, random):
    chosen = choose_held_out([keys], count)
    assert len(chosen) == min(count, len(keys))
    shuffled = random.sample(keys, len(keys))
    cut = random.randint(0, len(keys))
    assert choose_held_out([shuffled], count) == chosen
    assert choose_held_out([shuffled[:cut], shuffled[cut:], shuffled[:1]], count) == chosen


@given(keys=KEYS, others=KEYS, count=st.integers(1, 10))
def test_other_clips_change_the_choice_only_by_being_chosen(keys, others, count):
    before = choose_held_out([keys], count)
    after = choose_held_out([set(keys) | set(others)], count)
    assert [key for key in after if key in keys] == [key for key in before if key in after]


def test_the_choice_is_even_among_keys_that_look_alike():
    keys = [f"{number:05d}" for number in range(10_000)]
    chosen = choose_held_out([keys], 1000)
    assert 430 < sum(key < "05000" for key in chosen) < 570


def test_held_out_clips_are_not_trained_on(cache, base_model):
    stores = join_stores(cache, held_out=2)
    assert len(stores.keys) == 3
    assert len(stores.held_out) == 2
    assert {*stores.keys, *stores.held_out} == {f"clip/{number}" for number in range(5)}
    samples = CachedSamples([stores], read_configs(base_model), seed=0, batch_size=1)
    assert samples.held_out == stores.held_out
    assert not {samples[number].keys[0] for number in range(9)} & set(stores.held_out)


def test_a_held_out_clip_is_the_same_at_every_time_and_for_every_seed(cache, base_model):
    stores, configs = (
        join_stores(cache, held_out=2),
        read_configs(base_model),
    )
    key, other = stores.held_out
    first, second = (
        CachedSamples([stores], configs, seed=seed, batch_size=1).held_out_batch(key, 300)
        for seed in (0, 1)
    )
    torch.manual_seed(5)
    for name in ("clean_BFCHW", "noise_BFCHW", "text_BLD"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.keys == (key,)
    assert first.timestep_B.tolist() == [300]
    assert first.teacher["features"].shape[0] == 1
    samples = CachedSamples([stores], configs, seed=0, batch_size=1)
    for changed in (samples.held_out_batch(key, 500), samples.held_out_batch(other, 300)):
        assert not torch.equal(changed.noise_BFCHW, first.noise_BFCHW)


def test_a_clip_that_is_trained_on_is_not_validated_with(cache, base_model):
    stores = join_stores(cache, kinds=(), held_out=1)
    samples = CachedSamples([stores], read_configs(base_model), seed=0, batch_size=1)
    with pytest.raises(ValueError, match="is not among the 1 held out"):
        samples.held_out_batch(stores.keys[0], 300)


def test_holding_out_everything_is_refused(cache):
    with pytest.raises(ValueError, match=r"holds out every one of the 5 clips .* hold out fewer"):
        join_stores(cache, kinds=(), held_out=5)
