import tracemalloc
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.train_student.data.order import (
    SampleOrder,
    accumulation_steps,
    clip_of_sample,
    largest_micro_batch,
    micro_batches,
    seed_of_sample,
)


@given(num_clips=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_every_epoch_shows_every_clip_once(num_clips, seed, epoch):
    samples = range(epoch * num_clips, (epoch + 1) * num_clips)
    clips = [clip_of_sample(sample, num_clips, seed) for sample in samples]
    assert sorted(clips) == list(range(num_clips))


def test_the_orders_of_past_epochs_are_not_kept():
    num_clips, order_bytes = 20_000, 160_000
    tracemalloc.start()
    try:
        for epoch in range(30):
            clip_of_sample(epoch * num_clips, num_clips, seed=7)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 3 * order_bytes  # two are kept: a batch may lie across two epochs


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(clip_of_sample(epoch * 30 + i, 30, seed) for i in range(30))
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(orders) == 9


@given(
    steps=st.integers(1, 6),
    micro=st.integers(1, 3),
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    resumed=st.integers(0, 6),
)
def test_ranks_share_each_steps_samples_and_a_resume_goes_on(
    steps, micro, world, accumulation, resumed
):
    batch = micro * world * accumulation
    resumed = min(resumed, steps)

    def samples(of_steps, rank):
        return list(
            micro_batches(
                of_steps,
                batch_size=batch,
                micro_batch_size=micro,
                rank=rank,
                world_size=world,
            )
        )

    every = [samples(range(steps), rank) for rank in range(world)]
    assert sorted(chain(*chain(*every))) == list(range(steps * batch))
    for rank in range(world):
        split = samples(range(resumed), rank) + samples(range(resumed, steps), rank)
        assert split == every[rank]
        for number, micro_batch in enumerate(every[rank]):
            step = number // accumulation
            assert all(step * batch <= s < (step + 1) * batch for s in micro_batch)


BUCKETS = st.lists(st.integers(1, 40), min_size=2, max_size=4)


@given(num_clips=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 5))
def test_one_bucket_is_ordered_as_its_clips_alone(num_clips, batch, seed):
    order = SampleOrder([num_clips], batch_size=batch, seed=seed)
    for sample in range(3 * num_clips):
        assert order.locate(sample) == (0, clip_of_sample(sample, num_clips, seed))


@given(num_clips=BUCKETS, batch=st.integers(1, 7), seed=st.integers(0, 5))
def test_each_bucket_shows_every_clip_once_before_any_twice(num_clips, batch, seed):
    order = SampleOrder(num_clips, batch_size=batch, seed=seed)
    shown = [[] for _ in num_clips]
    for step in range(3 * sum(order.steps_per_epoch)):
        places = [order.locate(step * batch + position) for position in range(batch)]
        assert len({bucket for bucket, _ in places}) == 1, "a step is of one size"
        shown[places[0][0]] += [clip for _, clip in places]
    for clips, count in zip(shown, num_clips, strict=True):
        for start in range(0, len(clips) - count + 1, count):
            assert sorted(clips[start : start + count]) == list(range(count))


@given(num_clips=BUCKETS, batch=st.integers(1, 7), epoch=st.integers(0, 3))
def test_in_an_epoch_each_bucket_has_the_steps_its_clips_fill(num_clips, batch, epoch):
    order = SampleOrder(num_clips, batch_size=batch, seed=1)
    steps = sum(order.steps_per_epoch)
    buckets = [order.step(step)[0] for step in range(epoch * steps, (epoch + 1) * steps)]
    for bucket, clips in enumerate(num_clips):
        assert abs(buckets.count(bucket) - clips / batch) <= 0.5 or buckets.count(bucket) == 1


@given(num_clips=BUCKETS, seed=st.integers(0, 5), steps=st.lists(st.integers(0, 90), max_size=9))
def test_any_step_is_found_without_those_before_it(num_clips, seed, steps):
    order = SampleOrder(num_clips, batch_size=3, seed=seed)
    walked = [order.step(step) for step in range(91)]
    seen = [0] * len(num_clips)
    for bucket, before in walked:
        assert before == seen[bucket]
        seen[bucket] += 1
    later = SampleOrder(num_clips, batch_size=3, seed=seed)
    assert [later.step(step) for step in steps] == [walked[step] for step in steps]


def test_epochs_and_seeds_mix_the_buckets_in_ways_of_their_own():
    found = set()
    for seed in range(3):
        order = SampleOrder([30, 20], batch_size=2, seed=seed)
        found |= {tuple(order.step(25 * epoch + i)[0] for i in range(25)) for epoch in range(3)}
    assert len(found) == 9


def test_a_bucket_without_clips_is_refused():
    with pytest.raises(ValueError, match=r"needs a clip to train on, got \[3, 0\]"):
        SampleOrder([3, 0], batch_size=2, seed=0)


def test_seeds_of_samples_differ():
    seeds = {seed_of_sample(sample, seed) for sample in range(100) for seed in range(3)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_batch_that_cannot_be_shared_is_refused_with_one_that_can():
    with pytest.raises(ValueError, match="number of processes, 4, got 30; 28 works"):
        largest_micro_batch(30, 2, 4)


@given(share=st.integers(1, 40), most=st.integers(1, 40), world=st.integers(1, 9))
def test_the_micro_batch_is_the_largest_that_goes_evenly_into_a_ranks_share(share, most, world):
    clips = largest_micro_batch(share * world, most, world)
    assert accumulation_steps(share * world, clips, world) * clips == share
    assert clips <= most
    assert all(share % more for more in range(clips + 1, min(most, share) + 1))
