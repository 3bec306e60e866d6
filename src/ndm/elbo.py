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
from ndm.forward import (
    Gaussian,
    NoisingProcess,
    PosteriorCoefficients,
    gaussian,
    posterior_coefficients,
)
from ndm.random import RandomSource, standard_normal
from ndm.reverse import Guess, MarkovReverse, Reverse, require_markov
from ndm.schedule import NoiseLevel
from ndm.shapes import expand, sum_event
from ndm.time_grid import Steps, TimeGrid, as_grid
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


_SHORTEST = 1 / 4096  # the shortest step at which F(x, s) - F(x, t) has enough digits in float32
Eta = float | PiecewiseConstant
"""Stochasticity of the reverse process: a number or a function of time."""


def _eta_at(eta: Eta, t: Tensor, like: Tensor) -> float | Tensor:
    """Return eta at times ``t`` ``(B,)``, in a shape that broadcasts against ``like``."""
    return expand(eta(t).to(like.dtype), like) if isinstance(eta, PiecewiseConstant) else eta


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

    See :meth:`ndm.reverse.MarkovReverse.training_guess`.
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


@dataclass(frozen=True)
class _Interval:
    """The step from t_{i+1} = t to t_i = s for each example."""

    s: NoiseLevel
    t: NoiseLevel
    midpoint: Tensor
    """(s + t)/2, ``(B,)``, in double precision."""
    middle: NoiseLevel | None
    """The level there, if F(x, s) and F(x, t) are too close to be subtracted."""

    @classmethod
    def of(
        cls, process: NoisingProcess, index: Tensor, grid: TimeGrid, like: Tensor
    ) -> "_Interval":
        """Return the steps from t_{i+1} to t_i, for the indices i ``(B,)``, float64."""
        midpoint = grid.middle(index)
        s, t = process.level(grid.at(index), like), process.level(grid.at(index + 1), like)
        close = grid.shortest < _SHORTEST and like.dtype != torch.float64
        subtract = process.transform.constant or not close
        return cls(s, t, midpoint, None if subtract else process.level(midpoint, like))

    def values(self, curve: Curve, at_t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return F(x, t) and F(x, s) - F(x, t), each ``(B, *event)``.

        In very short steps the difference is -F' (t - s) at the midpoint, to order (t - s)³.

        Args:
            curve: t -> F(x, t).
            at_t: F(x, t), if it has been computed already.
        """
        if self.middle is None and at_t is not None:
            return at_t, curve.at(self.s) - at_t
        if self.middle is None:
            at_s, at_t = curve.at_both(self.s, self.t)
            return at_t, at_s - at_t
        value, rate = curve.with_derivative(self.middle)
        change = expand(self.t.since(self.s), rate) * rate
        return value + 0.5 * change, -change


def _scaled_mean_error(
    interval: _Interval,
    true: tuple[Tensor, Tensor],
    predicted: tuple[Tensor, Tensor],
    coefficients: PosteriorCoefficients,
) -> Tensor:
    """Return Δmu/sqrt(v), ``(B, *event)``, from the :meth:`_Interval.values` of both curves."""
    error_t, difference = true[0] - predicted[0], true[1] - predicted[1]
    weighted = coefficients.target_weight * error_t + expand(interval.s.alpha, error_t) * difference
    return weighted / coefficients.variance.sqrt()


@dataclass(frozen=True)
class StepError:
    """The error of one step for each example."""

    error: Tensor
    """Δmu/sqrt(v), ``(B, *event)``."""
    midpoint: Tensor
    """The time halfway, ``(B,)``, in double precision."""
    regression: Tensor | None
    """Loss of a second head, ``(B,)``, nats."""
    excess: Tensor | None
    """r - 1 of a learned reverse variance, ``(B, *event)``."""


def discrete_errors(
    reverse: MarkovReverse, curve: Curve, draw: Draw, steps: Steps, eta: Eta = 1.0
) -> StepError:
    """Return the error of the step selected by u.

    Arguments are those of :func:`discrete_diffusion`.
    """
    like, grid = curve.like, as_grid(steps)
    index = torch.floor(_double(draw.u) * grid.steps).clamp(max=grid.steps - 1)
    interval = _Interval.of(reverse.process, index, grid, like)
    true = interval.values(curve)
    eta_at = _eta_at(eta, interval.midpoint, like)
    guess = reverse.training_guess(true[0], draw.noise, interval.t, eta_at, draw.coin)
    step = posterior_coefficients(interval.s.expand(like), interval.t.expand(like), eta_at)
    error = _scaled_mean_error(interval, true, interval.values(guess.curve), step)
    return StepError(error, interval.midpoint, guess.regression, _learned_excess(guess, step))


def _learned_excess(guess: Guess, step: PosteriorCoefficients) -> Tensor | None:
    """Return r - 1 of the learned reverse variance, ``(B, *event)``, or None."""
    if guess.variance is None:
        return None
    return step.target_weight**2 / step.variance * guess.variance


def _double(u: Tensor) -> Tensor:
    return u if u.device.type == "mps" else u.double()


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
    fitted = None if variance_ratio is None else _each(variance_ratio(found.midpoint), error)
    cost = error**2
    if found.excess is not None:  # log r + 1/r - 1 would cancel for r near 1
        u = found.excess
        factor = 1.0 if fitted is None else fitted
        cost = cost / (factor * (1 + u)) + torch.log1p(u) - u / (1 + u)
        if fitted is not None:
            cost = cost + torch.log(fitted) + (1 / fitted - 1) / (1 + u)
    elif fitted is not None:
        cost = cost / fitted + torch.log(fitted) + 1 / fitted - 1
    return Integrand((steps * 0.5 * sum_event(cost)).to(error.dtype), found.regression)


def _each(ratio: Tensor, like: Tensor) -> Tensor:
    """Return a ratio ``(B,)`` or ``(B, *event)`` in a shape that broadcasts against ``like``."""
    return expand(ratio, like) if ratio.dim() == 1 else ratio


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
    _check_eta(eta)
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


def _check_eta(eta: Eta) -> None:
    if not isinstance(eta, PiecewiseConstant) and not eta > 0:
        raise UserError(
            f"eta={eta}: the bound is infinite for a deterministic reverse process; use eta > 0,"
            " eta=1 for DDPM"
        )


def path_log_weight(
    reverse: Reverse,
    decoder: Decoder,
    x: Tensor,
    steps: Steps,
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
        steps: T, or the time grid; the predictor is evaluated T times.
        source: source of randomness.
        eta: eta of the posterior.
        variance_ratio: r, the ratio of the reverse variance to v; None means r = 1.

    Returns:
        ``(B,)``, nats.
    """
    _check_eta(eta)
    grid = as_grid(steps)
    decoder.check(x)
    markov = require_markov(reverse, f"steps={grid.steps}")
    process = markov.process
    end, curve = process.level(1.0, x), process.curve(x)
    at_t = curve.at(end)
    q = gaussian(at_t, end)
    z = q.sample(standard_normal(q.mean, source))
    log_weight = Gaussian(torch.zeros_like(z), torch.ones_like(z)).log_prob(z) - q.log_prob(z)
    log_weight = _double(log_weight)
    for index in range(grid.steps - 1, -1, -1):
        places = torch.full_like(_double(end.t), index)
        interval = _Interval.of(process, places, grid, z)
        s, t = interval.s, interval.t
        eta_at = _eta_at(eta, interval.midpoint, z)
        true = interval.values(curve, at_t)
        guess = markov.guess(z, t, eta_at)
        predicted = interval.values(guess.curve)
        step = posterior_coefficients(s.expand(z), t.expand(z), eta_at)
        error = _scaled_mean_error(interval, true, predicted, step)
        noise = standard_normal(z, source)
        z = process.posterior_from(z, *true, s, step).sample(noise)
        at_t = true[0] + true[1]
        ratio = None if variance_ratio is None else _each(variance_ratio(interval.midpoint), z)
        learned = _learned_excess(guess, step)
        if learned is not None:
            ratio = (1 + learned.double()) * (1.0 if ratio is None else ratio)
        log_weight = log_weight + _log_ratio(error, noise, ratio)
    return log_weight.to(x.dtype) + decoder.log_prob(x, z, process.level(0.0, x))


def _log_ratio(error: Tensor, noise: Tensor, ratio: Tensor | None) -> Tensor:
    """Return log p(z_s)/q(z_s) ``(B,)`` at z_s = mu + sqrt(v) noise, where p has variance r v.

    Args:
        error: Δmu/sqrt(v), the mean of q minus that of p, ``(B, *event)``.
        noise: ``(B, *event)``.
        ratio: r, in double precision, broadcasts against ``error``; None means r = 1.
    """
    # The squares of noise cancel in the difference of the log-densities.
    cross = 0.5 * error**2 + error * noise
    if ratio is None:
        return -sum_event(cross)
    own = 0.5 * ((1 / ratio - 1) * noise**2 + torch.log(ratio))
    return -sum_event(cross / ratio + own)
