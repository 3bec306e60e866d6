r"""Transformations F(x, t) of the data, with their time derivative dF at fixed x.

.. math::
    q(z_t | x) = N(\alpha_t F_\phi(x, t), \sigma_t^2 I)

===========================  ================================  =============================================
:class:`Identity`            F = x                             DDPM, DDIM, VDM, flow matching
:class:`NetworkTransform`    F = (1-t) x + t g(x, t), g = x+f  the paper (NDM, section 4), i.e. F = x + t f(x, t)
:class:`GatedTransform`      F = x + sigma_t² f(x, t)          log-SNR gated (DiffEnc, Nielsen et al. 2024)
:class:`SeparableTransform`  F = x + w(t) sum_k B_k(t) c_k(x)  time-separable, B_k(t) = cos(pi k t) (ours)
:class:`Encoder`             F = E(x), in a space of its own   latent diffusion (LSGM)
===========================  ================================  =============================================

Fixed linear ones (blur, masks, down-sampling) are in :mod:`ndm.operators`.

The time-separable form needs one evaluation of its network for F(x, s), F(x, t), F(x, 1) and every time derivative of the same x: c_k(x) are
channels of ONE network output that does not know t, and w and B_k are differentiated by hand. A :class:`Curve` is such a t -> F(x, t) at
fixed x.

Every learned transformation of the data in its own space starts training at the identity: networks of this library zero their last layer, any
other network is multiplied by a learned scalar that starts at zero. Networks here always run in the precision of x, never under autocast:
the bound multiplies F(x, t) - F(x̂, t) by exp(-gamma/2), up to 800, and half precision would drown it.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from ndm.errors import UserError
from ndm.forward_mode import time_derivative
from ndm.precision import full_precision
from ndm.schedule import NoiseLevel


class Transform(nn.Module, ABC):
    """F(x, t). Times come as a :class:`NoiseLevel`, because a transformation may depend on the noise as well as on t."""

    data_at_zero: bool = True
    """Whether F(x, 0) is x exactly, so that the reconstruction term needs no evaluation."""
    constant: bool = False
    """Whether F(x, t) is the same at every t."""
    keeps_shape: bool = True
    """Whether latents have the shape of the data; an encoder into another space does not."""

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

    def curve(self, x: Tensor) -> "Curve":
        """t -> F(x, t) at these x, for several times."""
        return Curve(self, x)

    def latent_shape(self, x: Tensor) -> torch.Size:
        """Shape of F(x, t), which is that of the latents, for a batch in the shape of ``x``; its values are not read."""
        return x.shape


class CurveTransform(Transform, ABC):
    """A transformation that does its work once for x, in its curve."""

    @abstractmethod
    def curve(self, x: Tensor) -> "Curve":
        pass

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self.curve(x).at(level)

    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self.curve(x).with_derivative(level)

    def at_both(self, x: Tensor, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self.curve(x).at_both(s, t)


class Curve:
    """t -> F(x, t) at fixed x ``(B, *event)``, evaluated anew at each time.

    Args:
        transform: F.
        x: the data.
    """

    def __init__(self, transform: Transform, x: Tensor):
        self._transform, self._x = transform, x

    @property
    def like(self) -> Tensor:
        """A tensor in the shape of F(x, t), which is that of the latents."""
        return self._x

    def at(self, level: NoiseLevel) -> Tensor:
        """F(x, t)."""
        return self._transform(self._x, level)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """F(x, t) and dF(x, t)."""
        return self._transform.with_derivative(self._x, level)

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        """F(x, s) and F(x, t)."""
        return self._transform.at_both(self._x, s, t)


class Identity(Transform):
    """F(x, t) = x: the conventional diffusion model."""

    constant = True

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return x

    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def at_both(self, x: Tensor, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        return x, x


def started_at_zero(network: nn.Module) -> tuple[nn.Module, nn.Parameter | None]:
    """The network, and for a foreign one a learned scalar that starts at zero; networks of this library start at zero themselves."""
    if not isinstance(network, nn.Module):
        raise UserError(f"network is a {type(network).__name__}: a transformation needs an nn.Module called as network(x, t)")
    zero_output = getattr(network, "zero_output", None)
    if zero_output is None:
        return network, nn.Parameter(torch.zeros(()))
    zero_output()
    return network, None


class GatedNetwork(nn.Module, ABC):
    """w(t) f(x, t) with a network f that keeps the shape of x and starts at zero, and its derivative in t."""

    role = "transformation; F(x, t)"
    """For messages: whose network it is, and what keeps the shape of x."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.gain = started_at_zero(network)

    @abstractmethod
    def window(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """The window w and its derivative in t, in the shape of ``level``."""

    def _raw(self, x: Tensor, t: Tensor) -> Tensor:
        with full_precision(x):
            raw = self.network(x, t)
        if raw.shape != x.shape:
            owner, what = self.role.split("; ")
            raise UserError(
                f"the network of the {owner} maps {tuple(x.shape)} to {tuple(raw.shape)}; {what} must keep the shape of x: "
                "give it as many output channels as input channels"
            )
        return raw if self.gain is None else self.gain * raw

    def product(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The product w f, ``(B, *event)``."""
        return self.window(level.expand(x))[0] * self._raw(x, level.t)

    def product_with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """The product w f and its derivative in t at fixed x, each ``(B, *event)``."""
        window, slope = self.window(level.expand(x))
        # A network that is not of this library may hold operations whose compiled derivative would be wrong.
        derive = time_derivative if self.gain is None else torch.compiler.disable(time_derivative)
        raw, rate = derive(self._raw, x, level.t, type(self.network).__name__)
        return window * raw, slope * raw + window * rate


class _Residual(GatedNetwork, Transform, ABC):
    """F = x + w(t) f(x, t)."""

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return x + self.product(x, level)

    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        shift, derivative = self.product_with_derivative(x, level)
        return x + shift, derivative


class NetworkTransform(_Residual):
    """The paper's form F = (1-t) x + t g(x, t) with g(x, t) = x + f(x, t), that is F = x + t f(x, t).

    Args:
        network: f, any ``nn.Module`` called as ``network(x, t)`` with ``(B, *event)`` and ``(B,)``. In continuous time it must be
            differentiable in t by forward mode.
    """

    def window(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return level.t, torch.ones_like(level.t)


class GatedTransform(_Residual):
    """The log-SNR gated form F = x + sigma_t² f(x, t), whose bound stays finite near t = 0 whatever f does (DiffEnc).

    Args:
        network: f, any ``nn.Module`` called as ``network(x, t)`` with ``(B, *event)`` and ``(B,)``.
    """

    data_at_zero = False

    def window(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return level.sigma**2, 2 * level.sigma * level.dsigma


class SeparableTransform(CurveTransform):
    """The time-separable form F = x + w(t) sum_k cos(pi k t) c_k(x), k = 0 ... K-1: one network evaluation for all times of one x.

    Args:
        network: called as ``network(x, t)`` with t = 0, it returns c ``(B, K, *event)``: a network of this library with ``outputs=K``, or any
            other ``nn.Module``. It needs no derivative in t.
        gate: w(t): ``noise`` is sigma_t², as in :class:`GatedTransform`; ``time`` is t, as in the paper's form.
    """

    def __init__(self, network: nn.Module, gate: Literal["noise", "time"] = "noise"):
        super().__init__()
        if gate not in ("noise", "time"):
            raise UserError(f"gate={gate!r} is not known: choose noise or time")
        self.gate, self.data_at_zero = gate, gate == "time"
        self.network, self.gain = started_at_zero(network)

    def channels(self, x: Tensor) -> Tensor:
        """c_k(x), ``(B, K, *event)``."""
        with full_precision(x):
            channels = self.network(x, x.new_zeros(len(x)))
        if channels.dim() != x.dim() + 1 or channels.shape[:1] + channels.shape[2:] != x.shape:
            raise UserError(
                f"the network of the time-separable transformation maps {tuple(x.shape)} to {tuple(channels.shape)}; it must return "
                "(B, K, *event): give a network of this library outputs=K"
            )
        return channels if self.gain is None else self.gain * channels

    def curve(self, x: Tensor) -> "SumCurve":
        return _SeparableCurve(self, x)


class SumCurve(Curve, ABC):
    """x + sum_k w_k(t) c_k with fixed c.

    Args:
        x: the data, ``(B, *event)``.
        channels: c, ``(B, K, *event)``.
    """

    def __init__(self, x: Tensor, channels: Tensor):
        self._x, self._channels = x, channels

    @abstractmethod
    def weights(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """w_k(t) and its derivative in t, each ``(B, K)``."""

    def _sum(self, weights: Tensor) -> Tensor:
        with full_precision(self._x):  # products of matrices would run in half precision
            return torch.einsum("bk,bk...->b...", weights, self._channels)

    def added(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """F(x, t) - x and its derivative in t."""
        weights, slopes = self.weights(level)
        return self._sum(weights), self._sum(slopes)

    def at(self, level: NoiseLevel) -> Tensor:
        return self._x + self._sum(self.weights(level)[0])

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        added, derivative = self.added(level)
        return self._x + added, derivative

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self.at(s), self.at(t)


class _SeparableCurve(SumCurve):
    """w_k = w(t) cos(pi k t), over the channels of one network output."""

    def __init__(self, transform: SeparableTransform, x: Tensor):
        super().__init__(x, transform.channels(x))
        self._gate = transform.gate

    def _window(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        if self._gate == "time":
            return level.t, torch.ones_like(level.t)
        return level.sigma**2, 2 * level.sigma * level.dsigma

    def weights(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        window, slope = (value[:, None] for value in self._window(level))
        order = math.pi * torch.arange(self._channels.shape[1], dtype=level.t.dtype, device=level.t.device)
        angle = order * level.t[:, None]
        return window * angle.cos(), slope * angle.cos() - window * order * angle.sin()


class Encoder(CurveTransform):
    """F(x, t) = E(x), a learned encoder into a space of its own, the same at every t: latent diffusion (LSGM, Vahdat et al. 2021).

    The latents z_t have the shape of E(x). It goes with :class:`ndm.NetworkDecoder` and ``reverse="direct"``, whose predictor predicts E(x).

    Args:
        network: E, any ``nn.Module`` called as ``network(x)`` with ``(B, *event)``; it returns ``(B, *latent)``.
    """

    constant = True
    data_at_zero = False
    keeps_shape = False

    def __init__(self, network: nn.Module):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise UserError(f"network is a {type(network).__name__}: an encoder needs an nn.Module called as network(x)")
        self.network = network

    def encode(self, x: Tensor) -> Tensor:
        """E(x), ``(B, *latent)``."""
        with full_precision(x):
            code = self.network(x)
        if not isinstance(code, Tensor) or code.shape[:1] != x.shape[:1]:
            found = tuple(code.shape) if isinstance(code, Tensor) else f"a {type(code).__name__}"
            raise UserError(f"the encoder's network maps {tuple(x.shape)} to {found}; it must return one tensor (B, *latent)")
        return code

    def curve(self, x: Tensor) -> Curve:
        return Identity().curve(self.encode(x))  # the same value at every time

    @torch.no_grad()
    def latent_shape(self, x: Tensor) -> torch.Size:
        return torch.Size((x.shape[0], *self.encode(x.new_zeros((1, *x.shape[1:]))).shape[1:]))
