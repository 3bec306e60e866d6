"""Learned noise: at S = 1 the Neural Diffusion Model, for Gaussians the closed forms, for networks
the limit of small steps.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ndm
from ndm.decoder import GaussianDecoder
from ndm.elbo import Draw, diffusion_integrand, prior_term, reconstruction_term
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.ode import OdeSettings, ode_log_prob
from ndm.predictor import Predictor
from ndm.reverse import ReverseProcess
from ndm.sample import Euler, Heun, Step
from ndm.schedule import (
    FlowMatchingSchedule,
    LearnedSchedule,
    LinearLogSNRSchedule,
    NoiseLevel,
    Schedule,
)
from ndm.transform import Curve, GatedTransform, Identity, NetworkTransform, Transform
from ndm.variants.nfdm import (
    NFDM,
    DiagonalCurve,
    DiagonalScale,
    NetworkScale,
    ScaledProcess,
    ScaledReverse,
    SeparableScale,
)
from oracles import (
    F64,
    FormulaCurve,
    GaussianProblem,
    LinearTransform,
    affine_map,
    randomized,
    slope,
)

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: LinearLogSNRSchedule(-6.0, 3.0),
    "flow": lambda: FlowMatchingSchedule(0.05, 0.1),
    "learned": lambda: randomized(LearnedSchedule(-6.0, 3.0)),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_gate = pytest.mark.parametrize("gate", ["time", "bridge"])
TIMES = torch.tensor([0.02, 0.3, 0.62, 0.95], dtype=F64)
FINE = OdeSettings(rtol=1e-7, atol=1e-7, nodes=128, probes="exact")


class TimeScale(DiagonalScale):
    """h = t (a + b t) in each dimension, free of x."""

    def __init__(self, rise: Tensor, bend: Tensor):
        super().__init__()
        self.rise, self.bend = rise, bend
        self.one_at_end = bool((rise + bend == 0).all())

    def log_scale(self, x: Tensor) -> Curve:
        def value(level: NoiseLevel) -> Tensor:
            t = level.t[:, None]
            return (t * (self.rise + self.bend * t)).expand_as(x)

        return FormulaCurve(
            x, value, lambda level: (self.rise + 2 * self.bend * level.t[:, None]).expand_as(x)
        )


def uneven() -> TimeScale:
    return TimeScale(torch.tensor([0.7, -0.4], dtype=F64), torch.tensor([-1.2, 0.9], dtype=F64))


class Foreign(nn.Module):
    """A user's network, time mixed in by a product; its last layer does not start at zero."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dims, 8), nn.Linear(8, dims)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * (1 + t[:, None])))


def network(seed: int, dims: int = 2, scale: float = 0.1) -> MLP:
    torch.manual_seed(seed)
    return randomized(MLP(dims, hidden=16, blocks=1, max_frequency=2.0), scale, seed)


def learned_scale(gate: Any = "time", dims: int = 2) -> NetworkScale:
    return randomized(NetworkScale(network(9, dims), gate), 0.2, 5)


def model(
    schedule: Schedule | None = None, scale: DiagonalScale | None = None, **options: Any
) -> NFDM:
    transform = randomized(NetworkTransform(network(3)), 0.1)
    parts = (
        schedule or LinearLogSNRSchedule(-6.0, 3.0),
        transform,
        scale or learned_scale(),
        Predictor(network(4)),
        GaussianDecoder(),
    )
    return NFDM(*parts, **options).double().eval()


def batch(count: int = 16, dims: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, noise = torch.randn(2, count, dims, dtype=F64, generator=generator)
    return x, noise, torch.rand(count, dtype=F64, generator=generator)


def diffusion(
    reverse: ReverseProcess, x: Tensor, u: Tensor, noise: Tensor, eta: float = 1.0
) -> Tensor:
    return diffusion_integrand(reverse, reverse.process.curve(x), Draw(u, noise), None, eta).bound


# At S = 1


@every_gate
@every_schedule
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_without_a_scale_it_is_the_neural_diffusion_model(
    schedule: str, eta: float, gate: Any
) -> None:
    new = NetworkScale(network(9), gate).double()
    ours = model(SCHEDULES[schedule](), new, eta=eta)
    plain = (
        NDM(ours.schedule, ours.transform, ours.predictor, ours.decoder, eta=eta).double().eval()
    )
    x, z, t = batch()
    found, expected = (
        m.bound(x, draws=2, generator=torch.Generator().manual_seed(0)).terms()
        for m in (ours, plain)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=0)
    level = ours.schedule(t)
    torch.testing.assert_close(
        ours.process.drift(z, x, level, eta),
        plain.process.drift(z, x, level, eta),
        rtol=1e-12,
        atol=1e-12,
    )
    for noise in (0.0, eta):
        expected_drift = plain.reverse_process.drift(z, level, noise)
        torch.testing.assert_close(
            ours.reverse_process.drift(z, level, noise), expected_drift, rtol=1e-12, atol=1e-12
        )


def test_without_a_scale_it_has_the_likelihood_and_the_samples_of_the_neural_diffusion_model() -> (
    None
):
    ours = model(scale=NetworkScale(network(9)).double())
    plain = NDM(ours.schedule, ours.transform, ours.predictor, ours.decoder).double().eval()
    x, _, _ = batch(4)
    found, expected = (m.log_likelihood(x, settings=FINE) for m in (ours, plain))
    torch.testing.assert_close(found.log_weights, expected.log_weights, rtol=1e-9, atol=1e-9)
    for method in ("sde", "ode"):
        options: dict[str, Any] = {"method": method, "steps": 9, "seed": 1}
        torch.testing.assert_close(
            ours.sample((3, 2), **options), plain.sample((3, 2), **options), rtol=1e-10, atol=1e-10
        )
    assert torch.equal(
        ours.sample((3, 2), steps=9, seed=1), ours.sample((3, 2), "sde", steps=9, seed=1)
    )


class Widened(Schedule):
    """The schedule that has h(t), the same for all dimensions and data, within its sigma."""

    def __init__(self, base: Schedule, scale: TimeScale):
        super().__init__()
        self.base, self.scale = base, scale

    def forward(self, t: Tensor) -> NoiseLevel:
        level = self.base(t)
        h, dh = (value[:, 0] for value in self.scale.log_scale(t[:, None]).with_derivative(level))
        sigma = level.sigma * h.exp()
        return NoiseLevel(
            t,
            level.gamma + 2 * h,
            level.alpha,
            sigma,
            level.dalpha,
            h.exp() * (level.dsigma + level.sigma * dh),
        )


@every_schedule
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_a_scale_of_time_alone_is_another_schedule(schedule: str, eta: float) -> None:
    scale = TimeScale(torch.tensor([0.7], dtype=F64), torch.tensor([-0.4], dtype=F64))
    base, transform, predictor = (
        SCHEDULES[schedule](),
        randomized(NetworkTransform(network(3)), 0.1),
        Predictor(network(4), "x"),
    )
    ours = NFDM(base, transform, scale, predictor, GaussianDecoder(), eta=eta).double()
    plain = NDM(Widened(base, scale), transform, predictor, GaussianDecoder()).double()
    x, noise, u = batch()
    of_ours, of_plain = base(u), plain.schedule(u)
    same_g = eta * of_ours.sigma * of_ours.dgamma.sqrt() / (of_plain.sigma * of_plain.dgamma.sqrt())
    level, error, _ = ndm.elbo.continuous_errors(
        plain.reverse_process, plain.process.curve(x), Draw(u, noise), same_g[:, None]
    )
    expected = 0.5 * level.snr_decay * (error**2 / same_g[:, None] ** 2).sum(1)
    torch.testing.assert_close(
        diffusion(ours.reverse_process, x, u, noise, eta), expected, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        prior_term(ours.process, x), prior_term(plain.process, x), rtol=1e-12, atol=0
    )
    for i in range(4):
        one, other = (
            m.process.drift(noise[i : i + 1], x[i : i + 1], m.schedule(u[i : i + 1]), g)
            for m, g in ((ours, eta), (plain, same_g[i].item()))
        )
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# Gaussian data


class ScaledProblem(GaussianProblem):
    """Gaussian data, a linear F, and a noise of its own in each dimension."""

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
        return (
            mean,
            covariance
            + torch.diag_embed(self.variance(level) - level.sigma[:, None] ** 2)[:, None],
        )


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.7])
def test_with_the_exact_predictor_mean_and_covariance_move_as_those_of_the_forward_process(
    schedule: str, eta: float
) -> None:
    """Fokker-Planck for a linear drift a + B z: m' = a + B m and C' = B C + C B^T - g² I, time
    running backward.
    """
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
        torch.testing.assert_close(
            a + b @ mean, (later[0] - earlier[0]).detach() / (2 * step), rtol=1e-6, atol=1e-6
        )
        moved = b @ covariance + covariance @ b.T - g2 * torch.eye(2, dtype=F64)
        torch.testing.assert_close(
            moved, (later[1] - earlier[1]).detach() / (2 * step), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(("make", "order"), [(Euler, 1), (Heun, 2)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samplers_converge_to_the_marginal(
    make: Callable[[float], Step], order: int, eta: float
) -> None:
    problem, sizes, errors = ScaledProblem(LinearLogSNRSchedule(-3.0, 3.0)), [40, 80, 160], []
    for steps in sizes:
        mean, covariance = (value.detach() for value in problem.marginal(1.0))
        for i in range(steps, 0, -1):
            t, s = (
                problem.process.level(j / steps, torch.zeros(1, 2, dtype=F64)) for j in (i, i - 1)
            )
            a, b, c = affine_map(make(eta), problem, t, s)
            mean, covariance = a + b @ mean, b @ covariance @ b.T + c @ c.T
        end = problem.marginal(0.0)
        errors.append(((mean - end[0]).norm() + (covariance - end[1]).norm()).item())
    assert order - 0.25 < slope(sizes, errors) < order + 0.4, errors


def test_the_likelihood_of_the_ode_is_the_gaussian_density() -> None:
    bridge = TimeScale(torch.tensor([0.9, -0.6], dtype=F64), torch.tensor([-0.9, 0.6], dtype=F64))
    problem = ScaledProblem(
        LinearLogSNRSchedule(-4.0, 25.0), bridge
    )  # no signal is left at t = 1: the prior is exact
    mean, covariance = (value.detach() for value in problem.marginal(0.0))
    expected = torch.distributions.MultivariateNormal(mean, covariance)
    z = expected.sample((20,))
    found = ode_log_prob(problem.reverse, z, FINE).log_p
    torch.testing.assert_close(found, expected.log_prob(z), rtol=0, atol=2e-4)


def stepwise_bound(problem: ScaledProblem, steps: int, eta: float) -> float:
    """E[NELBO] of a chain with posteriors N(mu_s + K (z - mu_t), g² (t - s) I), K = sqrt(s_s² -
    v)/s_t, whose marginals are those of q.
    """
    n, covariance = problem.dims, problem.covariances[0]
    level = problem.process.schedule(torch.arange(steps + 1, dtype=F64) / steps)
    matrix, offset = problem.linear.matrix(level.t)
    of_x, spread = level.alpha[:, None, None] * matrix, problem.variance(level)
    taken = (eta**2 * level.sigma**2 * level.dgamma)[1:] / steps
    k = torch.sqrt((spread[:-1] - taken[:, None]) / spread[1:])
    move = of_x[:-1] - k[..., None] * of_x[1:]
    of_z = of_x @ covariance @ of_x.mT + torch.diag_embed(spread)
    left = (
        covariance - covariance @ of_x.mT @ torch.linalg.inv(of_z) @ of_x @ covariance
    )  # cov(x|z_t)
    steps_cost = ((move @ left[1:] @ move.mT).diagonal(dim1=1, dim2=2).sum(1) / (2 * taken)).sum()
    mean = level.alpha[-1] * (matrix[-1] @ problem.means[0] + offset[-1])
    prior = 0.5 * (torch.trace(of_z[-1]) + mean @ mean - n - spread[-1].log().sum())
    reconstruction = 0.5 * n * (1 + math.log(2 * math.pi) + level.gamma[0].item())
    return (prior + steps_cost + reconstruction).item()


def continuous_bound(problem: ScaledProblem, eta: float, panels: int = 100) -> float:
    """E[NELBO] by two-point Gauss-Legendre panels in t; exact in x and noise, of which every term
    is a quadratic.
    """
    edge = (
        torch.arange(panels, dtype=F64)[:, None]
        + 0.5
        + torch.tensor([-1, 1], dtype=F64) / math.sqrt(12)
    )
    x, noise, u, mean = problem.cubature(edge.flatten() / panels)
    ends = prior_term(problem.process, x) + reconstruction_term(
        problem.process, GaussianDecoder(), x, noise
    )
    return (mean(diffusion(problem.reverse, x, u, noise, eta)).mean() + mean(ends).mean()).item()


@every_schedule
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_the_bound_is_the_limit_of_chains_of_gaussian_posteriors(schedule: str, eta: float) -> None:
    problem, sizes = ScaledProblem(SCHEDULES[schedule]()), [1000, 2000, 4000]
    limit = continuous_bound(problem, eta)
    gaps = [stepwise_bound(problem, size, eta) - limit for size in sizes]
    assert (8 * gaps[2] - 6 * gaps[1] + gaps[0]) / 3 == pytest.approx(0.0, abs=3e-4), (
        gaps
    )  # Richardson, twice
    assert 0.8 < slope(sizes, [abs(gap) for gap in gaps]) < 1.2
    assert limit > float(problem.entropy()) + 1e-3, "a bound"


# Networks


def by_hand(process: ScaledProcess, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """mu and s."""
    level = process.schedule(t)
    return (
        level.alpha[:, None] * process.transform(x, level),
        level.sigma[:, None] * process.scale(x, level).exp(),
    )


@every_gate
@every_schedule
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_the_integrand_is_the_limit_of_the_divergence_of_one_step(
    schedule: str, eta: float, gate: Any
) -> None:
    """Twice: of Euler steps of both SDEs, whose drift is :meth:`drift`, and of Gaussian posteriors
    made of marginals alone.
    """
    ours, span = model(SCHEDULES[schedule](), learned_scale(gate)), 1e-6
    x, noise, u = batch()
    u = u.clamp(min=0.01)
    level, process = ours.schedule(u), ours.process
    found = diffusion(ours.reverse_process, x, u, noise, eta)
    mean, std = by_hand(process, x, u)
    z = mean + std * noise
    guess = ours.predictor(z, level)
    assert (process.scale(x, level) - process.scale(guess, level)).abs().mean().item() > 0.02, (
        "the scale must depend on x"
    )
    g2 = (eta**2 * level.sigma**2 * level.dgamma)[:, None]
    drifts = process.drift(z, x, level, eta) - process.drift(z, guess, level, eta)
    torch.testing.assert_close(found, (drifts**2 / (2 * g2)).sum(1), rtol=1e-8, atol=0)
    v, means = g2 * span, []
    for at in (x, guess):
        (mean, std), (mean_s, std_s) = by_hand(process, at, u), by_hand(process, at, u - span)
        means.append(mean_s + torch.sqrt(std_s**2 - v) / std * (z - mean))
    torch.testing.assert_close(
        found, ((means[0] - means[1]) ** 2 / (2 * v)).sum(1) / span, rtol=1e-3, atol=1e-6
    )


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.7])
def test_the_conditional_drift_keeps_the_marginals(schedule: str, eta: float) -> None:
    """d mean/dt = mu' and d variance/dt = 2 B s² - g² = 2 s s', with B the slope of f in z."""
    process, step = model(SCHEDULES[schedule]()).process, 1e-6
    x, _, _ = batch(4)
    level = process.schedule(TIMES)
    (mean, std), earlier, later = (by_hand(process, x, TIMES + shift) for shift in (0, -step, step))
    at_mean = process.drift(mean, x, level, eta)
    torch.testing.assert_close(at_mean, (later[0] - earlier[0]) / (2 * step), rtol=1e-6, atol=1e-7)
    steepness = process.drift(mean + 1, x, level, eta) - at_mean
    g2 = (eta**2 * level.sigma**2 * level.dgamma)[:, None] if eta else 0.0
    torch.testing.assert_close(
        2 * steepness * std**2 - g2,
        (later[1] ** 2 - earlier[1] ** 2) / (2 * step),
        rtol=1e-6,
        atol=1e-7,
    )
    marginal = process.marginal(x, level)
    torch.testing.assert_close((marginal.mean, marginal.std), (mean, std))


def test_prior_and_first_latent_are_those_of_torch_distributions() -> None:
    process = model().process
    x, _, _ = batch()
    normal = torch.distributions.Normal(*by_hand(process, x, torch.ones(16, dtype=F64)))
    standard = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    torch.testing.assert_close(
        prior_term(process, x), torch.distributions.kl_divergence(normal, standard).sum(1)
    )
    for gate in ("time", "bridge"):
        at_zero = model(scale=learned_scale(gate)).process
        first, whole = (
            q(x, at_zero.level(0.0, x)) for q in (at_zero.first_marginal, at_zero.marginal)
        )
        torch.testing.assert_close(first.mean, whole.mean)
        torch.testing.assert_close(first.std.expand_as(x), whole.std, rtol=0, atol=0)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP(3, 16, 2, fourier=(0,), max_frequency=2.0), (3,)),
    "unet": (
        lambda: UNet(2, 8, (1, 2), attention=(False, True), fourier=(0,), max_frequency=2.0),
        (2, 6, 5),
    ),
    "foreign": (lambda: Foreign(3), (3,)),
}


@every_gate
@pytest.mark.parametrize("name", NETWORKS)
def test_the_scale_starts_at_one_and_its_derivative_is_that_of_differences(
    name: str, gate: Any
) -> None:
    torch.manual_seed(0)
    make, event = NETWORKS[name]
    scale, schedule = NetworkScale(make(), gate).double(), LinearLogSNRSchedule(-6.0, 3.0)
    x = torch.randn(4, *event, dtype=F64)
    for value in (scale(x, schedule(TIMES)), *scale.log_scale(x).with_derivative(schedule(TIMES))):
        assert torch.equal(value, torch.zeros_like(x))
    randomized(scale, 0.2)
    value, derivative = scale.log_scale(x).with_derivative(schedule(TIMES))
    torch.testing.assert_close(value, scale(x, schedule(TIMES)))
    difference = (scale(x, schedule(TIMES + 1e-5)) - scale(x, schedule(TIMES - 1e-5))) / 2e-5
    assert derivative.abs().mean().item() > 0.05
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-7)
    assert torch.equal(scale(x, schedule(0 * TIMES)), torch.zeros_like(x))
    assert (
        bool((scale(x, schedule(0 * TIMES + 1)) == 0).all())
        == scale.one_at_end
        == (gate == "bridge")
    )


@pytest.mark.parametrize("gate", ["time", "bridge"])
def test_every_term_trains_what_it_depends_on(gate: str) -> None:
    ours = model(
        randomized(LearnedSchedule(-5.0, 2.0, learn_ends=True), 0.1), learned_scale(gate)
    ).train()
    x, _, _ = batch()
    terms = ours.bound(x, generator=torch.Generator().manual_seed(0)).terms()
    groups = {"transform": ours.transform, "scale": ours.scale, "predictor": ours.predictor}
    reached = set()
    for name in ("prior", "diffusion", "reconstruction"):
        for group, part in groups.items():
            gradients = torch.autograd.grad(
                terms[name].sum(), list(part.parameters()), retain_graph=True, allow_unused=True
            )
            if any(g is not None and float(g.abs().max()) > 1e-9 for g in gradients):
                reached.add((name, group))
                assert all(
                    g is not None and bool(g.isfinite().all()) and float(g.abs().max()) > 0
                    for g in gradients
                ), (name, group)
    expected = {("diffusion", group) for group in groups} | {("prior", "transform")}
    assert reached == expected | ({("prior", "scale")} if gate == "time" else set())


def test_a_new_scale_learns() -> None:
    torch.manual_seed(0)
    ours = model(scale=NetworkScale(Foreign()))
    before = ours.bound(
        batch(256)[0], draws=4, generator=torch.Generator().manual_seed(0)
    ).total.mean()
    optimizer, generator = (
        torch.optim.Adam(ours.scale.parameters(), 3e-3),
        torch.Generator().manual_seed(1),
    )
    for _ in range(60):
        optimizer.zero_grad()
        ours.bound(batch(256)[0], draws=1, generator=generator).total.mean().backward()
        optimizer.step()
    after = ours.bound(
        batch(256)[0], draws=4, generator=torch.Generator().manual_seed(0)
    ).total.mean()
    assert after.item() < before.item() - 0.05


@pytest.mark.parametrize("kind", [NetworkTransform, GatedTransform])
def test_single_precision_suffices_near_the_data(kind: type[Transform]) -> None:
    torch.manual_seed(0)
    parts = (
        LinearLogSNRSchedule(-13.0, 5.0),
        randomized(kind(network(3)), 0.1),
        learned_scale(),
        Predictor(network(4)),
        GaussianDecoder(),
    )  # type: ignore[call-arg]
    exact = NFDM(*parts).double()
    rounded = copy.deepcopy(exact).float()
    x, noise, u = (value.float() for value in batch(256))
    for reach in (1e-3, 0.03, 0.3):
        found = diffusion(rounded.reverse_process, x, reach * u, noise)
        expected = diffusion(exact.reverse_process, x.double(), reach * u.double(), noise.double())
        assert ((found.double() - expected).abs() / expected).max().item() < 5e-3, reach


def test_a_separable_scale_is_zero_at_the_start_and_knows_its_slope() -> None:
    torch.manual_seed(0)
    scale = randomized(SeparableScale(MLP(2, hidden=8, blocks=1, outputs=3)), 0.3)
    x, _, t = batch()
    t, step, schedule = 0.05 + 0.9 * t, 1e-6, LinearLogSNRSchedule()
    value, slope_in_t = scale.log_scale(x).with_derivative(schedule(t))
    assert value.abs().mean().item() > 0.05
    assert torch.equal(scale(x, schedule(torch.zeros_like(t))), torch.zeros_like(x))
    torch.testing.assert_close(value, scale(x, schedule(t)), rtol=1e-12, atol=1e-12)
    around = scale(x, schedule(t + step)) - scale(x, schedule(t - step))
    torch.testing.assert_close(slope_in_t, around / (2 * step), rtol=1e-6, atol=1e-8)


def test_the_network_of_a_separable_scale_is_evaluated_once_for_x_and_once_for_its_prediction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    scale = randomized(SeparableScale(MLP(2, hidden=8, blocks=1, outputs=3)), 0.3)
    made = NFDM(
        LinearLogSNRSchedule(-5.0, 2.0),
        Identity(),
        scale,
        Predictor(MLP(2, hidden=8)),
        GaussianDecoder(),
    ).double()
    x, _, t = batch()
    level, curve = made.process.level(t, x), made.process.curve(x)
    assert isinstance(curve, DiagonalCurve)
    for found, expected in zip(
        curve.log_scale.with_derivative(level),
        scale.log_scale(x).with_derivative(level),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert torch.equal(curve.log_scale.at(level), scale(x, level))
    calls, forward = [], scale.network.forward
    monkeypatch.setattr(
        scale.network, "forward", lambda *arguments: (calls.append(1), forward(*arguments))[1]
    )
    made.bound(x, draws=1)
    assert len(calls) == 2
