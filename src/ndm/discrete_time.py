r"""Discrete time: the error of one step, and the weights of whole paths.

In the step from t to s the means of the posterior and of the reverse process differ by

.. math::
    \Delta\mu = (\alpha_s - k\alpha_t)\,\Delta F_t + \alpha_s (\Delta F_s - \Delta F_t), \qquad
    \Delta F_t = F(x,t) - F(\hat x,t) .

The cost of the step, KL(q || p), is :func:`ndm.elbo.discrete_diffusion`.

With K paths z drawn from q(.|x), the discrete-time model also has a bound that tightens with K
(Burda et al. 2016):

.. math::
    -\log p(x) \le -E \log \tfrac1K \textstyle\sum_k w_k, \qquad
    w_k = p(x, z^{(k)}) / q(z^{(k)}|x) .
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ndm.curve import Curve
from ndm.decoder import Decoder
from ndm.forward import (
    Gaussian,
    NoisingProcess,
    PosteriorCoefficients,
    gaussian,
    posterior_coefficients,
)
from ndm.parts import masked
from ndm.random import RandomSource, standard_normal
from ndm.reverse import Guess, MarkovReverse, Reverse, require_markov
from ndm.schedule import NoiseLevel
from ndm.shapes import expand, sum_event
from ndm.time_grid import Steps, TimeGrid, as_grid
from ndm.time_sampling import Draw, Eta, PiecewiseConstant, as_double, check_eta, eta_at

_SHORTEST = 1 / 4096  # the shortest step at which F(x, s) - F(x, t) has enough digits in float32


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

    Arguments are those of :func:`ndm.elbo.discrete_diffusion`.
    """
    like, grid = curve.like, as_grid(steps)
    index = torch.floor(as_double(draw.u) * grid.steps).clamp(max=grid.steps - 1)
    interval = _Interval.of(reverse.process, index, grid, like)
    true = interval.values(curve)
    eta_here = eta_at(eta, interval.midpoint, like)
    guess = reverse.training_guess(true[0], draw.noise, interval.t, eta_here, draw.coin)
    step = posterior_coefficients(interval.s.expand(like), interval.t.expand(like), eta_here)
    error = _scaled_mean_error(interval, true, interval.values(guess.curve), step)
    return StepError(error, interval.midpoint, guess.regression, learned_excess(guess, step))


def learned_excess(guess: Guess, step: PosteriorCoefficients) -> Tensor | None:
    """Return r - 1 of the learned reverse variance, ``(B, *event)``, or None."""
    if guess.variance is None:
        return None
    return step.target_weight**2 / step.variance * guess.variance


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
    check_eta(eta)
    grid = as_grid(steps)
    decoder.check(x)
    markov = require_markov(reverse, f"steps={grid.steps}")
    process = markov.process
    end, curve = process.level(1.0, x), process.curve(x)
    at_t = curve.at(end)
    q = gaussian(at_t, end, process.missing)
    z = q.sample(standard_normal(q.mean, source))
    prior = Gaussian(torch.zeros_like(z), torch.ones_like(z), missing=process.missing)
    log_weight = prior.log_prob(z) - q.log_prob(z)
    log_weight = as_double(log_weight)
    for index in range(grid.steps - 1, -1, -1):
        places = torch.full_like(as_double(end.t), index)
        interval = _Interval.of(process, places, grid, z)
        s, t = interval.s, interval.t
        eta_here = eta_at(eta, interval.midpoint, z)
        true = interval.values(curve, at_t)
        guess = markov.guess(z, t, eta_here)
        predicted = interval.values(guess.curve)
        step = posterior_coefficients(s.expand(z), t.expand(z), eta_here)
        error = _scaled_mean_error(interval, true, predicted, step)
        noise = standard_normal(z, source)
        z = process.posterior_from(z, *true, s, step).sample(noise)
        at_t = true[0] + true[1]
        ratio = None if variance_ratio is None else variance_ratio.broadcast(interval.midpoint, z)
        learned = learned_excess(guess, step)
        if learned is not None:
            ratio = (1 + learned.double()) * (1.0 if ratio is None else ratio)
        if process.missing is not None and ratio is not None:
            ratio = 1 + masked(ratio - 1, process.missing)
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
