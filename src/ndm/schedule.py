r"""Noise schedules: signal and noise scales over time t in [0, 1], from data (0) to noise (1).

.. math::
    z_t = \alpha_t F(x, t) + \sigma_t \epsilon, \qquad
    \gamma_t = \log(\sigma_t^2 / \alpha_t^2), \qquad
    \omega_t = \alpha_t \sigma'_t - \alpha'_t \sigma_t = \tfrac12 \alpha_t \sigma_t \gamma'_t .

A variance-preserving schedule is defined by its gamma:
:math:`\alpha^2 = \mathrm{sigmoid}(-\gamma)`, :math:`\sigma^2 = \mathrm{sigmoid}(\gamma)`. Both ends
are exact in floating point, since 1 minus a small number never appears. All other quantities are
computed from :math:`\alpha, \sigma, \alpha', \sigma'`, which stay finite where gamma does not (flow
matching ends at :math:`\alpha_1 = 0`, :math:`\gamma_1 = \infty`):

.. math::
    e^{-\gamma}\gamma' = 2\alpha\omega/\sigma^3, \qquad 1/\gamma' = \alpha\sigma/(2\omega).

Levels of neighboring times t - s = 1/T differ by as little as the rounding error of single
precision. A :class:`RoundedLevel` therefore has its double-precision level too, and differences are
taken between those.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.func import functional_call

from ndm.errors import UserError
from ndm.parts import Part
from ndm.shapes import expand


@dataclass(frozen=True)
class NoiseLevel:
    """A schedule evaluated at a batch of times.

    Every field has the shape of ``t``: ``(B,)``, or ``(B, 1, ..., 1)`` after :meth:`expand`.
    """

    t: Tensor
    gamma: Tensor
    """log(sigma²/alpha²), minus the log signal-to-noise ratio, in nats."""
    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    """d alpha/dt"""
    dsigma: Tensor
    """d sigma/dt"""

    @property
    def exact_time(self) -> Tensor:
        """t before rounding, in double precision where it is known."""
        return self.t

    def since(self, earlier: "NoiseLevel") -> Tensor:
        """Return the time from an earlier level to this one, in the shape and dtype of ``t``."""
        return (self.exact_time - earlier.exact_time).to(self.t.dtype)

    @property
    def omega(self) -> Tensor:
        """omega = alpha sigma' - alpha' sigma = alpha sigma gamma'/2, positive."""
        return self.alpha * self.dsigma - self.dalpha * self.sigma

    @property
    def dgamma(self) -> Tensor:
        """gamma' = d gamma/dt (infinite where alpha is 0)."""
        return 2 * self.omega / (self.alpha * self.sigma)

    @property
    def inverse_dgamma(self) -> Tensor:
        """1/gamma', always finite."""
        return self.alpha * self.sigma / (2 * self.omega)

    @property
    def snr_decay(self) -> Tensor:
        """exp(-gamma) gamma' = -d(SNR)/dt, finite wherever sigma is positive."""
        return 2 * self.alpha * self.omega / self.sigma**3

    def diffusion(self, eta: float) -> Tensor:
        """Return g = eta sigma sqrt(gamma'), the diffusion coefficient of the reverse-time SDE."""
        return eta * self.sigma * self.dgamma.sqrt()

    def expand(self, like: Tensor) -> "NoiseLevel":
        """Reshape every field to broadcast against ``like`` ``(B, *event)``."""
        return NoiseLevel(**{name: expand(getattr(self, name), like) for name in _NAMES})

    def detach(self) -> "NoiseLevel":
        """Detach every field, which cuts the gradient of a learned schedule."""
        return NoiseLevel(**{name: getattr(self, name).detach() for name in _NAMES})

    def rows(self, chosen: slice) -> "NoiseLevel":
        """Return the level of a slice of the batch."""
        return NoiseLevel(**{name: getattr(self, name)[chosen] for name in _NAMES})

    def cat(self, other: "NoiseLevel") -> "NoiseLevel":
        """Concatenate both levels along the batch, for one network call at two sets of times."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _NAMES}
        return NoiseLevel(**{name: torch.cat(pair) for name, pair in pairs.items()})


_NAMES = tuple(field.name for field in fields(NoiseLevel))


@dataclass(frozen=True)
class RoundedLevel(NoiseLevel):
    """A level in less than double precision that can also be computed in double precision."""

    time: Tensor
    """t before rounding, in the shape of ``t``."""
    schedule: "Schedule"
    """The schedule of the level."""

    @property
    def exact_time(self) -> Tensor:
        return self.time.double()

    def expand(self, like: Tensor) -> "RoundedLevel":
        level = super().expand(like)
        values = {name: getattr(level, name) for name in _NAMES}
        return RoundedLevel(**values, time=expand(self.time, like), schedule=self.schedule)


class Schedule(Part, ABC):
    """A map from times ``(B,)`` to a :class:`NoiseLevel`, derivatives included."""

    @abstractmethod
    def forward(self, t: Tensor) -> NoiseLevel:
        """Return the noise level at times ``t`` ``(B,)`` in [0, 1], in the dtype of ``t``."""

    def in_double(self, t: Tensor) -> NoiseLevel:
        """Return the level at times ``t`` ``(B,)``, float64, with the parameters in float64 too."""
        state = {
            name: value.double() if value.is_floating_point() else value
            for name, value in (*self.named_parameters(), *self.named_buffers())
        }
        return functional_call(self, state, (t,)) if state else self(t)

    def at(self, t: Tensor, dtype: torch.dtype) -> NoiseLevel:
        """Return the level at times ``t`` ``(B,)`` of any precision, in ``dtype``.

        It can be computed in double precision too, except on devices without it (MPS).
        """
        rounded = t.to(dtype)
        level = self(rounded)
        if dtype == torch.float64 or t.device.type == "mps":
            return level
        values = {name: getattr(level, name) for name in _NAMES}
        return RoundedLevel(**values, time=t, schedule=self)


def exact_pair(s: NoiseLevel, t: NoiseLevel) -> tuple[NoiseLevel, NoiseLevel]:
    """Return two levels of the same shape in double precision, or unchanged if that is unknown."""
    if not (isinstance(s, RoundedLevel) and isinstance(t, RoundedLevel)):
        return s, t
    # One call, so that nearly opposite gradients of a learned schedule are added before rounding.
    times = torch.cat([s.exact_time.flatten(), t.exact_time.flatten()])
    both = s.schedule.in_double(times)
    parts = {name: getattr(both, name).chunk(2) for name in _NAMES}
    return (
        NoiseLevel(**{name: part[0].view_as(s.time) for name, part in parts.items()}),
        NoiseLevel(**{name: part[1].view_as(t.time) for name, part in parts.items()}),
    )


class VariancePreserving(Schedule, ABC):
    """A schedule with alpha² + sigma² = 1, defined by its gamma."""

    @abstractmethod
    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma, which strictly increases, and d gamma/dt at times ``t`` ``(B,)``."""

    def forward(self, t: Tensor) -> NoiseLevel:
        gamma, dgamma = self.gamma(t)
        alpha = torch.exp(0.5 * nnf.logsigmoid(-gamma))
        sigma = torch.exp(0.5 * nnf.logsigmoid(gamma))
        return NoiseLevel(
            t=t,
            gamma=gamma,
            alpha=alpha,
            sigma=sigma,
            dalpha=-0.5 * dgamma * alpha * sigma**2,
            dsigma=0.5 * dgamma * sigma * alpha**2,
        )


def check_gamma_ends(gamma_0: float, gamma_1: float) -> None:
    """Raise :class:`UserError` unless gamma_0 < gamma_1 and both are finite."""
    if not (math.isfinite(gamma_0) and math.isfinite(gamma_1) and gamma_0 < gamma_1):
        raise UserError(
            f"gamma_0={gamma_0} and gamma_1={gamma_1}: gamma must increase from data to noise; give"
            " finite gamma_0 < gamma_1, for 8-bit images gamma_0=-13.3 and gamma_1=5"
        )


class LinearLogSNRSchedule(VariancePreserving):
    """The schedule with gamma linear in t (the fixed schedule of VDM, Kingma et al. 2021).

    Args:
        gamma_0: gamma at t = 0. The decoder resolves values that are sqrt(exp(gamma_0)) apart.
        gamma_1: gamma at t = 1. The prior term is about D alpha_1²|F|²/2 nats.
    """

    def __init__(self, gamma_0: float = -13.3, gamma_1: float = 5.0):
        super().__init__()
        check_gamma_ends(gamma_0, gamma_1)
        self.gamma_0, self.gamma_1 = gamma_0, gamma_1

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start, end = torch.full_like(t, self.gamma_0), torch.full_like(t, self.gamma_1)
        return torch.lerp(start, end, t), end - start


class CosineSchedule(VariancePreserving):
    """The cosine schedule, gamma = 2 log tan(pi u/2) (Nichol & Dhariwal 2021).

    That is alpha = cos(pi u/2). u is linear in t and covers the part of [0, 1] where gamma lies
    between ``gamma_0`` and ``gamma_1``, so both ends are exact.

    Args:
        gamma_0: gamma at t = 0.
        gamma_1: gamma at t = 1.
    """

    def __init__(self, gamma_0: float = -13.3, gamma_1: float = 10.0):
        super().__init__()
        check_gamma_ends(gamma_0, gamma_1)
        self.gamma_0, self.gamma_1 = gamma_0, gamma_1

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start = math.atan(math.exp(0.5 * self.gamma_0))
        end = math.atan(math.exp(0.5 * self.gamma_1))
        angle = start + (end - start) * t
        half_gamma = torch.log(torch.tan(angle))
        half_gamma = half_gamma.where(t > 0, 0.5 * self.gamma_0)  # exact at both ends
        half_gamma = half_gamma.where(t < 1, 0.5 * self.gamma_1)
        return 2 * half_gamma, 4 * (end - start) / torch.sin(2 * angle)


class LinearBetaSchedule(VariancePreserving):
    """DDPM's linear beta in continuous time, gamma = log(exp(B) - 1), that is alpha² = exp(-B).

    B = beta_0 u + (beta_1 - beta_0) u²/2 with u = t_0 + (1 - t_0) t, which starts at ``t_0``
    because gamma is minus infinity at u = 0. The defaults are the limit (Song et al. 2021) of 1,000
    steps with beta from 1e-4 to 0.02 (Ho et al. 2020).

    Args:
        beta_0: rate at u = 0 (1,000 times DDPM's first beta).
        beta_1: rate at u = 1 (1,000 times DDPM's last beta).
        t_0: the value of u at t = 0; in (0, 1).
    """

    def __init__(self, beta_0: float = 0.1, beta_1: float = 20.0, t_0: float = 1e-3):
        super().__init__()
        if not (0 < beta_0 <= beta_1 and 0 < t_0 < 1):
            raise UserError(
                f"beta_0={beta_0}, beta_1={beta_1}, t_0={t_0}: need 0 < beta_0 <= beta_1 and"
                " 0 < t_0 < 1"
            )
        self.beta_0, self.beta_1, self.t_0 = beta_0, beta_1, t_0

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u = self.t_0 + (1 - self.t_0) * t
        integral = self.beta_0 * u + 0.5 * (self.beta_1 - self.beta_0) * u**2
        rate = (1 - self.t_0) * (self.beta_0 + (self.beta_1 - self.beta_0) * u)
        # log(exp(B) - 1) = B + log(1 - exp(-B)) does not overflow at large B or cancel at small B.
        return integral + torch.log(-torch.expm1(-integral)), rate / -torch.expm1(-integral)


class FlowMatchingSchedule(Schedule):
    """The straight path of flow matching, alpha = 1 - t and sigma = t (Lipman et al. 2023).

    It is not variance preserving.

    Args:
        sigma_0: noise left at t = 0: sigma = sigma_0 + (1 - sigma_0) t. It is the width of the
            decoder, so it must be positive.
        alpha_1: signal left at t = 1: alpha = 1 - (1 - alpha_1) t. With 0 the prior term is
            exactly 0, and the ODE and the ancestral sampler are finite, but the coefficient of the
            SDE is infinite at t = 1.
    """

    def __init__(self, sigma_0: float = 1e-3, alpha_1: float = 0.0):
        super().__init__()
        if not (0 < sigma_0 < 1 and 0 <= alpha_1 < 1):
            raise UserError(
                f"sigma_0={sigma_0}, alpha_1={alpha_1}: need 0 < sigma_0 < 1 and 0 <= alpha_1 < 1"
            )
        self.sigma_0, self.alpha_1 = sigma_0, alpha_1

    def forward(self, t: Tensor) -> NoiseLevel:
        ones = torch.ones_like(t)
        alpha = torch.lerp(ones, self.alpha_1 * ones, t)
        sigma = torch.lerp(self.sigma_0 * ones, ones, t)
        return NoiseLevel(
            t=t,
            gamma=2 * (torch.log(sigma) - torch.log(alpha)),
            alpha=alpha,
            sigma=sigma,
            dalpha=(self.alpha_1 - 1) * ones,
            dsigma=(1 - self.sigma_0) * ones,
        )


class LearnedSchedule(VariancePreserving):
    r"""A learned monotone gamma whose ends are exact throughout training.

    .. math::
        \gamma(t) = \gamma_0 + (\gamma_1 - \gamma_0)\, \frac{g(t) - g(0)}{g(1) - g(0)}, \qquad
        g(t) = w t + \sum_j a_j\, \mathrm{sigmoid}(b_j (t - c_j)), \quad w, a_j, b_j > 0 .

    This is VDM's monotone network with its normalization (Kingma et al. 2021, appendix), written so
    that the derivative is a closed form. It starts linear to within a few percent. In continuous
    time the bound of a plain diffusion model depends only on the ends of the schedule; its interior
    affects only the variance of the estimate.

    Args:
        gamma_0: gamma at t = 0; the starting value if the ends are learned.
        gamma_1: gamma at t = 1; the starting value if the ends are learned.
        learn_ends: learn both ends too; gamma_1 - gamma_0 stays positive. gamma(0) and gamma(1)
            are then exactly ``ends()``.
        units: number of sigmoids.
    """

    def __init__(
        self,
        gamma_0: float = -13.3,
        gamma_1: float = 5.0,
        learn_ends: bool = False,
        units: int = 32,
    ):
        super().__init__()
        check_gamma_ends(gamma_0, gamma_1)
        if units < 1:
            raise UserError(f"units={units}: the learned schedule needs at least one unit")
        self.gamma_0, self.gamma_1 = gamma_0, gamma_1
        self.learn_ends, self.units = learn_ends, units
        start = torch.tensor([gamma_0, math.log(gamma_1 - gamma_0)])
        self.start_and_log_range = nn.Parameter(start) if learn_ends else None
        self.log_slope = nn.Parameter(torch.zeros(()))
        self.log_height = nn.Parameter(torch.full((units,), math.log(0.1 / units)))
        self.log_steepness = nn.Parameter(torch.linspace(math.log(2.0), math.log(20.0), units))
        self.center = nn.Parameter(torch.linspace(0.0, 1.0, units))

    def ends(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return gamma at t = 0 and t = 1, scalars, in ``dtype`` or else that of the parameters."""
        dtype = dtype or self.log_slope.dtype
        if self.start_and_log_range is None:
            start = self.log_slope.new_full((), self.gamma_0, dtype=dtype)
            end = self.log_slope.new_full((), self.gamma_1, dtype=dtype)
            return start, end
        start, log_range = self.start_and_log_range.to(dtype)
        return start, start + log_range.exp()

    def _unnormalized(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return g and g' at times ``t`` ``(B,)``."""
        steepness, height = self.log_steepness.exp(), self.log_height.exp()
        gate = torch.sigmoid(steepness * (t[..., None] - self.center))
        slope = self.log_slope.exp()
        rate = slope + (height * steepness * gate * (1 - gate)).sum(-1)
        return slope * t + (height * gate).sum(-1), rate

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # Evaluate g(0) and g(1) in the same call, so that t = 0 and t = 1 give the same floats.
        ends_and_times = torch.cat([torch.arange(2, dtype=t.dtype, device=t.device), t])
        value, slope = self._unnormalized(ends_and_times)
        low, high, value, slope = value[0], value[1], value[2:], slope[2:]
        start, end = self.ends(t.dtype)
        # lerp is exact at 0 and at 1, and value - low is exactly 0 at t = 0, high - low at t = 1.
        gamma = torch.lerp(start.expand_as(t), end.expand_as(t), (value - low) / (high - low))
        return gamma, (end - start) * slope / (high - low)
