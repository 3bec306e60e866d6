r"""Noise schedules: how much signal and noise a latent holds at time t in [0, 1] (0 is data, 1 is
noise).

.. math::
    z_t = \alpha_t F(x, t) + \sigma_t \epsilon, \qquad \gamma_t = \log(\sigma_t^2 / \alpha_t^2), \qquad
    \omega_t = \alpha_t \sigma'_t - \alpha'_t \sigma_t = \tfrac12 \alpha_t \sigma_t \gamma'_t .

Variance-preserving schedules are given by their gamma alone: :math:`\alpha^2 =
\mathrm{sigmoid}(-\gamma)`,
:math:`\sigma^2 = \mathrm{sigmoid}(\gamma)`, so that both ends are exact in floating point ("1 minus something small" never appears).
All quantities that the process needs are written in :math:`\alpha, \sigma, \alpha', \sigma'`, which
stay finite where gamma does not (flow matching ends at :math:`\alpha_1 = 0`, :math:`\gamma_1 =
\infty`):

.. math::
    e^{-\gamma}\gamma' = 2\alpha\omega/\sigma^3, \qquad 1/\gamma' = \alpha\sigma/(2\omega).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ndm.errors import UserError
from ndm.parts import Part
from ndm.shapes import expand


@dataclass(frozen=True)
class NoiseLevel:
    """A schedule at given times: every field has the shape of ``t``, ``(B,)`` or, expanded, ``(B,
    1, ..., 1)``.
    """

    t: Tensor
    gamma: Tensor
    """log(sigma²/alpha²), minus the log signal-to-noise ratio; nats."""
    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    """d alpha/dt"""
    dsigma: Tensor
    """d sigma/dt"""

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
        """1/gamma', finite everywhere."""
        return self.alpha * self.sigma / (2 * self.omega)

    @property
    def snr_decay(self) -> Tensor:
        """exp(-gamma) gamma' = -d(SNR)/dt, finite everywhere sigma is positive."""
        return 2 * self.alpha * self.omega / self.sigma**3

    def diffusion(self, eta: float) -> Tensor:
        """G = eta sigma sqrt(gamma'), the diffusion coefficient of the reverse-time SDE."""
        return eta * self.sigma * self.dgamma.sqrt()

    def expand(self, like: Tensor) -> "NoiseLevel":
        """The same level with every field reshaped to broadcast against ``like`` ``(B, *event)``."""
        return NoiseLevel(
            **{field.name: expand(getattr(self, field.name), like) for field in fields(self)}
        )

    def detach(self) -> "NoiseLevel":
        """The same level without the gradient of a learned schedule."""
        return NoiseLevel(
            **{field.name: getattr(self, field.name).detach() for field in fields(self)}
        )

    def rows(self, chosen: slice) -> "NoiseLevel":
        """The level of some examples of the batch."""
        return NoiseLevel(
            **{field.name: getattr(self, field.name)[chosen] for field in fields(self)}
        )

    def cat(self, other: "NoiseLevel") -> "NoiseLevel":
        """Both levels in one batch, for one network call at two sets of times."""
        pairs = {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
        }
        return NoiseLevel(**{name: torch.cat(pair) for name, pair in pairs.items()})


class Schedule(Part, ABC):
    """Maps times ``(B,)`` to a :class:`NoiseLevel`, derivatives included."""

    @abstractmethod
    def forward(self, t: Tensor) -> NoiseLevel:
        """Return the noise level at times ``t`` ``(B,)`` in [0, 1], in the dtype of ``t``."""


class VariancePreserving(Schedule, ABC):
    """A schedule with alpha² + sigma² = 1, given by its gamma."""

    @abstractmethod
    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma and d gamma/dt at times ``t`` ``(B,)``; gamma increases strictly."""

    def forward(self, t: Tensor) -> NoiseLevel:
        gamma, dgamma = self.gamma(t)
        alpha, sigma = (
            torch.exp(0.5 * nnf.logsigmoid(-gamma)),
            torch.exp(0.5 * nnf.logsigmoid(gamma)),
        )
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
    """gamma linear in t (VDM, Kingma et al. 2021, the fixed schedule).

    Args:
        gamma_0: gamma at t = 0. The decoder resolves values sqrt(exp(gamma_0)) apart.
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
    r"""gamma = 2 log tan(pi u/2), u running over the part of [0, 1] where gamma lies between its
    ends.

    Nichol & Dhariwal 2021 (alpha = cos(pi u/2)), truncated exactly at ``gamma_0`` and ``gamma_1``.

    Args:
        gamma_0: gamma at t = 0.
        gamma_1: gamma at t = 1.
    """

    def __init__(self, gamma_0: float = -13.3, gamma_1: float = 10.0):
        super().__init__()
        check_gamma_ends(gamma_0, gamma_1)
        self.gamma_0, self.gamma_1 = gamma_0, gamma_1

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start, end = (
            math.atan(math.exp(0.5 * self.gamma_0)),
            math.atan(math.exp(0.5 * self.gamma_1)),
        )
        angle = start + (end - start) * t
        gamma = 2 * torch.log(torch.tan(angle)).where(t > 0, 0.5 * self.gamma_0).where(
            t < 1, 0.5 * self.gamma_1
        )  # exact ends
        return gamma, 4 * (end - start) / torch.sin(2 * angle)


class LinearBetaSchedule(VariancePreserving):
    r"""DDPM's linear beta in continuous time: alpha² = exp(-B(u)), B(u) = beta_0 u + (beta_1 -
    beta_0) u²/2.

    Ho et al. 2020 with 1,000 steps of beta from 1e-4 to 0.02; Song et al. 2021 for the limit. u =
    t_0 + (1 - t_0) t starts at ``t_0`` because gamma is minus infinity at u = 0. gamma = log(exp(B)
    - 1).

    Args:
        beta_0: rate at u = 0 (1,000 times DDPM's first beta).
        beta_1: rate at u = 1 (1,000 times DDPM's last beta).
        t_0: where t = 0 lies on DDPM's own clock; in (0, 1).
    """

    def __init__(self, beta_0: float = 0.1, beta_1: float = 20.0, t_0: float = 1e-3):
        super().__init__()
        if not (0 < beta_0 <= beta_1 and 0 < t_0 < 1):
            raise UserError(
                f"beta_0={beta_0}, beta_1={beta_1}, t_0={t_0}: need 0 < beta_0 <= beta_1 and 0 <"
                " t_0 < 1"
            )
        self.beta_0, self.beta_1, self.t_0 = beta_0, beta_1, t_0

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u = self.t_0 + (1 - self.t_0) * t
        integral = self.beta_0 * u + 0.5 * (self.beta_1 - self.beta_0) * u**2
        rate = (1 - self.t_0) * (self.beta_0 + (self.beta_1 - self.beta_0) * u)
        # log(exp(B) - 1) = B + log(1 - exp(-B)): no overflow for large B, no cancellation for small
        # B.
        return integral + torch.log(-torch.expm1(-integral)), rate / -torch.expm1(-integral)


class FlowMatchingSchedule(Schedule):
    """The straight path of flow matching: alpha = 1 - t, sigma = t (Lipman et al. 2023), not
    variance preserving.

    Args:
        sigma_0: noise left at t = 0 (sigma = sigma_0 + (1 - sigma_0) t): the width of the decoder,
            so positive.
        alpha_1: signal left at t = 1 (alpha = 1 - (1 - alpha_1) t). With 0 the prior term is
            exactly 0 and the ODE and the ancestral sampler are finite, while the coefficient of the
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
    r"""A learned monotone gamma whose ends are exact at every moment of training.

    .. math::
        \gamma(t) = \gamma_0 + (\gamma_1 - \gamma_0)\, \frac{g(t) - g(0)}{g(1) - g(0)}, \qquad
        g(t) = w t + \sum_j a_j\, \mathrm{sigmoid}(b_j (t - c_j)), \quad w, a_j, b_j > 0 .

    VDM's monotone network with its normalization (Kingma et al. 2021, appendix), written so that
    the derivative is a closed form. It starts linear up to a few per cent. In continuous time the
    bound of a plain diffusion does not depend on the inside of the schedule, only on its ends; the
    inside then acts on the variance of the estimate alone.

    Args:
        gamma_0: gamma at t = 0; the starting value if the ends are learned.
        gamma_1: gamma at t = 1; the starting value if the ends are learned.
        learn_ends: learn both ends too; gamma_1 - gamma_0 stays positive. Then gamma(0) and
            gamma(1) are exactly ``ends()``.
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
        self.gamma_0, self.gamma_1, self.learn_ends, self.units = (
            gamma_0,
            gamma_1,
            learn_ends,
            units,
        )
        start = torch.tensor([gamma_0, math.log(gamma_1 - gamma_0)])
        self.start_and_log_range = nn.Parameter(start) if learn_ends else None
        self.log_slope = nn.Parameter(torch.zeros(()))
        self.log_height = nn.Parameter(torch.full((units,), math.log(0.1 / units)))
        self.log_steepness = nn.Parameter(torch.linspace(math.log(2.0), math.log(20.0), units))
        self.center = nn.Parameter(torch.linspace(0.0, 1.0, units))

    def ends(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """gamma at t = 0 and at t = 1, scalars; of the given dtype, or that of the parameters."""
        dtype = dtype or self.log_slope.dtype
        if self.start_and_log_range is None:
            start, end = (
                self.log_slope.new_full((), gamma, dtype=dtype)
                for gamma in (self.gamma_0, self.gamma_1)
            )
            return start, end
        start, log_range = self.start_and_log_range.to(dtype)
        return start, start + log_range.exp()

    def _raw(self, t: Tensor) -> tuple[Tensor, Tensor]:
        steepness, height = self.log_steepness.exp(), self.log_height.exp()
        gate = torch.sigmoid(steepness * (t[..., None] - self.center))
        slope = self.log_slope.exp()
        return slope * t + (height * gate).sum(-1), slope + (
            height * steepness * gate * (1 - gate)
        ).sum(-1)

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # One call for the ends and the times, so that t = 0 and t = 1 give the very floats of the
        # ends.
        value, slope = self._raw(torch.cat([torch.arange(2, dtype=t.dtype, device=t.device), t]))
        low, high, value, slope = value[0], value[1], value[2:], slope[2:]
        start, end = self.ends(t.dtype)
        # lerp is exact at 0 and at 1, where (value - low) is exactly 0 and exactly (high - low).
        gamma = torch.lerp(start.expand_as(t), end.expand_as(t), (value - low) / (high - low))
        return gamma, (end - start) * slope / (high - low)
