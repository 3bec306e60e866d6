r"""The variational bound, term by term and example by example.

.. math::
    -\log p(x) \le \underbrace{KL(q(z_1|x)\,\|\,N(0,I))}_{\text{prior}} + L_{\text{diffusion}}
                   + \underbrace{E_{q(z_0|x)}[-\log p(x|z_0)]}_{\text{reconstruction}}

Discrete time, T steps, s = (i-1)/T, t = i/T (NDM, Algorithm 1):

.. math::
    L_{\text{diffusion}} = T\, E_i \frac{\|\Delta\mu\|^2}{2 v}, \qquad
    \Delta\mu = (\alpha_s - k\alpha_t)\,\Delta F_t + \alpha_s (\Delta F_s - \Delta F_t), \qquad \Delta F_t = F(x,t) - F(\hat x,t)

Continuous time (NDM, section 3.3; any eta, ours):

.. math::
    L_{\text{diffusion}} = E_t\, \frac{e^{-\gamma}\gamma'}{2\eta^2}
        \Bigl\| \Delta\dot F / \gamma' - \tfrac12 (1 + \eta^2)\, \Delta F \Bigr\|^2, \qquad \Delta\dot F = \partial_t \Delta F

The sign between the two is minus: at eta = 1 the target of the reverse process is F - dF/dgamma.
With F = x this is VDM's loss. All three terms carry gradients for phi: leaving the prior or the
reconstruction out, or reweighting the diffusion term, lets F collapse.

A reverse process in discrete time may have another variance, r v instead of v (Analytic-DPM, Bao et
al. 2022). Its step costs

.. math::
    KL(q(z_s|z_t,x)\,\|\,N(\hat\mu, r v I)) = \frac{\|\Delta\mu\|^2}{2 r v} + \frac D2 \bigl(\log r + \tfrac1r - 1\bigr),

and with K whole paths z of q(.|x) the discrete-time model has a bound that tightens with K (Burda
et al. 2016):

.. math::
    -\log p(x) \le -E \log \tfrac1K \textstyle\sum_k w_k, \qquad w_k = p(x, z^{(k)}) / q(z^{(k)}|x) .

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
    """The terms of the negative evidence lower bound of each example: ``(B,)`` tensors, nats."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    regression: Tensor | None = None
    """What the second head of a direct reverse process learns from, with gradients alone; no part
    of the bound.
    """

    @property
    def loss(self) -> Tensor:
        """What training minimizes: the bound, and the regression of a second head if there is one;
        ``(B,)``, nats.
        """
        return self.total if self.regression is None else self.total + self.regression

    @property
    def total(self) -> Tensor:
        """The bound itself: an estimate whose expectation is at least -log p(x); ``(B,)``, nats."""
        return self.prior + self.diffusion + self.reconstruction

    def terms(self) -> dict[str, Tensor]:
        """The terms and their sum by name."""
        return {
            "prior": self.prior,
            "diffusion": self.diffusion,
            "reconstruction": self.reconstruction,
            "nelbo": self.total,
        }


def bits_per_dim(nats: Tensor | float, dims: int) -> Tensor | float:
    """Nats per example to bits per dimension: nats/(D ln 2)."""
    return nats / (dims * math.log(2))


def prior_term(process: NoisingProcess, x: Tensor, curve: Curve | None = None) -> Tensor:
    """KL(q(z_1|x) || N(0, I)), ``(B,)``, nats; ``curve`` is t -> F(x, t) where it is at hand."""
    return process.marginal(x, process.level(1.0, x), curve).kl_to_normal()


def reconstruction_term(
    process: NoisingProcess, decoder: Decoder, x: Tensor, noise: Tensor, curve: Curve | None = None
) -> Tensor:
    """-log p(x|z_0) with z_0 drawn from q(z_0|x) by ``noise``; ``(B,)``, nats; ``curve`` is t ->
    F(x, t) where it is at hand.
    """
    level = process.level(0.0, x)
    return -decoder.log_prob(x, process.first_marginal(x, level, curve).sample(noise), level)


MOST_STEPS = 10**7
"""Largest T: beyond it a step is lost in the rounding of single precision."""
Eta = float | PiecewiseConstant
"""Stochasticity of the reverse process: a number, or a function of time."""


def _eta_at(eta: Eta, t: Tensor, like: Tensor) -> float | Tensor:
    """Eta at times ``t`` ``(B,)``, such that it broadcasts against ``like``."""
    return expand(eta(t), like) if isinstance(eta, PiecewiseConstant) else eta


@dataclass(frozen=True)
class Draw:
    """One draw for each example: where in time, and what noise."""

    u: Tensor
    """Uniform numbers in [0, 1), ``(B,)``: the time t in continuous time, in discrete time the step
    floor(uT) + 1.
    """
    noise: Tensor
    """Standard normal, in the shape of F(x, t)."""
    coin: Tensor | None = None
    """A uniform number ``(1,)`` for a direct reverse process with two heads, see
    :meth:`ndm.reverse.MarkovReverse.learning_curve`.
    """


@dataclass(frozen=True)
class BoundDraw(Draw):
    """All random numbers of one estimate of the bound."""

    weight: Tensor | None = None
    """Importance weights of the times, ``(B,)``; None is 1."""
    noise_0: Tensor | None = None
    """Standard normal, in the shape of F(x, 0), for the reconstruction term."""


@dataclass(frozen=True)
class Integrand:
    """The diffusion term at one time for each example, ``(B,)``, nats."""

    bound: Tensor
    """What the diffusion term is the mean of."""
    regression: Tensor | None = None
    """What the second head of a direct reverse process learns from; no part of the bound."""


def discrete_errors(
    reverse: MarkovReverse, curve: Curve, draw: Draw, steps: int, eta: Eta = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """||Δmu||²/v of the step that contains u and the middle of that step, each ``(B,)``, and the
    loss of a second head.
    """
    step = torch.floor(draw.u * steps).clamp(max=steps - 1)
    middle = (step + 0.5) / steps
    s, t = reverse.process.schedule(step / steps), reverse.process.schedule((step + 1) / steps)
    true_s, true_t = curve.at_both(s, t)
    eta_at = _eta_at(eta, middle, true_t)
    guess, regression = reverse.learning_curve(true_t, draw.noise, t, eta_at, draw.coin)
    guess_s, guess_t = guess.at_both(s, t)
    difference_s, difference_t = true_s - guess_s, true_t - guess_t
    at_s = s.expand(true_t)
    coefficients = posterior_coefficients(at_s, t.expand(true_t), eta_at)
    mean = coefficients.target_weight * difference_t + at_s.alpha * (difference_s - difference_t)
    return sum_event(mean**2 / coefficients.variance), middle, regression


def discrete_diffusion(
    reverse: MarkovReverse,
    curve: Curve,
    draw: Draw,
    steps: int,
    eta: Eta = 1.0,
    variance_ratio: PiecewiseConstant | None = None,
) -> Integrand:
    """T ||Δmu||²/(2v) at the step that contains u: unbiased for the sum over steps when u is
    uniform.

    Args:
        reverse: the reverse process.
        curve: t -> F(x, t) at the data.
        draw: u and noise.
        steps: T.
        eta: of the posterior; positive, since the bound of DDIM (eta = 0) is infinite.
        variance_ratio: r, by which the reverse variance exceeds v; None is r = 1.
    """
    square, middle, regression = discrete_errors(reverse, curve, draw, steps, eta)
    if variance_ratio is None:
        return Integrand(steps * square / 2, regression)
    ratio = variance_ratio(middle)
    return Integrand(
        steps
        * 0.5
        * (square / ratio + event_size(draw.noise) * (torch.log(ratio) + 1 / ratio - 1)),
        regression,
    )


def continuous_errors(
    reverse: Reverse, curve: Curve, draw: Draw, eta: float | Tensor = 1.0
) -> tuple[NoiseLevel, Tensor, Tensor | None]:
    """The level at t = u, and there :meth:`ndm.reverse.MarkovReverse.continuous_error`."""
    level = reverse.process.schedule(draw.u)
    error, regression = reverse.continuous_error(curve, draw.noise, level, eta, draw.coin)
    return level, error, regression


def continuous_diffusion(reverse: Reverse, curve: Curve, draw: Draw, eta: Eta = 1.0) -> Integrand:
    """The integrand of the continuous-time diffusion term at t = u; arguments as
    :func:`discrete_diffusion`.
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
    """The diffusion term at one time an example, in discrete (``steps`` = T) or continuous time
    (``steps`` = None).

    Raises:
        UserError: eta or steps is out of range.
    """
    _check_reverse(reverse, steps, eta)
    if steps is None and variance_ratio is not None:
        raise UserError(
            "in continuous time only the reverse variance of the forward process gives a finite"
            " bound; leave variance_ratio out, or give steps"
        )
    if steps is None:
        return continuous_diffusion(reverse, curve, draw, eta)
    return discrete_diffusion(
        require_markov(reverse, f"steps={steps}"), curve, draw, steps, eta, variance_ratio
    )


def _check_reverse(reverse: Reverse, steps: int | None, eta: Eta) -> None:
    if not isinstance(eta, PiecewiseConstant) and not eta > 0:
        raise UserError(
            f"eta={eta}: the bound is infinite for a deterministic reverse process; use eta > 0,"
            " eta=1 for DDPM"
        )
    if steps is not None and (
        isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS
    ):
        raise UserError(
            f"steps={steps}: discrete time needs a whole number of steps from 1 to {MOST_STEPS};"
            " None stands for continuous time"
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
    """log w = log p(x, z) - log q(z|x) of one path z_1 ... z_0 of the T-step process; its mean is
    minus the NELBO.

    Args:
        reverse: the reverse process.
        decoder: p(x|z_0).
        x: data ``(B, *event)``.
        steps: T; the predictor is evaluated T times.
        source: source of randomness.
        eta: of the posterior.
        variance_ratio: r, by which the reverse variance exceeds v.

    Returns:
        ``(B,)``, nats.
    """
    _check_reverse(reverse, steps, eta)
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
        middle = torch.full_like(t.t, (index - 0.5) / steps)
        eta_at = _eta_at(eta, middle, z)
        true_s = curve.at(s)
        q = process.posterior_of(z, (true_s, true_t), s, t, eta_at)
        p = markov.posterior(z, s, t, eta_at)
        widened = (
            p.std if variance_ratio is None else p.std * expand(variance_ratio(middle), z).sqrt()
        )
        z = q.sample(standard_normal(z, source))
        log_weight = log_weight + Gaussian(p.mean, widened).log_prob(z) - q.log_prob(z)
        t, true_t = s, true_s
    return log_weight + decoder.log_prob(x, z, t)
