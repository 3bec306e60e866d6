"""The learned reverse variance: its bound, paths and samples against torch.distributions."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import ndm
from evaluation.test_calibrate import points
from ndm.decoder import GaussianDecoder
from ndm.discrete_time import path_log_weight
from ndm.errors import UserError
from ndm.evaluation import best_variance_ratio
from ndm.evaluation.fit_times import step_costs
from ndm.model import NDM
from ndm.nn import MLP
from ndm.predictor import Predictor
from ndm.random import ExampleGenerators, standard_normal
from ndm.reverse import ReverseKind, ReverseProcess
from ndm.sample import Ancestral, GridSampler
from ndm.schedule import LinearLogSNRSchedule, NoiseLevel
from ndm.time_grid import TimeGrid
from ndm.time_sampling import PiecewiseConstant
from ndm.transform import GatedTransform, Identity
from ndm.value_grid.rounding import RoundingPredictor
from oracles import COVARIANCE, F64, GaussianProblem, Points, constant, diffusion, randomized


def network(seed: int, outputs: int | None = None) -> MLP:
    torch.manual_seed(seed)
    return randomized(MLP(2, hidden=16, blocks=1, max_frequency=2.0, outputs=outputs), 0.3, seed)


def model(reverse: ReverseKind = "tied", steps: int | None = 5) -> NDM:
    return NDM(
        LinearLogSNRSchedule(-5.0, 3.0),
        randomized(GatedTransform(network(3)), 0.1),
        Predictor(network(4, outputs=2), learned_variance=True),
        GaussianDecoder(),
        steps=steps,
        reverse=reverse,
    ).double()


def textbook(ndm: NDM, z: Tensor, s: NoiseLevel, t: NoiseLevel, eta: float) -> Normal:
    """p(z_s|z_t) from the network's outputs by the formulas of the paper, tied reverse."""
    predictor = ndm.predictor
    assert isinstance(predictor, Predictor)
    output, log_factor = predictor.network(z, t.t).unbind(1)
    alpha_s, sigma_s, alpha, sigma = (
        part[:, None] for part in (s.alpha, s.sigma, t.alpha, t.sigma)
    )
    v = eta**2 * sigma_s**2 * (1 - torch.exp(s.gamma - t.gamma)[:, None])
    k = (sigma_s**2 - v).sqrt() / sigma
    x = alpha * z - sigma * output
    mean = alpha_s * ndm.transform(x, s) + k * (z - alpha * ndm.transform(x, t))
    error = sigma**2 / (alpha**2 + sigma**2) * torch.exp(log_factor)
    return Normal(mean, (v + (alpha_s - k * alpha) ** 2 * error).sqrt())


def test_a_rounding_predictor_learns_the_variance_of_its_rounded_prediction() -> None:
    """The first output gives the x̂ of a rounding predictor without it; the second the variance."""
    two = network(4, outputs=2)
    learned = RoundingPredictor(two, 6, learned_variance=True).double()
    plain = RoundingPredictor(First(two), 6).double()
    level = LinearLogSNRSchedule(-6.0, 3.0)(torch.linspace(0, 1, 50, dtype=F64))
    z = torch.randn(50, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    prediction, variance = learned.with_variance(z, level)
    assert variance is not None
    torch.testing.assert_close(prediction, plain(z, level), rtol=0, atol=0)
    torch.testing.assert_close(learned(z, level), plain(z, level), rtol=0, atol=0)
    log_factor = two(z, level.t)[:, 1]
    share = (level.sigma**2 / (level.alpha**2 + level.sigma**2))[:, None]
    torch.testing.assert_close(variance, share * log_factor.exp())


class First(torch.nn.Module):
    """The first output of a network with two."""

    def __init__(self, two: MLP):
        super().__init__()
        self.two = two

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.two(z, t)[:, 0]


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("eta", [1.0, 0.7])
def test_a_step_costs_the_divergence_of_two_gaussians(eta: float, fitted: bool) -> None:
    ndm, steps = model(), 5
    x, noise = torch.randn(2, 30, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    u = (torch.arange(30, dtype=F64) + 0.5) / 30
    ratio = PiecewiseConstant(torch.tensor([1.5, 0.7, 2.0, 1.0, 3.0], dtype=F64))
    options = {"variance_ratio": ratio} if fitted else {}
    found = diffusion(ndm.process, ndm.predictor, x, u, noise, steps, eta, **options)
    step = torch.floor(u * steps)
    s, t = ndm.schedule(step / steps), ndm.schedule((step + 1) / steps)
    z = ndm.process.marginal(x, t).sample(noise)
    q, p = ndm.process.posterior(z, x, s, t, eta), textbook(ndm, z, s, t, eta)
    width = ratio.values[step.long()][:, None].sqrt() if fitted else 1.0
    expected = kl_divergence(Normal(q.mean, q.std.expand_as(z)), Normal(p.mean, p.stddev * width))
    torch.testing.assert_close(found, steps * expected.sum(1), rtol=1e-9, atol=1e-9)


def test_ancestral_steps_draw_from_the_learned_gaussian() -> None:
    ndm = model()
    z, noise = torch.randn(2, 6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    s, t = ndm.process.level(0.4, z), ndm.process.level(0.6, z)
    with torch.no_grad():
        expected = textbook(ndm, z, s, t, 1.0)
        found = Ancestral()(ndm.reverse_process, z, t, s, noise)
        ddim = Ancestral(0.0)(ndm.reverse_process, z, t, s, noise)
        mean = textbook(ndm, z, s, t, 0.0).mean
    torch.testing.assert_close(found, expected.mean + expected.stddev * noise)
    torch.testing.assert_close(ddim, mean, msg="DDIM stays deterministic")
    sampler = GridSampler(Ancestral(), 5)
    assert torch.equal(ndm.sample((4, 2), sampler, seed=1), ndm.sample((4, 2), seed=1))


@pytest.mark.parametrize("reverse", ["tied", "direct", "diffenc"])
def test_the_mean_path_weight_is_the_bound(reverse: ReverseKind) -> None:
    ndm, count = model(reverse), 4000
    x = torch.tensor([[0.7, -0.2]], dtype=F64).repeat(count, 1)
    ratio = PiecewiseConstant(torch.tensor([1.5, 0.7, 2.0, 1.0, 3.0], dtype=F64))
    source = ExampleGenerators(0, range(count))
    with torch.no_grad():
        paths = -path_log_weight(
            ndm.reverse_process, ndm.decoder, x, 5, source, variance_ratio=ratio
        )
        source = ExampleGenerators(1, range(count))
        bound = ndm.bound(x, draws=5, generator=source, variance_ratio=ratio).total
    error = float((paths.var() + bound.var()).div(count).sqrt())
    assert abs(float(paths.mean() - bound.mean())) < 4 * error


class ExactVariance(GaussianProblem):
    """The exact predictor of a Gaussian, with the exact variance of its error."""

    learned_variance = True

    def with_variance(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        snr = torch.exp(-level.gamma)[:, None, None] * torch.eye(self.dims, dtype=F64)
        posterior = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + snr)
        return self(z, level), posterior.diagonal(dim1=1, dim2=2).expand_as(z)


def test_no_fit_improves_the_exact_variance() -> None:
    """Each step of each dimension then costs the logarithm of its own ratio."""
    schedule = LinearLogSNRSchedule(-5.0, 3.0)
    problem = ExactVariance(schedule, constant(torch.eye(len(COVARIANCE), dtype=F64)))
    exact = NDM(schedule, Identity(), problem, GaussianDecoder(), steps=4).double()
    data = Points(problem.draw(4000, torch.Generator().manual_seed(0)))
    ratio = best_variance_ratio(exact, data, 4, by_dimension=True, examples=4000)
    torch.testing.assert_close(ratio.values, torch.ones_like(ratio.values), rtol=0, atol=0.08)
    plain = NDM(schedule, Identity(), GaussianProblem(schedule, problem.linear), GaussianDecoder())
    fitted = best_variance_ratio(plain.double(), data, 4, by_dimension=True, examples=4000)
    x, bounds = data.x[:500], []
    with torch.no_grad():
        for one, options in ((exact, {}), (plain, {"variance_ratio": fitted})):
            source = ExampleGenerators(0, range(500))
            found = one.bound(x, steps=4, draws=4, generator=source, **options)  # type: ignore[arg-type]
            bounds.append(float(found.diffusion.mean()))
    assert bounds[0] == pytest.approx(bounds[1], abs=0.02)


def test_the_cost_of_a_step_contains_the_learned_variance() -> None:
    ndm, data, candidates = model(), points(6), 4
    found = step_costs(ndm, data, candidates, examples=6)
    noise = standard_normal(data.x, ExampleGenerators(0, range(6), 21))
    times = TimeGrid(candidates).tolist()
    with torch.no_grad():
        for j in range(1, candidates + 1):
            for i in range(j):
                s, t = (ndm.process.level(times[index], data.x) for index in (i, j))
                z = ndm.process.marginal(data.x, t).sample(noise)
                q, p = ndm.process.posterior(z, data.x, s, t), textbook(ndm, z, s, t, 1.0)
                r = p.variance / q.std**2
                scaled = (q.std**2 + (q.mean - p.mean) ** 2) / p.variance
                expected = 0.5 * (r.log().sum(1).mean() + 2 * math.log(scaled.mean()))
                torch.testing.assert_close(found.costs[i, j], expected, rtol=1e-9, atol=0)


def test_the_gradient_of_the_bound_trains_the_variance() -> None:
    ndm = model()
    last = ndm.predictor.network.last  # type: ignore[union-attr]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    bound = ndm.bound(points(64).x, generator=torch.Generator().manual_seed(0)).total.mean()
    bound.backward()
    assert bool((last.bias.grad != 0).all())  # both outputs
    assert torch.isfinite(last.weight.grad).all()


def test_a_learned_variance_needs_discrete_time_and_a_second_output() -> None:
    with pytest.raises(UserError, match="steps"):
        model(steps=None)
    with pytest.raises(UserError, match="direct-score"):
        model("direct-score")
    one = Predictor(network(4), learned_variance=True).double()
    process = model().process
    with pytest.raises(UserError, match="outputs=2"):
        ReverseProcess(process, one).guess(
            torch.zeros(2, 2, dtype=F64), process.level(0.5, torch.zeros(2, 2, dtype=F64)), 1.0
        )


def test_a_learned_variance_is_saved_and_loaded(tmp_path: object) -> None:
    first = model().float()
    first.save_pretrained(str(tmp_path))
    again = ndm.NDM.from_pretrained(str(tmp_path))
    assert isinstance(again.predictor, Predictor) and again.predictor.learned_variance
    assert torch.equal(again.sample((3, 2), seed=0), first.sample((3, 2), seed=0))
