"""Learned noise: NDM at S = 1, and the limit of small steps for networks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ndm
from ndm.curve import Curve
from ndm.decoder import GaussianDecoder
from ndm.elbo import diffusion_integrand, prior_term
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.ode import OdeSettings
from ndm.predictor import Predictor
from ndm.reverse import ReverseProcess
from ndm.schedule import (
    FlowMatchingSchedule,
    LearnedSchedule,
    LinearLogSNRSchedule,
    NoiseLevel,
    Schedule,
)
from ndm.time_sampling import Draw
from ndm.transform import GatedTransform, Identity, NetworkTransform, Transform
from ndm.variants.nfdm import (
    NFDM,
    DiagonalCurve,
    DiagonalScale,
    NetworkScale,
    ScaledProcess,
    SeparableScale,
)
from oracles import (
    F64,
    FormulaCurve,
    randomized,
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
    """h = t (a + b t) in each dimension, independent of x."""

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


class Foreign(nn.Module):
    """A user's network with multiplicative time; its last layer does not start at zero."""

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
    schedule = schedule or LinearLogSNRSchedule(-6.0, 3.0)
    transform = randomized(NetworkTransform(network(3)), 0.1)
    parts = schedule, transform, scale or learned_scale(), Predictor(network(4))
    return NFDM(*parts, GaussianDecoder(), **options).double().eval()


def batch(count: int = 16, dims: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, noise = torch.randn(2, count, dims, dtype=F64, generator=generator)
    return x, noise, torch.rand(count, dtype=F64, generator=generator)


def diffusion(
    reverse: ReverseProcess, x: Tensor, u: Tensor, noise: Tensor, eta: float = 1.0
) -> Tensor:
    return diffusion_integrand(reverse, reverse.process.curve(x), Draw(u, noise), None, eta).bound


@pytest.mark.slow
@every_gate
@every_schedule
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_without_a_scale_nfdm_equals_ndm(schedule: str, eta: float, gate: Any) -> None:
    new = NetworkScale(network(9), gate).double()
    ours = model(SCHEDULES[schedule](), new, eta=eta)
    parts = ours.schedule, ours.transform, ours.predictor, ours.decoder
    plain = NDM(*parts, eta=eta).double().eval()
    x, z, t = batch()
    found, expected = (
        m.bound(x, draws=2, generator=torch.Generator().manual_seed(0)).terms()
        for m in (ours, plain)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=0)
    level = ours.schedule(t)
    drifts = [m.process.drift(z, x, level, eta) for m in (ours, plain)]
    torch.testing.assert_close(*drifts, rtol=1e-12, atol=1e-12)
    for noise in (0.0, eta):
        drifts = [m.reverse_process.drift(z, level, noise) for m in (ours, plain)]
        torch.testing.assert_close(*drifts, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_without_a_scale_likelihood_and_samples_equal_those_of_ndm() -> None:
    ours = model(scale=NetworkScale(network(9)).double())
    plain = NDM(ours.schedule, ours.transform, ours.predictor, ours.decoder).double().eval()
    x, _, _ = batch(4)
    found, expected = (m.log_likelihood(x, settings=FINE) for m in (ours, plain))
    torch.testing.assert_close(found.log_weights, expected.log_weights, rtol=1e-9, atol=1e-9)
    for method in ("sde", "ode"):
        options: dict[str, Any] = {"method": method, "steps": 9, "seed": 1}
        samples = [m.sample((3, 2), **options) for m in (ours, plain)]
        torch.testing.assert_close(*samples, rtol=1e-10, atol=1e-10)
    default, sde = (ours.sample((3, 2), method, steps=9, seed=1) for method in (None, "sde"))
    assert torch.equal(default, sde)


class Widened(Schedule):
    """A schedule whose sigma includes h(t), equal for all dimensions and data."""

    def __init__(self, base: Schedule, scale: TimeScale):
        super().__init__()
        self.base, self.scale = base, scale

    def forward(self, t: Tensor) -> NoiseLevel:
        level = self.base(t)
        h, dh = (value[:, 0] for value in self.scale.log_scale(t[:, None]).with_derivative(level))
        sigma, dsigma = level.sigma * h.exp(), h.exp() * (level.dsigma + level.sigma * dh)
        return NoiseLevel(t, level.gamma + 2 * h, level.alpha, sigma, level.dalpha, dsigma)


@pytest.mark.slow
@every_schedule
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_a_scale_that_depends_only_on_time_is_another_schedule(schedule: str, eta: float) -> None:
    scale = TimeScale(torch.tensor([0.7], dtype=F64), torch.tensor([-0.4], dtype=F64))
    base = SCHEDULES[schedule]()
    transform = randomized(NetworkTransform(network(3)), 0.1)
    predictor = Predictor(network(4), "x")
    ours = NFDM(base, transform, scale, predictor, GaussianDecoder(), eta=eta).double()
    plain = NDM(Widened(base, scale), transform, predictor, GaussianDecoder()).double()
    x, noise, u = batch()
    of_ours, of_plain = base(u), plain.schedule(u)
    same_g = eta * of_ours.sigma * of_ours.dgamma.sqrt() / (of_plain.sigma * of_plain.dgamma.sqrt())
    level, error, _ = ndm.elbo.continuous_errors(
        plain.reverse_process, plain.process.curve(x), Draw(u, noise), same_g[:, None]
    )
    expected = 0.5 * level.snr_decay * (error**2 / same_g[:, None] ** 2).sum(1)
    found = diffusion(ours.reverse_process, x, u, noise, eta)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    priors = [prior_term(m.process, x) for m in (ours, plain)]
    torch.testing.assert_close(*priors, rtol=1e-12, atol=0)
    for i in range(4):
        row = slice(i, i + 1)
        found = ours.process.drift(noise[row], x[row], ours.schedule(u[row]), eta)
        same = same_g[i].item()
        expected = plain.process.drift(noise[row], x[row], plain.schedule(u[row]), same)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def by_hand(process: ScaledProcess, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """mu and s."""
    level = process.schedule(t)
    mu = level.alpha[:, None] * process.transform(x, level)
    return mu, level.sigma[:, None] * process.scale(x, level).exp()


@pytest.mark.slow
@every_gate
@every_schedule
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_the_integrand_is_the_limit_of_the_one_step_divergence(
    schedule: str, eta: float, gate: Any
) -> None:
    """For Euler steps of both SDEs, and for Gaussian posteriors built from the marginals."""
    ours, span = model(SCHEDULES[schedule](), learned_scale(gate)), 1e-6
    x, noise, u = batch()
    u = u.clamp(min=0.01)
    level, process = ours.schedule(u), ours.process
    found = diffusion(ours.reverse_process, x, u, noise, eta)
    mean, std = by_hand(process, x, u)
    z = mean + std * noise
    guess = ours.predictor(z, level)
    change = process.scale(x, level) - process.scale(guess, level)
    assert change.abs().mean().item() > 0.02, "the scale must depend on x"
    g2 = (eta**2 * level.sigma**2 * level.dgamma)[:, None]
    drifts = process.drift(z, x, level, eta) - process.drift(z, guess, level, eta)
    torch.testing.assert_close(found, (drifts**2 / (2 * g2)).sum(1), rtol=1e-8, atol=0)
    v, means = g2 * span, []
    for at in (x, guess):
        (mean, std), (mean_s, std_s) = by_hand(process, at, u), by_hand(process, at, u - span)
        means.append(mean_s + torch.sqrt(std_s**2 - v) / std * (z - mean))
    expected = ((means[0] - means[1]) ** 2 / (2 * v)).sum(1) / span
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.7])
def test_the_conditional_drift_preserves_the_marginals(schedule: str, eta: float) -> None:
    """d mean/dt = mu' and d variance/dt = 2 B s² - g² = 2 s s', with B the slope of f in z."""
    process, step = model(SCHEDULES[schedule]()).process, 1e-6
    x, _, _ = batch(4)
    level = process.schedule(TIMES)
    (mean, std), earlier, later = (by_hand(process, x, TIMES + shift) for shift in (0, -step, step))
    at_mean = process.drift(mean, x, level, eta)
    torch.testing.assert_close(at_mean, (later[0] - earlier[0]) / (2 * step), rtol=1e-6, atol=1e-7)
    steepness = process.drift(mean + 1, x, level, eta) - at_mean
    g2 = (eta**2 * level.sigma**2 * level.dgamma)[:, None] if eta else 0.0
    rate = (later[1] ** 2 - earlier[1] ** 2) / (2 * step)
    torch.testing.assert_close(2 * steepness * std**2 - g2, rate, rtol=1e-6, atol=1e-7)
    marginal = process.marginal(x, level)
    torch.testing.assert_close((marginal.mean, marginal.std), (mean, std))


def test_prior_and_first_latent_match_torch_distributions() -> None:
    process = model().process
    x, _, _ = batch()
    normal = torch.distributions.Normal(*by_hand(process, x, torch.ones(16, dtype=F64)))
    standard = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).sum(1)
    torch.testing.assert_close(prior_term(process, x), expected)
    for gate in ("time", "bridge"):
        at_zero = model(scale=learned_scale(gate)).process
        level = at_zero.level(0.0, x)
        first, whole = at_zero.first_marginal(x, level), at_zero.marginal(x, level)
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
def test_the_scale_starts_at_one_and_its_derivative_matches_finite_differences(
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
    zero_at_end = bool((scale(x, schedule(0 * TIMES + 1)) == 0).all())
    assert zero_at_end == scale.one_at_end == (gate == "bridge")


@pytest.mark.parametrize("gate", ["time", "bridge"])
def test_each_term_has_gradients_only_for_its_own_parts(gate: str) -> None:
    schedule = randomized(LearnedSchedule(-5.0, 2.0, learn_ends=True), 0.1)
    ours = model(schedule, learned_scale(gate)).train()
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
                for g in gradients:
                    assert g is not None and bool(g.isfinite().all()), (name, group)
                    assert float(g.abs().max()) > 0, (name, group)
    expected = {("diffusion", group) for group in groups} | {("prior", "transform")}
    assert reached == expected | ({("prior", "scale")} if gate == "time" else set())


@pytest.mark.slow
def test_a_new_scale_learns() -> None:
    torch.manual_seed(0)
    ours = model(scale=NetworkScale(Foreign()))
    x, _, _ = batch(256)
    before = ours.bound(x, draws=4, generator=torch.Generator().manual_seed(0)).total.mean()
    optimizer = torch.optim.Adam(ours.scale.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        optimizer.zero_grad()
        ours.bound(x, draws=1, generator=generator).total.mean().backward()
        optimizer.step()
    after = ours.bound(x, draws=4, generator=torch.Generator().manual_seed(0)).total.mean()
    assert after.item() < before.item() - 0.05


@pytest.mark.parametrize("kind", [NetworkTransform, GatedTransform])
def test_float32_suffices_near_the_data(kind: type[Transform]) -> None:
    torch.manual_seed(0)
    transform = randomized(kind(network(3)), 0.1)  # type: ignore[call-arg]
    parts = LinearLogSNRSchedule(-13.0, 5.0), transform, learned_scale(), Predictor(network(4))
    exact = NFDM(*parts, GaussianDecoder()).double()
    rounded = copy.deepcopy(exact).float()
    x, noise, u = (value.float() for value in batch(256))
    for reach in (1e-3, 0.03, 0.3):
        found = diffusion(rounded.reverse_process, x, reach * u, noise)
        expected = diffusion(exact.reverse_process, x.double(), reach * u.double(), noise.double())
        assert ((found.double() - expected).abs() / expected).max().item() < 5e-3, reach


def test_a_separable_scale_starts_at_one_and_has_the_right_derivative() -> None:
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
    parts = LinearLogSNRSchedule(-5.0, 2.0), Identity(), scale, Predictor(MLP(2, hidden=8))
    ours = NFDM(*parts, GaussianDecoder()).double()
    x, _, t = batch()
    level, curve = ours.process.level(t, x), ours.process.curve(x)
    assert isinstance(curve, DiagonalCurve)
    found = curve.log_scale.with_derivative(level)
    expected = scale.log_scale(x).with_derivative(level)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(curve.log_scale.at(level), scale(x, level))
    calls, forward = [], scale.network.forward

    def counting(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(scale.network, "forward", counting)
    ours.bound(x, draws=1)
    assert len(calls) == 2
