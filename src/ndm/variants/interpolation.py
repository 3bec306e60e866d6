r"""A forward process along the lines of an optimal-transport reverse process.

The data follow the lines of :mod:`ndm.variants.transport` that generate them, and the noise is
stretched as the lines diverge or converge. With :math:`z_0 = \alpha_0 x`,
:math:`\zeta = T^{-1}(z_0)` and the clock r of the lines,

.. math::
    \alpha_t F(x, t) = (1 - r)\, z_0 + r\, \zeta, \qquad
    S(x, t) = (1 - r)\, I + r\, \nabla T(\zeta)^{-1}, \qquad
    q(z_t|x) = N(\alpha_t F, \sigma_t^2 S S^T) .

F and S have no parameters but those of T, and learn with it. To first order in sigma, this Gaussian
is what the flow of the reverse process makes of a small perturbation of z_0. The neglected orders
cost about sigma²/gamma', and the noise that enters on the way, g² = eta² sigma² gamma', costs about
gamma'. So the bound tends to the exact likelihood as sigma_0² << gamma' << 1: first less noise,
then a flatter gamma. A free F and S could do the same in principle but do not find it, since the
bound weights their deviation from the lines by 1/g².

T is the gradient of a convex function, so S is symmetric and positive definite (a positive number
for events of one number). Without S, F needs a wide range of gamma, to make up for noise of the
wrong width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ndm.curve import Curve
from ndm.errors import UserError
from ndm.forward import Gaussian
from ndm.schedule import NoiseLevel, Schedule
from ndm.shapes import event_size, expand, sum_event
from ndm.transform import Transform
from ndm.variants.monotone import TransportMap
from ndm.variants.nfdm import NoiseScale, ScaledCurve, ScaledNoise


def clock(schedule: Schedule, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """Return r = (sigma_t² - sigma_0²)/(sigma_1² - sigma_0²) and dr/dt, in the shape of ``level``.

    r is the position on the lines, from 0 at the data to 1 at the prior.
    """
    ends = torch.arange(2, dtype=level.t.dtype, device=level.t.device)
    start, end = schedule(ends).sigma.square()
    r = ((level.sigma**2 - start) / (end - start)).clamp(0, 1)
    return r, 2 * level.sigma * level.dsigma / (end - start)


class _Interpolated:
    """A part of a forward process that follows the lines of a transport map.

    :class:`ndm.variants.transport.TransportNDM` sets the map.
    """

    # A tuple hides the map from nn.Module, so that it is not registered a second time here.
    _followed: tuple[TransportMap, Schedule] | None = None

    def follow(self, transport: TransportMap, schedule: Schedule) -> None:
        """Follow the lines of ``transport`` with the clock of ``schedule``.

        Raises:
            UserError: it already follows others.
        """
        followed = self._followed
        if followed and (followed[0] is not transport or followed[1] is not schedule):
            raise UserError(
                f"this {type(self).__name__} follows the lines of another model: give each model"
                " its own"
            )
        self._followed = (transport, schedule)

    @property
    def lines(self) -> tuple[TransportMap, Schedule]:
        """The transport map and the schedule."""
        if self._followed is None:
            raise UserError(
                f"{type(self).__name__} follows the lines of a transport map: give it to a"
                " TransportNDM"
            )
        return self._followed

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_0 = alpha_0 x and ζ with T(ζ) = z_0, each ``(B, D)``; differentiable once."""
        transport, schedule = self.lines
        z = (schedule(x.new_zeros(1)).alpha * x.flatten(1)).to(x.dtype)
        return z, transport.origin_with_gradient(z, z.new_zeros(len(z)))

    def clock(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return r and dr/dt, each ``(B,)``."""
        return clock(self.lines[1], level)


class InterpolationTransform(_Interpolated, Transform):
    """The transformation F(x, t) = ((1 - r) alpha_0 x + r T⁻¹(alpha_0 x)) / alpha_t.

    The data follow the lines that generate them. It takes no arguments.
    """

    data_at_zero = True

    def curve(self, x: Tensor) -> Curve:
        return _InterpolationCurve(self, x)


class _InterpolationCurve(Curve):
    def __init__(self, transform: InterpolationTransform, x: Tensor):
        self._x, self._clock = x, transform.clock
        z, self.zeta = transform.ends(x)
        self._start, self._shift = z.reshape(x.shape), (self.zeta - z).reshape(x.shape)

    @property
    def like(self) -> Tensor:
        return self._x

    def at(self, level: NoiseLevel) -> Tensor:
        r, _ = self._clock(level)
        return (self._start + expand(r, self._x) * self._shift) / expand(level.alpha, self._x)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        at, (_, rate) = level.expand(self._x), self._clock(level)
        value = self.at(level)
        return value, (expand(rate, self._x) * self._shift - at.dalpha * value) / at.alpha


@dataclass(frozen=True)
class CorrelatedGaussian(Gaussian):
    """N(mean, std² S S^T) with a symmetric, positive definite S ``(B, D, D)``.

    ``std`` is the same for all dimensions of an example.
    """

    stretch: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std S noise."""
        return self.mean + self.std * times(self.stretch, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        whitened = solved(self.stretch, value - self.mean)
        log_det = torch.linalg.slogdet(self.stretch)[1]
        return Gaussian(torch.zeros_like(whitened), self.std).log_prob(whitened) - log_det

    def kl_to_normal(self) -> Tensor:
        trace = self.std.flatten(1).square()[:, 0] * self.stretch.square().sum((1, 2))
        log_std = sum_event(self.std.log().expand_as(self.mean))
        log_det = torch.linalg.slogdet(self.stretch)[1] + log_std
        return 0.5 * (sum_event(self.mean**2) + trace - event_size(self.mean)) - log_det


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Return matrices ``(B, D, D)`` times flattened events ``(B, *event)``."""
    # Autocast would round a matrix product.
    return (matrix * x.flatten(1)[:, None]).sum(-1).reshape(x.shape)


def solved(matrix: Tensor, x: Tensor) -> Tensor:
    """Return inverse matrices ``(B, D, D)`` times flattened events ``(B, *event)``."""
    return torch.linalg.solve(matrix, x.flatten(1)[..., None])[..., 0].reshape(x.shape)


class InterpolationScale(_Interpolated, NoiseScale):
    """The noise scale S(x, t) = (1 - r) I + r ∇T(ζ)⁻¹, which stretches noise as the lines do.

    It takes no arguments.
    """

    def curve(self, transform: Transform, x: Tensor) -> "InterpolationCurve":
        return InterpolationCurve(transform, self, x)


class InterpolationCurve(ScaledCurve):
    """The curves t -> F(x, t) and t -> S(x, t) at fixed x.

    S(x, t) is ``(B, D, D)``, symmetric and positive definite.
    """

    def __init__(self, transform: Transform, scale: InterpolationScale, x: Tensor):
        transformed = transform.curve(x)
        super().__init__(transformed)
        self._clock = scale.clock
        if isinstance(transformed, _InterpolationCurve):
            zeta = transformed.zeta
        else:
            zeta = scale.ends(x)[1]
        self._end = torch.linalg.inv(scale.lines[0].with_jacobian(zeta)[1])

    def stretch(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return S(x, t) and its derivative in t, each ``(B, D, D)``."""
        r, rate = self._clock(level)
        unit = torch.eye(self._end.shape[-1], dtype=self._end.dtype, device=self._end.device)
        away = self._end - unit
        return unit + r[:, None, None] * away, rate[:, None, None] * away

    def scaled(self, noise: Tensor, level: NoiseLevel) -> ScaledNoise:
        stretch, rate = self.stretch(level)
        return ScaledNoise(times(stretch, noise), times(rate, noise), solved(stretch, noise))

    def marginal(self, plain: Gaussian, level: NoiseLevel) -> Gaussian:
        return CorrelatedGaussian(plain.mean, plain.std, self.stretch(level)[0])

    def extra_drift(self, away: Tensor, level: NoiseLevel, rate: Tensor) -> Tensor:
        stretch, derivative = self.stretch(level)
        whitened = solved(stretch, away)
        return times(derivative, whitened) + rate * (solved(stretch, whitened) - away)


def follow(parts: tuple[Any, ...], transport: TransportMap, schedule: Schedule) -> None:
    """Let the parts that follow lines, and those inside of parts, follow those of ``transport``."""
    for part in parts:
        for module in part.modules() if isinstance(part, nn.Module) else (part,):
            if isinstance(module, _Interpolated):
                module.follow(transport, schedule)
