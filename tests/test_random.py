"""Random numbers of an example, which do not depend on its batch."""

import pytest
import torch

from ndm.random import ExampleGenerators, part_seed, standard_normal, uniform


def test_the_numbers_of_an_example_do_not_depend_on_its_neighbors() -> None:
    like = torch.zeros(4, 2, 3)
    four, one = ExampleGenerators(3, [5, 6, 7, 8]), ExampleGenerators(3, [7])
    batches = [standard_normal(like, four) for _ in range(2)]
    singles = [standard_normal(like[:1], one) for _ in range(2)]
    for batch, single in zip(batches, singles, strict=True):
        assert torch.equal(batch[2:3], single)
    assert not torch.equal(batches[0], batches[1]), "the second draw must differ"


def test_seed_stream_and_example_each_change_the_numbers() -> None:
    like = torch.zeros(1, 50)
    draws = [
        ExampleGenerators(*arguments)
        for arguments in ((0, [1]), (1, [1]), (0, [2]), (0, [1], 1), (0, [1], 1, 0), (0, [1], 0, 1))
    ]
    rows = torch.cat([standard_normal(like, source) for source in draws])
    assert float(torch.corrcoef(rows).fill_diagonal_(0).abs().max()) < 0.6


def test_lower_precision_only_rounds_the_numbers() -> None:
    single, double = (
        standard_normal(torch.zeros(2, 9, dtype=t), ExampleGenerators(0, [0, 1]))
        for t in (torch.float32, torch.float64)
    )
    assert torch.equal(double.float(), single)


def test_draws_are_normal_or_uniform_and_independent() -> None:
    like = torch.zeros(400, 50, dtype=torch.float64)
    normal = standard_normal(like, ExampleGenerators(0, range(400)))
    even = uniform(like, ExampleGenerators(1, range(400)))
    assert abs(float(normal.mean())) < 0.03
    assert abs(float(normal.std()) - 1) < 0.02
    assert abs(float(even.mean()) - 0.5) < 0.01
    assert 0 <= float(even.min()) < 0.01
    assert 0.99 < float(even.max()) < 1
    correlation = torch.corrcoef(normal).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.7, "examples must be independent"


def test_a_batch_of_another_size_is_rejected() -> None:
    with pytest.raises(ValueError, match="3 examples"):
        standard_normal(torch.zeros(2, 1), ExampleGenerators(0, [0, 1, 2]))


def test_part_seeds_differ() -> None:
    assert part_seed(3, 10) != part_seed(3, 10, 0) != part_seed(3, 10, 0, 0)
    assert part_seed(10 * 2**32 + 5, 1, 1) != part_seed(5, 10, 1)
    numbers = [(0,), (0, 1), (0, 1, 2), (0, 2, 1), (1, 2), (2, 1)]
    assert len({part_seed(*seeds) for seeds in numbers}) == 6
