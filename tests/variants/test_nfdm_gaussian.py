"""Learned noise for Gaussian data, in closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ndm.decoder import GaussianDecoder
from ndm.elbo import prior_term, reconstruction_term
from ndm.ode import ode_log_prob
from ndm.reverse import ReverseProcess
from ndm.sample import Euler, Heun, Step
from ndm.schedule import (
    LinearLogSNRSchedule,
    NoiseLevel,
    Schedule,
)
from ndm.variants.nfdm import (
    ScaledProcess,
    ScaledReverse,
)
from oracles import (
    F64,
    GaussianProblem,
    LinearTransform,
    affine_map,
    gauss_times,
    slope,
)
from variants.test_nfdm import FINE, SCHEDULES, TIMES, TimeScale, diffusion, every_schedule


def uneven() -> TimeScale:
    return TimeScale(torch.tensor([0.7, -0.4], dtype=F64), torch.tensor([-1.2, 0.9], dtype=F64))


class ScaledProblem(GaussianProblem):
    """Gaussian data, a linear F, and different noise in each dimension."""

    def __init__(self, schedule: Schedule, scale: TimeScale | None = None):
        super().__init__(schedule)
        self.process = ScaledProcess(schedule, LinearTransform(), scale or uneven())

    @property
    def reverse(self) -> ReverseProcess:
        return ScaledReverse(self.process, self)  # type: ignore[arg-type]

    def variance(self, level: NoiseLevel) -> Tensor:
        """s², ``(B, D)``."""
        t = level.t[:, None]
        scale = self.process.scale
        return (level.sigma[:, None] * torch.exp(t * (scale.rise + scale.bend * t))) ** 2

    def latent(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        mean, covariance = super().latent(level)
        extra = self.variance(level) - level.sigma[:, None] ** 2
        return mean, covariance + torch.diag_embed(extra)[:, None]


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.7])
def test_the_exact_drift_moves_mean_and_covariance_like_the_forward_process(
    schedule: str, eta: float
) -> None:
    """For a drift a + B z in reverse time, m' = a + B m and C' = B C + C B^T - g² I."""
    problem, step = ScaledProblem(SCHEDULES[schedule]()), 1e-5
    unit = torch.cat([torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)])
    for t in TIMES.tolist():
        level = problem.process.level(t, unit)
        drift = problem.reverse.drift(unit, level, eta).detach()
        a, b = drift[0], (drift[1:] - drift[0]).T
        (mean, covariance), earlier, later = (
            problem.marginal(at) for at in (t, t - step, t + step)
        )
        g2 = (eta**2 * level.sigma[0] ** 2 * level.dgamma[0]).item()
        dmean, dcovariance = (
            (after - before).detach() / (2 * step)
            for after, before in zip(later, earlier, strict=True)
        )
        torch.testing.assert_close(a + b @ mean, dmean, rtol=1e-6, atol=1e-6)
        moved = b @ covariance + covariance @ b.T - g2 * torch.eye(2, dtype=F64)
        torch.testing.assert_close(moved, dcovariance, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "order"), [(Euler, 1), (Heun, 2)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samplers_converge_to_the_marginal(
    make: Callable[[float], Step], order: int, eta: float
) -> None:
    problem, zero = ScaledProblem(LinearLogSNRSchedule(-3.0, 3.0)), torch.zeros(1, 2, dtype=F64)
    sizes, errors = [40, 80, 160], []
    for steps in sizes:
        mean, covariance = (value.detach() for value in problem.marginal(1.0))
        for i in range(steps, 0, -1):
            t, s = (problem.process.level(j / steps, zero) for j in (i, i - 1))
            a, b, c = affine_map(make(eta), problem, t, s)
            mean, covariance = a + b @ mean, b @ covariance @ b.T + c @ c.T
        end = problem.marginal(0.0)
        errors.append(((mean - end[0]).norm() + (covariance - end[1]).norm()).item())
    assert order - 0.25 < slope(sizes, errors) < order + 0.4, errors


def test_the_likelihood_of_the_ode_is_the_gaussian_density() -> None:
    bridge = TimeScale(torch.tensor([0.9, -0.6], dtype=F64), torch.tensor([-0.9, 0.6], dtype=F64))
    # No signal is left at t = 1: the prior is exact.
    problem = ScaledProblem(LinearLogSNRSchedule(-4.0, 25.0), bridge)
    mean, covariance = (value.detach() for value in problem.marginal(0.0))
    expected = torch.distributions.MultivariateNormal(mean, covariance)
    z = expected.sample((20,))
    found = ode_log_prob(problem.reverse, z, FINE).log_p
    torch.testing.assert_close(found, expected.log_prob(z), rtol=0, atol=2e-4)


def stepwise_bound(problem: ScaledProblem, steps: int, eta: float) -> float:
    """E[NELBO] of a chain with the marginals of q.

    Its posteriors are N(mu_s + K (z - mu_t), g² (t - s) I) with K = sqrt(s_s² - v)/s_t.
    """
    n, covariance = problem.dims, problem.covariances[0]
    level = problem.process.schedule(torch.arange(steps + 1, dtype=F64) / steps)
    matrix, offset = problem.linear.matrix(level.t)
    of_x, spread = level.alpha[:, None, None] * matrix, problem.variance(level)
    taken = (eta**2 * level.sigma**2 * level.dgamma)[1:] / steps
    k = torch.sqrt((spread[:-1] - taken[:, None]) / spread[1:])
    move = of_x[:-1] - k[..., None] * of_x[1:]
    of_z = of_x @ covariance @ of_x.mT + torch.diag_embed(spread)
    of_x_given_z = covariance - covariance @ of_x.mT @ torch.linalg.inv(of_z) @ of_x @ covariance
    steps_cost = (
        (move @ of_x_given_z[1:] @ move.mT).diagonal(dim1=1, dim2=2).sum(1) / (2 * taken)
    ).sum()
    mean = level.alpha[-1] * (matrix[-1] @ problem.means[0] + offset[-1])
    prior = 0.5 * (torch.trace(of_z[-1]) + mean @ mean - n - spread[-1].log().sum())
    reconstruction = 0.5 * n * (1 + math.log(2 * math.pi) + level.gamma[0].item())
    return (prior + steps_cost + reconstruction).item()


def continuous_bound(problem: ScaledProblem, eta: float, panels: int = 100) -> float:
    """E[NELBO] by Gauss-Legendre panels in t, exact in x and noise, as every term is quadratic."""
    x, noise, u, mean = problem.cubature(gauss_times(panels))
    ends = prior_term(problem.process, x)
    ends = ends + reconstruction_term(problem.process, GaussianDecoder(), x, noise)
    return (mean(diffusion(problem.reverse, x, u, noise, eta)).mean() + mean(ends).mean()).item()


@every_schedule
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_the_bound_is_the_limit_of_chains_of_gaussian_posteriors(schedule: str, eta: float) -> None:
    problem, sizes = ScaledProblem(SCHEDULES[schedule]()), [1000, 2000, 4000]
    limit = continuous_bound(problem, eta)
    gaps = [stepwise_bound(problem, size, eta) - limit for size in sizes]
    extrapolated = (8 * gaps[2] - 6 * gaps[1] + gaps[0]) / 3  # Richardson, twice
    assert extrapolated == pytest.approx(0.0, abs=3e-4), gaps
    assert 0.8 < slope(sizes, [abs(gap) for gap in gaps]) < 1.2
    assert limit > float(problem.entropy()) + 1e-3, "a bound"
