r"""The forward process: marginal, posterior for any variance, conditional drift.

.. math::
    q(z_t|x) &= N(\alpha_t F(x,t), \sigma_t^2 I) \\
    q(z_s|z_t,x) &= N(\alpha_s F(x,s) + k (z_t - \alpha_t F(x,t)),\; v I), \qquad
    k = \sqrt{\sigma_s^2 - v} / \sigma_t, \quad s < t \\
    f(z,t,x) &= \frac{d(\alpha F)}{dt}
    + \Bigl(\frac{\sigma'}{\sigma} + \frac{g^2}{2\sigma^2}\Bigr)(z - \alpha F),
    \qquad g^2 = \eta^2 \sigma^2 \gamma'

The posterior is consistent with the marginals for every 0 <= v <= sigma_s². With v = eta² sigma_s²
(1 - exp(gamma_s - gamma_t)), eta = 1 is DDPM and eta = 0 is DDIM. With d = gamma_s - gamma_t, the
coefficients in the bound have no cancellation however close s and t are:

.. math::
    k \alpha_t / \alpha_s = \exp\bigl(\tfrac12 [d + \log(1 + \eta^2 (e^d - 1))]\bigr), \qquad
    \alpha_s - k \alpha_t
    = -\alpha_s\, \mathrm{expm1}\bigl(\tfrac12 [d
    + \mathrm{log1p}(\eta^2\, \mathrm{expm1}(d))]\bigr) .

Source: Neural Diffusion Models (Bartosh et al. 2024), section 3 and appendix A; eta as in DDIM
(Song et al. 2021).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ndm.curve import Curve, mask_curve
from ndm.errors import UserError
from ndm.parts import Conditional, masked
from ndm.schedule import NoiseLevel, Schedule, exact_pair
from ndm.shapes import expand, sum_event
from ndm.transform import Transform


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian with mean ``(B, *event)`` and a standard deviation that broadcasts against it."""

    mean: Tensor
    std: Tensor
    missing: Tensor | None = field(default=None, kw_only=True)
    """The dimensions that it is of, see :class:`ndm.MaskCondition`; None for all."""

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std noise; 0 in known dimensions."""
        return masked(self.mean + self.std * noise, self.missing)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of ``value`` ``(B, *event)`` in nats, ``(B,)``."""
        standardized = (value - self.mean) / self.std
        log_scale = torch.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -sum_event(masked(0.5 * standardized**2 + log_scale, self.missing))

    def kl_to_normal(self) -> Tensor:
        """Return KL(self || N(0, I)) in nats, ``(B,)``."""
        # expm1 of log sigma² keeps sigma² - 1 - log sigma² accurate for sigma near 1.
        log_variance = 2 * torch.log(self.std)
        each = self.mean**2 + (torch.expm1(log_variance) - log_variance)
        return 0.5 * sum_event(masked(each, self.missing))


@dataclass(frozen=True)
class PosteriorCoefficients:
    """Coefficients of q(z_s|z_t,x), in the shape and dtype of the levels."""

    k: Tensor
    """Weight of the noise part z_t - alpha_t F(x, t)."""
    decay: Tensor
    """1 - k, with the digits that k loses by rounding when s and t are close."""
    target_weight: Tensor
    """alpha_s - k alpha_t without cancellation: the weight of F in the mean if F is constant."""
    variance: Tensor
    """v"""


def posterior_coefficients(
    s: NoiseLevel, t: NoiseLevel, eta: float | Tensor
) -> PosteriorCoefficients:
    """Return the coefficients of the posterior with v = eta² sigma_s² (1 - exp(gamma_s - gamma_t)).

    They are computed in double precision, see :func:`ndm.schedule.exact_pair`.

    Args:
        s: the earlier level (closer to data).
        t: the later level.
        eta: 1 is DDPM, 0 is DDIM; values above 1 are allowed as long as v <= sigma_s².

    Raises:
        UserError: eta is negative, or so large that v would exceed sigma_s².
    """
    dtype = s.alpha.dtype
    s, t = exact_pair(s, t)
    shrink = torch.expm1(s.gamma - t.gamma)  # in [-1, 0]
    relative_variance = eta**2 * shrink  # -v/sigma_s²
    if isinstance(eta, Tensor) or not 0 <= eta <= 1:  # an eta up to 1 is always in range
        eta = torch.as_tensor(eta, dtype=shrink.dtype, device=shrink.device)
        if not bool((eta >= 0).all()) or not bool((relative_variance >= -1 - 1e-6).all()):
            largest = float((-shrink).max()) ** -0.5
            raise UserError(
                f"eta={float(eta.max()):g} is out of range for this step: the posterior needs 0 <="
                f" eta <= {largest:.6g}; eta=1 is DDPM"
            )
    relative_variance = relative_variance.clamp(min=-1)
    # Over a long step shrink may round to -1, where the gradient of log1p is infinite.
    off_pole = relative_variance.clamp(min=-1 + torch.finfo(relative_variance.dtype).eps)
    log_ratio = 0.5 * (s.gamma - t.gamma + torch.log1p(off_pole))  # log(k alpha_t / alpha_s)
    k = s.sigma / t.sigma * (1 + relative_variance).sqrt()
    return PosteriorCoefficients(
        k=k.to(dtype),
        decay=(1 - k).to(dtype),
        target_weight=(-s.alpha * torch.expm1(log_ratio)).to(dtype),
        variance=(-(s.sigma**2) * relative_variance).to(dtype),
    )


class NoisingProcess(Conditional, ABC):
    """The marginals q(z_t|x) of a schedule and a transformation, in continuous time.

    Args:
        schedule: noise levels over time.
        transform: F(x, t).
    """

    def __init__(self, schedule: Schedule, transform: Transform):
        super().__init__()
        self.schedule, self.transform = schedule, transform

    def level(self, t: Tensor | float, like: Tensor) -> NoiseLevel:
        """Return the noise level at ``t``, a number or ``(B,)``, for a batch ``like``.

        It has the dtype of ``like``. For differences of neighboring times give a number, or
        float64.
        """
        if isinstance(t, Tensor):
            t = t.to(like.device)
        else:
            precise = like.dtype if like.device.type == "mps" else torch.float64
            t = torch.as_tensor(t, dtype=precise, device=like.device)
        return self.schedule.at(t.repeat(like.shape[0]) if t.dim() == 0 else t, like.dtype)

    @abstractmethod
    def curve(self, x: Tensor) -> Curve:
        """Return the curve t -> F(x, t) at ``x`` ``(B, *event)``; subclasses may add to it."""

    @abstractmethod
    def marginal(self, x: Tensor, level: NoiseLevel, curve: Curve | None = None) -> Gaussian:
        """Return q(z_t|x) for ``x`` ``(B, *event)``; pass :meth:`curve` of x if it is available."""

    def first_marginal(self, x: Tensor, level: NoiseLevel, curve: Curve | None = None) -> Gaussian:
        """Return q(z_0|x) = N(alpha_0 F(x, 0), sigma_0² I), without evaluating F if F(x, 0) = x."""
        at_zero = x if self.transform.data_at_zero else (curve or self.curve(x)).at(level)
        return gaussian(at_zero, level, self.missing)


def gaussian(transformed: Tensor, level: NoiseLevel, missing: Tensor | None = None) -> Gaussian:
    """Return N(alpha_t F, sigma_t² I) for F ``(B, *event)``, in the missing dimensions if given."""
    mean = expand(level.alpha, transformed) * transformed
    return Gaussian(mean, expand(level.sigma, transformed), missing=missing)


def drift_of(
    z: Tensor, transformed: tuple[Tensor, Tensor], level: NoiseLevel, eta: float = 1.0
) -> Tensor:
    """Return the drift f(z, t, x), ``(B, *event)``, from F(x, t) and dF(x, t).

    Raises:
        UserError: eta > 0 where alpha = 0, so that g is infinite.
    """
    value, derivative = transformed
    at = level.expand(z)
    noise_rate = at.dsigma / at.sigma
    if eta:
        if bool((level.alpha == 0).any()):
            raise UserError(
                "the generative SDE is infinite where alpha = 0 (t = 1 of this schedule); use the"
                " ODE, the ancestral sampler, or a schedule that keeps some signal, for example"
                " FlowMatchingSchedule(alpha_1=1e-3)"
            )
        noise_rate = noise_rate + 0.5 * eta**2 * at.dgamma
    return at.dalpha * value + at.alpha * derivative + noise_rate * (z - at.alpha * value)


class ForwardProcess(NoisingProcess):
    """The forward process q(z_t|x) = N(alpha_t F(x, t), sigma_t² I), with its posteriors.

    It supports discrete and continuous time.

    Args:
        schedule: noise levels over time.
        transform: F(x, t).
    """

    def curve(self, x: Tensor) -> Curve:
        """Return t -> F(x, t) at ``x`` ``(B, *event)``, 0 in known dimensions."""
        return mask_curve(self.transform.curve(x), self.missing)

    def marginal(self, x: Tensor, level: NoiseLevel, curve: Curve | None = None) -> Gaussian:
        return gaussian((curve or self.curve(x)).at(level), level, self.missing)

    def posterior(
        self, z: Tensor, x: Tensor, s: NoiseLevel, t: NoiseLevel, eta: float | Tensor = 1.0
    ) -> Gaussian:
        """Return q(z_s|z_t,x) with v = eta² sigma_s² (1 - exp(gamma_s - gamma_t)).

        ``z`` and ``x`` are ``(B, *event)``.
        """
        return self.posterior_of(z, self.curve(x).at_both(s, t), s, t, eta)

    def posterior_of(
        self,
        z: Tensor,
        transformed: tuple[Tensor, Tensor],
        s: NoiseLevel,
        t: NoiseLevel,
        eta: float | Tensor = 1.0,
    ) -> Gaussian:
        """Return q(z_s|z_t,x) from F(x, s) and F(x, t)."""
        at_s, at_t = transformed
        step = posterior_coefficients(s.expand(z), t.expand(z), eta)
        return self.posterior_from(z, at_t, at_s - at_t, s, step)

    @staticmethod
    def posterior_from(
        z: Tensor, at_t: Tensor, difference: Tensor, s: NoiseLevel, step: PosteriorCoefficients
    ) -> Gaussian:
        """Return q(z_s|z_t,x) from F(x, t), F(x, s) - F(x, t) and the coefficients."""
        # alpha_s F(x, s) + k (z - alpha_t F(x, t)) would round a short step away.
        shift = step.target_weight * at_t + expand(s.alpha, z) * difference
        return Gaussian(z - step.decay * z + shift, step.variance.sqrt())

    def posterior_with_variance(
        self, z: Tensor, x: Tensor, s: NoiseLevel, t: NoiseLevel, variance: Tensor
    ) -> Gaussian:
        """Return q(z_s|z_t,x) with variance v ``(B,)``, any with 0 <= v <= sigma_s².

        Raises:
            UserError: a variance lies outside [0, sigma_s²].
        """
        if bool((variance < 0).any()) or bool((variance > s.sigma**2 * (1 + 1e-6)).any()):
            raise UserError("the posterior variance must lie between 0 and sigma_s²")
        k = expand((s.sigma**2 - variance).clamp(min=0).sqrt() / t.sigma, z)
        at_s, at_t = self.curve(x).at_both(s, t)
        mean = expand(s.alpha, z) * at_s + k * (z - expand(t.alpha, z) * at_t)
        return Gaussian(mean, expand(variance, z).sqrt())

    def drift(self, z: Tensor, x: Tensor, level: NoiseLevel, eta: float = 1.0) -> Tensor:
        """Return the conditional reverse-time drift f(z, t, x), ``(B, *event)``.

        The diffusion coefficient is g = eta sigma sqrt(gamma').

        Raises:
            UserError: eta > 0 where alpha = 0, so that g is infinite.
        """
        return drift_of(z, self.curve(x).with_derivative(level), level, eta)
