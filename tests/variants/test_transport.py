"""Displacement interpolation: its density and its equation of motion, the bound against closed
forms and above the exact likelihood.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ndm.decoder import GaussianDecoder
from ndm.elbo import Draw, diffusion_integrand, prior_term, reconstruction_term
from ndm.errors import UserError
from ndm.nn import MLP
from ndm.sample import Euler, GridSampler, Heun
from ndm.schedule import FlowMatchingSchedule, LinearLogSNRSchedule, NoiseLevel, Schedule
from ndm.serialize import load_model, save_model
from ndm.time_sampling import PiecewiseConstant
from ndm.transform import Curve, SeparableTransform, Transform
from ndm.variants.monotone import ConvexMap, MonotoneMap, TransportMap
from ndm.variants.nfdm import NetworkScale
from ndm.variants.transport import TransportNDM, TransportReverse
from oracles import F64, FormulaCurve, randomized

SCHEDULES: dict[str, Any] = {
    "linear": lambda: LinearLogSNRSchedule(-5.0, 0.5),
    "flow": lambda: FlowMatchingSchedule(0.1, 0.4),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
with_and_without_scale = pytest.mark.parametrize("scaled", [False, True])


def bent_map(seed: int = 1) -> MonotoneMap:
    return randomized(MonotoneMap(6, scale=1.3), 0.4, seed)


def model(schedule: Schedule | None = None, scaled: bool = False) -> TransportNDM:
    torch.manual_seed(0)
    transform = randomized(SeparableTransform(MLP(1, hidden=8, blocks=1, outputs=3)), 0.2)
    scale = (
        randomized(NetworkScale(MLP(1, hidden=8, blocks=1, max_frequency=2.0)), 0.2)
        if scaled
        else None
    )
    made = TransportNDM(
        schedule or LinearLogSNRSchedule(-5.0, 0.5),
        transform,
        bent_map(),
        GaussianDecoder(),
        scale,
        eta_parts=4,
    ).double()
    with torch.no_grad():
        made.log_eta.copy_(torch.tensor([0.1, -0.2, 0.3, 0.2]))
    return made.eval()


def noises(count: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, 1, dtype=F64, generator=generator)
    return 1.5 * x, noise, torch.rand(count, dtype=F64, generator=generator)


# The map


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("steepness", [0.3, 3.0, 80.0])
def test_the_line_through_a_point_is_found(dtype: torch.dtype, steepness: float) -> None:
    """Also where T all but jumps: there ζ hardly moves with z, and z must come back."""
    transport = bent_map().to(dtype)
    with torch.no_grad():
        transport.log_steepness.fill_(math.log(steepness))
    z = torch.linspace(-9, 9, 301, dtype=dtype)[:, None]
    for r in (0.0, 0.2, 0.9, 1.0):
        at = torch.full((301,), r, dtype=dtype)
        back, _ = transport.interpolate(transport.origin(z, at), at)
        torch.testing.assert_close(back, z, rtol=0, atol=3e4 * torch.finfo(dtype).eps)


def convex_map(dims: int, terms: int = 3) -> ConvexMap:
    torch.manual_seed(0)
    return randomized(ConvexMap(dims, 6, terms, scale=1.3), 0.3)


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_a_convex_map_has_its_jacobian_and_its_lines(dims: int) -> None:
    transport = convex_map(dims)
    zeta, r = torch.randn(30, dims, dtype=F64), torch.rand(30, dtype=F64)
    value, jacobian = transport.with_jacobian(zeta)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.jacrev(lambda one: transport(one[None])[0]))(zeta), jacobian
    )
    assert torch.linalg.eigvalsh(jacobian).min() > 0
    z = transport.interpolate(zeta, r)[0]
    torch.testing.assert_close(transport.origin(z, r), zeta, rtol=0, atol=1e-9)
    moved = zeta.flip(0)
    assert (((transport(moved) - value) * (moved - zeta)).sum(1) > 0)[(moved != zeta).any(1)].all()


def test_a_convex_map_is_the_gradient_of_its_formula() -> None:
    transport, zeta = convex_map(3), torch.randn(20, 3, dtype=F64, requires_grad=True)
    steepness = transport.log_steepness.exp()
    terms = (zeta[:, None, None] * transport.direction).sum(-1) * steepness + transport.offset
    sums = (transport.log_height.exp() / steepness * terms.logsumexp(1)).sum(1)
    potential = zeta @ transport.shift + 0.5 * transport.log_slope.exp() * (zeta**2).sum(1) + sums
    torch.testing.assert_close(transport(zeta), torch.autograd.grad(potential.sum(), zeta)[0])


def test_a_convex_map_of_pairs_on_a_line_is_a_monotone_map() -> None:
    monotone, convex = bent_map(), convex_map(1, terms=2)
    with torch.no_grad():
        convex.shift.copy_(monotone.shift[None])
        convex.log_slope.copy_(monotone.log_slope)
        convex.direction.copy_(
            torch.tensor([1.0, -1.0])[:, None, None]
        )  # tanh(u) = weight of exp(u) less that of exp(-u)
        convex.log_height.copy_(monotone.log_height)
        convex.log_steepness.copy_(monotone.log_steepness)
        bend = monotone.log_steepness.exp() * monotone.center
        convex.offset.copy_(torch.stack([-bend, bend]))
    zeta = torch.linspace(-3, 3, 50, dtype=F64)[:, None]
    for one, other in zip(convex.with_jacobian(zeta), monotone.with_jacobian(zeta), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dims", [1, 2, 8])
def test_a_new_convex_map_is_about_a_multiple(dims: int) -> None:
    torch.manual_seed(0)
    zeta = torch.randn(4000, dims)
    image = ConvexMap(dims, 48, 4, scale=2.0)(zeta)
    assert 0.5 < (image * zeta).sum().item() / (zeta * zeta).sum().item() / 2.0 < 1.5
    assert (image.mean(0).norm() / image.norm(dim=1).mean()).item() < 0.3, "no drift to a side"


def test_a_line_that_is_not_found_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndm.variants.monotone._NEWTON_STEPS", 1)
    with pytest.raises(
        ArithmeticError, match="at 1 point"
    ):  # at r = 1 the map is the identity, which takes no step
        bent_map().origin(
            torch.tensor([[0.5], [0.5]], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
        )


def test_jacobian_density_and_score_are_those_of_the_change_of_variables() -> None:
    transport, r = bent_map(), torch.rand(40, dtype=F64)
    zeta = torch.randn(40, 1, dtype=F64, requires_grad=True)
    value, jacobian = transport.with_jacobian(zeta)
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), zeta)[0], jacobian[..., 0], rtol=1e-10, atol=1e-12
    )
    z = transport.interpolate(zeta, r)[0].detach().requires_grad_()
    found = transport.interpolant(z, r)
    torch.testing.assert_close(found.origin, zeta, rtol=0, atol=1e-9)
    (score,) = torch.autograd.grad(found.log_p.sum(), z)
    torch.testing.assert_close(found.score, score, rtol=1e-8, atol=1e-10)
    for at in (0.0, 0.4, 1.0):
        grid = torch.linspace(-12, 12, 20_001, dtype=F64)[:, None]
        with torch.no_grad():
            density = transport.interpolant(grid, torch.full((20_001,), at, dtype=F64)).log_p.exp()
        assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-6)


def test_gradients_of_what_is_found_are_those_of_the_inverse() -> None:
    """Against differences: of the velocity and the score in the weights of T."""
    transport, r = bent_map(), torch.tensor([0.1, 0.5, 0.8], dtype=F64)
    z, step = torch.tensor([[-0.7], [0.2], [1.1]], dtype=F64), 1e-5

    def reading() -> Tensor:
        found = transport.interpolant(z, r)
        return (
            found.velocity * torch.tensor([[1.0], [2.0], [3.0]], dtype=F64) + torch.sin(found.score)
        ).sum()

    for parameter in transport.parameters():
        (gradient,) = torch.autograd.grad(reading(), parameter)
        flat = parameter.data.reshape(-1)
        for index in range(min(2, len(flat))):
            around = []
            for shift in (-step, 2 * step):
                flat[index] += shift
                around.append(reading().item())
            flat[index] -= step
            assert gradient.reshape(-1)[index].item() == pytest.approx(
                (around[1] - around[0]) / (2 * step), rel=1e-6, abs=1e-7
            )


# The reverse process


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.5])
def test_the_marginals_solve_the_equation_of_fokker_and_planck(schedule: str, eta: float) -> None:
    """∂_t log p + ∂_z b + b ∂_z log p + ½ g² (∂²_z log p + (∂_z log p)²) = 0, time running
    backward; and log p is that of the lines.
    """
    reverse = model(SCHEDULES[schedule]()).reverse_process
    z, t = (
        torch.randn(30, 1, dtype=F64, requires_grad=True),
        (0.02 + 0.96 * torch.rand(30, dtype=F64)).requires_grad_(),
    )
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
    made, z = model(SCHEDULES[schedule]()), torch.randn(50, 1, dtype=F64)
    with torch.no_grad():
        target = made.transport(z)
        ends = [GridSampler(Heun(0.0), steps)(made.reverse_process, z) for steps in (20, 40)]
    errors = [(end - target).abs().max().item() for end in ends]
    assert errors[1] < 0.02
    assert errors[0] / errors[1] > 2.5, "of second order"
    assert (target - z).abs().mean().item() > 0.3


def test_samples_of_the_sde_have_the_density_of_the_lines() -> None:
    made = model()
    z = torch.randn(4000, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = made.transport(z).sort(0).values
        found = (
            GridSampler(Euler(1.0), 100)(made.reverse_process, z, torch.Generator().manual_seed(1))
            .sort(0)
            .values
        )
        wrong = z.sort(0).values
    assert (
        (found - expected).square().mean().sqrt().item()
        < 0.1
        < 0.2
        < (wrong - expected).square().mean().sqrt().item()
    )


def test_a_sample_is_the_image_of_the_prior_and_the_decoder() -> None:
    made, shape = model(), (6, 1)
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(shape, dtype=F64, generator=generator)
    level = made.process.level(0.0, z)
    expected = made.decoder.sample(made.transport(z), level, generator)
    assert torch.equal(made.sample(shape, seed=4), expected.detach())
    lines = made.predict(
        made.transport.interpolate(z, made.reverse_process.clock(made.process.level(0.4, z))[0])[0],
        0.4,
    )
    torch.testing.assert_close(lines, made.transport(z), rtol=0, atol=1e-9)


# The bound


@with_and_without_scale
@every_schedule
def test_the_integrand_is_the_squared_difference_of_the_drifts(schedule: str, scaled: bool) -> None:
    made = model(SCHEDULES[schedule](), scaled)
    x, noise, u = noises(30)
    u = u.clamp(min=0.02)
    for eta in (0.5, 1.0, 1.7):
        found = diffusion_integrand(
            made.reverse_process, made.process.curve(x), Draw(u, noise), None, eta
        ).bound
        level = made.process.schedule(u)
        z = made.process.marginal(x, level).sample(noise)
        drifts = made.process.drift(z, x, level, eta) - made.reverse_process.drift(z, level, eta)
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
    """The F that gives q(z_t) the marginals of an affine map's lines for x ~ N(m, S²): c (x - m) +
    (1 - r) m/alpha.
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
        return (
            torch.sqrt(spread**2 - level.sigma**2) / (level.alpha * self.std),
            (1 - r) * self.transport.mean / level.alpha,
            level,
        )

    def curve(self, x: Tensor) -> Curve:
        def value(level: NoiseLevel) -> Tensor:
            gain, offset, _ = self.at(level.t)
            return gain[:, None] * (x - self.transport.mean) + offset[:, None]

        def derivative(level: NoiseLevel) -> Tensor:
            return torch.func.jvp(
                lambda t: value(self.schedule(t)), (level.t,), (torch.ones_like(level.t),)
            )[1]  # type: ignore[misc]

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
    made = TransportNDM(schedule, transform, transport, GaussianDecoder()).double()
    panels = 200
    edge = (
        torch.arange(panels, dtype=F64)[:, None]
        + 0.5
        + torch.tensor([-1, 1], dtype=F64) / math.sqrt(12)
    )
    points = math.sqrt(2) * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=F64)
    u = (edge.flatten() / panels).repeat_interleave(4)
    x, noise = (
        (mean + std * points[:, :1]).repeat(2 * panels, 1),
        points[:, 1:].repeat(2 * panels, 1),
    )
    eta = ExactEta(transform, factor)
    terms = diffusion_integrand(
        made.reverse_process, made.process.curve(x), Draw(u, noise), None, eta
    ).bound.mean()
    ends = prior_term(made.process, x) + reconstruction_term(made.process, made.decoder, x, noise)
    return (terms + ends.mean()).item()


@every_schedule
@pytest.mark.parametrize("slope", [0.7, 1.6])
def test_the_bound_is_tight_for_a_gaussian_but_for_the_decoder(schedule: str, slope: float) -> None:
    made, mean, std = SCHEDULES[schedule](), 0.4, slope
    first = made(torch.zeros(1, dtype=F64))
    alpha, sigma = first.alpha.item(), first.sigma.item()
    # q(x|z_0) and p(x|z_0): both Gaussian, z_0 ~ N(m, a²)
    gain = std * math.sqrt(slope**2 - sigma**2) / slope**2
    ratio = (std * alpha / slope) ** 2
    bias = (mean * (1 - 1 / alpha)) ** 2 + (gain - 1 / alpha) ** 2 * slope**2
    decoder_gap = 0.5 * (ratio - 1 - math.log(ratio)) + bias * alpha**2 / (2 * sigma**2)
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    best = gaussian_bound(made, mean, std, slope)
    assert best == pytest.approx(entropy + decoder_gap, abs=2e-5)
    for factor in (0.8, 1.25):
        assert gaussian_bound(made, mean, std, slope, factor) > best + 1e-3, "another g costs more"


def exact_log_prob(made: TransportNDM, x: Tensor) -> Tensor:
    """log p(x), the decoder integrated out by Gauss-Legendre panels over ζ; of the density of T(ζ)
    nothing is used.
    """
    edges = torch.linspace(-9, 9, 4001, dtype=F64)
    zeta = torch.stack(
        [edges[:-1] + (edges[1] - edges[0]) * (0.5 + shift / math.sqrt(12)) for shift in (-1, 1)]
    ).flatten()[:, None]
    level = made.process.level(0.0, x[:1])
    with torch.no_grad():
        mean = made.transport(zeta)[:, 0] / level.alpha
    width = level.sigma / level.alpha
    log_joint = (
        -0.5 * zeta[:, 0] ** 2 - 0.5 * ((x - mean) / width) ** 2 - torch.log(2 * math.pi * width)
    )
    return torch.logsumexp(log_joint, 1) + math.log(18 / len(zeta))


@with_and_without_scale
def test_the_bound_lies_above_the_exact_likelihood(scaled: bool) -> None:
    """For every x by itself, whatever F, h, T and eta."""
    made = model(scaled=scaled)
    x = torch.tensor([-2.5, -0.8, 0.0, 0.9, 2.2], dtype=F64)[:, None]
    with torch.no_grad():
        draws = made.bound(
            x.repeat_interleave(3000, 0), draws=2, generator=torch.Generator().manual_seed(0)
        ).total.reshape(5, -1)
    exact = -exact_log_prob(made, x)
    assert bool((draws.mean(1) + 4 * draws.std(1) / draws.shape[1] ** 0.5 > exact).all())
    assert bool((draws.mean(1) < exact + 60).all())


def test_the_likelihood_tends_to_the_exact_one() -> None:
    made, x = model(), torch.tensor([-2.5, -0.8, 0.0, 0.9, 2.2], dtype=F64)[:, None]
    found = made.log_likelihood(x, samples=80, seed=1)
    torch.testing.assert_close(found.log_p, exact_log_prob(made, x), rtol=0, atol=0.05)
    assert bool((found.single < found.log_p).all())
    plain = made.log_likelihood(x, dequantization="none").log_p
    alpha = made.process.level(0.0, x).alpha
    zeta = made.transport.origin(alpha[:, None] * x, torch.zeros(5, dtype=F64))
    slope = made.transport.with_jacobian(zeta)[1][:, 0, 0]
    expected = -0.5 * zeta[:, 0] ** 2 - 0.5 * math.log(2 * math.pi) - slope.log() + alpha.log()
    torch.testing.assert_close(plain, expected.detach(), rtol=1e-9, atol=1e-9)


def test_every_part_learns_from_the_bound() -> None:
    made = model(scaled=True)
    made.bound(noises(64)[0]).loss.mean().backward()
    silent = [
        name
        for name, value in made.named_parameters()
        if value.grad is None or not bool(value.grad.abs().sum() > 0)
    ]
    assert silent == []


# Use


def test_what_it_is_not_for_is_refused() -> None:
    made, x = model(), torch.zeros(2, 1, dtype=F64)
    for call in (
        lambda: made.bound(x, steps=10),
        lambda: made.sample((2, 1), "ancestral"),
        lambda: made.sample((2, 1), "ddim"),
    ):
        with pytest.raises(UserError, match="continuous time"):
            call()
    with pytest.raises(UserError, match="events of one number, got 2"):
        made.sample((2, 2))
    with pytest.raises(UserError, match="keeps no signal"):
        TransportNDM(FlowMatchingSchedule(), made.transform, made.transport, made.decoder)
    with pytest.raises(UserError, match="transport must be a TransportMap"):
        TransportNDM(made.schedule, made.transform, made.decoder, made.decoder)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="scale=-1"):
        MonotoneMap(scale=-1)


def test_it_is_saved_and_read(tmp_path: Any) -> None:
    made = model(scaled=True).float()
    save_model(tmp_path, made)
    again = load_model(tmp_path)[0]
    assert isinstance(again, TransportNDM)
    x = noises(5)[0].float()
    one, other = (
        m.bound(x, draws=1, generator=torch.Generator().manual_seed(0)).total for m in (made, again)
    )
    assert torch.equal(one, other)


def test_the_reverse_process_is_what_the_samplers_take() -> None:
    assert isinstance(model().reverse_process, TransportReverse)
