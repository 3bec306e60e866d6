r"""Random numbers, from one generator for a batch or from one generator for each example.

.. math::
    \epsilon_i = \epsilon(\text{seed}, i, \text{stream}), \qquad
    i \text{ the number of the example in its data set} .

An estimate for a data set must not depend on how the data are split into batches or distributed
over processes. :class:`ExampleGenerators` therefore has one generator for each example, seeded by a
hash of seed, example and stream. Functions that draw noise for a batch accept it in place of a
``torch.Generator``. It draws in double precision on the CPU and then rounds, so the numbers are the
same on every device and, up to rounding, in every precision.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def part_seed(seed: int, *part: int) -> int:
    """Return the seed of one part of a run: a hash of ``seed`` and the numbers of the part."""
    words = [seed, *part]
    if len(part) > 1:
        # SeedSequence hashes [1] and [1, 0] alike: prepend the length, and use two 32-bit words for
        # each number.
        halves = [half for number in words for half in (number & 0xFFFFFFFF, number >> 32)]
        words = [0xFFFFFFFF, len(part), *halves]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


class ExampleGenerators:
    """A source of noise for a batch, with one generator for each example.

    Args:
        seed: seed of the estimate.
        examples: the numbers of the batch's examples in their data set, one for each row.
        stream: numbers that identify the use of the noise; different streams are independent.
    """

    def __init__(self, seed: int, examples: Sequence[int], *stream: int):
        self._generators = [
            torch.Generator().manual_seed(part_seed(seed, *stream, example)) for example in examples
        ]

    def draw(self, sampler: Callable[..., Tensor], like: Tensor) -> Tensor:
        """Draw one event for each row of ``like`` ``(B, *event)``.

        Args:
            sampler: called as ``sampler(shape, generator=, dtype=)``, such as ``torch.randn``.
            like: gives shape, dtype and device.
        """
        if like.shape[0] != len(self._generators):
            raise ValueError(
                f"there are generators for {len(self._generators)} examples, but the batch has"
                f" {like.shape[0]}"
            )
        rows = [
            sampler(tuple(like.shape[1:]), generator=generator, dtype=torch.float64)
            for generator in self._generators
        ]
        if not rows:
            return torch.empty_like(like)
        return torch.stack(rows).to(dtype=like.dtype, device=like.device)


RandomSource = torch.Generator | ExampleGenerators | None
"""Source of randomness; None is PyTorch's global generator."""


def standard_normal(like: Tensor, source: RandomSource = None) -> Tensor:
    """Draw standard normal numbers with the shape, dtype and device of ``like``."""
    return _draw(torch.randn, like, source)


def uniform(like: Tensor, source: RandomSource = None) -> Tensor:
    """Draw uniform numbers in [0, 1) with the shape, dtype and device of ``like``."""
    return _draw(torch.rand, like, source).clamp(max=1 - torch.finfo(like.dtype).eps)


def _draw(sampler: Callable[..., Tensor], like: Tensor, source: RandomSource) -> Tensor:
    if isinstance(source, ExampleGenerators):
        return source.draw(sampler, like)
    return sampler(like.shape, generator=source, dtype=like.dtype, device=like.device)
