"""Interpolation along the lines of a transport map: derivatives and a bound near the likelihood."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ndm.decoder import GaussianDecoder
from ndm.errors import UserError
from ndm.nn import MLP
from ndm.predictor import Predictor
from ndm.schedule import FlowMatchingSchedule, LearnedSchedule, LinearLogSNRSchedule, Schedule
from ndm.serialize import load_model, save_model
from ndm.transform import SeparableTransform, SumTransform
from ndm.variants.interpolation import (
    InterpolationCurve,
    InterpolationScale,
    InterpolationTransform,
)
from ndm.variants.monotone import ConvexMap, MonotoneMap
from ndm.variants.nfdm import NFDM
from ndm.variants.transport import TransportNDM
from oracles import F64, expected_bound, mixture_nodes, randomized

SCHEDULES: dict[str, Schedule] = {
    "linear": LinearLogSNRSchedule(-5.0, -1.0),
    "flow": FlowMatchingSchedule(0.1, 0.4),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_dimension = pytest.mark.parametrize("dims", [1, 2, 3])


def make_model(schedule: Schedule, dims: int = 1) -> TransportNDM:
    torch.manual_seed(2)
    map_ = MonotoneMap(6, scale=1.3) if dims == 1 else ConvexMap(dims, 6, 3, scale=1.3)
    parts = InterpolationTransform(), randomized(map_, 0.4, 1), GaussianDecoder()
    return TransportNDM(schedule, *parts, InterpolationScale(), eta_parts=4).double()


def points(count: int = 40, dims: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = 1.5 * torch.randn(count, dims, dtype=F64, generator=generator)
    return x, torch.rand(count, dtype=F64, generator=generator)


def interpolation_curve(model: TransportNDM, x: Tensor) -> InterpolationCurve:
    curve = model.process.curve(x)
    assert isinstance(curve, InterpolationCurve)
    return curve


@every_dimension
@every_schedule
def test_transformed_data_stay_on_their_line(schedule: Schedule, dims: int) -> None:
    model, (x, t) = make_model(schedule, dims), points(dims=dims)
    level = model.process.level(t, x)
    z = level.expand(x).alpha * model.transformed(x, t)
    target = model.process.level(0.0, x).expand(x).alpha * x
    found = model.reverse_process.interpolant(z, level).target
    torch.testing.assert_close(found, target, rtol=0, atol=1e-9)
    end = model.process.level(1.0, x).expand(x).alpha * model.transformed(x, 1.0)
    origin = model.transport.origin(target, torch.zeros(len(x), dtype=F64))
    torch.testing.assert_close(end, origin, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.transformed(x, 0.0), x, rtol=0, atol=1e-12)


@every_dimension
@every_schedule
def test_the_noise_stretch_is_the_jacobian_of_the_flow(schedule: Schedule, dims: int) -> None:
    """S = ∂z_t/∂z_0 along the flow of the reverse process, by finite differences."""
    model, (x, t) = make_model(schedule, dims), points(dims=dims)
    level, step = model.process.level(t, x), 1e-5
    scale = level.expand(x).alpha / (2 * step * model.process.level(0.0, x).expand(x).alpha)
    found, unit = interpolation_curve(model, x).stretch(level)[0], torch.eye(dims, dtype=F64)
    for direction in range(dims):
        shift = step * unit[direction]
        apart = scale * (model.transformed(x + shift, t) - model.transformed(x - shift, t))
        torch.testing.assert_close(found[:, :, direction], apart, rtol=1e-6, atol=1e-8)
    assert (found - unit).abs().mean().item() > 0.05
    noise = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(4))
    drawn = model.process.marginal(x, level).sample(noise)
    expected = level.expand(x).alpha * model.transformed(x, t)
    expected += level.expand(x).sigma * (found @ noise[..., None])[..., 0]
    torch.testing.assert_close(drawn, expected)


@every_dimension
@every_schedule
def test_time_derivatives_match_finite_differences(schedule: Schedule, dims: int) -> None:
    model, (x, t) = make_model(schedule, dims), points(dims=dims)
    t, step = 0.01 + 0.98 * t, 1e-5
    curve, noise = interpolation_curve(model, x), torch.ones_like(x)
    before, level, after = (model.process.level(time, x) for time in (t - step, t, t + step))
    value, derivative = curve.with_derivative(level)
    difference = (curve.at(after) - curve.at(before)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(value, curve.at(level))
    change = (curve.scaled(noise, after).noise - curve.scaled(noise, before).noise) / (2 * step)
    torch.testing.assert_close(curve.scaled(noise, level).rate, change, rtol=1e-6, atol=1e-7)
    first, second = curve.at_both(before, after)
    assert torch.equal(first, curve.at(before)) and torch.equal(second, curve.at(after))


@every_dimension
def test_the_marginal_matches_torchs_multivariate_normal(dims: int) -> None:
    """Density, score and divergence from the prior."""
    model, (x, t) = make_model(SCHEDULES["linear"], dims), points(dims=dims)
    level, noise = model.process.level(t, x), points(dims=dims)[0].flip(0)
    q, curve = model.process.marginal(x, level), interpolation_curve(model, x)
    factor = level.sigma[:, None, None] * curve.stretch(level)[0]
    reference = torch.distributions.MultivariateNormal(q.mean, factor @ factor.mT)
    z = q.sample(noise).detach().requires_grad_()
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z))
    (score,) = torch.autograd.grad(reference.log_prob(z).sum(), z)
    torch.testing.assert_close(-curve.scaled(noise, level).whitened / level.expand(x).sigma, score)
    zero, eye = torch.zeros(dims, dtype=F64), torch.eye(dims, dtype=F64)
    prior = torch.distributions.MultivariateNormal(zero, eye)
    expected = torch.distributions.kl_divergence(reference, prior)
    torch.testing.assert_close(q.kl_to_normal(), expected)


@every_dimension
def test_the_conditional_drift_transports_the_marginals(dims: int) -> None:
    """The drift at eta = 0 moves mu + sigma S eps; for other eta it is f - ½ g² ∇ log q."""
    model, (x, t) = make_model(SCHEDULES["linear"], dims), points(dims=dims)
    t, noise, step = 0.01 + 0.98 * t, points(dims=dims)[0].flip(0), 1e-5
    level = model.process.level(t, x)
    before, after = (
        model.process.marginal(x, model.process.level(time, x)).sample(noise)
        for time in (t - step, t + step)
    )
    z = model.process.marginal(x, level).sample(noise)
    drift = model.process.drift(z, x, level, 0.0)
    torch.testing.assert_close(drift, (after - before) / (2 * step), rtol=1e-6, atol=1e-7)
    score = -interpolation_curve(model, x).scaled(noise, level).whitened / level.expand(x).sigma
    g = level.diffusion(0.7)[:, None]
    found = model.process.drift(z, x, level, 0.7)
    torch.testing.assert_close(found, drift - 0.5 * g**2 * score)


@every_dimension
def test_gradients_in_the_map_match_finite_differences(dims: int) -> None:
    """Of F and S, in the weights of T."""
    model, (x, t) = make_model(SCHEDULES["linear"], dims), points(6, dims)

    def function() -> Tensor:
        curve, level = interpolation_curve(model, x), model.process.level(t, x)
        return curve.at(level).sum() + 2 * torch.sin(curve.stretch(level)[0]).sum()

    check_gradients(function, list(model.transport.parameters()), 1e-6)


def check_gradients(function: Callable[[], Tensor], inputs: list[Tensor], tolerance: float) -> None:
    """Compare the gradient in the first entry of each input with finite differences."""
    for value, gradient in zip(inputs, torch.autograd.grad(function(), inputs), strict=True):
        flat, step, around = value.data.reshape(-1), 1e-5, []
        for shift in (-step, 2 * step):
            flat[0] += shift
            around.append(function().item())
        flat[0] -= step
        expected = pytest.approx(
            (around[1] - around[0]) / (2 * step), rel=tolerance, abs=10 * tolerance
        )
        assert gradient.reshape(-1)[0].item() == expected


@pytest.mark.slow
def test_the_bound_tends_to_the_likelihood_as_noise_falls() -> None:
    """For sigma_0² << gamma' << 1. If gamma is too flat for its noise, the gap grows again."""
    x, share = mixture_nodes()

    def gap(first: float, span: float) -> float:
        model = make_model(LinearLogSNRSchedule(first, first + span))
        log_p = model.log_likelihood(x, dequantization="none").log_p
        return expected_bound(model, x, share) + float(share @ log_p)

    gaps = [gap(-9.2, 0.5), gap(-9.2, 0.05), gap(-11.2, 0.05), gap(-11.2, 0.01)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.01 > 0.002 > gaps[-1] > -1e-4
    assert gap(-9.2, 0.002) == pytest.approx(10 * gap(-9.2, 0.02), rel=0.5), "sigma²/gamma'"


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
def test_the_bound_tends_to_the_likelihood_in_more_dimensions(dims: int) -> None:
    """For each example, averaged over times and noise; without stretched noise it does not."""
    model, (x, _) = make_model(LinearLogSNRSchedule(-11.2, -11.19), dims), points(20, dims)
    exact = model.log_likelihood(x, dequantization="none").log_p
    bound = model.bound(x, draws=1000, generator=torch.Generator().manual_seed(0)).total.detach()
    torch.testing.assert_close(bound, -exact, rtol=0, atol=0.2)
    assert (bound + exact).mean().item() == pytest.approx(0.0, abs=0.03)
    parts = model.schedule, InterpolationTransform(), model.transport, GaussianDecoder()
    plain = TransportNDM(*parts, eta_parts=4).double()
    bound = plain.bound(x, draws=200, generator=torch.Generator().manual_seed(0)).total
    assert (bound + exact).mean().item() > 1.0


@pytest.mark.slow
@every_dimension
def test_gradients_of_the_bound_match_finite_differences(dims: int) -> None:
    """In every weight of T, in the data and in a learned schedule."""
    model = make_model(LearnedSchedule(-5.0, -1.0, learn_ends=True), dims)
    x = points(6, dims)[0].requires_grad_()

    def bound() -> Tensor:
        return model.bound(x, draws=2, generator=torch.Generator().manual_seed(0)).total.sum()

    check_gradients(bound, [x, *model.parameters()], 1e-5)


def test_the_map_is_stored_once_and_copied_with_the_model() -> None:
    model, (x, t) = make_model(SCHEDULES["linear"]), points()
    assert all(name == "log_eta" or name.startswith("transport.") for name in model.state_dict())
    before, copied = model.transformed(x, t), copy.deepcopy(model)
    with torch.no_grad():
        copied.transport.get_parameter("shift").add_(1.0)
    assert torch.equal(model.transformed(x, t), before)
    assert not torch.equal(copied.transformed(x, t), before)
    assert model.bound(x[:0]).total.shape == (0,)


def test_a_loaded_model_uses_its_own_map(tmp_path: Path) -> None:
    model, (x, t) = make_model(SCHEDULES["linear"]).float(), points()
    x, t = x.float(), t.float()
    save_model(tmp_path, model)
    again = load_model(tmp_path)[0]
    assert isinstance(again, TransportNDM)
    assert torch.equal(again.transformed(x, t), model.transformed(x, t))
    with torch.no_grad():
        again.transport.get_parameter("shift").add_(1.0)
    assert not torch.equal(again.transformed(x, t), model.transformed(x, t))


def test_incompatible_parts_and_shapes_are_rejected() -> None:
    model, (x, t) = make_model(SCHEDULES["linear"]), points()
    with pytest.raises(UserError, match="give it to a TransportNDM"):
        InterpolationTransform()(x, model.process.level(t, x))
    with pytest.raises(UserError, match="follows the lines of another model"):
        TransportNDM(model.schedule, model.transform, MonotoneMap(), GaussianDecoder())
    with pytest.raises(UserError, match="gamma a wider range"):
        flat = LinearLogSNRSchedule(-11.2, -11.2 + 1e-6)
        TransportNDM(flat, InterpolationTransform(), MonotoneMap(), GaussianDecoder())
    with pytest.raises(UserError, match="events of one number, got 2: use a ConvexMap"):
        model.transformed(x.reshape(-1, 2), t[:20])
    with pytest.raises(UserError, match="scale must be a DiagonalScale"):
        transform, predictor = SeparableTransform(MLP(1, outputs=2)), Predictor(MLP(1))
        NFDM(model.schedule, transform, InterpolationScale(), predictor, GaussianDecoder())  # type: ignore[arg-type]


def test_the_line_of_a_point_is_solved_once_for_mean_and_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (x, t) = make_model(SCHEDULES["linear"], 2), points(dims=2)
    calls, origin = [], model.transport.origin

    def counting(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return origin(*arguments)

    monkeypatch.setattr(model.transport, "origin", counting)
    curve, level = interpolation_curve(model, x), model.process.level(t, x)
    curve.with_derivative(level)
    curve.scaled(torch.ones_like(x), level)
    curve.at(model.process.level(1.0, x))
    assert len(calls) == 1


def test_a_network_can_serve_as_f_with_stretched_noise() -> None:
    model, (x, t) = make_model(SCHEDULES["linear"], 2), points(dims=2)
    transform = SeparableTransform(MLP(2, outputs=2))
    parts = transform, model.transport, GaussianDecoder(), InterpolationScale()
    free = TransportNDM(model.schedule, *parts).double()
    level = model.process.level(t, x)
    found, expected = (interpolation_curve(m, x).stretch(level)[0] for m in (free, model))
    torch.testing.assert_close(found, expected)


def test_an_interpolation_inside_of_a_sum_follows_the_model() -> None:
    schedule = LinearLogSNRSchedule(-8.0, 4.0)
    inside = SumTransform([InterpolationTransform()])
    models = [
        TransportNDM(schedule, transform, MonotoneMap(), GaussianDecoder(), InterpolationScale())
        for transform in (inside, InterpolationTransform())
    ]
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    found, expected = (
        model.bound(x, generator=torch.Generator().manual_seed(1)).total for model in models
    )
    torch.testing.assert_close(found, expected)
