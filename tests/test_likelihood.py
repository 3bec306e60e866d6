"""Likelihoods against closed forms and sums over all values of a grid; dequantization."""

import math

import pytest
import torch
from torch import Tensor

from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.errors import UserError
from ndm.forward import ForwardProcess
from ndm.likelihood import latent, log_likelihood
from ndm.model import NDM
from ndm.nn import MLP
from ndm.ode import OdeSettings
from ndm.predictor import DataPredictor, Predictor
from ndm.random import ExampleGenerators
from ndm.reverse import ReverseProcess
from ndm.schedule import (
    CosineSchedule,
    FlowMatchingSchedule,
    LinearBetaSchedule,
    LinearLogSNRSchedule,
    NoiseLevel,
    Schedule,
)
from ndm.transform import GatedTransform, Identity, NetworkTransform
from oracles import (
    F64,
    MEAN,
    SHEAR,
    LinearTransform,
    MixtureProblem,
    randomized,
)
from test_ode import mixture, network_process


class GridPredictor(DataPredictor):
    """E[x|z_t] of independent uniform values on a decoder's grid, for F = x."""

    def __init__(self, decoder: DiscretizedGaussian):
        super().__init__()
        self.values = decoder.values

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        alpha, sigma = level.alpha[:, None, None], level.sigma[:, None, None]
        exponent = -0.5 * ((z[..., None] - alpha * self.values) / sigma) ** 2
        return (torch.softmax(exponent, -1) * self.values).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [LinearBetaSchedule(), CosineSchedule(), FlowMatchingSchedule(), LinearLogSNRSchedule()],
    ids=["ddpm", "cosine", "flow", "linear"],
)
def test_the_default_settings_resolve_steep_schedules(schedule: Schedule) -> None:
    decoder = DiscretizedGaussian(17)
    x = decoder.values[torch.randint(17, (40, 1), generator=torch.Generator().manual_seed(0))]
    reverse = ReverseProcess(ForwardProcess(schedule, Identity()), GridPredictor(decoder))  # type: ignore[arg-type]
    settings = OdeSettings(rtol=1e-5, atol=1e-6)
    found = log_likelihood(reverse, decoder, x, samples=2, settings=settings)
    assert float(found.log_p.mean()) == pytest.approx(-math.log(17), abs=0.01)
    coarse = found.coarse_log_weights.logsumexp(1) - math.log(2)
    assert float((found.log_p - coarse).mean()) == pytest.approx(0, abs=0.03)


def decoder_density(problem: MixtureProblem, x: Tensor) -> Tensor:
    """log of the integral of N(x; z_0/alpha_0, exp(gamma_0) I) over q(z_0)."""
    level = problem.process.schedule(torch.zeros(1, dtype=F64))
    mean, covariance = problem.latent(level)
    covariance = covariance[0] / level.alpha**2 + torch.exp(level.gamma) * torch.eye(2, dtype=F64)
    components = torch.distributions.MultivariateNormal(mean[0] / level.alpha, covariance)
    return torch.logsumexp(problem.weights.log() + components.log_prob(x[:, None]), dim=1).detach()


@pytest.mark.slow
def test_importance_weighted_likelihood_approaches_the_exact_likelihood() -> None:
    problem = mixture(LinearLogSNRSchedule(-1.0, 25.0), LinearTransform())
    x = problem.draw(3, torch.Generator().manual_seed(0))
    exact, rows = decoder_density(problem, x), 1024
    settings = OdeSettings(solver="rk4", nodes=64, probes="exact")
    many = x.repeat_interleave(rows, 0)
    found = log_likelihood(problem.reverse, GaussianDecoder(), many, settings=settings, seed=1)
    weights = found.log_weights.reshape(3, rows)
    bounds = {k: torch.logsumexp(weights.reshape(3, -1, k), 2) - math.log(k) for k in (1, 8, 1024)}
    means = {k: float(bound.mean(1).mean()) for k, bound in bounds.items()}
    assert means[1] + 0.02 < means[8] < means[1024], "loose for one sample, then rising"
    spread = (weights.exp().std(1) / weights.exp().mean(1) / math.sqrt(rows)).detach()
    assert bool(((bounds[1024][:, 0] - exact).abs() < 4 * spread).all())
    assert bool((bounds[8].mean(1) < exact + 4 * bounds[8].std(1) / math.sqrt(rows / 8)).all())


@pytest.mark.slow
def test_importance_samples_do_not_depend_on_the_batch() -> None:
    reverse = network_process(2)
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    settings = OdeSettings(rtol=1e-6, atol=1e-6, nodes=8)
    found = log_likelihood(reverse, GaussianDecoder(), x, samples=3, settings=settings)
    assert found.log_weights.shape == (5, 3)
    assert not torch.equal(found.log_weights[:, 0], found.log_weights[:, 1])
    torch.testing.assert_close(found.log_p, found.log_weights.exp().mean(1).log())
    torch.testing.assert_close(found.single, found.log_weights.mean(1))
    assert bool((found.log_p >= found.single).all())
    again = log_likelihood(
        reverse, GaussianDecoder(), x[2:3], samples=3, settings=settings, examples=[2]
    )
    torch.testing.assert_close(again.log_weights, found.log_weights[2:3], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["variational", "uniform"])
@pytest.mark.parametrize(
    "grid",
    [[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0], [-4.0, -1.5, -1.0, 0.25, 0.5, 2.0, 4.0]],
)
def test_probabilities_of_a_grid_sum_to_one(how: str, grid: list[float]) -> None:
    torch.manual_seed(0)
    network = randomized(MLP(1, hidden=16, blocks=1, max_frequency=2.0), 0.2, 5)
    transform = randomized(GatedTransform(MLP(1, 8, 1, max_frequency=2.0)), 0.1, 3)
    process = ForwardProcess(LinearLogSNRSchedule(-1.5, 4.0), transform)
    reverse = ReverseProcess(process, Predictor(network))
    decoder, rows = DiscretizedGaussian(grid), 3000
    x = decoder.values.repeat_interleave(rows)[:, None]
    settings = OdeSettings(solver="rk4", nodes=20, probes="exact")
    found = log_likelihood(reverse, decoder, x, dequantization=how, settings=settings)  # type: ignore[arg-type]
    weights = found.log_weights.exp().reshape(len(grid), rows)
    total, error = float(weights.mean(1).sum()), float((weights.var(1) / rows).sum().sqrt())
    assert error < 0.02
    assert abs(total - 1) < 4 * error + 2e-3
    one_sample = float(weights.log().mean(1).exp().sum())
    assert one_sample < total, "the one-sample bound must not exceed the probability"


def test_where_f_is_the_identity_at_zero_the_decoder_only_rescales() -> None:
    reverse = network_process(3)
    x = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    level = reverse.process.level(0.0, x)
    source = ExampleGenerators(0, range(6))
    z, ratio = latent(reverse.process, GaussianDecoder(), x, "variational", source)
    torch.testing.assert_close(ratio, 3 * torch.log(level.alpha))
    plain, same = latent(reverse.process, GaussianDecoder(), x, "none")
    torch.testing.assert_close(plain, level.alpha[:, None] * x)
    torch.testing.assert_close(same, ratio)
    assert not torch.allclose(z, plain)


def test_the_variational_latent_follows_the_forward_process() -> None:
    process = ForwardProcess(LinearLogSNRSchedule(-1.0, 4.0), LinearTransform(start=SHEAR))
    x = MEAN.expand(4000, 2)
    source = ExampleGenerators(0, range(4000))
    z, ratio = latent(process, GaussianDecoder(), x, "variational", source)
    level = process.schedule(torch.zeros(1, dtype=F64))
    q = torch.distributions.Normal(level.alpha * (SHEAR @ MEAN), level.sigma)
    assert bool(((z.mean(0) - q.mean).abs() < 4 * q.stddev / math.sqrt(4000)).all())
    torch.testing.assert_close(z.std(0), q.stddev.expand(2), rtol=0.05, atol=0)
    p = torch.distributions.Normal(z / level.alpha, torch.exp(level.gamma / 2))
    torch.testing.assert_close(ratio, (p.log_prob(x) - q.log_prob(z)).sum(1))


def test_uniform_dequantization_fills_the_bins_and_includes_their_widths() -> None:
    decoder = DiscretizedGaussian([0.0, 1.0, 1.5, 4.0])
    low, width = decoder.bins(torch.tensor([[0.0, 1.0, 1.5, 4.0]]))
    torch.testing.assert_close(low, torch.tensor([[-0.5, 0.5, 1.25, 2.75]]))
    torch.testing.assert_close(width, torch.tensor([[1.0, 0.75, 1.5, 2.5]]))
    low, width = DiscretizedGaussian(256).bins(DiscretizedGaussian(256).values[None])
    torch.testing.assert_close(width, torch.full((1, 256), 2 / 256, dtype=F64))
    assert float(low[0, 0]) == pytest.approx(-1.0)
    process = ForwardProcess(LinearLogSNRSchedule(0.0, 4.0), Identity())
    x = torch.tensor([[1.5, 4.0]], dtype=F64).expand(2000, 2)
    z, ratio = latent(process, decoder, x, "uniform", ExampleGenerators(0, range(2000)))
    alpha = math.sqrt(0.5)
    assert float(ratio[0]) == pytest.approx(2 * math.log(alpha) + math.log(1.5 * 2.5))
    y = z / alpha
    assert bool(((y >= torch.tensor([1.25, 2.75])) & (y < torch.tensor([2.75, 5.25]))).all())
    assert float((y.mean(0) - torch.tensor([2.0, 4.0])).abs().max()) < 0.08


@pytest.mark.slow
def test_log_likelihood_leaves_the_model_unchanged() -> None:
    torch.manual_seed(0)
    transform, predictor = NetworkTransform(MLP(2, 8, 1)), Predictor(MLP(2, 8, 1))
    model = NDM(LinearLogSNRSchedule(-5.0, 3.0), transform, predictor, GaussianDecoder())
    model.double().train()
    x = torch.randn(4, 2, dtype=F64)
    found = model.log_likelihood(x, seed=3)
    assert found.log_p.shape == (4,)
    assert bool(found.log_p.isfinite().all())
    assert torch.equal(found.log_p, model.log_likelihood(x, seed=3).log_p)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_dequantizations_that_do_not_fit_the_data_are_rejected() -> None:
    process, x = ForwardProcess(LinearLogSNRSchedule(), Identity()), torch.zeros(1, 2)
    with pytest.raises(UserError, match="none"):
        latent(process, DiscretizedGaussian(3), x, "none")
    with pytest.raises(UserError, match="uniform"):
        latent(process, GaussianDecoder(), x, "uniform")
    with pytest.raises(UserError, match="magic"):
        latent(process, GaussianDecoder(), x, "magic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="samples"):
        log_likelihood(network_process(2), GaussianDecoder(), x, samples=0)
    with pytest.raises(UserError, match="none"):
        log_likelihood(network_process(2), GaussianDecoder(), x, samples=2, dequantization="none")
