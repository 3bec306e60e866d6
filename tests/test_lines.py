"""The forward process along the lines of a transport map: where it leads, its derivatives, and a bound that tends to the likelihood."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ndm.decoder import GaussianDecoder
from ndm.errors import UserError
from ndm.lines import LineScale, LineTransform
from ndm.nn import MLP
from ndm.reproduce.transport import data_nodes, expected_bound
from ndm.schedule import FlowMatching, LearnedSchedule, LinearLogSNR, Schedule
from ndm.serialize import load_model, save_model
from ndm.transform import SeparableTransform
from ndm.transport import MonotoneMap, TransportMap, TransportNDM
from oracles import F64, randomised

SCHEDULES: dict[str, Schedule] = {"linear": LinearLogSNR(-5.0, -1.0), "flow": FlowMatching(0.1, 0.4)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def model(schedule: Schedule) -> TransportNDM:
    transport = randomised(MonotoneMap(6, scale=1.3), 0.4, 1)
    return TransportNDM(schedule, LineTransform(), transport, GaussianDecoder(), LineScale(), eta_parts=4).double()


def points(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return 1.5 * torch.randn(count, 1, dtype=F64, generator=generator), torch.rand(count, dtype=F64, generator=generator)


@every_schedule
def test_the_data_keep_to_their_line(schedule: Schedule) -> None:
    made, (x, t) = model(schedule), points()
    level = made.process.level(t, x)
    along = made.reverse_process.displaced(level.expand(x).alpha * made.transformed(x, t), level)
    torch.testing.assert_close(along.target, made.process.level(0.0, x).expand(x).alpha * x, rtol=0, atol=1e-9)
    end = made.process.level(1.0, x)
    origin = made.transport.origin(made.process.level(0.0, x).expand(x).alpha * x, torch.zeros(len(x), dtype=F64))
    torch.testing.assert_close(end.expand(x).alpha * made.transformed(x, 1.0), origin, rtol=0, atol=1e-9)
    torch.testing.assert_close(made.transformed(x, 0.0), x, rtol=0, atol=1e-12)


@every_schedule
def test_noise_is_stretched_as_neighbouring_lines_part(schedule: Schedule) -> None:
    """e^h = ∂z_t/∂z_0 along the flow of the reverse process, by differences."""
    made, (x, t) = model(schedule), points()
    level, step = made.process.level(t, x), 1e-5
    first = made.process.level(0.0, x).expand(x).alpha
    mean = level.expand(x).alpha
    apart = mean * (made.transformed(x + step, t) - made.transformed(x - step, t)) / (2 * step * first)
    found = made.process.curve(x).log_scale(level).exp()  # type: ignore[attr-defined]
    torch.testing.assert_close(found, apart, rtol=1e-6, atol=1e-8)
    assert (found - 1).abs().mean().item() > 0.1


@every_schedule
def test_derivatives_in_time_are_those_of_differences(schedule: Schedule) -> None:
    made, (x, t) = model(schedule), points()
    t, step = 0.01 + 0.98 * t, 1e-5
    curve = made.process.curve(x)
    before, after = made.process.level(t - step, x), made.process.level(t + step, x)
    for with_derivative, at in (
        (curve.with_derivative, curve.at),
        (curve.log_scale_with_derivative, curve.log_scale),  # type: ignore[attr-defined]
    ):
        value, derivative = with_derivative(made.process.level(t, x))
        torch.testing.assert_close(derivative, (at(after) - at(before)) / (2 * step), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(value, at(made.process.level(t, x)))
    assert all(torch.equal(one, at) for one, at in zip(curve.at_both(before, after), (curve.at(before), curve.at(after)), strict=True))


def test_gradients_reach_the_map() -> None:
    """Of F and h in the weights of T, against differences."""
    made, (x, t) = model(SCHEDULES["linear"]), points(6)

    def reading() -> Tensor:
        curve, level = made.process.curve(x), made.process.level(t, x)
        return (curve.at(level) + 2 * torch.sin(curve.log_scale(level))).sum()  # type: ignore[attr-defined]

    for parameter in made.transport.parameters():
        (gradient,) = torch.autograd.grad(reading(), parameter)
        flat, step, around = parameter.data.reshape(-1), 1e-5, []
        for shift in (-step, 2 * step):
            flat[0] += shift
            around.append(reading().item())
        flat[0] -= step
        assert gradient.reshape(-1)[0].item() == pytest.approx((around[1] - around[0]) / (2 * step), rel=1e-6, abs=1e-7)


def test_the_bound_tends_to_the_likelihood_as_noise_falls() -> None:
    """As sigma_0² << gamma' << 1; a gamma too flat for its noise costs again. Where hardly any noise comes in, the gap is below 0.002 nats."""
    x, share = data_nodes()

    def gap(first: float, span: float) -> float:
        made = model(LinearLogSNR(first, first + span))
        return expected_bound(made, 64)["nelbo"] + float(share @ made.log_likelihood(x, dequantization="none").log_p)

    gaps = [gap(-9.2, 0.5), gap(-9.2, 0.05), gap(-11.2, 0.05), gap(-11.2, 0.01)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.01 > 0.002 > gaps[-1] > -1e-4
    assert gap(-9.2, 0.002) == pytest.approx(10 * gap(-9.2, 0.02), rel=0.5), "sigma²/gamma'"


def test_the_bound_has_its_gradient() -> None:
    """In every weight of T, in the data and in a learned schedule, against differences."""
    made = model(LearnedSchedule(-5.0, -1.0, learn_ends=True))
    x = points(6)[0].requires_grad_()

    def bound() -> Tensor:
        return made.bound(x, draws=2, generator=torch.Generator().manual_seed(0)).total.sum()

    inputs = [x, *made.parameters()]
    for value, gradient in zip(inputs, torch.autograd.grad(bound(), inputs), strict=True):
        flat, step, around = value.data.reshape(-1), 1e-5, []
        for shift in (-step, 2 * step):
            flat[0] += shift
            around.append(bound().item())
        flat[0] -= step
        assert gradient.reshape(-1)[0].item() == pytest.approx((around[1] - around[0]) / (2 * step), rel=1e-5, abs=1e-6)


class Bowl(TransportMap):
    """T(ζ) = A ζ + tanh(ζ), the gradient of a convex function of two numbers."""

    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        matrix = torch.tensor([[1.5, 0.6], [0.6, 0.8]], dtype=zeta.dtype)
        return zeta @ matrix + zeta.tanh(), matrix + torch.diag_embed(1 - zeta.tanh() ** 2)


def test_the_data_keep_to_their_line_in_two_dimensions() -> None:
    made, (x, t) = TransportNDM(SCHEDULES["linear"], LineTransform(), Bowl(), GaussianDecoder()).double(), points()
    x, t = x.reshape(-1, 2), t[:20]
    level = made.process.level(t, x)
    along = made.reverse_process.displaced(level.expand(x).alpha * made.transformed(x, t), level)
    torch.testing.assert_close(along.target, made.process.level(0.0, x).expand(x).alpha * x, rtol=0, atol=1e-9)


def test_the_map_is_one_part_of_the_model() -> None:
    made, (x, t) = model(SCHEDULES["linear"]), points()
    assert all(name == "log_eta" or name.startswith("predictor.") for name in made.state_dict())
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
        LineTransform()(x, made.process.level(t, x))
    with pytest.raises(UserError, match="follows the lines of another model"):
        TransportNDM(made.schedule, made.transform, MonotoneMap(), GaussianDecoder())
    with pytest.raises(UserError, match="gamma a wider range"):
        TransportNDM(LinearLogSNR(-11.2, -11.2 + 1e-6), LineTransform(), MonotoneMap(), GaussianDecoder())
    wide = x.reshape(-1, 2)
    with pytest.raises(UserError, match="events of one number, got 2"):
        made.scale(wide, made.process.level(t[: len(wide)], wide))  # type: ignore[misc]
    free = TransportNDM(made.schedule, SeparableTransform(MLP(1, outputs=2)), made.transport, GaussianDecoder(), LineScale())
    assert isinstance(free.process.curve(x.float()).log_scale(made.process.level(0.5, x)), Tensor)  # type: ignore[attr-defined]
