"""The generative ODE: densities in closed form and by Jacobians of the flow, probes, quadrature."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ndm.decoder import GaussianDecoder
from ndm.errors import UserError
from ndm.forward import ForwardProcess
from ndm.likelihood import latent
from ndm.nn import MLP, UNet
from ndm.ode import OdeSettings, ode_log_prob, round_trip_error, solve_ode
from ndm.predictor import Predictor
from ndm.quadrature import quadrature, trace_times
from ndm.random import ExampleGenerators
from ndm.reverse import ReverseProcess
from ndm.schedule import (
    CosineSchedule,
    FlowMatchingSchedule,
    LinearLogSNRSchedule,
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
    # No signal is left at t = 1: the prior is exact to 1e-10.
    "linear": lambda: LinearLogSNRSchedule(-4.0, 25.0),
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
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    return MixtureProblem(schedule, transform, weights, means, covariances)


def density(problem: MixtureProblem, z: Tensor, t: float = 0.0) -> Tensor:
    """log q(z_t) of the forward process, by torch.distributions."""
    mean, covariance = problem.latent(problem.process.schedule(torch.tensor([t], dtype=F64)))
    components = torch.distributions.MultivariateNormal(mean[0], covariance[0])
    return torch.logsumexp(problem.weights.log() + components.log_prob(z[:, None]), dim=1).detach()


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [GaussianProblem, mixture])
def test_exact_predictor_gives_the_exact_density(
    kind: Callable[..., MixtureProblem], schedule: str, transform: str
) -> None:
    problem = kind(SCHEDULES[schedule](), TRANSFORMS[transform]())
    x = problem.draw(40, torch.Generator().manual_seed(0))
    source = ExampleGenerators(0, range(40))
    z = latent(problem.process, GaussianDecoder(), x, "variational", source)[0].detach()
    settings = OdeSettings(rtol=1e-7, atol=1e-7, nodes=128, probes="exact")
    found = ode_log_prob(problem.reverse, z, settings)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(found.z_1).sum(1)
    assert float((found.log_p - prior).abs().mean()) > 0.5, "the divergence must matter"
    # 1e-4 nats per dimension.
    torch.testing.assert_close(found.log_p, density(problem, z), rtol=0, atol=2e-4)
    assert float((found.coarse - found.log_p).abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", ["dopri8", "bosh3", "adaptive_heun", "rk4", "heun3", "heun2", "midpoint"]
)
def test_every_solver_converges_to_the_same_density(solver: str) -> None:
    problem = mixture(LinearLogSNRSchedule(-4.0, 12.0), LinearTransform())
    z = torch.linspace(-1, 1, 12, dtype=F64).reshape(6, 2)
    exact = ode_log_prob(problem.reverse, z, FINE).log_p
    errors = []
    for tolerance, nodes in ((1e-2, 40), (1e-4, 160)):
        settings = OdeSettings(solver, tolerance, tolerance, nodes=nodes, probes="exact")  # type: ignore[arg-type]
        found = ode_log_prob(problem.reverse, z, settings).log_p
        errors.append(float((found - exact).abs().max()))
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
    process = ForwardProcess(LinearLogSNRSchedule(-4.0, 3.0), transform)
    return ReverseProcess(process, Predictor(networks[1]))


def image_process() -> ReverseProcess:
    torch.manual_seed(0)
    nets = [UNet(1, 8, (1,), attention=attention, max_frequency=2.0) for attention in (False, True)]
    transform = randomized(GatedTransform(nets[0]), 0.05, 1)
    process = ForwardProcess(LinearLogSNRSchedule(-4.0, 3.0), transform)
    return ReverseProcess(process, randomized(Predictor(nets[1]), 0.05, 2))


def flow_log_det(reverse: ReverseProcess, z: Tensor, step: float = 1e-4) -> tuple[Tensor, Tensor]:
    """z_1 and log |det dz_1/dz_0|, ``(B,)``, by central differences, without a trace."""
    size = z[0].numel()
    shifts = step * torch.eye(size, dtype=F64).reshape(size, 1, *z.shape[1:])
    moved = torch.cat([z[None] + shifts, z[None] - shifts, z[None]]).flatten(0, 1)
    with torch.no_grad():
        path, *_ = solve_ode(reverse, moved, torch.tensor([0.0, 1.0]), rtol=1e-9, atol=1e-9)
    end = path[-1].reshape(2 * size + 1, len(z), size)
    jacobian = (end[:size] - end[size:-1]).permute(1, 2, 0) / (2 * step)
    return end[-1].reshape(z.shape), torch.linalg.slogdet(jacobian).logabsdet


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: network_process(3),
        lambda: network_process(2, GatedTransform),
        lambda: network_process(3, None),
    ],
)
def test_density_of_a_nonlinear_transform_matches_the_jacobian_of_the_flow(
    make: Callable[[], ReverseProcess],
) -> None:
    reverse = make()
    dims = reverse.predictor.network.dims  # type: ignore[union-attr]
    z = torch.randn(4, dims, dtype=F64, generator=torch.Generator().manual_seed(3))
    found, (end, log_det) = ode_log_prob(reverse, z, FINE), flow_log_det(reverse, z)
    torch.testing.assert_close(found.z_1, end, rtol=0, atol=1e-6)
    assert float(log_det.abs().min()) > 0.1
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(end).sum(1) + log_det
    torch.testing.assert_close(found.log_p, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_density_of_images_matches_the_jacobian_of_the_flow() -> None:
    reverse = image_process()
    z = torch.randn(1, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
    found = ode_log_prob(reverse, z, OdeSettings(rtol=1e-7, atol=1e-7, nodes=32, probes="exact"))
    (end, log_det) = flow_log_det(reverse, z)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(end).flatten(1).sum(1) + log_det
    torch.testing.assert_close(found.log_p, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_probes_of_an_example_do_not_depend_on_the_batch() -> None:
    reverse = network_process(20)
    z = torch.randn(90, 20, dtype=F64, generator=torch.Generator().manual_seed(3))
    settings = OdeSettings(solver="rk4", nodes=6, probes=3)
    whole = ode_log_prob(reverse, z, settings, ExampleGenerators(0, range(90))).log_p
    parts = []
    for i in (0, 40, 80):
        source = ExampleGenerators(0, range(i, min(i + 40, 90)))
        parts.append(ode_log_prob(reverse, z[i : i + 40], settings, source).log_p)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_its_variance_falls_with_the_probes(probe: str) -> None:
    reverse = image_process()
    z = torch.randn(1, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(3))
    exact = ode_log_prob(reverse, z, OdeSettings(solver="rk4", nodes=8, probes="exact")).log_p
    many, variance = z.expand(144, 1, 4, 4), []
    for probes in (1, 4):
        settings = OdeSettings(solver="rk4", nodes=8, probes=probes, probe=probe)  # type: ignore[arg-type]
        found = ode_log_prob(reverse, many, settings, ExampleGenerators(probes, range(144))).log_p
        assert float(found.std()) > 1e-2
        assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / 12
        variance.append(float(found.var()))
    assert 2.4 < variance[0] / variance[1] < 6.5


@pytest.mark.slow
def test_the_cost_of_an_adaptive_solver_does_not_depend_on_the_probes() -> None:
    """Probes in the solver's state, or new ones at each call, would multiply its steps."""
    reverse = network_process(20)
    z = torch.randn(8, 20, dtype=F64, generator=torch.Generator().manual_seed(3))
    source = ExampleGenerators(0, range(8))
    all_settings = [OdeSettings(probes=probes) for probes in ("exact", 1, 8)]  # type: ignore[arg-type]
    counts = [ode_log_prob(reverse, z, settings, source).nfe for settings in all_settings]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] < 400


def test_quadrature_is_exact_for_polynomials_and_nested() -> None:
    times, weights = quadrature(8)
    for degree in range(9):
        assert float((weights * times**degree).sum()) == pytest.approx(1 / (degree + 1), abs=1e-14)
    assert torch.allclose(times[::2], quadrature(4)[0], atol=1e-15)
    times, weights = quadrature(32)
    integral = float((weights * torch.exp(3 * times)).sum())
    assert integral == pytest.approx(math.expm1(3) / 3, rel=1e-13)
    assert bool((weights > 0).all())


@pytest.mark.parametrize(
    "schedule",
    [CosineSchedule(), FlowMatchingSchedule(), LinearLogSNRSchedule(-6.0, 25.0)],
    ids=["cosine", "flow", "linear"],
)
def test_trace_times_integrate_over_t_and_are_nested(schedule: Schedule) -> None:
    process = ForwardProcess(schedule, Identity())
    times, weights = trace_times(process, 64)
    assert (float(times[0]), float(times[-1])) == (0.0, 1.0)
    assert bool((times.diff() > 0).all())
    for power in (0, 1, 3):
        assert float((weights * times**power).sum()) == pytest.approx(1 / (power + 1), abs=2e-3)
    torch.testing.assert_close(times[::2], trace_times(process, 32)[0], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_tolerance_holds_for_a_hard_example_among_many_easy_ones() -> None:
    problem = mixture(LinearLogSNRSchedule(-8.0, 12.0), LinearTransform())
    hard = torch.tensor([[6.0, -7.0]], dtype=F64)
    easy = torch.zeros(400, 2, dtype=F64)
    settings = OdeSettings(rtol=1e-5, atol=1e-5, probes="exact", nodes=8)
    best = ode_log_prob(problem.reverse, hard, FINE)
    scale = float(best.z_1.abs().max())
    for z in (hard, torch.cat([hard, easy])):
        found = ode_log_prob(problem.reverse, z, settings)
        assert float((found.z_1[:1] - best.z_1).abs().max()) < 50 * 1e-5 * scale


@pytest.mark.slow
def test_the_ode_is_reversible_within_its_tolerance() -> None:
    reverse = network_process(3)
    z = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    errors = [
        float(round_trip_error(reverse, z, OdeSettings(rtol=tolerance, atol=tolerance)).max())
        for tolerance in (1e-3, 1e-7)
    ]
    assert errors[1] < 1e-5
    assert errors[1] < errors[0] / 100


def test_unreachable_tolerances_are_rejected_in_one_line() -> None:
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
def test_settings_out_of_range_are_rejected(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        OdeSettings(**options)  # type: ignore[arg-type]


def test_few_dimensions_use_the_exact_trace_and_many_use_probes() -> None:
    assert OdeSettings().probes_for(16) is None
    assert OdeSettings().probes_for(17) == 2
    assert OdeSettings(probes="exact").probes_for(1000) is None
    assert OdeSettings(probes=2).probes_for(3) == 2
