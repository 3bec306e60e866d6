r"""Curves t -> F(x, t) at fixed x, with their derivative in t.

.. math::
    t \mapsto \Bigl(F(x, t),\; \frac{\partial F(x, t)}{\partial t}\Bigr)

A transformation returns the curve of x, which holds what does not depend on t, such as the output
of a network, and is then evaluated at any number of times.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from ndm.device import full_precision
from ndm.schedule import NoiseLevel

Gate = Literal["time", "noise", "bridge"]


def gate(kind: Gate, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """Return the factor w(t) of a displacement and its derivative, in the shape of ``level``.

    w(t) is t (``time``), sigma_t² (``noise``) or t (1 - t) (``bridge``).
    """
    if kind == "time":
        return level.t, torch.ones_like(level.t)
    if kind == "noise":
        return level.sigma**2, 2 * level.sigma * level.dsigma
    return level.t * (1 - level.t), 1 - 2 * level.t


class Curve(ABC):
    """The map t -> F(x, t) at fixed x ``(B, *event)``."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor with the shape of F(x, t), which is the shape of the latents."""

    @abstractmethod
    def at(self, level: NoiseLevel) -> Tensor:
        """Return F(x, t) at times ``(B,)``; ``(B, *event)``."""

    @abstractmethod
    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return F(x, t) and its time derivative dF(x, t) at fixed x; each ``(B, *event)``."""

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return F(x, s) and F(x, t); each ``(B, *event)``."""
        return self.at(s), self.at(t)


class Constant(Curve):
    """A curve that does not depend on t.

    Args:
        value: F, ``(B, *event)``.
    """

    def __init__(self, value: Tensor):
        self.value = value

    @property
    def like(self) -> Tensor:
        return self.value

    def at(self, level: NoiseLevel) -> Tensor:
        return self.value

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self.value, torch.zeros_like(self.value)


class SumCurve(Curve, ABC):
    """The curve sum_k w_k(t) c_k with fixed c.

    Args:
        channels: c, ``(B, K, *event)``.
    """

    def __init__(self, channels: Tensor):
        self._channels = channels

    @property
    def like(self) -> Tensor:
        return self._channels[:, 0]

    @abstractmethod
    def weights(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return w_k(t) and its derivative in t, each ``(B, K)``."""

    def _sum(self, weights: Tensor) -> Tensor:
        with full_precision(self._channels):  # autocast would multiply in half precision
            return torch.einsum("bk,bk...->b...", weights, self._channels)

    def at(self, level: NoiseLevel) -> Tensor:
        return self._sum(self.weights(level)[0])

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        weights, slopes = self.weights(level)
        return self._sum(weights), self._sum(slopes)


class SeparableCurve(SumCurve):
    """The curve w(t) sum_k cos(pi k t) c_k with fixed c.

    Args:
        kind: w(t), see :func:`gate`.
        channels: c, ``(B, K, *event)``.
    """

    def __init__(self, kind: Gate, channels: Tensor):
        super().__init__(channels)
        self._kind = kind

    def weights(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        w, slope = (value[:, None] for value in gate(self._kind, level))
        channels = torch.arange(self._channels.shape[1], dtype=level.t.dtype, device=level.t.device)
        order = math.pi * channels
        angle = order * level.t[:, None]
        return w * angle.cos(), slope * angle.cos() - w * order * angle.sin()


def mask_curve(curve: Curve, missing: Tensor | None) -> Curve:
    """Return the curve with 0 in known dimensions; unchanged without masks."""
    return curve if missing is None else _Masked(curve, missing)


class _Masked(Curve):
    def __init__(self, curve: Curve, missing: Tensor):
        self._curve, self._missing = curve, missing.to(curve.like)

    @property
    def like(self) -> Tensor:
        return self._curve.like

    def at(self, level: NoiseLevel) -> Tensor:
        return self._missing * self._curve.at(level)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        value, slope = self._curve.with_derivative(level)
        return self._missing * value, self._missing * slope

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        at_s, at_t = self._curve.at_both(s, t)
        return self._missing * at_s, self._missing * at_t


class Displaced(Curve):
    """The curve x + d(x, t) at fixed x.

    Args:
        x: the data, ``(B, *event)``.
        displacement: t -> d(x, t).
    """

    def __init__(self, x: Tensor, displacement: Curve):
        self._x, self._displacement = x, displacement

    @property
    def like(self) -> Tensor:
        return self._x

    def at(self, level: NoiseLevel) -> Tensor:
        return self._x + self._displacement.at(level)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        value, derivative = self._displacement.with_derivative(level)
        return self._x + value, derivative

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        at_s, at_t = self._displacement.at_both(s, t)
        return self._x + at_s, self._x + at_t
