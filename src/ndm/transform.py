r"""Transformations F(x, t) of the data, with their time derivative dF at fixed x.

.. math::
    q(z_t | x) = N(\alpha_t F_\phi(x, t), \sigma_t^2 I)

===========================  =================================  =================================
class                        F(x, t)                            model
===========================  =================================  =================================
:class:`Identity`            x                                  DDPM, DDIM, VDM, flow matching
:class:`NetworkTransform`    (1 - t) x + t g(x, t), g = x + f   NDM, section 4: F = x + t f(x, t)
:class:`GatedTransform`      x + sigma_t² f(x, t)               DiffEnc (Nielsen et al. 2024)
:class:`SeparableTransform`  x + w(t) sum_k cos(pi k t) c_k(x)  time-separable (ours)
:class:`SumTransform`        x + sum_i (F_i(x, t) - x)          a sum of displacements
:class:`Encoder`             E(x), in another space             latent diffusion (LSGM)
===========================  =================================  =================================

Linear transformations, fixed (blur, masks, down-sampling) and learned (gains and offsets), are in
:mod:`ndm.linear_transform`.

A transformation has one abstract method: :meth:`Transform.curve` returns t -> F(x, t) at fixed x,
with its time derivative (:mod:`ndm.curve`). The learned transformations are F = x + d(x, t), with a
:class:`Displacement` d that vanishes at t = 0. The noise scale of :mod:`ndm.variants.nfdm` is made
of a displacement too:

.. math::
    d(x, t) = w(t) f(x, t) \quad\text{or}\quad w(t) \textstyle\sum_k \cos(\pi k t)\, c_k(x), \qquad
    w(t) = t,\; \sigma_t^2 \text{ or } t (1 - t) .

The time-separable form evaluates its network once for F(x, s), F(x, t), F(x, 1) and all their time
derivatives: the c_k(x) are channels of one network output that does not depend on t, and w and the
cosines are differentiated by hand.

Training starts at the identity: networks of this library zero their last layer, and the output of
any other network is multiplied by a learned scalar that starts at zero. Networks here run in the
precision of x, never under autocast: the bound multiplies F(x, t) - F(x̂, t) by exp(-gamma/2), up
to 800, and with it the rounding errors of half precision.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ndm.autodiff.forward_mode import time_derivative
from ndm.curve import Constant, Curve, Displaced, Gate, SeparableCurve, gate
from ndm.device import full_precision
from ndm.errors import UserError, check_choice
from ndm.parts import Conditional, check_network, describe_output
from ndm.schedule import NoiseLevel


class Transform(Conditional, ABC):
    """The transformation F(x, t) of the data.

    Times are passed as a :class:`NoiseLevel`, since F may depend on the noise scale too.
    """

    data_at_zero: bool = True
    """Whether F(x, 0) is exactly x, so that the reconstruction term needs no evaluation of F."""
    constant: bool = False
    """Whether F(x, t) is the same for every t."""
    keeps_shape: bool = True
    """Whether latents have the shape of the data; an encoder into another space changes it."""

    @abstractmethod
    def curve(self, x: Tensor) -> Curve:
        """Return t -> F(x, t) at ``x`` ``(B, *event)``, to be evaluated at any number of times."""

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Return F(x, t) for ``x`` ``(B, *event)`` at times ``(B,)``; ``(B, *event)``."""
        return self.curve(x).at(level)

    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return F(x, t) and its time derivative dF(x, t); each ``(B, *event)``."""
        return self.curve(x).with_derivative(level)

    def at_both(self, x: Tensor, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return F(x, s) and F(x, t); each ``(B, *event)``."""
        return self.curve(x).at_both(s, t)

    def latent_shape(self, x: Tensor) -> torch.Size:
        """Return the shape of F(x, t), which is that of the latents, for a batch shaped like ``x``.

        The values of ``x`` are not used.
        """
        return x.shape


class Identity(Transform):
    """The identity F(x, t) = x of conventional diffusion models."""

    constant = True

    def curve(self, x: Tensor) -> Curve:
        return Constant(x)


class Displacement(Conditional, ABC):
    """The displacement d(x, t) in F = x + d, or in the logarithm of a noise scale.

    d(x, 0) is 0, or sigma_0² f(x, 0) with the gate ``noise``.

    Args:
        network: the network that d is made of. Its last layer is set to zero, so pass a new one.
        gate: w(t): ``time`` is t, ``noise`` is sigma_t², ``bridge`` is t (1 - t).
    """

    gates: tuple[str, ...] = get_args(Gate)
    """The gates that can be chosen."""

    def __init__(self, network: nn.Module, gate: Gate):
        super().__init__()
        check_choice("gate", gate, self.gates)
        check_network(network, "a displacement", "network(x, t)")
        zero_output = getattr(network, "zero_output", None)
        if zero_output is not None:
            zero_output()
        self.network, self.gate = network, gate
        self.gain = nn.Parameter(torch.zeros(())) if zero_output is None else None

    @abstractmethod
    def curve(self, x: Tensor) -> Curve:
        """Return t -> d(x, t) at ``x`` ``(B, *event)``."""

    def _scaled(self, output: Tensor) -> Tensor:
        return output if self.gain is None else self.gain * output


class NetworkDisplacement(Displacement):
    """The displacement d = w(t) f(x, t) with a network f.

    Args:
        network: f, any ``nn.Module`` called as ``network(x, t)`` with ``(B, *event)`` and ``(B,)``.
            In continuous time it must be differentiable in t by forward mode.
        gate: w(t).
    """

    def curve(self, x: Tensor) -> Curve:
        return _NetworkCurve(self, x)

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        """Return f(x, t), ``(B, *event)``."""
        with full_precision(x):
            output = self.call(x, t)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            raise UserError(
                f"the network maps {tuple(x.shape)} to {describe_output(output)}; F(x, t) and"
                " h(x, t) must keep the shape of x: give it as many output as input channels"
            )
        return self._scaled(output)


class _NetworkCurve(Curve):
    def __init__(self, displacement: NetworkDisplacement, x: Tensor):
        self._displacement, self._x = displacement, x

    @property
    def like(self) -> Tensor:
        return self._x

    def at(self, level: NoiseLevel) -> Tensor:
        w, _ = gate(self._displacement.gate, level.expand(self._x))
        return w * self._displacement.output(self._x, level.t)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        displacement, x = self._displacement, self._x
        w, slope = gate(displacement.gate, level.expand(x))
        derive = time_derivative
        if displacement.gain is not None:  # not a network of this library
            derive = torch.compiler.disable(time_derivative)  # its compiled derivative may be wrong
        output, rate = derive(displacement.output, x, level.t, type(displacement.network).__name__)
        return w * output, slope * output + w * rate

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Evaluate the network once, on a batch of both times."""
        twice = type(self)(self._displacement.repeated(2), torch.cat([self._x, self._x]))
        both = twice.at(s.cat(t))
        at_s, at_t = both.chunk(2)
        return at_s, at_t


class SeparableDisplacement(Displacement):
    """The displacement d = w(t) sum_k cos(pi k t) c_k(x), k = 0 ... K-1.

    One network evaluation serves all times of one x, without forward mode.

    Args:
        network: called as ``network(x, t)`` with t = 0; it returns c ``(B, K, *event)``: a network
            of this library with ``outputs=K``, or any other ``nn.Module``.
        gate: w(t).
    """

    def curve(self, x: Tensor) -> Curve:
        return SeparableCurve(self.gate, self.channels(x))

    def channels(self, x: Tensor) -> Tensor:
        """Return c_k(x), ``(B, K, *event)``."""
        with full_precision(x):
            channels = self.call(x, x.new_zeros(len(x)))
        if not isinstance(channels, Tensor) or (
            channels.dim() != x.dim() + 1 or channels.shape[:1] + channels.shape[2:] != x.shape
        ):
            raise UserError(
                f"the network of the time-separable form maps {tuple(x.shape)} to"
                f" {describe_output(channels)}; it must return (B, K, *event): give a network of"
                " this library outputs=K"
            )
        return self._scaled(channels)


class ResidualTransform(Transform):
    """The transformation F = x + d(x, t).

    Args:
        displacement: d.
    """

    def __init__(self, displacement: Displacement):
        super().__init__()
        self.displacement = displacement
        self.data_at_zero = displacement.gate != "noise"

    @property
    def network(self) -> nn.Module:
        """The network of the displacement."""
        return self.displacement.network

    @property
    def gate(self) -> Gate:
        """The gate of the displacement."""
        return self.displacement.gate

    def curve(self, x: Tensor) -> Curve:
        return Displaced(x, self.displacement.curve(x))


class NetworkTransform(ResidualTransform):
    """The paper's form F = (1-t) x + t g(x, t) with g(x, t) = x + f(x, t).

    That is F = x + t f(x, t).

    Args:
        network: f, any ``nn.Module`` called as ``network(x, t)`` with ``(B, *event)`` and ``(B,)``.
            In continuous time it must be differentiable in t by forward mode.
    """

    def __init__(self, network: nn.Module):
        super().__init__(NetworkDisplacement(network, "time"))


class GatedTransform(ResidualTransform):
    """The log-SNR gated form F = x + sigma_t² f(x, t) (DiffEnc).

    Its bound stays finite near t = 0 for every f.

    Args:
        network: f, any ``nn.Module`` called as ``network(x, t)`` with ``(B, *event)`` and ``(B,)``.
    """

    def __init__(self, network: nn.Module):
        super().__init__(NetworkDisplacement(network, "noise"))


class SeparableTransform(ResidualTransform):
    """The time-separable form F = x + w(t) sum_k cos(pi k t) c_k(x).

    See :class:`SeparableDisplacement`.

    Args:
        network: called as ``network(x, t)`` with t = 0; it returns c ``(B, K, *event)``: a network
            of this library with ``outputs=K``, or any other ``nn.Module``.
        gate: w(t): ``noise`` is sigma_t², as in :class:`GatedTransform`; ``time`` is t, as in the
            paper's form.
    """

    def __init__(self, network: nn.Module, gate: Literal["noise", "time"] = "noise"):
        check_choice("gate", gate, ("noise", "time"))
        super().__init__(SeparableDisplacement(network, gate))


class SumTransform(Transform):
    """The sum of several displacements, F = x + sum_i (F_i(x, t) - x).

    For example gains by frequency, :class:`ndm.AffineTransform`, below a network.

    Args:
        transforms: the F_i.
    """

    def __init__(self, transforms: Sequence[Transform]):
        super().__init__()
        if not transforms or not all(isinstance(one, Transform) for one in transforms):
            raise UserError("transforms: give one or more transformations of the data")
        if not all(one.keeps_shape for one in transforms):
            raise UserError("transforms: an Encoder has latents of another shape and adds to none")
        self.transforms = nn.ModuleList(transforms)
        self.data_at_zero = all(one.data_at_zero for one in transforms)
        self.constant = all(one.constant for one in transforms)

    def curve(self, x: Tensor) -> Curve:
        return _TotalCurve(x, [cast(Transform, one).curve(x) for one in self.transforms])


class _TotalCurve(Curve):
    """The curve x + sum_i (c_i(t) - x)."""

    def __init__(self, x: Tensor, curves: Sequence[Curve]):
        self._x, self._curves = x, curves

    @property
    def like(self) -> Tensor:
        return self._x

    def _total(self, values: Iterable[Tensor]) -> Tensor:
        return sum((value - self._x for value in values), self._x)

    def at(self, level: NoiseLevel) -> Tensor:
        return self._total(one.at(level) for one in self._curves)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        found = [one.with_derivative(level) for one in self._curves]
        total = self._total(value for value, _ in found)
        return total, sum((slope for _, slope in found), torch.zeros_like(self._x))

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        found = [one.at_both(s, t) for one in self._curves]
        return self._total(at_s for at_s, _ in found), self._total(at_t for _, at_t in found)


class Encoder(Transform):
    """A learned encoder F(x, t) = E(x): latent diffusion (LSGM, Vahdat et al. 2021).

    F does not depend on t, and the latents z_t have the shape of E(x). Combine it with
    :class:`ndm.NetworkDecoder` and ``reverse="direct"``, whose predictor predicts E(x).

    Args:
        network: E, any ``nn.Module`` called as ``network(x)`` with ``(B, *event)``; it returns
            ``(B, *latent)``.
    """

    constant = True
    data_at_zero = False
    keeps_shape = False
    arity = 1

    def __init__(self, network: nn.Module):
        super().__init__()
        check_network(network, "an encoder", "network(x)")
        self.network = network

    def encode(self, x: Tensor) -> Tensor:
        """Return E(x), ``(B, *latent)``."""
        with full_precision(x):
            code = self.call(x)
        if not isinstance(code, Tensor) or code.shape[:1] != x.shape[:1]:
            found = tuple(code.shape) if isinstance(code, Tensor) else f"a {type(code).__name__}"
            raise UserError(
                f"the encoder's network maps {tuple(x.shape)} to {found}; it must return one tensor"
                " (B, *latent)"
            )
        return code

    def curve(self, x: Tensor) -> Curve:
        return Constant(self.encode(x))

    @torch.no_grad()
    def latent_shape(self, x: Tensor) -> torch.Size:
        one = self if self.c is None else self.bind(self.c[:1])
        return torch.Size((x.shape[0], *one.encode(x.new_zeros((1, *x.shape[1:]))).shape[1:]))
