"""Fitted time grids: costs in closed form, the optimum by brute force, bounds on unequal grids."""

import itertools
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from evaluation.test_calibrate import model, points
from ndm.decoder import GaussianDecoder
from ndm.discrete_time import discrete_errors, path_log_weight
from ndm.errors import UserError
from ndm.evaluation import best_grid, best_variance_ratio
from ndm.evaluation.fit_times import StepCosts, step_costs
from ndm.model import NDM
from ndm.random import ExampleGenerators, standard_normal
from ndm.sample import Ancestral, GridSampler
from ndm.schedule import LinearLogSNRSchedule
from ndm.time_grid import TimeGrid
from ndm.time_sampling import Draw, PiecewiseConstant
from ndm.transform import Identity
from oracles import COVARIANCE, F64, GaussianProblem, Points, constant, diffusion

UNEQUAL = TimeGrid([0.0, 0.1, 0.15, 0.5, 0.8, 1.0])


def gaussian_costs(candidates: int) -> torch.Tensor:
    """For F = x, u = (SNR_s - SNR_t) tr cov(x|z_t) / D; ``(M + 1, M + 1)``, nats."""
    times = torch.arange(candidates + 1, dtype=F64) / candidates
    snr = torch.exp(-LinearLogSNRSchedule(-5.0, 3.0)(times).gamma)
    eye = torch.eye(len(COVARIANCE), dtype=F64)
    posterior = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + snr[:, None, None] * eye)
    trace = posterior.diagonal(dim1=1, dim2=2).sum(1)
    excess = (snr[:, None] - snr[None, :]) * trace[None, :] / len(COVARIANCE)
    costs = torch.full_like(excess, torch.inf)
    upper = torch.ones_like(excess, dtype=torch.bool).triu(1)
    costs[upper] = 0.5 * len(COVARIANCE) * torch.log1p(excess[upper])
    return costs


def gaussian_model() -> tuple[NDM, Points]:
    """The exact model of a Gaussian with F = x, and samples."""
    schedule = LinearLogSNRSchedule(-5.0, 3.0)
    problem = GaussianProblem(schedule, constant(torch.eye(len(COVARIANCE), dtype=F64)))
    exact = NDM(schedule, Identity(), problem, GaussianDecoder()).double()
    return exact, Points(problem.draw(2000, torch.Generator().manual_seed(0)))


def test_costs_of_a_gaussian_are_those_in_closed_form() -> None:
    exact, data = gaussian_model()
    found = step_costs(exact, data, 8, examples=2000, batch_size=500).costs
    expected = gaussian_costs(8)
    assert torch.equal(found.isinf(), expected.isinf())
    finite = found.isfinite()
    torch.testing.assert_close(found[finite], expected[finite], rtol=0.04, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 11, 12])
def test_the_grid_is_the_optimum_by_brute_force(steps: int) -> None:
    candidates = TimeGrid(12)
    costs = gaussian_costs(12)
    grids = [(0, *inner, 12) for inner in itertools.combinations(range(1, 12), steps - 1)]
    totals = [sum(float(costs[s, t]) for s, t in itertools.pairwise(indices)) for indices in grids]
    best = grids[min(range(len(grids)), key=totals.__getitem__)]
    found = StepCosts(candidates, costs, costs).best_grid(steps)
    assert found.tolist() == [candidates.tolist()[index] for index in best]
    with pytest.raises(UserError, match="at most 12"):
        StepCosts(candidates, costs, costs).best_grid(13)


@pytest.mark.parametrize("steps", [4, 10])
def test_a_fitted_grid_costs_within_half_a_percent_of_the_optimum(steps: int) -> None:
    exact, data = gaussian_model()
    found = best_grid(exact, data, steps, candidates=40, examples=400)
    costs = gaussian_costs(40)

    def total(grid: TimeGrid) -> float:
        indices = [round(40 * time) for time in grid.tolist()]
        return sum(float(costs[s, t]) for s, t in itertools.pairwise(indices))

    best = total(StepCosts(TimeGrid(40), costs, costs).best_grid(steps))
    assert best <= total(found) < 1.004 * best
    assert total(TimeGrid(steps)) > 1.006 * best


def test_costs_are_the_errors_of_the_bound() -> None:
    """For a learned F, at the noise of the fit."""
    ndm, data, candidates = model(), points(5), 6
    times = TimeGrid(candidates).tolist()
    found = step_costs(ndm, data, candidates, examples=5)
    noise = standard_normal(data.x, ExampleGenerators(0, range(5), 21))
    with torch.no_grad():
        for j in range(1, candidates + 1):
            for i in range(j):
                ends = sorted({0.0, times[i], times[j], 1.0})
                grid, step = TimeGrid(ends), ends.index(times[i])
                u = torch.full((5,), (step + 0.5) / grid.steps, dtype=F64)
                draw, curve = Draw(u, noise), ndm.process.curve(data.x)
                error = discrete_errors(ndm.reverse_process, curve, draw, grid).error
                expected = torch.log1p(error.square().mean())  # D/2 = 1
                torch.testing.assert_close(found.costs[i, j], expected, rtol=1e-10, atol=0)


def test_the_variance_of_a_grid_is_the_best_one() -> None:
    ndm, data = model(), points(200)
    costs = step_costs(ndm, data, 16, examples=200)
    grid = costs.best_grid(4)
    found = costs.variance_ratio(grid)
    expected = best_variance_ratio(ndm, data, grid, examples=200)
    torch.testing.assert_close(found.values.log(), expected.values.log(), rtol=0, atol=0.15)
    excess = torch.expm1(2 * costs.costs[0, 16] / 2)  # D = 2
    torch.testing.assert_close(costs.ratios[0, 16] - 1, excess)


def test_fitting_lowers_the_bound_of_held_out_data() -> None:
    ndm, data = model(), points(400)
    held_out = torch.randn(400, 2, dtype=F64, generator=torch.Generator().manual_seed(9))
    held_out = held_out * torch.tensor([1.0, 0.3])

    def bound(grid: TimeGrid) -> float:
        ratio = best_variance_ratio(ndm, data, grid)
        source = ExampleGenerators(7, range(400))
        with torch.no_grad():
            found = ndm.bound(held_out, steps=grid, draws=8, generator=source, variance_ratio=ratio)
        return float(found.total.mean())

    assert bound(best_grid(ndm, data, 8)) < bound(TimeGrid(8)) - 0.01


def test_a_step_of_an_unequal_grid_costs_the_divergence_of_two_gaussians() -> None:
    ndm, steps = model(), UNEQUAL.steps
    x, noise = torch.randn(2, 30, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    u = (torch.arange(30, dtype=F64) + 0.5) / 30
    ratio = PiecewiseConstant(torch.tensor([1.5, 0.7, 2.0, 1.0, 3.0], dtype=F64), UNEQUAL)
    found = diffusion(ndm.process, ndm.predictor, x, u, noise, UNEQUAL, 0.8, variance_ratio=ratio)  # type: ignore[arg-type]
    step, times = torch.floor(u * steps).long(), torch.tensor(UNEQUAL.tolist(), dtype=F64)
    s, t = ndm.schedule(times[step]), ndm.schedule(times[step + 1])
    z = ndm.process.marginal(x, t).sample(noise)
    q = ndm.process.posterior(z, x, s, t, 0.8)
    p = ndm.process.posterior(z, ndm.predictor(z, t), s, t, 0.8)
    wide = p.std * ratio.values[step][:, None].sqrt()
    true, model_step = Normal(q.mean, q.std.expand_as(z)), Normal(p.mean, wide.expand_as(z))
    expected = kl_divergence(true, model_step).sum(1)
    torch.testing.assert_close(found, steps * expected, rtol=1e-7, atol=1e-9)


def test_path_weights_of_an_unequal_grid_have_the_bound_as_mean() -> None:
    ndm, count = model(), 4000
    x = torch.tensor([[0.7, -0.2]], dtype=F64).repeat(count, 1)
    values = torch.tensor([[1.5, 0.9], [0.7, 1.0], [2.0, 1.3], [1.0, 2.0], [3.0, 0.8]], dtype=F64)
    ratio = PiecewiseConstant(values, UNEQUAL)
    with torch.no_grad():
        paths = -path_log_weight(
            ndm.reverse_process,
            ndm.decoder,
            x,
            UNEQUAL,
            ExampleGenerators(0, range(count)),
            variance_ratio=ratio,
        )
        source = ExampleGenerators(1, range(count))
        bound = ndm.bound(x, steps=UNEQUAL, draws=5, generator=source, variance_ratio=ratio).total
    error = float((paths.var() + bound.var()).div(count).sqrt())
    assert abs(float(paths.mean() - bound.mean())) < 4 * error
    assert error < 0.2


def test_a_grid_of_equal_times_is_a_number_of_steps() -> None:
    ndm, data = model(), points(20)
    equal = TimeGrid(TimeGrid(8).tolist())
    found: list[Any] = []
    for steps in (8, equal):
        bound = ndm.bound(data.x, steps=steps, draws=8, generator=ExampleGenerators(0, range(20)))
        found.append((bound.total, ndm.sample((20, 2), steps=steps, seed=3)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_sampler_visits_the_times_of_its_grid_with_their_variance() -> None:
    ndm = model()
    z = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([[1.0, 1.0], [4.0, 4.0], [1.0, 1.0], [9.0, 4.0], [1.0, 1.0]], dtype=F64)
    ratio = PiecewiseConstant(values, UNEQUAL)
    with torch.no_grad():
        path = {}
        for name, fitted in (("plain", None), ("wide", ratio)):
            sampler = GridSampler(Ancestral(1.0, fitted), UNEQUAL)
            generator = torch.Generator().manual_seed(1)
            path[name] = list(sampler.path(ndm.reverse_process, z, generator))
    assert [time for time, _ in path["plain"]] == list(reversed(UNEQUAL.tolist()))
    first = [steps[1][1] for steps in path.values()]
    assert torch.equal(*first), "the last part has r = 1"
    second = [steps[2][1] for steps in path.values()]
    with torch.no_grad():
        s, t = (ndm.process.level(time, z) for time in (0.5, 0.8))
        mean = ndm.reverse_process.posterior(first[0], s, t, 1.0).mean
    factors = torch.tensor([3.0, 2.0], dtype=F64)
    torch.testing.assert_close(second[1] - mean, factors * (second[0] - mean))


@pytest.mark.parametrize(
    "times", [[0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.6, 0.5, 1.0], [0.0, float("nan"), 1.0], "ab"]
)
def test_times_that_do_not_increase_from_zero_to_one_are_rejected(times: Any) -> None:
    with pytest.raises(UserError, match="times"):
        TimeGrid(times)


@pytest.mark.parametrize("steps", [0, -3, True, 2.5, 10**8])
def test_a_wrong_number_of_steps_is_rejected(steps: Any) -> None:
    with pytest.raises(UserError, match="steps"):
        model().bound(points(2).x, steps=steps, draws=1)


def test_a_model_in_continuous_time_only_has_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    ndm = model()
    monkeypatch.setattr(type(ndm), "reverse_process", property(lambda self: object()))
    with pytest.raises(UserError, match="posteriors"):
        best_grid(ndm, points(4), 4)


def test_steps_that_a_large_eta_forbids_are_left_out() -> None:
    """With eta above 1, v would exceed sigma_s² in long steps."""
    exact, data = gaussian_model()
    wide = NDM(exact.schedule, Identity(), exact.predictor, GaussianDecoder(), eta=1.2).double()
    found = step_costs(wide, data, 8, examples=64).costs
    gamma = exact.schedule(torch.arange(9, dtype=F64) / 8).gamma
    allowed = (-(1.2**2) * torch.expm1(gamma[:, None] - gamma) <= 1).triu(1)
    assert torch.equal(found.isfinite(), allowed)
    assert not allowed[0, 8] and allowed[:-1, 1:].diagonal().all()
    steps = best_grid(wide, data, 8, examples=64).tolist()
    assert all(wide.schedule is not None and s < t for s, t in itertools.pairwise(steps))
    with torch.no_grad():
        wide.bound(data.x[:4], steps=TimeGrid(steps))
    with pytest.raises(UserError, match="eta is too large"):
        StepCosts(TimeGrid(8), found, found).best_grid(1)


def test_a_model_with_weights_that_are_not_finite_has_no_grid() -> None:
    costs = torch.full((5, 5), torch.nan, dtype=F64)
    with pytest.raises(UserError, match="not finite"):
        StepCosts(TimeGrid(4), costs, costs).best_grid(2)
