r"""Batches and random numbers as a pure function of the seed and the step.

.. math::
    \text{part } m = (\text{step} \cdot A + a) \cdot W + r, \qquad
    a < A \text{ accumulated batches}, \quad r < W \text{ processes}

Part m takes positions m b ... (m+1) b - 1 of an endless sequence of shuffled passes over the data.
Its random numbers are seeded by the run's seed and m. An interrupted run therefore resumes exactly
at its checkpoint, and two processes compute the same as one process with two accumulated batches.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ndm.condition import Condition
from ndm.data import EventDataset

_STORED, _WORD = 2**24, 2**64 - 1


class WithFlips(EventDataset):
    """The N images of a split, then their N mirror images; ``(C, H, W)`` each.

    Args:
        images: the split.
    """

    def __init__(self, images: EventDataset):
        self.images = images

    @property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        """Class of each example."""
        return None if self.images.labels is None else self.images.labels.repeat(2)

    def conditions(self, indices: Sequence[int]) -> Tensor | None:
        count = len(self.images)
        known = self.images.conditions([index % count for index in indices])
        if known is None or known.dim() < 4:
            return known
        flipped = torch.tensor([index >= count for index in indices]).view(-1, 1, 1, 1)
        return torch.where(flipped, known.flip(-1), known)

    def __len__(self) -> int:
        return 2 * len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        count = len(self.images)
        batch = self.images.__getitems__([index % count for index in indices])
        flipped = torch.tensor([index >= count for index in indices]).view(-1, 1, 1, 1)
        return torch.where(flipped, batch.flip(-1), batch)


class WithConditions(Dataset[tuple[Tensor, Tensor]]):
    """Batches of examples with their conditions as networks see them.

    Args:
        data: the examples.
        condition: the kind of condition.
    """

    def __init__(self, data: EventDataset, condition: Condition):
        self.data, self.condition = data, condition

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the examples ``indices``, ``(B, *event)``, and their conditions."""
        known = self.data.conditions(indices)
        return self.data.__getitems__(indices), self.condition.encode(known)


class RunBatches(Sampler[list[int]]):
    """The batches of indices for one process, from ``first_step`` to the end of the run.

    Args:
        examples: number of examples in the data.
        size: examples in a part, b.
        steps: optimizer steps in the whole run.
        seed: seed of the shuffling.
        first_step: the step to start from.
        accumulate: A.
        processes: W.
        rank: r.
    """

    def __init__(
        self,
        examples: int,
        size: int,
        steps: int,
        seed: int,
        first_step: int = 0,
        accumulate: int = 1,
        processes: int = 1,
        rank: int = 0,
    ):
        self.examples, self.size, self.seed = examples, size, seed
        self.steps, self.first_step = steps, first_step
        self.accumulate, self.processes, self.rank = accumulate, processes, rank

    def __len__(self) -> int:
        """Return the number of batches in the whole run, which resuming does not change."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        passes: dict[int, Callable[[int], int]] = {}
        for index in range(self.first_step * self.accumulate, len(self)):
            start = (index * self.processes + self.rank) * self.size
            first, last = start // self.examples, (start + self.size - 1) // self.examples
            for number in range(first, last + 1):
                if number not in passes:
                    passes[number] = shuffle(self.examples, [self.seed, number])
            passes = {number: order for number, order in passes.items() if number >= first}
            positions = (divmod(start + i, self.examples) for i in range(self.size))
            yield [passes[number](index) for number, index in positions]


def shuffle(count: int, seed: Sequence[int]) -> Callable[[int], int]:
    """Return a random permutation of 0 ... count-1, as a function.

    Beyond 16 million numbers it is computed one by one instead of stored.
    """
    if count > _STORED:
        return Feistel(count, seed)
    order = np.random.default_rng(seed).permutation(count)
    return lambda index: int(order[index])


class Feistel:
    """A pseudo-random permutation of 0 ... count-1 that takes no memory.

    A network of six rounds permutes the numbers of an even number of bits, fewer than 4 count of
    them. It is repeated until the result is below count (Black & Rogaway 2002).

    Args:
        count: how many numbers.
        seed: seed of the rounds.
    """

    def __init__(self, count: int, seed: Sequence[int]):
        self.count, self._half = count, ((count - 1).bit_length() + 1) // 2 or 1
        keys = np.random.default_rng(seed).integers(0, 2**63, size=6)
        self._keys = [int(key) for key in keys]

    def __call__(self, index: int) -> int:
        """Return the number at a position."""
        while True:
            index = self._permuted(index)
            if index < self.count:
                return index

    def _permuted(self, index: int) -> int:
        mask = (1 << self._half) - 1
        left, right = index >> self._half, index & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << self._half | right


def _mixed(value: int) -> int:
    """Return 64 bits that depend on all bits of a number (splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31
