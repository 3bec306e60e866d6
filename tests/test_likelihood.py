"""The likelihood by the ODE against closed forms, against Jacobians of the flow, and against sums
over all values of a grid.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.errors import UserError
from ndm.forward import ForwardProcess
from ndm.likelihood import latent, log_likelihood
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.ode import OdeSettings, ode_log_prob, quadrature, round_trip_error, solve_ode, trace_times
from ndm.predictor import Predictor
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
from ndm.transform import GatedTransform, Identity, NetworkTransform, Transform
from oracles import (
    COVARIANCE,
    F64,
    MEAN,
    SHEAR,
    GaussianProblem,
    LinearTransform,
    MixtureProblem,
    randomized,
)

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: LinearLogSNRSchedule(
        -4.0, 25.0
    ),  # no signal is left at t = 1: the prior is exact to 1e-10
    "flow": lambda: FlowMatchingSchedule(0.1, 0.0),
}
TRANSFORMS: dict[str, Callable[[], LinearTransform]] = {
    "tilted": LinearTransform,
    "sheared": lambda: LinearTransform(start=SHEAR),
}
FINE = OdeSettings(rtol=1e-9, atol=1e-9, nodes=96, probes="exact")


def mixture(schedule: Schedule, transform: LinearTransform) -> MixtureProblem:
    means = torch.stack([MEAN, -MEAN])
    covariances = torch.stack([0.3 * COVARIANCE, torch.diag(torch.tensor([0.2, 0.6], dtype=F64))])
    return MixtureProblem(
        schedule, transform, torch.tensor([0.3, 0.7], dtype=F64), means, covariances
    )


def density(problem: MixtureProblem, z: Tensor, t: float = 0.0) -> Tensor:
    """log q(z_t) of the forward process, by torch.distributions."""
    mean, covariance = problem.latent(problem.process.schedule(torch.tensor([t], dtype=F64)))
    components = torch.distributions.MultivariateNormal(mean[0], covariance[0])
    return torch.logsumexp(problem.weights.log() + components.log_prob(z[:, None]), dim=1).detach()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [GaussianProblem, mixture])
def test_exact_predictor_gives_the_exact_density(
    kind: Callable[..., MixtureProblem], schedule: str, transform: str
) -> None:
    problem = kind(SCHEDULES[schedule](), TRANSFORMS[transform]())
    x = problem.draw(40, torch.Generator().manual_seed(0))
    z, _ = latent(
        problem.process, GaussianDecoder(), x, "variational", ExampleGenerators(0, range(40))
    )
    settings = OdeSettings(rtol=1e-7, atol=1e-7, nodes=128, probes="exact")
    found = ode_log_prob(problem.reverse, z.detach(), settings)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(found.z_1).sum(1)
    assert float((found.log_p - prior).abs().mean()) > 0.5, "the divergence must matter"
    torch.testing.assert_close(
        found.log_p, density(problem, z.detach()), rtol=0, atol=2e-4
    )  # 1e-4 nats a dimension
    assert float((found.coarse - found.log_p).abs().max()) < 1e-3


@pytest.mark.parametrize(
    "solver", ["dopri8", "bosh3", "adaptive_heun", "rk4", "heun3", "heun2", "midpoint"]
)
def test_every_solver_converges_to_the_same_density(solver: str) -> None:
    problem = mixture(LinearLogSNRSchedule(-4.0, 12.0), LinearTransform())
    z = torch.linspace(-1, 1, 12, dtype=F64).reshape(6, 2)
    exact = ode_log_prob(problem.reverse, z, FINE).log_p
    errors = []
    for tolerance, nodes in ((1e-2, 40), (1e-4, 160)):
        settings = OdeSettings(
            solver=solver, rtol=tolerance, atol=tolerance, nodes=nodes, probes="exact"
        )  # type: ignore[arg-type]
        errors.append(float((ode_log_prob(problem.reverse, z, settings).log_p - exact).abs().max()))
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 4


def network_process(
    dims: int, kind: type[Transform] | None = NetworkTransform, seed: int = 1
) -> ReverseProcess:
    torch.manual_seed(seed)
    networks = [
        randomized(MLP(dims, hidden=16, blocks=1, max_frequency=2.0), 0.15, seed + i)
        for i in range(2)
    ]
    transform = Identity() if kind is None else randomized(kind(networks[0]), 0.1, seed)  # type: ignore[call-arg]
    return ReverseProcess(
        ForwardProcess(LinearLogSNRSchedule(-4.0, 3.0), transform), Predictor(networks[1])
    )


def image_process() -> ReverseProcess:
    torch.manual_seed(0)
    nets = [UNet(1, 8, (1,), attention=attention, max_frequency=2.0) for attention in (False, True)]
    transform = randomized(GatedTransform(nets[0]), 0.05, 1)
    return ReverseProcess(
        ForwardProcess(LinearLogSNRSchedule(-4.0, 3.0), transform),
        randomized(Predictor(nets[1]), 0.05, 2),
    )


def flow_log_det(reverse: ReverseProcess, z: Tensor, step: float = 1e-4) -> tuple[Tensor, Tensor]:
    """z_1 and log |det dz_1/dz_0|, ``(B,)``, by central differences of the solved flow: no trace
    anywhere.
    """
    size = z[0].numel()
    shifts = step * torch.eye(size, dtype=F64).reshape(size, 1, *z.shape[1:])
    moved = torch.cat([z[None] + shifts, z[None] - shifts, z[None]]).flatten(0, 1)
    with torch.no_grad():
        end = solve_ode(reverse, moved, torch.tensor([0.0, 1.0]), rtol=1e-9, atol=1e-9)[0][
            -1
        ].reshape(2 * size + 1, len(z), size)
    jacobian = (end[:size] - end[size:-1]).permute(1, 2, 0) / (2 * step)
    return end[-1].reshape(z.shape), torch.linalg.slogdet(jacobian).logabsdet


@pytest.mark.parametrize(
    "make",
    [
        lambda: network_process(3),
        lambda: network_process(2, GatedTransform),
        lambda: network_process(3, None),
    ],
)
def test_nonlinear_transformations_against_the_jacobian_of_the_flow(
    make: Callable[[], ReverseProcess],
) -> None:
    reverse = make()
    dims = reverse.predictor.network.dims  # type: ignore[union-attr]
    z = torch.randn(4, dims, dtype=F64, generator=torch.Generator().manual_seed(3))
    found, (end, log_det) = ode_log_prob(reverse, z, FINE), flow_log_det(reverse, z)
    torch.testing.assert_close(found.z_1, end, rtol=0, atol=1e-6)
    assert float(log_det.abs().min()) > 0.1
    torch.testing.assert_close(
        found.log_p,
        torch.distributions.Normal(0.0, 1.0).log_prob(end).sum(1) + log_det,
        rtol=0,
        atol=1e-5,
    )


def test_images_against_the_jacobian_of_the_flow() -> None:
    reverse = image_process()
    z = torch.randn(1, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
    found, (end, log_det) = (
        ode_log_prob(reverse, z, OdeSettings(rtol=1e-7, atol=1e-7, nodes=32, probes="exact")),
        flow_log_det(reverse, z),
    )
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(end).flatten(1).sum(1) + log_det
    torch.testing.assert_close(found.log_p, expected, rtol=0, atol=1e-4)


def test_the_probes_of_an_example_do_not_depend_on_the_batch() -> None:
    reverse, z = (
        network_process(20),
        torch.randn(90, 20, dtype=F64, generator=torch.Generator().manual_seed(3)),
    )
    settings = OdeSettings(solver="rk4", nodes=6, probes=3)
    whole = ode_log_prob(reverse, z, settings, ExampleGenerators(0, range(90))).log_p
    parts = [
        ode_log_prob(
            reverse, z[i : i + 40], settings, ExampleGenerators(0, range(i, min(i + 40, 90)))
        ).log_p
        for i in (0, 40, 80)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_its_variance_falls_with_the_probes(probe: str) -> None:
    reverse = image_process()
    z = torch.randn(1, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(3))
    exact = ode_log_prob(reverse, z, OdeSettings(solver="rk4", nodes=8, probes="exact")).log_p
    many, variance = z.expand(256, 1, 4, 4), []
    for probes in (1, 4):
        settings = OdeSettings(solver="rk4", nodes=8, probes=probes, probe=probe)  # type: ignore[arg-type]
        found = ode_log_prob(reverse, many, settings, ExampleGenerators(probes, range(256))).log_p
        assert float(found.std()) > 1e-2
        assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / 16
        variance.append(float(found.var()))
    assert 2.4 < variance[0] / variance[1] < 6.5


def test_the_cost_of_an_adaptive_solver_does_not_depend_on_the_probes() -> None:
    """A probe that the solver could see, or that changed at each call, would multiply its steps."""
    reverse, z = (
        network_process(20),
        torch.randn(8, 20, dtype=F64, generator=torch.Generator().manual_seed(3)),
    )
    source = ExampleGenerators(0, range(8))
    counts = [
        ode_log_prob(reverse, z, OdeSettings(probes=probes), source).nfe
        for probes in ("exact", 1, 8)
    ]  # type: ignore[arg-type]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] < 400


def test_quadrature_is_exact_for_polynomials_and_nested() -> None:
    times, weights = quadrature(8)
    for degree in range(9):
        assert float((weights * times**degree).sum()) == pytest.approx(1 / (degree + 1), abs=1e-14)
    assert torch.allclose(times[::2], quadrature(4)[0], atol=1e-15)
    times, weights = quadrature(32)
    assert float((weights * torch.exp(3 * times)).sum()) == pytest.approx(
        math.expm1(3) / 3, rel=1e-13
    )
    assert bool((weights > 0).all())


class GridPredictor(nn.Module):
    """E[x|z_t] of independent uniform values on the grid of a decoder, F = x: as sharp as data on a
    grid make it.
    """

    def __init__(self, decoder: DiscretizedGaussian):
        super().__init__()
        self.values = decoder.values

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        alpha, sigma = level.alpha[:, None, None], level.sigma[:, None, None]
        exponent = -0.5 * ((z[..., None] - alpha * self.values) / sigma) ** 2
        return (torch.softmax(exponent, -1) * self.values).sum(-1)


@pytest.mark.parametrize(
    "schedule",
    [LinearBetaSchedule(), CosineSchedule(), FlowMatchingSchedule(), LinearLogSNRSchedule()],
    ids=["ddpm", "cosine", "flow", "linear"],
)
def test_the_default_settings_resolve_steep_schedules(schedule: Schedule) -> None:
    decoder = DiscretizedGaussian(17)
    x = decoder.values[torch.randint(17, (40, 1), generator=torch.Generator().manual_seed(0))]
    reverse = ReverseProcess(ForwardProcess(schedule, Identity()), GridPredictor(decoder))  # type: ignore[arg-type]
    found = log_likelihood(
        reverse, decoder, x, samples=2, settings=OdeSettings(rtol=1e-5, atol=1e-6)
    )
    assert float(found.log_p.mean()) == pytest.approx(-math.log(17), abs=0.01)
    assert float(
        (found.log_p - found.coarse_log_weights.logsumexp(1) + math.log(2)).mean()
    ) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    "schedule",
    [CosineSchedule(), FlowMatchingSchedule(), LinearLogSNRSchedule(-6.0, 25.0)],
    ids=["cosine", "flow", "linear"],
)
def test_the_times_of_the_trace_integrate_over_t_and_are_nested(schedule: Schedule) -> None:
    process = ForwardProcess(schedule, Identity())
    times, weights = trace_times(process, 64)
    assert (float(times[0]), float(times[-1])) == (0.0, 1.0)
    assert bool((times.diff() > 0).all())
    for power in (0, 1, 3):
        assert float((weights * times**power).sum()) == pytest.approx(1 / (power + 1), abs=2e-3)
    torch.testing.assert_close(times[::2], trace_times(process, 32)[0], rtol=0, atol=1e-12)


def test_the_tolerance_holds_for_a_hard_example_among_many_easy_ones() -> None:
    problem = mixture(LinearLogSNRSchedule(-8.0, 12.0), LinearTransform())
    hard = torch.tensor([[6.0, -7.0]], dtype=F64)
    easy = torch.zeros(400, 2, dtype=F64)
    settings = OdeSettings(rtol=1e-5, atol=1e-5, probes="exact", nodes=8)
    alone, together = (
        ode_log_prob(problem.reverse, z, settings) for z in (hard, torch.cat([hard, easy]))
    )
    best = ode_log_prob(problem.reverse, hard, FINE)
    scale = float(best.z_1.abs().max())
    for found in (alone, together):
        assert float((found.z_1[:1] - best.z_1).abs().max()) < 50 * 1e-5 * scale


def decoder_density(problem: MixtureProblem, x: Tensor) -> Tensor:
    """log of the integral of N(x; z_0/alpha_0, exp(gamma_0) I) over q(z_0)."""
    level = problem.process.schedule(torch.zeros(1, dtype=F64))
    mean, covariance = problem.latent(level)
    covariance = covariance[0] / level.alpha**2 + torch.exp(level.gamma) * torch.eye(2, dtype=F64)
    components = torch.distributions.MultivariateNormal(mean[0] / level.alpha, covariance)
    return torch.logsumexp(problem.weights.log() + components.log_prob(x[:, None]), dim=1).detach()


def test_importance_weighted_likelihood_rises_to_the_exact_one() -> None:
    problem = mixture(LinearLogSNRSchedule(-1.0, 25.0), LinearTransform())
    x = problem.draw(3, torch.Generator().manual_seed(0))
    exact, rows = decoder_density(problem, x), 1024
    settings = OdeSettings(solver="rk4", nodes=64, probes="exact")
    found = log_likelihood(
        problem.reverse, GaussianDecoder(), x.repeat_interleave(rows, 0), settings=settings, seed=1
    )
    weights = found.log_weights.reshape(3, rows)
    bounds = {k: torch.logsumexp(weights.reshape(3, -1, k), 2) - math.log(k) for k in (1, 8, 1024)}
    means = {k: float(bound.mean(1).mean()) for k, bound in bounds.items()}
    assert means[1] + 0.02 < means[8] < means[1024], (
        "the bound must be loose for one sample and rise"
    )
    spread = (weights.exp().std(1) / weights.exp().mean(1) / math.sqrt(rows)).detach()
    assert bool(((bounds[1024][:, 0] - exact).abs() < 4 * spread).all())
    assert bool((bounds[8].mean(1) < exact + 4 * bounds[8].std(1) / math.sqrt(rows / 8)).all())


def test_samples_in_the_record_are_those_of_separate_rows() -> None:
    reverse, x = (
        network_process(2),
        torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0)),
    )
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


@pytest.mark.parametrize("how", ["variational", "uniform"])
@pytest.mark.parametrize(
    "grid",
    [[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0], [-4.0, -1.5, -1.0, 0.25, 0.5, 2.0, 4.0]],
)
def test_probabilities_of_all_values_of_a_grid_add_up_to_one(how: str, grid: list[float]) -> None:
    torch.manual_seed(0)
    network = randomized(MLP(1, hidden=16, blocks=1, max_frequency=2.0), 0.2, 5)
    process = ForwardProcess(
        LinearLogSNRSchedule(-1.5, 4.0),
        randomized(GatedTransform(MLP(1, 8, 1, max_frequency=2.0)), 0.1, 3),
    )
    decoder, rows = DiscretizedGaussian(grid), 3000
    x = decoder.values.repeat_interleave(rows)[:, None]
    settings = OdeSettings(solver="rk4", nodes=20, probes="exact")
    found = log_likelihood(
        ReverseProcess(process, Predictor(network)),
        decoder,
        x,
        dequantization=how,
        settings=settings,  # type: ignore[arg-type]
    )
    weights = found.log_weights.exp().reshape(len(grid), rows)
    total, error = float(weights.mean(1).sum()), float((weights.var(1) / rows).sum().sqrt())
    assert error < 0.02
    assert abs(total - 1) < 4 * error + 2e-3
    assert float(weights.log().mean(1).exp().sum()) < total, (
        "the bound for one sample must not exceed the probability"
    )


def test_for_an_identity_at_zero_the_decoder_only_rescales() -> None:
    reverse, x = (
        network_process(3),
        torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0)),
    )
    level = reverse.process.level(0.0, x)
    z, ratio = latent(
        reverse.process, GaussianDecoder(), x, "variational", ExampleGenerators(0, range(6))
    )
    torch.testing.assert_close(ratio, 3 * torch.log(level.alpha))
    plain, same = latent(reverse.process, GaussianDecoder(), x, "none")
    torch.testing.assert_close(plain, level.alpha[:, None] * x)
    torch.testing.assert_close(same, ratio)
    assert not torch.allclose(z, plain)


def test_the_variational_latent_is_that_of_the_forward_process() -> None:
    process = ForwardProcess(LinearLogSNRSchedule(-1.0, 4.0), LinearTransform(start=SHEAR))
    x = MEAN.expand(4000, 2)
    z, ratio = latent(
        process, GaussianDecoder(), x, "variational", ExampleGenerators(0, range(4000))
    )
    level = process.schedule(torch.zeros(1, dtype=F64))
    q = torch.distributions.Normal(level.alpha * (SHEAR @ MEAN), level.sigma)
    assert bool(((z.mean(0) - q.mean).abs() < 4 * q.stddev / math.sqrt(4000)).all())
    torch.testing.assert_close(z.std(0), q.stddev.expand(2), rtol=0.05, atol=0)
    p = torch.distributions.Normal(z / level.alpha, torch.exp(level.gamma / 2))
    torch.testing.assert_close(ratio, (p.log_prob(x) - q.log_prob(z)).sum(1))


def test_uniform_noise_fills_the_bins_and_counts_their_widths() -> None:
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


def test_the_ode_is_reversible_within_its_tolerance() -> None:
    reverse, z = (
        network_process(3),
        torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0)),
    )
    errors = [
        float(round_trip_error(reverse, z, OdeSettings(rtol=tolerance, atol=tolerance)).max())
        for tolerance in (1e-3, 1e-7)
    ]
    assert errors[1] < 1e-5
    assert errors[1] < errors[0] / 100


def test_the_model_answers_and_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = (
        NDM(
            LinearLogSNRSchedule(-5.0, 3.0),
            NetworkTransform(MLP(2, 8, 1)),
            Predictor(MLP(2, 8, 1)),
            GaussianDecoder(),
        )
        .double()
        .train()
    )
    x = torch.randn(4, 2, dtype=F64)
    found = model.log_likelihood(x, seed=3)
    assert found.log_p.shape == (4,)
    assert bool(found.log_p.isfinite().all())
    assert torch.equal(found.log_p, model.log_likelihood(x, seed=3).log_p)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_tolerances_out_of_reach_are_one_clear_line() -> None:
    problem = GaussianProblem(LinearLogSNRSchedule(-8.0, 12.0))
    z = torch.randn(2, 2, dtype=F64) * math.nan
    with pytest.raises(UserError, match="raise the tolerances") as caught:
        ode_log_prob(problem.reverse, z, OdeSettings(rtol=1e-12, atol=1e-12))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="float64"):
        ode_log_prob(problem.reverse, torch.zeros(2, 2), OdeSettings(rtol=1e-12, atol=1e-12))


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "rk9"},
        {"rtol": 0.0},
        {"nodes": 7},
        {"nodes": 0},
        {"probes": 0},
        {"probes": "many"},
        {"probe": "cauchy"},
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        OdeSettings(**options)  # type: ignore[arg-type]


def test_ways_that_do_not_fit_the_data_are_refused() -> None:
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


def test_few_dimensions_take_the_exact_trace_and_many_take_probes() -> None:
    assert OdeSettings().probes_for(16) is None
    assert OdeSettings().probes_for(17) == 2
    assert OdeSettings(probes="exact").probes_for(1000) is None
    assert OdeSettings(probes=2).probes_for(3) == 2
