"""The forward process along the lines of a transport map: where it leads, its derivatives, and a
bound that tends to the likelihood.
"""

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
from ndm.transform import SeparableTransform
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


def model(schedule: Schedule, dims: int = 1) -> TransportNDM:
    torch.manual_seed(2)
    transport = randomized(
        MonotoneMap(6, scale=1.3) if dims == 1 else ConvexMap(dims, 6, 3, scale=1.3), 0.4, 1
    )
    return TransportNDM(
        schedule,
        InterpolationTransform(),
        transport,
        GaussianDecoder(),
        InterpolationScale(),
        eta_parts=4,
    ).double()


def points(count: int = 40, dims: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return 1.5 * torch.randn(count, dims, dtype=F64, generator=generator), torch.rand(
        count, dtype=F64, generator=generator
    )


def stretch(made: TransportNDM, x: Tensor) -> InterpolationCurve:
    curve = made.process.curve(x)
    assert isinstance(curve, InterpolationCurve)
    return curve


@every_dimension
@every_schedule
def test_the_data_keep_to_their_line(schedule: Schedule, dims: int) -> None:
    made, (x, t) = model(schedule, dims), points(dims=dims)
    level = made.process.level(t, x)
    along = made.reverse_process.interpolant(level.expand(x).alpha * made.transformed(x, t), level)
    torch.testing.assert_close(
        along.target, made.process.level(0.0, x).expand(x).alpha * x, rtol=0, atol=1e-9
    )
    end = made.process.level(1.0, x)
    origin = made.transport.origin(
        made.process.level(0.0, x).expand(x).alpha * x, torch.zeros(len(x), dtype=F64)
    )
    torch.testing.assert_close(
        end.expand(x).alpha * made.transformed(x, 1.0), origin, rtol=0, atol=1e-9
    )
    torch.testing.assert_close(made.transformed(x, 0.0), x, rtol=0, atol=1e-12)


@every_dimension
@every_schedule
def test_noise_is_stretched_as_neighboring_lines_part(schedule: Schedule, dims: int) -> None:
    """S = ∂z_t/∂z_0 along the flow of the reverse process, by differences."""
    made, (x, t) = model(schedule, dims), points(dims=dims)
    level, step = made.process.level(t, x), 1e-5
    scale = level.expand(x).alpha / (2 * step * made.process.level(0.0, x).expand(x).alpha)
    found, unit = stretch(made, x).stretch(level)[0], torch.eye(dims, dtype=F64)
    for direction in range(dims):
        shift = step * unit[direction]
        apart = scale * (made.transformed(x + shift, t) - made.transformed(x - shift, t))
        torch.testing.assert_close(found[:, :, direction], apart, rtol=1e-6, atol=1e-8)
    assert (found - unit).abs().mean().item() > 0.05
    noise = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(4))
    drawn = made.process.marginal(x, level).sample(noise)
    torch.testing.assert_close(
        drawn,
        level.expand(x).alpha * made.transformed(x, t)
        + level.expand(x).sigma * (found @ noise[..., None])[..., 0],
    )


@every_dimension
@every_schedule
def test_derivatives_in_time_are_those_of_differences(schedule: Schedule, dims: int) -> None:
    made, (x, t) = model(schedule, dims), points(dims=dims)
    t, step = 0.01 + 0.98 * t, 1e-5
    curve, noise = stretch(made, x), torch.ones_like(x)
    before, level, after = (made.process.level(time, x) for time in (t - step, t, t + step))
    value, derivative = curve.with_derivative(level)
    torch.testing.assert_close(
        derivative, (curve.at(after) - curve.at(before)) / (2 * step), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(value, curve.at(level))
    apart = (curve.scaled(noise, after).noise - curve.scaled(noise, before).noise) / (2 * step)
    torch.testing.assert_close(curve.scaled(noise, level).rate, apart, rtol=1e-6, atol=1e-7)
    assert all(
        torch.equal(one, at)
        for one, at in zip(
            curve.at_both(before, after), (curve.at(before), curve.at(after)), strict=True
        )
    )


@every_dimension
def test_the_marginal_is_the_gaussian_with_that_covariance(dims: int) -> None:
    """Density, its gradient and the distance to the prior, against PyTorch's multivariate normal."""
    made, (x, t) = model(SCHEDULES["linear"], dims), points(dims=dims)
    level, noise = made.process.level(t, x), points(dims=dims)[0].flip(0)
    q, curve = made.process.marginal(x, level), stretch(made, x)
    factor = level.sigma[:, None, None] * curve.stretch(level)[0]
    reference = torch.distributions.MultivariateNormal(q.mean, factor @ factor.mT)
    z = q.sample(noise).detach().requires_grad_()
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z))
    (score,) = torch.autograd.grad(reference.log_prob(z).sum(), z)
    torch.testing.assert_close(-curve.scaled(noise, level).whitened / level.expand(x).sigma, score)
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(dims, dtype=F64), torch.eye(dims, dtype=F64)
    )
    torch.testing.assert_close(
        q.kl_to_normal(), torch.distributions.kl_divergence(reference, prior)
    )


@every_dimension
def test_the_drift_given_x_carries_the_marginals(dims: int) -> None:
    """By the equation of continuity of q(z_t|x), as the difference of drift and score: f - ½ g² ∇
    log q moves mu + sigma S eps along.
    """
    made, (x, t) = model(SCHEDULES["linear"], dims), points(dims=dims)
    t, noise, step = 0.01 + 0.98 * t, points(dims=dims)[0].flip(0), 1e-5
    level = made.process.level(t, x)
    before, after = (
        made.process.marginal(x, made.process.level(time, x)).sample(noise)
        for time in (t - step, t + step)
    )
    z = made.process.marginal(x, level).sample(noise)
    torch.testing.assert_close(
        made.process.drift(z, x, level, 0.0), (after - before) / (2 * step), rtol=1e-6, atol=1e-7
    )
    score = -stretch(made, x).scaled(noise, level).whitened / level.expand(x).sigma
    g = level.diffusion(0.7)[:, None]
    moved = made.process.drift(z, x, level, 0.0) - 0.5 * g**2 * score
    torch.testing.assert_close(made.process.drift(z, x, level, 0.7), moved)


@every_dimension
def test_gradients_reach_the_map(dims: int) -> None:
    """Of F and S in the weights of T, against differences."""
    made, (x, t) = model(SCHEDULES["linear"], dims), points(6, dims)

    def reading() -> Tensor:
        curve, level = stretch(made, x), made.process.level(t, x)
        return curve.at(level).sum() + 2 * torch.sin(curve.stretch(level)[0]).sum()

    check_gradients(reading, list(made.transport.parameters()), 1e-6)


def check_gradients(reading: Callable[[], Tensor], inputs: list[Tensor], tolerance: float) -> None:
    """The gradient in the first entry of each input against differences."""
    for value, gradient in zip(inputs, torch.autograd.grad(reading(), inputs), strict=True):
        flat, step, around = value.data.reshape(-1), 1e-5, []
        for shift in (-step, 2 * step):
            flat[0] += shift
            around.append(reading().item())
        flat[0] -= step
        assert gradient.reshape(-1)[0].item() == pytest.approx(
            (around[1] - around[0]) / (2 * step), rel=tolerance, abs=10 * tolerance
        )


def test_the_bound_tends_to_the_likelihood_as_noise_falls() -> None:
    """As sigma_0² << gamma' << 1; a gamma too flat for its noise costs again. Where hardly any
    noise comes in, the gap is below 0.002 nats.
    """
    x, share = mixture_nodes()

    def gap(first: float, span: float) -> float:
        made = model(LinearLogSNRSchedule(first, first + span))
        return expected_bound(made, x, share) + float(
            share @ made.log_likelihood(x, dequantization="none").log_p
        )

    gaps = [gap(-9.2, 0.5), gap(-9.2, 0.05), gap(-11.2, 0.05), gap(-11.2, 0.01)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.01 > 0.002 > gaps[-1] > -1e-4
    assert gap(-9.2, 0.002) == pytest.approx(10 * gap(-9.2, 0.02), rel=0.5), "sigma²/gamma'"


@pytest.mark.parametrize("dims", [2, 3])
def test_the_bound_tends_to_the_likelihood_in_more_dimensions(dims: int) -> None:
    """Example by example, by averages over times and noise; with the noise stretched wrongly it
    does not.
    """
    made, (x, _) = model(LinearLogSNRSchedule(-11.2, -11.19), dims), points(20, dims)
    exact = made.log_likelihood(x, dequantization="none").log_p
    bound = made.bound(x, draws=1000, generator=torch.Generator().manual_seed(0)).total.detach()
    torch.testing.assert_close(bound, -exact, rtol=0, atol=0.2)
    assert (bound + exact).mean().item() == pytest.approx(0.0, abs=0.03)
    plain = TransportNDM(
        made.schedule, InterpolationTransform(), made.transport, GaussianDecoder(), eta_parts=4
    ).double()
    assert (
        plain.bound(x, draws=200, generator=torch.Generator().manual_seed(0)).total + exact
    ).mean().item() > 1.0


@every_dimension
def test_the_bound_has_its_gradient(dims: int) -> None:
    """In every weight of T, in the data and in a learned schedule, against differences."""
    made = model(LearnedSchedule(-5.0, -1.0, learn_ends=True), dims)
    x = points(6, dims)[0].requires_grad_()

    def bound() -> Tensor:
        return made.bound(x, draws=2, generator=torch.Generator().manual_seed(0)).total.sum()

    check_gradients(bound, [x, *made.parameters()], 1e-5)


def test_the_map_is_one_part_of_the_model() -> None:
    made, (x, t) = model(SCHEDULES["linear"]), points()
    assert all(name == "log_eta" or name.startswith("transport.") for name in made.state_dict())
    before, copied = made.transformed(x, t), copy.deepcopy(made)
    with torch.no_grad():
        copied.transport.get_parameter("shift").add_(1.0)
    assert torch.equal(made.transformed(x, t), before)
    assert not torch.equal(copied.transformed(x, t), before)
    assert made.bound(x[:0]).total.shape == (0,)


def test_a_model_read_again_follows_its_own_map(tmp_path: Path) -> None:
    made, (x, t) = model(SCHEDULES["linear"]).float(), points()
    x, t = x.float(), t.float()
    save_model(tmp_path, made)
    again = load_model(tmp_path)[0]
    assert isinstance(again, TransportNDM)
    assert torch.equal(again.transformed(x, t), made.transformed(x, t))
    with torch.no_grad():
        again.transport.get_parameter("shift").add_(1.0)
    assert not torch.equal(again.transformed(x, t), made.transformed(x, t))


def test_what_it_is_not_for_is_refused() -> None:
    made, (x, t) = model(SCHEDULES["linear"]), points()
    with pytest.raises(UserError, match="give it to a TransportNDM"):
        InterpolationTransform()(x, made.process.level(t, x))
    with pytest.raises(UserError, match="follows the lines of another model"):
        TransportNDM(made.schedule, made.transform, MonotoneMap(), GaussianDecoder())
    with pytest.raises(UserError, match="gamma a wider range"):
        TransportNDM(
            LinearLogSNRSchedule(-11.2, -11.2 + 1e-6),
            InterpolationTransform(),
            MonotoneMap(),
            GaussianDecoder(),
        )
    with pytest.raises(UserError, match="events of one number, got 2: use a ConvexMap"):
        made.transformed(x.reshape(-1, 2), t[:20])
    with pytest.raises(UserError, match="scale must be a DiagonalScale"):
        NFDM(
            made.schedule,
            SeparableTransform(MLP(1, outputs=2)),
            InterpolationScale(),
            Predictor(MLP(1)),
            GaussianDecoder(),
        )  # type: ignore[arg-type]


def test_the_line_of_a_point_is_sought_once_for_mean_and_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, (x, t) = model(SCHEDULES["linear"], 2), points(dims=2)
    calls, origin = [], made.transport.origin
    monkeypatch.setattr(
        made.transport, "origin", lambda *arguments: (calls.append(1), origin(*arguments))[1]
    )
    curve, level = stretch(made, x), made.process.level(t, x)
    curve.with_derivative(level)
    curve.scaled(torch.ones_like(x), level)
    curve.at(made.process.level(1.0, x))
    assert len(calls) == 1


def test_a_network_may_stand_for_f_beside_the_stretched_noise() -> None:
    made, (x, t) = model(SCHEDULES["linear"], 2), points(dims=2)
    free = TransportNDM(
        made.schedule,
        SeparableTransform(MLP(2, outputs=2)),
        made.transport,
        GaussianDecoder(),
        InterpolationScale(),
    ).double()
    level = made.process.level(t, x)
    torch.testing.assert_close(
        stretch(free, x).stretch(level)[0], stretch(made, x).stretch(level)[0]
    )
