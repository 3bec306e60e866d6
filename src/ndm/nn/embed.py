r"""Embeddings of time and of values.

.. math::
    \text{time: } t \mapsto [\cos(\pi\omega_j t), \sin(\pi\omega_j t)]_j, \quad
    \omega_j \text{ geometric from 1 to } \omega_{\max}, \qquad
    \text{values: } x \mapsto [x, \sin(2^n \pi x), \cos(2^n \pi x)]_n .

The time derivative of a network grows with its fastest time frequency, so give a transformation a
lower maximum than a predictor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ndm.errors import UserError

_CLASS_STD = 0.3  # of the embeddings of classes, at the start


class TimeEmbedding(nn.Module):
    """Sines and cosines of t, then a two-layer perceptron.

    The embedding of a condition, if any, is added before the last nonlinearity. Added after it,
    a class was not learned in hundreds of steps.

    Args:
        features: size of the embedding.
        frequencies: number of frequencies; each has a sine and a cosine.
        max_frequency: fastest frequency, in half-turns per unit of time.
        classes: number of classes of a condition, see :class:`ndm.ClassCondition`.
        condition_dims: length of the vector of a condition, see :class:`ndm.VectorCondition`.
    """

    omega: Tensor

    def __init__(
        self,
        features: int,
        frequencies: int = 16,
        max_frequency: float = 32.0,
        classes: int = 0,
        condition_dims: int = 0,
    ):
        super().__init__()
        if frequencies < 1 or not max_frequency >= 1:
            raise UserError(
                f"frequencies={frequencies}, max_frequency={max_frequency}: need at least one"
                " frequency, and max_frequency >= 1"
            )
        self.register_buffer(
            "omega",
            math.pi * torch.logspace(0, math.log2(max_frequency), frequencies, base=2.0),
            persistent=False,
        )
        self.net = nn.Sequential(
            nn.Linear(2 * frequencies, features),
            nn.SiLU(),
            nn.Linear(features, features),
            nn.SiLU(),
        )
        self.condition: nn.Module | None = None
        if classes:
            self.condition = nn.Embedding(classes + 1, features)
            nn.init.normal_(self.condition.weight, std=_CLASS_STD)
        elif condition_dims:
            self.condition = nn.Linear(condition_dims + 1, features)

    def forward(self, t: Tensor, c: Tensor | None = None) -> Tensor:
        """Map ``(B,)`` and, with a condition, its ``(B,)`` or ``(B, D + 1)`` to ``(B, features)``.

        See :mod:`ndm.condition`.
        """
        angle = t[:, None] * self.omega.to(t.dtype)
        h = torch.cat([angle.cos(), angle.sin()], dim=1)
        if self.condition is None:
            return self.net(h)
        first, silu, second, last = self.net
        return last(second(silu(first(h))) + self.condition(c))


class FourierFeatures(nn.Module):
    """Appends sin(2^n pi x) and cos(2^n pi x) of every channel (VDM, appendix C).

    They show a network the fine digits of its input.

    Args:
        powers: the exponents n. For data with L values in [-1, 1], VDM uses those near log2(L) - 1.
            If the predictor rounds (``num_values``), 1 to 4 help more: see the results on MNIST.
    """

    def __init__(self, powers: Sequence[int] = ()):
        super().__init__()
        self.powers = list(powers)

    def multiple(self) -> int:
        """Return the factor by which the number of channels grows."""
        return 1 + 2 * len(self.powers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, ...)`` to ``(B, C (1 + 2 len(powers)), ...)``."""
        parts = [x]
        for power in self.powers:
            angle = (2.0**power * math.pi) * x
            parts += [angle.sin(), angle.cos()]
        return torch.cat(parts, dim=1) if self.powers else x
