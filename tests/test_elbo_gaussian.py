"""The bound of Gaussian data: dense Gaussians, the continuous limit, exact likelihoods."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ndm.decoder import GaussianDecoder
from ndm.discrete_time import path_log_weight
from ndm.elbo import prior_term, reconstruction_term
from ndm.sample import Ancestral
from ndm.schedule import FlowMatchingSchedule, LearnedSchedule, LinearLogSNRSchedule, Schedule
from ndm.time_sampling import (
    PiecewiseConstant,
)
from oracles import (
    F64,
    SHEAR,
    GaussianProblem,
    LinearTransform,
    affine_map,
    constant,
    diffusion,
    gauss_times,
    joint_bound,
    randomized,
    slope,
)

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: LinearLogSNRSchedule(-6.0, 3.0),
    "flow": lambda: FlowMatchingSchedule(0.05, 0.1),
    "learned": lambda: randomized(LearnedSchedule(-6.0, 3.0)),
}
TRANSFORMS: dict[str, Callable[[], LinearTransform]] = {
    "tilted": LinearTransform,
    "sheared": lambda: LinearTransform(start=SHEAR),
}


def expected_ends(problem: GaussianProblem) -> Tensor:
    """E[prior + reconstruction], exactly: both are quadratic in (x, noise)."""
    x, noise, _, mean = problem.cubature(torch.zeros(1, dtype=F64))
    prior = prior_term(problem.process, x)
    reconstruction = reconstruction_term(problem.process, GaussianDecoder(), x, noise)
    return mean(prior + reconstruction)[0].detach()


def expected_discrete(problem: GaussianProblem, steps: int, eta: float) -> Tensor:
    """E[discrete NELBO], exactly: every step once, quadratic in (x, noise)."""
    x, noise, u, mean = problem.cubature((torch.arange(steps, dtype=F64) + 0.5) / steps)
    with torch.no_grad():
        terms = diffusion(problem.process, problem, x, u, noise, steps, eta)
    return expected_ends(problem) + mean(terms).mean()


def expected_continuous(problem: GaussianProblem, eta: float, panels: int = 100) -> Tensor:
    """E[continuous NELBO] by two-point Gauss-Legendre panels in t."""
    x, noise, u, mean = problem.cubature(gauss_times(panels))
    with torch.no_grad():
        terms = diffusion(problem.process, problem, x, u, noise, None, eta)
    return expected_ends(problem) + mean(terms).mean()


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "eta"), [(1, 1.0), (3, 0.4), (5, 1.0), (60, 1.2)])
def test_discrete_bound_is_the_divergence_of_joint_gaussians(
    schedule: str, transform: str, steps: int, eta: float
) -> None:
    problem = GaussianProblem(SCHEDULES[schedule](), TRANSFORMS[transform]())
    expected = joint_bound(problem, steps, eta)
    assert expected_discrete(problem, steps, eta).item() == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_bound_converges_to_the_continuous_bound_at_order_one(
    schedule: str, eta: float
) -> None:
    problem = GaussianProblem(SCHEDULES[schedule]())
    limit = expected_continuous(problem, eta).item()
    sizes = [500, 1000, 2000]
    gaps = [expected_discrete(problem, size, eta).item() - limit for size in sizes]
    assert 0.8 < slope(sizes, [abs(gap) for gap in gaps]) < 1.2
    assert 2 * gaps[-1] - gaps[-2] == pytest.approx(0.0, abs=1e-3)  # Richardson


def test_flow_matching_without_signal_at_the_end_has_the_same_limit() -> None:
    problem = GaussianProblem(FlowMatchingSchedule(0.05, 0.0))
    assert problem.prior_gap().item() == pytest.approx(0.0, abs=1e-12)
    joint = joint_bound(problem, 20, 1.0 - 1e-12).item()
    assert expected_discrete(problem, 20, 1.0).item() == pytest.approx(joint, rel=1e-6)
    limit = expected_continuous(problem, 1.0).item()
    gaps = [expected_discrete(problem, size, 1.0).item() - limit for size in (400, 800)]
    assert 2 * gaps[1] - gaps[0] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("start", [torch.eye(2, dtype=F64), SHEAR], ids=["identity", "sheared"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_markov_case_is_tight_up_to_prior_and_decoder(schedule: str, start: Tensor) -> None:
    problem = GaussianProblem(SCHEDULES[schedule](), constant(start))
    expected = problem.entropy() + problem.prior_gap() + problem.decoder_gap()
    assert expected_continuous(problem, 1.0).item() == pytest.approx(expected.item(), abs=2e-5)
    coarse = expected_discrete(problem, 10, 1.0)
    assert coarse > expected + 1e-3, "a coarse chain must cost nats"


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.7, 1.0, 1.5])
def test_time_dependent_transforms_add_exactly_the_path_gap(
    schedule: str, transform: str, eta: float
) -> None:
    problem = GaussianProblem(SCHEDULES[schedule](), TRANSFORMS[transform]())
    assert problem.path_gap(eta) > 1e-3
    expected = problem.entropy() + problem.prior_gap() + problem.decoder_gap()
    expected += problem.path_gap(eta)
    assert expected_continuous(problem, eta).item() == pytest.approx(expected.item(), abs=1e-3)


def test_a_worse_predictor_has_a_worse_bound() -> None:
    problem, shifted = (GaussianProblem(LinearLogSNRSchedule(-6.0, 3.0)) for _ in range(2))
    shifted.means = shifted.means + 0.1
    x, noise, u, mean = problem.cubature((torch.arange(200, dtype=F64) + 0.5) / 200)
    with torch.no_grad():
        worse = mean(diffusion(shifted.process, shifted, x, u, noise)).mean()
    assert worse + expected_ends(problem) > expected_continuous(problem, 1.0) + 1e-3


def chain_log_prob(
    problem: GaussianProblem, x: Tensor, steps: int, eta: float, scale: PiecewiseConstant | None
) -> Tensor:
    """log p(x) of the T-step model with the exact predictor.

    Pushes N(0, I) through its affine steps and the Gaussian decoder.
    """
    mean, covariance = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    for i in range(steps, 0, -1):
        t, s = (problem.process.level(j / steps, torch.zeros(1, 2, dtype=F64)) for j in (i, i - 1))
        a, b, c = affine_map(Ancestral(eta, scale), problem, t, s)
        mean, covariance = a + b @ mean, b @ covariance @ b.T + c @ c.T
    level = problem.process.schedule(torch.zeros(1, dtype=F64))
    covariance = covariance / level.alpha**2 + torch.exp(level.gamma) * torch.eye(2, dtype=F64)
    return torch.distributions.MultivariateNormal(mean / level.alpha, covariance).log_prob(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale",
    [None, PiecewiseConstant(torch.tensor([1.3, 1.1, 1.8, 1.2], dtype=F64))],
    ids=["v", "wide"],
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_importance_weighted_paths_approach_the_exact_likelihood_of_the_chain(
    transform: str, scale: PiecewiseConstant | None
) -> None:
    # A thin Gaussian would need too many paths.
    covariance = torch.tensor([[0.6, 0.2], [0.2, 0.5]], dtype=F64)
    schedule = LinearLogSNRSchedule(-1.0, 2.0)
    problem = GaussianProblem(schedule, TRANSFORMS[transform](), covariance=covariance)
    steps, eta, rows = 4, 0.9, 80_000
    x = problem.draw(2, torch.Generator().manual_seed(0))
    exact = chain_log_prob(problem, x, steps, eta, scale)
    generator = torch.Generator().manual_seed(1)
    many = x.repeat_interleave(rows, 0)
    with torch.no_grad():
        weights = path_log_weight(
            problem.reverse, GaussianDecoder(), many, steps, generator, eta, scale
        ).reshape(2, rows)
    ratio = (weights - exact[:, None]).exp()
    error = ratio.std(1) / math.sqrt(rows)
    assert bool(((ratio.mean(1) - 1).abs() < 4 * error).all()), "weights must be unbiased for p(x)"
    assert float(error.max()) < 0.05
    bounds = [
        float((torch.logsumexp(weights.reshape(2, -1, k), 2) - math.log(k)).mean())
        for k in (1, 5, 50)
    ]
    assert bounds[0] + 0.05 < bounds[1] < bounds[2] < float(exact.mean()) + 0.02


@pytest.mark.parametrize("eta", [1.0, 0.8])
def test_one_path_estimates_the_discrete_bound(eta: float) -> None:
    problem, steps = GaussianProblem(LinearLogSNRSchedule(-3.0, 4.0)), 3
    x = problem.draw(40_000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = path_log_weight(
            problem.reverse, GaussianDecoder(), x, steps, torch.Generator().manual_seed(1), eta
        )
    expected = joint_bound(problem, steps, eta).detach()
    assert abs(float(-weights.mean() - expected)) < 4 * float(weights.std()) / 200
    assert float(weights.std()) / 200 < 0.05
