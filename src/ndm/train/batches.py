r"""Which examples and which random numbers belong to which part of which step: a pure function of
the seed and the step.

.. math::
    \text{part } m = (\text{step} \cdot A + a) \cdot W + r, \qquad a < A \text{ accumulated batches}, \quad r < W \text{ processes}

Part m takes positions m b ... (m+1) b - 1 of an endless sequence of shuffled passes over the data,
and seeds its own random numbers. So a run that was interrupted goes on exactly where its checkpoint
stands, and two processes do what one process with two accumulated batches does.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class RunBatches(Sampler[list[int]]):
    """The batches of indices that one process sees, from a given step to the end of the run.

    Args:
        examples: number of examples in the data.
        size: examples in a part, b.
        steps: optimizer steps of the whole run.
        seed: seed of the shuffling.
        first_step: the step to begin with.
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
        self.examples, self.size, self.steps, self.seed, self.first_step = (
            examples,
            size,
            steps,
            seed,
            first_step,
        )
        self.accumulate, self.processes, self.rank = accumulate, processes, rank

    def __len__(self) -> int:
        """Batches of the whole run, those before ``first_step`` included: the length of the run
        does not change on resuming.
        """
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        passes: dict[int, np.ndarray] = {}
        for index in range(self.first_step * self.accumulate, len(self)):
            start = (index * self.processes + self.rank) * self.size
            first, last = start // self.examples, (start + self.size - 1) // self.examples
            for number in range(first, last + 1):
                if number not in passes:
                    passes[number] = np.random.default_rng([self.seed, number]).permutation(
                        self.examples
                    )
            passes = {number: order for number, order in passes.items() if number >= first}
            positions = range(start, start + self.size)
            yield [
                int(passes[position // self.examples][position % self.examples])
                for position in positions
            ]
