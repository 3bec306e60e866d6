"""Displacement interpolation: density, reverse process, bound and likelihood in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ndm.curve import Curve
from ndm.decoder import GaussianDecoder
from ndm.elbo import diffusion_integrand, prior_term, reconstruction_term
from ndm.errors import UserError
from ndm.nn import MLP
from ndm.sample import Euler, GridSampler, Heun
from ndm.schedule import FlowMatchingSchedule, LinearLogSNRSchedule, NoiseLevel, Schedule
from ndm.serialize import load_model, save_model
from ndm.time_sampling import Draw, PiecewiseConstant
from ndm.transform import SeparableTransform, Transform
from ndm.variants.monotone import MonotoneMap, TransportMap
from ndm.variants.nfdm import NetworkScale
from ndm.variants.transport import TransportNDM, TransportReverse
from oracles import F64, FormulaCurve, cubature_points, gauss_times, randomized
from variants.test_monotone import bent_map

SCHEDULES: dict[str, Any] = {
    "linear": lambda: LinearLogSNRSchedule(-5.0, 0.5),
    "flow": lambda: FlowMatchingSchedule(0.1, 0.4),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
with_and_without_scale = pytest.mark.parametrize("scaled", [False, True])


def make_model(schedule: Schedule | None = None, scaled: bool = False) -> TransportNDM:
    torch.manual_seed(0)
    transform = randomized(SeparableTransform(MLP(1, hidden=8, blocks=1, outputs=3)), 0.2)
    scale = None
    if scaled:
        scale = randomized(NetworkScale(MLP(1, hidden=8, blocks=1, max_frequency=2.0)), 0.2)
    schedule = schedule or LinearLogSNRSchedule(-5.0, 0.5)
    parts = schedule, transform, bent_map(), GaussianDecoder()
    model = TransportNDM(*parts, scale, eta_parts=4).double()
    with torch.no_grad():
        model.log_eta.copy_(torch.tensor([0.1, -0.2, 0.3, 0.2]))
    return model.eval()


def noises(count: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, 1, dtype=F64, generator=generator)
    return 1.5 * x, noise, torch.rand(count, dtype=F64, generator=generator)


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.5])
def test_the_marginals_solve_the_fokker_planck_equation(schedule: str, eta: float) -> None:
    """∂_t log p + ∂_z b + b ∂_z log p + ½ g² (∂²_z log p + (∂_z log p)²) = 0 in reverse time."""
    reverse = make_model(SCHEDULES[schedule]()).reverse_process
    z = torch.randn(30, 1, dtype=F64, requires_grad=True)
    t = (0.02 + 0.96 * torch.rand(30, dtype=F64)).requires_grad_()
    level = reverse.process.schedule(t)
    found, drift = reverse.interpolant(z, level), reverse.drift(z, level, eta)
    (by_t,) = torch.autograd.grad(found.log_p.sum(), t, retain_graph=True)
    by_z = found.score  # the gradient of log p, see above
    (curvature,) = torch.autograd.grad(by_z.sum(), z, retain_graph=True)
    (divergence,) = torch.autograd.grad(drift.sum(), z, retain_graph=True)
    g2 = (eta**2 * level.sigma**2 * level.dgamma)[:, None]
    residual = by_t[:, None] + divergence + drift * by_z + 0.5 * g2 * (curvature + by_z**2)
    assert by_t.abs().mean().item() > 0.05
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-8)


@every_schedule
def test_the_ode_follows_the_straight_lines(schedule: str) -> None:
    model, z = make_model(SCHEDULES[schedule]()), torch.randn(50, 1, dtype=F64)
    with torch.no_grad():
        target = model.transport(z)
        ends = [GridSampler(Heun(0.0), steps)(model.reverse_process, z) for steps in (20, 40)]
    errors = [(end - target).abs().max().item() for end in ends]
    assert errors[1] < 0.02
    assert errors[0] / errors[1] > 2.5, "second order"
    assert (target - z).abs().mean().item() > 0.3


@pytest.mark.slow
def test_samples_of_the_sde_have_the_density_of_the_lines() -> None:
    model = make_model()
    z = torch.randn(4000, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.transport(z).sort(0).values
        sampler, generator = GridSampler(Euler(1.0), 100), torch.Generator().manual_seed(1)
        found = sampler(model.reverse_process, z, generator).sort(0).values
        wrong = z.sort(0).values
    assert (found - expected).square().mean().sqrt().item() < 0.1
    assert (wrong - expected).square().mean().sqrt().item() > 0.2


def test_a_sample_is_the_decoded_image_of_the_prior() -> None:
    model, shape = make_model(), (6, 1)
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(shape, dtype=F64, generator=generator)
    level = model.process.level(0.0, z)
    expected = model.decoder.sample(model.transport(z), level, generator)
    assert torch.equal(model.sample(shape, seed=4), expected.detach())
    r, *_ = model.reverse_process.clock(model.process.level(0.4, z))
    z_t, *_ = model.transport.interpolate(z, r)
    torch.testing.assert_close(model.predict(z_t, 0.4), model.transport(z), rtol=0, atol=1e-9)


@with_and_without_scale
@every_schedule
def test_the_integrand_is_the_squared_difference_of_the_drifts(schedule: str, scaled: bool) -> None:
    model = make_model(SCHEDULES[schedule](), scaled)
    x, noise, u = noises(30)
    u = u.clamp(min=0.02)
    for eta in (0.5, 1.0, 1.7):
        reverse, curve = model.reverse_process, model.process.curve(x)
        found = diffusion_integrand(reverse, curve, Draw(u, noise), None, eta).bound
        level = model.process.schedule(u)
        z = model.process.marginal(x, level).sample(noise)
        drifts = model.process.drift(z, x, level, eta) - model.reverse_process.drift(z, level, eta)
        g2 = (eta**2 * level.sigma**2 * level.dgamma)[:, None]
        torch.testing.assert_close(found, (drifts**2 / (2 * g2)).sum(1), rtol=1e-8, atol=1e-10)


class AffineMap(TransportMap):
    """T(ζ) = m + a ζ."""

    def __init__(self, mean: float, slope: float):
        super().__init__()
        self.mean, self.slope = mean, slope

    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean + self.slope * zeta, torch.full_like(zeta, self.slope)[..., None]


class Matching(Transform):
    """F = c (x - m) + (1 - r) m/alpha.

    For x ~ N(m, S²) it gives q(z_t) the marginals of an affine map's lines.
    """

    data_at_zero = False

    def __init__(self, schedule: Schedule, transport: AffineMap, std: float):
        super().__init__()
        self.schedule, self.transport, self.std = schedule, transport, std

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, NoiseLevel]:
        level = self.schedule(t)
        ends = self.schedule(t.new_tensor([0.0, 1.0])).sigma.square()
        r = (level.sigma**2 - ends[0]) / (ends[1] - ends[0])
        spread = (1 - r) * self.transport.slope + r
        gain = torch.sqrt(spread**2 - level.sigma**2) / (level.alpha * self.std)
        return gain, (1 - r) * self.transport.mean / level.alpha, level

    def curve(self, x: Tensor) -> Curve:
        def value(level: NoiseLevel) -> Tensor:
            gain, offset, _ = self.at(level.t)
            return gain[:, None] * (x - self.transport.mean) + offset[:, None]

        def derivative(level: NoiseLevel) -> Tensor:
            function = lambda t: value(self.schedule(t))  # noqa: E731
            return torch.func.jvp(function, (level.t,), (torch.ones_like(level.t),))[1]  # type: ignore[misc]

        return FormulaCurve(x, value, derivative)

    def eta(self, t: Tensor, factor: float = 1.0) -> Tensor:
        """The eta of g² = sigma² times the slope of log(sigma²/(alpha c)²)."""

        def gamma(t: Tensor) -> Tensor:
            gain, _, level = self.at(t)
            return 2 * (level.sigma / (level.alpha * gain)).log()

        _, slope = torch.func.jvp(gamma, (t,), (torch.ones_like(t),))  # type: ignore[misc]
        return factor * torch.sqrt(slope / self.schedule(t).dgamma)


class ExactEta(PiecewiseConstant):
    def __init__(self, transform: Matching, factor: float = 1.0):
        self.transform, self.factor = transform, factor

    def __call__(self, t: Tensor) -> Tensor:
        return self.transform.eta(t, self.factor)


def gaussian_bound(
    schedule: Schedule, mean: float, std: float, slope: float, factor: float = 1.0
) -> float:
    """E[NELBO] by cubature, exact in x and noise; Gauss-Legendre panels in t."""
    transport = AffineMap(mean, slope)
    transform = Matching(schedule, transport, std)
    model = TransportNDM(schedule, transform, transport, GaussianDecoder()).double()
    times, points = gauss_times(200), cubature_points(2)
    u = times.repeat_interleave(4)
    x = (mean + std * points[:, :1]).repeat(len(times), 1)
    noise = points[:, 1:].repeat(len(times), 1)
    eta = ExactEta(transform, factor)
    reverse, curve = model.reverse_process, model.process.curve(x)
    terms = diffusion_integrand(reverse, curve, Draw(u, noise), None, eta).bound
    ends = prior_term(model.process, x) + reconstruction_term(
        model.process, model.decoder, x, noise
    )
    return (terms.mean() + ends.mean()).item()


@every_schedule
@pytest.mark.parametrize("slope", [0.7, 1.6])
def test_the_bound_of_a_gaussian_is_tight_up_to_the_decoder(schedule: str, slope: float) -> None:
    levels, mean, std = SCHEDULES[schedule](), 0.4, slope
    first = levels(torch.zeros(1, dtype=F64))
    alpha, sigma = first.alpha.item(), first.sigma.item()
    # q(x|z_0) and p(x|z_0): both Gaussian, z_0 ~ N(m, a²)
    gain = std * math.sqrt(slope**2 - sigma**2) / slope**2
    ratio = (std * alpha / slope) ** 2
    bias = (mean * (1 - 1 / alpha)) ** 2 + (gain - 1 / alpha) ** 2 * slope**2
    decoder_gap = 0.5 * (ratio - 1 - math.log(ratio)) + bias * alpha**2 / (2 * sigma**2)
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    best = gaussian_bound(levels, mean, std, slope)
    assert best == pytest.approx(entropy + decoder_gap, abs=2e-5)
    for factor in (0.8, 1.25):
        assert gaussian_bound(levels, mean, std, slope, factor) > best + 1e-3, (
            "another g costs more"
        )


def exact_log_prob(model: TransportNDM, x: Tensor) -> Tensor:
    """log p(x), integrated over ζ by Gauss-Legendre panels, without the density of T(ζ)."""
    zeta = (18 * gauss_times(4000) - 9)[:, None]
    level = model.process.level(0.0, x[:1])
    with torch.no_grad():
        mean = model.transport(zeta)[:, 0] / level.alpha
    width = level.sigma / level.alpha
    log_joint = -0.5 * zeta[:, 0] ** 2 - 0.5 * ((x - mean) / width) ** 2
    log_joint -= torch.log(2 * math.pi * width)
    return torch.logsumexp(log_joint, 1) + math.log(18 / len(zeta))


@with_and_without_scale
def test_the_bound_lies_above_the_exact_negative_log_likelihood(scaled: bool) -> None:
    """For every x and any F, h, T and eta."""
    model = make_model(scaled=scaled)
    x = torch.tensor([-2.5, -0.8, 0.0, 0.9, 2.2], dtype=F64)[:, None]
    with torch.no_grad():
        many, generator = x.repeat_interleave(3000, 0), torch.Generator().manual_seed(0)
        draws = model.bound(many, draws=2, generator=generator).total.reshape(5, -1)
    exact = -exact_log_prob(model, x)
    assert bool((draws.mean(1) + 4 * draws.std(1) / draws.shape[1] ** 0.5 > exact).all())
    assert bool((draws.mean(1) < exact + 60).all())


def test_the_importance_weighted_likelihood_approaches_the_exact_one() -> None:
    model, x = make_model(), torch.tensor([-2.5, -0.8, 0.0, 0.9, 2.2], dtype=F64)[:, None]
    found = model.log_likelihood(x, samples=80, seed=1)
    torch.testing.assert_close(found.log_p, exact_log_prob(model, x), rtol=0, atol=0.05)
    assert bool((found.single < found.log_p).all())
    plain = model.log_likelihood(x, dequantization="none").log_p
    alpha = model.process.level(0.0, x).alpha
    zeta = model.transport.origin(alpha[:, None] * x, torch.zeros(5, dtype=F64))
    slope = model.transport.with_jacobian(zeta)[1][:, 0, 0]
    expected = -0.5 * zeta[:, 0] ** 2 - 0.5 * math.log(2 * math.pi) - slope.log() + alpha.log()
    torch.testing.assert_close(plain, expected.detach(), rtol=1e-9, atol=1e-9)


def test_every_parameter_has_a_gradient_from_the_bound() -> None:
    model = make_model(scaled=True)
    model.bound(noises(64)[0]).loss.mean().backward()
    silent = [
        name
        for name, value in model.named_parameters()
        if value.grad is None or not bool(value.grad.abs().sum() > 0)
    ]
    assert silent == []


def test_unsupported_uses_are_rejected() -> None:
    model, x = make_model(), torch.zeros(2, 1, dtype=F64)
    for call in (
        lambda: model.bound(x, steps=10),
        lambda: model.sample((2, 1), "ancestral"),
        lambda: model.sample((2, 1), "ddim"),
    ):
        with pytest.raises(UserError, match="continuous time"):
            call()
    with pytest.raises(UserError, match="events of one number, got 2"):
        model.sample((2, 2))
    with pytest.raises(UserError, match="keeps no signal"):
        TransportNDM(FlowMatchingSchedule(), model.transform, model.transport, model.decoder)
    with pytest.raises(UserError, match="transport must be a TransportMap"):
        TransportNDM(model.schedule, model.transform, model.decoder, model.decoder)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="scale=-1"):
        MonotoneMap(scale=-1)


def test_a_loaded_model_has_the_same_bound(tmp_path: Any) -> None:
    model = make_model(scaled=True).float()
    save_model(tmp_path, model)
    again = load_model(tmp_path)[0]
    assert isinstance(again, TransportNDM)
    x = noises(5)[0].float()
    one, other = (
        m.bound(x, draws=1, generator=torch.Generator().manual_seed(0)).total
        for m in (model, again)
    )
    assert torch.equal(one, other)


def test_the_reverse_process_is_a_transport_reverse() -> None:
    assert isinstance(make_model().reverse_process, TransportReverse)
