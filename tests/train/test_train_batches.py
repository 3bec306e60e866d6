"""The batch plan: which examples each step uses."""

from collections import Counter

import numpy as np
import pytest
import scipy.stats

from ndm.data import Digits
from ndm.random import part_seed
from ndm.train.batches import Feistel, RunBatches, WithFlips, shuffle


def plan(**changes: int) -> list[list[int]]:
    arguments = {"examples": 23, "size": 5, "steps": 12, "seed": 3} | changes
    return list(RunBatches(**arguments))


def test_every_pass_visits_every_example_once() -> None:
    # 23 batches of 5 are five passes over 23 examples.
    stream = [index for batch in plan(steps=23) for index in batch]
    for start in range(0, len(stream), 23):
        assert sorted(stream[start : start + 23]) == list(range(23))
    assert stream[:23] != stream[23:46]
    assert set(Counter(stream).values()) == {5}


@pytest.mark.parametrize("first", [1, 4, 11])
def test_a_resumed_run_gets_the_remaining_batches_of_the_whole_run(first: int) -> None:
    assert plan(first_step=first, accumulate=2) == plan(accumulate=2)[2 * first :]


def test_processes_and_accumulation_divide_the_same_stream() -> None:
    whole = plan(size=12)
    accumulated = plan(size=6, accumulate=2)
    assert [a + b for a, b in zip(accumulated[::2], accumulated[1::2], strict=True)] == whole
    ranks = [plan(size=3, accumulate=2, processes=2, rank=rank) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][2 * step + part] for part in range(2) for rank in range(2)]
        assert [index for part in parts for index in part] == batch


def test_the_length_does_not_depend_on_the_first_step() -> None:
    assert len(RunBatches(23, 5, 12, 0, first_step=7, accumulate=3)) == 36


def test_another_seed_gives_another_order() -> None:
    assert plan(seed=4) != plan(seed=3)


def test_every_part_has_a_different_seed() -> None:
    seeds = [part_seed(seed, part) for seed in range(4) for part in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_flips_add_the_mirror_image_of_every_image() -> None:
    split = Digits().split("test")
    flips = WithFlips(split)
    count = len(split)
    assert len(flips) == 2 * count
    chosen = [0, 5, count, count + 5, 2 * count - 1]
    plain = [0, 5, 0, 5, count - 1]
    expected = split[plain].numpy().copy()
    expected[2:] = np.flip(expected[2:], axis=3)
    np.testing.assert_array_equal(flips[chosen], expected)
    assert split.labels is not None and flips.labels is not None
    assert flips.labels[chosen].tolist() == split.labels[plain].tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000, 4097])
def test_a_permutation_without_memory_is_one(count: int) -> None:
    numbers = [Feistel(count, [7, 0])(index) for index in range(count)]
    assert sorted(numbers) == list(range(count))
    if count > 16:
        assert numbers != [Feistel(count, [7, 1])(index) for index in range(count)]
        assert numbers != list(range(count))


def test_a_permutation_without_memory_spreads_neighbors_evenly() -> None:
    count = 3 * 10**9
    found = np.array([Feistel(count, [1, 2])(index) for index in range(4000)]) / count
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.06
    assert shuffle(count, [1, 2])(17) == Feistel(count, [1, 2])(17)
    small = shuffle(100, [3])
    assert [small(i) for i in range(100)] == np.random.default_rng([3]).permutation(100).tolist()
