"""Samples and their random numbers are a function of (seed, epoch, index)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vssm.data.order import KeyedSampler, ResumableLoader, preserved_rng, seed_rng
from vssm.tasks.random_state import get_random_state, set_random_state


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_key_fixes_all_generators():
    seed_rng(1, 2, 3)
    first = draw()
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 2, 3, 1)):
        seed_rng(*other)
        assert not set(draw()) & set(first)
    seed_rng(1, 2, 3)
    assert draw() == first


def test_the_generators_are_left_as_they_were_also_after_an_error():
    state = get_random_state()
    expected = draw()
    set_random_state(state)
    with preserved_rng():
        seed_rng(5)
    assert draw() == expected
    set_random_state(state)
    with pytest.raises(ZeroDivisionError), preserved_rng():
        seed_rng(5 // 0)
    assert draw() == expected


def epoch(number, **options):
    sampler = KeyedSampler(11, seed=0, **options)
    sampler.set_epoch(number)
    return list(sampler)


def test_each_epoch_is_another_permutation():
    first, second = epoch(0, shuffle=True), epoch(1, shuffle=True)
    assert sorted(index for _, index, _ in first) == sorted(index for _, index, _ in second) == list(range(11))
    assert {e for e, _, _ in second} == {1}
    assert [index for _, index, _ in first] != [index for _, index, _ in second]
    assert first == epoch(0, shuffle=True)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_share_the_batches_of_one_process(ranks):
    whole = epoch(4, shuffle=True)
    parts = [epoch(4, shuffle=True, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    together = [key for keys in zip(*parts) for key in keys]
    assert together == whole[: len(together)]
    assert len(whole) - len(together) < ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
def test_evaluation_visits_each_sample_once(ranks):
    parts = [KeyedSampler(11, seed=0, shuffle=False, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    assert sorted(index for part in parts for _, index, _ in part) == list(range(11))


def test_repeated_augmentation_draws_each_image_several_times():
    keys = epoch(0, shuffle=True, repeats=3)
    assert len(keys) == 11
    assert [copy for _, _, copy in keys] == [0, 1, 2] * 3 + [0, 1]
    assert len({index for _, index, _ in keys}) == 4
    assert len(set(keys)) == 11


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_starts_behind_what_was_consumed(workers):
    done = 2
    sampler = KeyedSampler(11, seed=0, shuffle=True)
    loader = ResumableLoader(range_of_keys(), sampler=sampler, batch_size=2, drop_last=True, position=lambda: done,
                             num_workers=workers)
    iterator = iter(loader)
    sampler.set_epoch(3)  # as Lightning: after the iterator was made
    assert [batch.tolist() for batch in iterator] == [
        [list(key) for key in keys] for keys in zip(epoch(3, shuffle=True)[4:10:2], epoch(3, shuffle=True)[5:10:2])
    ]
    assert len(loader) == 5


def range_of_keys():
    class Keys(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return torch.tensor(key)

    return Keys()
