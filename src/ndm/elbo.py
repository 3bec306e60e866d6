r"""The variational bound, term by term and example by example.

.. math::
    -\log p(x) \le \underbrace{KL(q(z_1|x)\,\|\,N(0,I))}_{\text{prior}} + L_{\text{diffusion}}
                   + \underbrace{E_{q(z_0|x)}[-\log p(x|z_0)]}_{\text{reconstruction}}

Discrete time, T steps, s = (i-1)/T, t = i/T (NDM, Algorithm 1):

.. math::
    L_{\text{diffusion}} = T\, E_i \frac{\|\Delta\mu\|^2}{2 v}, \qquad
    \Delta\mu = (\alpha_s - k\alpha_t)\,\Delta F_t + \alpha_s (\Delta F_s - \Delta F_t), \qquad
    \Delta F_t = F(x,t) - F(\hat x,t)

Continuous time (NDM, section 3.3; for any eta, ours):

.. math::
    L_{\text{diffusion}} = E_t\, \frac{e^{-\gamma}\gamma'}{2\eta^2}
        \Bigl\| \Delta\dot F / \gamma' - \tfrac12 (1 + \eta^2)\, \Delta F \Bigr\|^2, \qquad
    \Delta\dot F = \partial_t \Delta F

The sign between the two terms is minus: at eta = 1 the reverse process regresses on F - dF/dgamma.
With F = x this is VDM's loss. The parameters phi of F receive gradients from all three terms.
Without the prior or the reconstruction term, or with a reweighted diffusion term, F collapses.

In discrete time the reverse process may have variance r v instead of v (Analytic-DPM, Bao et al.
2022). Each step then costs

.. math::
    KL(q(z_s|z_t,x)\,\|\,N(\hat\mu, r v I))
        = \frac{\|\Delta\mu\|^2}{2 r v} + \frac D2 \bigl(\log r + \tfrac1r - 1\bigr) .

With K paths z drawn from q(.|x), the discrete-time model also has a bound that tightens with K
(Burda et al. 2016):

.. math::
    -\log p(x) \le -E \log \tfrac1K \textstyle\sum_k w_k, \qquad
    w_k = p(x, z^{(k)}) / q(z^{(k)}|x) .

:mod:`ndm.evaluation.calibrate` finds the best r and the best eta after training.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ndm.decoder import Decoder
from ndm.errors import UserError
from ndm.forward import Gaussian, NoisingProcess, gaussian, posterior_coefficients
from ndm.random import RandomSource, standard_normal
from ndm.reverse import MarkovReverse, Reverse, require_markov
from ndm.schedule import NoiseLevel
from ndm.shapes import event_size, expand, sum_event
from ndm.time_sampling import PiecewiseConstant
from ndm.transform import Curve


@dataclass(frozen=True)
class Bound:
    """Terms of the negative evidence lower bound per example: ``(B,)`` tensors, nats."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    regression: Tensor | None = None
    """Regression loss of the second head of a direct reverse process, when gradients are enabled.

    Not part of the bound.
    """

    @property
    def loss(self) -> Tensor:
        """The training loss ``(B,)``, nats: the bound plus the regression loss, if any."""
        return self.total if self.regression is None else self.total + self.regression

    @property
    def total(self) -> Tensor:
        """The bound ``(B,)``, nats: an estimate whose expectation is at least -log p(x)."""
        return self.prior + self.diffusion + self.reconstruction

    def terms(self) -> dict[str, Tensor]:
        """Return the terms and their sum by name."""
        return {
            "prior": self.prior,
            "diffusion": self.diffusion,
            "reconstruction": self.reconstruction,
            "nelbo": self.total,
        }


def bits_per_dim(nats: Tensor | float, dims: int) -> Tensor | float:
    """Convert nats per example to bits per dimension: nats/(D ln 2)."""
    return nats / (dims * math.log(2))


def prior_term(process: NoisingProcess, x: Tensor, curve: Curve | None = None) -> Tensor:
    """Return KL(q(z_1|x) || N(0, I)), ``(B,)``, nats.

    Args:
        process: the forward process.
        x: data ``(B, *event)``.
        curve: t -> F(x, t), if it has been computed already.
    """
    return process.marginal(x, process.level(1.0, x), curve).kl_to_normal()


def reconstruction_term(
    process: NoisingProcess, decoder: Decoder, x: Tensor, noise: Tensor, curve: Curve | None = None
) -> Tensor:
    """Return -log p(x|z_0) for one z_0 ~ q(z_0|x), ``(B,)``, nats.

    Args:
        process: the forward process.
        decoder: p(x|z_0).
        x: data ``(B, *event)``.
        noise: standard normal, from which z_0 is made.
        curve: t -> F(x, t), if it has been computed already.
    """
    level = process.level(0.0, x)
    return -decoder.log_prob(x, process.first_marginal(x, level, curve).sample(noise), level)


MOST_STEPS = 10**7
"""Largest T. With more steps, single precision rounds a step away."""
Eta = float | PiecewiseConstant
"""Stochasticity of the reverse process: a number or a function of time."""


def _eta_at(eta: Eta, t: Tensor, like: Tensor) -> float | Tensor:
    """Return eta at times ``t`` ``(B,)``, in a shape that broadcasts against ``like``."""
    return expand(eta(t), like) if isinstance(eta, PiecewiseConstant) else eta


@dataclass(frozen=True)
class Draw:
    """The time and the noise drawn for each example."""

    u: Tensor
    """Uniform numbers in [0, 1), ``(B,)``.

    In continuous time u is the time t, in discrete time it selects the step floor(uT) + 1.
    """
    noise: Tensor
    """Standard normal, in the shape of F(x, t)."""
    coin: Tensor | None = None
    """A uniform number ``(1,)`` for a direct reverse process with two heads.

    See :meth:`ndm.reverse.MarkovReverse.training_curve`.
    """


@dataclass(frozen=True)
class BoundDraw(Draw):
    """All random numbers of one estimate of the bound."""

    weight: Tensor | None = None
    """Importance weights of the times, ``(B,)``; None means 1."""
    noise_0: Tensor | None = None
    """Standard normal for the reconstruction term, in the shape of F(x, 0)."""


@dataclass(frozen=True)
class Integrand:
    """The diffusion term at one time per example, ``(B,)``, nats."""

    bound: Tensor
    """The integrand; its mean over time is the diffusion term."""
    regression: Tensor | None = None
    """Regression loss of the second head of a direct reverse process; not part of the bound."""


def discrete_errors(
    reverse: MarkovReverse, curve: Curve, draw: Draw, steps: int, eta: Eta = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ||Δmu||²/v at the step selected by u, its midpoint, and the loss of a second head.

    The first two have shape ``(B,)``. Arguments are those of :func:`discrete_diffusion`.
    """
    step = torch.floor(draw.u * steps).clamp(max=steps - 1)
    midpoint = (step + 0.5) / steps
    s, t = reverse.process.schedule(step / steps), reverse.process.schedule((step + 1) / steps)
    true_s, true_t = curve.at_both(s, t)
    eta_at = _eta_at(eta, midpoint, true_t)
    predicted, regression = reverse.training_curve(true_t, draw.noise, t, eta_at, draw.coin)
    predicted_s, predicted_t = predicted.at_both(s, t)
    error_s, error_t = true_s - predicted_s, true_t - predicted_t
    at_s = s.expand(true_t)
    coefficients = posterior_coefficients(at_s, t.expand(true_t), eta_at)
    mean_error = coefficients.target_weight * error_t + at_s.alpha * (error_s - error_t)
    return sum_event(mean_error**2 / coefficients.variance), midpoint, regression


def discrete_diffusion(
    reverse: MarkovReverse,
    curve: Curve,
    draw: Draw,
    steps: int,
    eta: Eta = 1.0,
    variance_ratio: PiecewiseConstant | None = None,
) -> Integrand:
    """Return T ||Δmu||²/(2v) at the step selected by u.

    For uniform u this is an unbiased estimate of the sum over steps.

    Args:
        reverse: the reverse process.
        curve: t -> F(x, t) at the data.
        draw: u and noise.
        steps: T.
        eta: eta of the posterior; positive, because the bound of DDIM (eta = 0) is infinite.
        variance_ratio: r, the ratio of the reverse variance to v; None means r = 1.
    """
    square, midpoint, regression = discrete_errors(reverse, curve, draw, steps, eta)
    if variance_ratio is None:
        return Integrand(steps * square / 2, regression)
    ratio = variance_ratio(midpoint)
    excess = event_size(draw.noise) * (torch.log(ratio) + 1 / ratio - 1)
    return Integrand(steps * 0.5 * (square / ratio + excess), regression)


def continuous_errors(
    reverse: Reverse, curve: Curve, draw: Draw, eta: float | Tensor = 1.0
) -> tuple[NoiseLevel, Tensor, Tensor | None]:
    """Return the noise level at t = u, the error there, and the loss of a second head.

    See :meth:`ndm.reverse.Reverse.continuous_error`.
    """
    level = reverse.process.schedule(draw.u)
    error, regression = reverse.continuous_error(curve, draw.noise, level, eta, draw.coin)
    return level, error, regression


def continuous_diffusion(reverse: Reverse, curve: Curve, draw: Draw, eta: Eta = 1.0) -> Integrand:
    """Return the integrand of the continuous-time diffusion term at t = u.

    Arguments are those of :func:`discrete_diffusion`.
    """
    eta_at = _eta_at(eta, draw.u, draw.noise)
    level, error, regression = continuous_errors(reverse, curve, draw, eta_at)
    return Integrand(0.5 * level.snr_decay * sum_event(error**2 / eta_at**2), regression)


def diffusion_integrand(
    reverse: Reverse,
    curve: Curve,
    draw: Draw,
    steps: int | None = None,
    eta: Eta = 1.0,
    variance_ratio: PiecewiseConstant | None = None,
) -> Integrand:
    """Return the diffusion term at one time per example, in discrete or continuous time.

    Args:
        reverse: the reverse process.
        curve: t -> F(x, t) at the data.
        draw: u and noise.
        steps: T; None for continuous time.
        eta: stochasticity, positive.
        variance_ratio: r, for discrete time only; None means r = 1.

    Raises:
        UserError: eta or steps is out of range, or continuous time is combined with a variance
            ratio.
    """
    _check_steps_and_eta(steps, eta)
    if steps is None and variance_ratio is not None:
        raise UserError(
            "variance_ratio needs discrete time: in continuous time the bound is infinite for"
            " every reverse variance other than that of the forward process; leave variance_ratio"
            " out, or give steps"
        )
    if steps is None:
        return continuous_diffusion(reverse, curve, draw, eta)
    markov = require_markov(reverse, f"steps={steps}")
    return discrete_diffusion(markov, curve, draw, steps, eta, variance_ratio)


def _check_steps_and_eta(steps: int | None, eta: Eta) -> None:
    if not isinstance(eta, PiecewiseConstant) and not eta > 0:
        raise UserError(
            f"eta={eta}: the bound is infinite for a deterministic reverse process; use eta > 0,"
            " eta=1 for DDPM"
        )
    if steps is not None and (
        isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS
    ):
        raise UserError(
            f"steps={steps}: give an integer from 1 to {MOST_STEPS} for discrete time, or None for"
            " continuous time"
        )


def path_log_weight(
    reverse: Reverse,
    decoder: Decoder,
    x: Tensor,
    steps: int,
    source: RandomSource = None,
    eta: Eta = 1.0,
    variance_ratio: PiecewiseConstant | None = None,
) -> Tensor:
    """Return log w = log p(x, z) - log q(z|x) of one path z_1 ... z_0 of the T-step process.

    Its expectation is minus the NELBO.

    Args:
        reverse: the reverse process.
        decoder: p(x|z_0).
        x: data ``(B, *event)``.
        steps: T; the predictor is evaluated T times.
        source: source of randomness.
        eta: eta of the posterior.
        variance_ratio: r, the ratio of the reverse variance to v; None means r = 1.

    Returns:
        ``(B,)``, nats.
    """
    _check_steps_and_eta(steps, eta)
    decoder.check(x)
    markov = require_markov(reverse, f"steps={steps}")
    process = markov.process
    t, curve = process.level(1.0, x), process.curve(x)
    true_t = curve.at(t)
    q = gaussian(true_t, t)
    z = q.sample(standard_normal(true_t, source))
    log_weight = Gaussian(torch.zeros_like(z), torch.ones_like(z)).log_prob(z) - q.log_prob(z)
    for index in range(steps, 0, -1):
        s = process.level((index - 1) / steps, x)
        midpoint = torch.full_like(t.t, (index - 0.5) / steps)
        eta_at = _eta_at(eta, midpoint, z)
        true_s = curve.at(s)
        q = process.posterior_of(z, (true_s, true_t), s, t, eta_at)
        p = markov.posterior(z, s, t, eta_at)
        if variance_ratio is not None:
            p = Gaussian(p.mean, p.std * expand(variance_ratio(midpoint), z).sqrt())
        z = q.sample(standard_normal(z, source))
        log_weight = log_weight + p.log_prob(z) - q.log_prob(z)
        t, true_t = s, true_s
    return log_weight + decoder.log_prob(x, z, t)
