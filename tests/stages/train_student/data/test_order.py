from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.train_student.data.order import (
    accumulation_steps,
    clip_of_sample,
    micro_batches,
    seed_of_sample,
)


@given(num_clips=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_every_epoch_shows_every_clip_once(num_clips, seed, epoch):
    samples = range(epoch * num_clips, (epoch + 1) * num_clips)
    clips = [clip_of_sample(sample, num_clips, seed) for sample in samples]
    assert sorted(clips) == list(range(num_clips))


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


def test_seeds_of_samples_differ():
    seeds = {seed_of_sample(sample, seed) for sample in range(100) for seed in range(3)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_batch_that_cannot_be_shared_is_refused_with_one_that_can():
    assert accumulation_steps(32, 2, 4) == 4
    with pytest.raises(ValueError, match="2 x 4 = 8, got 30; 24 would do"):
        accumulation_steps(30, 2, 4)
