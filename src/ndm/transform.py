r"""Transformations F(x, t) of the data, with their time derivative dF at fixed x.

.. math::
    q(z_t | x) = N(\alpha_t F_\phi(x, t), \sigma_t^2 I)

=========================  ================================  =============================================
:class:`Identity`          F = x                             DDPM, DDIM, VDM, flow matching
:class:`NetworkTransform`  F = (1-t) x + t g(x, t), g = x+f  the paper (NDM, section 4), i.e. F = x + t f(x, t)
:class:`GatedTransform`    F = x + sigma_t² f(x, t)          log-SNR gated (DiffEnc, Nielsen et al. 2024)
=========================  ================================  =============================================

Every transformation starts training at the identity: networks of this library zero their last layer, any other network is multiplied
by a learned scalar that starts at zero. Networks here always run in the precision of x, never under autocast: the bound multiplies
F(x, t) - F(x̂, t) by exp(-gamma/2), up to 800, and half precision would drown it.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ndm.errors import UserError
from ndm.forward_mode import time_derivative
from ndm.schedule import NoiseLevel


class Transform(nn.Module, ABC):
    """F(x, t). Times come as a :class:`NoiseLevel`, because a transformation may depend on the noise as well as on t."""

    data_at_zero: bool = True
    """Whether F(x, 0) is x exactly, so that the reconstruction term needs no evaluation."""

    @abstractmethod
    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """F(x, t) for ``x`` ``(B, *event)`` at times ``(B,)``; ``(B, *event)``."""

    @abstractmethod
    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """F(x, t) and dF(x, t), the partial derivative in t at fixed x; each ``(B, *event)``."""

    def at_both(self, x: Tensor, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        """F(x, s) and F(x, t) from one batched evaluation; each ``(B, *event)``."""
        value_s, value_t = self(torch.cat([x, x]), s.cat(t)).chunk(2)
        return value_s, value_t


class Identity(Transform):
    """F(x, t) = x: the conventional diffusion model."""

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return x

    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def at_both(self, x: Tensor, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        return x, x


class _Residual(Transform, ABC):
    """F = x + gate(t) f(x, t), with a network f."""

    def __init__(self, network: nn.Module):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise UserError(f"network is a {type(network).__name__}: a transformation needs an nn.Module called as network(x, t)")
        self.network = network
        # Networks of this library start at zero themselves; a foreign one is started at zero by a learned scalar.
        zero_output = getattr(network, "zero_output", None)
        self.gain = None if zero_output is not None else nn.Parameter(torch.zeros(()))
        if zero_output is not None:
            zero_output()

    @abstractmethod
    def gate(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """The gate and its derivative in t, in the shape of ``level``."""

    def _shift(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            shift = self.network(x, t)
        if shift.shape != x.shape:
            raise UserError(
                f"the network of the transformation maps {tuple(x.shape)} to {tuple(shift.shape)}; F(x, t) must keep the shape of x: "
                "give it as many output channels as input channels"
            )
        return shift if self.gain is None else self.gain * shift

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        gate, _ = self.gate(level.expand(x))
        return x + gate * self._shift(x, level.t)

    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        gate, dgate = self.gate(level.expand(x))
        shift, dshift = time_derivative(self._shift, x, level.t, type(self.network).__name__)
        return x + gate * shift, dgate * shift + gate * dshift


class NetworkTransform(_Residual):
    """The paper's form F = (1-t) x + t g(x, t) with g(x, t) = x + f(x, t), that is F = x + t f(x, t).

    Args:
        network: f, any ``nn.Module`` called as ``network(x, t)`` with ``(B, *event)`` and ``(B,)``. In continuous time it must be
            differentiable in t by forward mode.
    """

    def gate(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return level.t, torch.ones_like(level.t)


class GatedTransform(_Residual):
    """The log-SNR gated form F = x + sigma_t² f(x, t), whose bound stays finite near t = 0 whatever f does (DiffEnc).

    Args:
        network: f, any ``nn.Module`` called as ``network(x, t)`` with ``(B, *event)`` and ``(B,)``.
    """

    data_at_zero = False

    def gate(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return level.sigma**2, 2 * level.sigma * level.dsigma
