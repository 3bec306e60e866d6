r"""The variational bound, term by term and example by example.

.. math::
    -\log p(x) \le \underbrace{KL(q(z_1|x)\,\|\,N(0,I))}_{\text{prior}} + L_{\text{diffusion}}
                   + \underbrace{E_{q(z_0|x)}[-\log p(x|z_0)]}_{\text{reconstruction}}

Discrete time, T steps, s = t_{i-1}, t = t_i, by default t_i = i/T (NDM, Algorithm 1):

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

A predictor with a learned variance s² of its error (:class:`ndm.Predictor`) has its own r for each
example and dimension, trained on this cost,

.. math::
    r = 1 + (\alpha_s - k\alpha_t)^2\, s^2(z_t, t) / v .

A fitted r multiplies it.

:mod:`ndm.evaluation.calibrate` finds the best r and the best eta after training.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ndm.curve import Curve
from ndm.decoder import Decoder
from ndm.discrete_time import discrete_errors
from ndm.errors import UserError
from ndm.forward import NoisingProcess
from ndm.parts import masked
from ndm.reverse import MarkovReverse, Reverse, require_markov
from ndm.schedule import NoiseLevel
from ndm.shapes import sum_event
from ndm.time_grid import Steps, as_grid
from ndm.time_sampling import Draw, Eta, PiecewiseConstant, check_eta, eta_at


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
    draws: Tensor | None = None
    """:attr:`total` at each of K times, ``(B, K)``, nats; None without a number of draws."""

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


def discrete_diffusion(
    reverse: MarkovReverse,
    curve: Curve,
    draw: Draw,
    steps: Steps,
    eta: Eta = 1.0,
    variance_ratio: PiecewiseConstant | None = None,
) -> Integrand:
    """Return T ||Δmu||²/(2v) at the step selected by u.

    For uniform u this is an unbiased estimate of the sum over steps.

    Args:
        reverse: the reverse process.
        curve: t -> F(x, t) at the data.
        draw: u and noise.
        steps: T, or the time grid.
        eta: eta of the posterior; positive, because the bound of DDIM (eta = 0) is infinite.
        variance_ratio: r, the ratio of the reverse variance to v, for all dimensions or for each;
            None means r = 1.
    """
    found = discrete_errors(reverse, curve, draw, steps, eta)
    error, steps = found.error, as_grid(steps).steps
    # In double precision, because it tends to 1 as 1/T.
    fitted = None if variance_ratio is None else variance_ratio.broadcast(found.midpoint, error)
    cost = error**2
    if found.excess is not None:  # log r + 1/r - 1 would cancel for r near 1
        u = found.excess
        factor = 1.0 if fitted is None else fitted
        cost = cost / (factor * (1 + u)) + torch.log1p(u) - u / (1 + u)
        if fitted is not None:
            cost = cost + torch.log(fitted) + (1 / fitted - 1) / (1 + u)
    elif fitted is not None:
        cost = cost / fitted + torch.log(fitted) + 1 / fitted - 1
    total = sum_event(masked(cost, reverse.process.missing))
    return Integrand((steps * 0.5 * total).to(error.dtype), found.regression)


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
    eta_here = eta_at(eta, draw.u, draw.noise)
    level, error, regression = continuous_errors(reverse, curve, draw, eta_here)
    return Integrand(0.5 * level.snr_decay * sum_event(error**2 / eta_here**2), regression)


def diffusion_integrand(
    reverse: Reverse,
    curve: Curve,
    draw: Draw,
    steps: Steps | None = None,
    eta: Eta = 1.0,
    variance_ratio: PiecewiseConstant | None = None,
) -> Integrand:
    """Return the diffusion term at one time per example, in discrete or continuous time.

    Args:
        reverse: the reverse process.
        curve: t -> F(x, t) at the data.
        draw: u and noise.
        steps: T or a time grid; None for continuous time.
        eta: stochasticity, positive.
        variance_ratio: r, for discrete time only; None means r = 1.

    Raises:
        UserError: eta or steps is out of range, or continuous time is combined with a variance
            ratio.
    """
    check_eta(eta)
    if steps is not None:
        steps = as_grid(steps)
    if steps is None and variance_ratio is not None:
        raise UserError(
            "variance_ratio needs discrete time: in continuous time the bound is infinite for"
            " every reverse variance other than that of the forward process; leave variance_ratio"
            " out, or give steps"
        )
    if steps is None:
        return continuous_diffusion(reverse, curve, draw, eta)
    markov = require_markov(reverse, f"steps={steps.steps}")
    return discrete_diffusion(markov, curve, draw, steps, eta, variance_ratio)
