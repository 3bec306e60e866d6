r"""Batches and random numbers as a pure function of the seed and the step.

.. math::
    \text{part } m = (\text{step} \cdot A + a) \cdot W + r, \qquad
    a < A \text{ accumulated batches}, \quad r < W \text{ processes}

Part m takes positions m b ... (m+1) b - 1 of an endless sequence of shuffled passes over the data.
Its random numbers are seeded by the run's seed and m. An interrupted run therefore resumes exactly
at its checkpoint, and two processes compute the same as one process with two accumulated batches.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ndm.data import EventDataset


class WithFlips(EventDataset):
    """The N images of a split, then their N mirror images; ``(C, H, W)`` each.

    Args:
        images: the split.
    """

    def __init__(self, images: EventDataset):
        self.images = images
        self.labels = None if images.labels is None else images.labels.repeat(2)

    def __len__(self) -> int:
        return 2 * len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        count = len(self.images)
        batch = self.images.__getitems__([index % count for index in indices])
        flipped = torch.tensor([index >= count for index in indices]).view(-1, 1, 1, 1)
        return torch.where(flipped, batch.flip(-1), batch)


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
        passes: dict[int, np.ndarray] = {}
        for index in range(self.first_step * self.accumulate, len(self)):
            start = (index * self.processes + self.rank) * self.size
            first, last = start // self.examples, (start + self.size - 1) // self.examples
            for number in range(first, last + 1):
                if number not in passes:
                    generator = np.random.default_rng([self.seed, number])
                    passes[number] = generator.permutation(self.examples)
            passes = {number: order for number, order in passes.items() if number >= first}
            positions = (divmod(start + i, self.examples) for i in range(self.size))
            yield [int(passes[number][index]) for number, index in positions]
