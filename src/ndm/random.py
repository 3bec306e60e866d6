r"""Random numbers, and random numbers that belong to an example.

.. math::
    \epsilon_i = \epsilon(\text{seed}, i, \text{stream}), \qquad i \text{ the number of the example in its data set} .

An estimate for a data set must not depend on how the data were cut into batches or spread over
processes. :class:`ExampleGenerators` therefore gives every example a generator of its own, seeded
by a hash of seed, example and stream; wherever a ``torch.Generator`` is taken as the source of
noise for a batch, it may stand instead. Numbers are drawn in double precision on the CPU and then
rounded, so they are the same on every device and, up to rounding, in every precision.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def part_seed(seed: int, *part: int) -> int:
    """Seed of the random numbers of one part of a run: a hash of the seed and of the numbers that
    name the part.
    """
    words = [seed, *part]
    if (
        len(part) > 1
        # each number in two words, and how many there are: SeedSequence itself takes [1] and [1, 0] for
        # the same
    ):
        words = [
            0xFFFFFFFF,
            len(part),
            *(half for number in words for half in (number & 0xFFFFFFFF, number >> 32)),
        ]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


class ExampleGenerators:
    """A source of noise for a batch in which every example has its own random numbers.

    Args:
        seed: seed of the estimate.
        examples: numbers of the examples of the batch in their data set, one for each row.
        stream: numbers that name what the noise is for; different streams are independent.
    """

    def __init__(self, seed: int, examples: Sequence[int], *stream: int):
        self._generators = [
            torch.Generator().manual_seed(part_seed(seed, *stream, example)) for example in examples
        ]

    def draw(self, sampler: Callable[..., Tensor], like: Tensor) -> Tensor:
        """One draw for each row of ``like`` ``(B, *event)``, by a sampler called as
        ``sampler(shape, generator=, dtype=)``.
        """
        if like.shape[0] != len(self._generators):
            raise ValueError(
                f"noise for {len(self._generators)} examples was asked for a batch of"
                f" {like.shape[0]}"
            )
        rows = [
            sampler(tuple(like.shape[1:]), generator=generator, dtype=torch.float64)
            for generator in self._generators
        ]
        return (
            torch.stack(rows).to(dtype=like.dtype, device=like.device)
            if rows
            else torch.empty_like(like)
        )


RandomSource = torch.Generator | ExampleGenerators | None
"""Where random numbers come from; None is PyTorch's global generator."""


def standard_normal(like: Tensor, source: RandomSource = None) -> Tensor:
    """Standard normal numbers in the shape and dtype and on the device of ``like``."""
    return _draw(torch.randn, like, source)


def uniform(like: Tensor, source: RandomSource = None) -> Tensor:
    """Uniform numbers in [0, 1) in the shape and dtype and on the device of ``like``."""
    return _draw(torch.rand, like, source).clamp(max=1 - torch.finfo(like.dtype).eps)


def _draw(sampler: Callable[..., Tensor], like: Tensor, source: RandomSource) -> Tensor:
    if isinstance(source, ExampleGenerators):
        return source.draw(sampler, like)
    return sampler(like.shape, generator=source, dtype=like.dtype, device=like.device)
