"""Laws of every noise schedule: identities, derivatives, exact ends, precision."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ndm.errors import UserError
from ndm.schedule import (
    CosineSchedule,
    FlowMatchingSchedule,
    LearnedSchedule,
    LinearBetaSchedule,
    LinearLogSNRSchedule,
    NoiseLevel,
    Schedule,
    VariancePreserving,
)
from oracles import F64, randomized

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: LinearLogSNRSchedule(-9.0, 4.0),
    "cosine": lambda: CosineSchedule(-9.0, 7.0),
    "ddpm": lambda: LinearBetaSchedule(0.2, 15.0, 2e-3),
    "flow": lambda: FlowMatchingSchedule(1e-2, 0.05),
    "learned": lambda: randomized(LearnedSchedule(-9.0, 4.0)),
    "learned_ends": lambda: randomized(LearnedSchedule(-9.0, 4.0, learn_ends=True, units=7)),
    "learned_steep": lambda: randomized(LearnedSchedule(-9.0, 4.0, units=5), scale=1.0, seed=4),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
INSIDE = torch.linspace(0.01, 0.99, 197, dtype=F64)


def central(function: Callable[[Tensor], Tensor], t: Tensor, width: float = 1e-5) -> Tensor:
    with torch.no_grad():
        return (function(t + width) - function(t - width)) / (2 * width)


@every_schedule
def test_derivatives_match_central_differences(name: str) -> None:
    schedule = SCHEDULES[name]()
    level = schedule(INSIDE)
    for field in ("alpha", "sigma", "gamma"):
        expected = central(lambda t, field=field: getattr(schedule(t), field), INSIDE)
        torch.testing.assert_close(getattr(level, f"d{field}"), expected, rtol=2e-6, atol=1e-9)
    slope = central(lambda t: schedule(t).gamma, INSIDE)
    torch.testing.assert_close(level.inverse_dgamma, 1 / slope, rtol=2e-6, atol=0)
    decay = -central(lambda t: torch.exp(-schedule(t).gamma), INSIDE)
    torch.testing.assert_close(level.snr_decay, decay, rtol=2e-5, atol=1e-9)
    omega = 0.5 * level.alpha * level.sigma * slope
    torch.testing.assert_close(level.omega, omega, rtol=2e-6, atol=1e-12)


@every_schedule
def test_gamma_is_the_log_ratio_of_noise_to_signal_and_increases(name: str) -> None:
    level = SCHEDULES[name]()(torch.linspace(0, 1, 501, dtype=F64))
    log_ratio = torch.log(level.sigma**2 / level.alpha**2)
    torch.testing.assert_close(level.gamma, log_ratio, rtol=1e-9, atol=1e-9)
    assert bool((level.gamma.diff() > 0).all() and (level.dgamma > 0).all())
    assert bool((level.alpha.diff() < 0).all() and (level.sigma.diff() > 0).all())


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "flow"])
def test_variance_is_preserved(name: str) -> None:
    schedule = SCHEDULES[name]()
    assert isinstance(schedule, VariancePreserving)
    level = schedule(torch.linspace(0, 1, 101, dtype=F64))
    power = level.alpha**2 + level.sigma**2
    torch.testing.assert_close(power, torch.ones_like(level.t), rtol=1e-14, atol=0)
    slopes = level.alpha * level.dalpha, -level.sigma * level.dsigma
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=0)


def test_flow_matching_is_the_straight_path() -> None:
    t = torch.linspace(0, 1, 11, dtype=F64)
    level = FlowMatchingSchedule(0.1, 0.2)(t)
    torch.testing.assert_close(level.alpha, 1 - 0.8 * t)
    torch.testing.assert_close(level.sigma, 0.1 + 0.9 * t)
    end = FlowMatchingSchedule(1e-3)(torch.ones(1))
    assert (end.alpha.item(), end.sigma.item(), end.gamma.item()) == (0.0, 1.0, math.inf)
    assert (end.inverse_dgamma.item(), end.snr_decay.item()) == (0.0, 0.0)
    assert end.omega.item() == pytest.approx(1.0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    units=st.sampled_from([1, 3, 8, 13, 32]),
    count=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0]),
    double=st.booleans(),
)
def test_ends_of_a_learned_schedule_are_held_exactly(
    seed: int, units: int, count: int, scale: float, double: bool
) -> None:
    dtype = F64 if double else torch.float32
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(count, generator=generator, dtype=dtype)
    zero, one = (
        torch.rand(count, generator=generator) < 0.3,
        torch.rand(count, generator=generator) < 0.3,
    )
    t[zero], t[one] = 0.0, 1.0
    zero = zero & ~one
    for learn_ends in (False, True):
        schedule = LearnedSchedule(-13.3, 5.0, learn_ends=learn_ends, units=units).to(dtype)
        with torch.no_grad():
            for parameter in schedule.parameters():
                parameter.add_(
                    scale * torch.randn(parameter.shape, generator=generator, dtype=dtype)
                )
            gamma = schedule(t).gamma
            low, high = schedule.ends()
        assert bool((gamma[zero] == low).all() and (gamma[one] == high).all())
        assert bool((gamma >= low).all() and (gamma <= high).all()), "no time may leave the ends"
        if not learn_ends:
            assert float(low) == torch.tensor(-13.3, dtype=dtype).item() and float(high) == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", [LinearLogSNRSchedule, CosineSchedule, LearnedSchedule])
@pytest.mark.parametrize(("low", "high"), [(-13.3, 5.0), (-13.3, 10.0), (-8.0, 6.0), (-2.7, 3.1)])
def test_fixed_ends_are_exact_in_the_dtype_of_the_times(
    kind: Callable[[float, float], Schedule], low: float, high: float, dtype: torch.dtype
) -> None:
    """Also for float64 times and float32 parameters."""
    with torch.no_grad():
        gamma = kind(low, high)(torch.tensor([0.0, 1.0], dtype=dtype)).gamma
    assert torch.equal(gamma, torch.tensor([low, high], dtype=dtype))


def test_learned_ends_start_at_their_arguments_and_receive_gradients() -> None:
    schedule = LearnedSchedule(-7.0, 2.0, learn_ends=True).double()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    gamma = schedule(t).gamma
    ends = torch.tensor([-7.0, 2.0], dtype=F64)
    torch.testing.assert_close(gamma[[0, 2]].detach(), ends, rtol=1e-6, atol=0)
    parameter = schedule.start_and_log_range
    assert parameter is not None
    fraction = (gamma.detach() + 7) / 9
    for index in range(3):  # gamma = start + exp(log range) * fraction
        gradient = torch.autograd.grad(gamma[index], parameter, retain_graph=True)[0]
        expected = torch.stack([torch.ones((), dtype=F64), 9 * fraction[index]])
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_a_learned_schedule_starts_nearly_linear_and_every_parameter_has_a_gradient() -> None:
    schedule = LearnedSchedule(-9.0, 4.0).double()
    gamma = schedule(INSIDE).gamma
    assert float((gamma.detach() - (-9 + 13 * INSIDE)).abs().max()) < 0.05 * 13
    gradients = torch.autograd.grad((gamma * INSIDE).sum(), list(schedule.parameters()))
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)


@every_schedule
def test_derivatives_have_gradients_in_the_learned_parameters(name: str) -> None:
    schedule = SCHEDULES[name]()
    parameters = dict(schedule.named_parameters())
    if not parameters:
        pytest.skip("nothing to learn")
    generator = torch.Generator().manual_seed(1)
    direction = {
        key: torch.randn(p.shape, dtype=F64, generator=generator) for key, p in parameters.items()
    }

    def loss(shift: float) -> Tensor:
        moved = {key: p + shift * direction[key] for key, p in parameters.items()}
        level = torch.func.functional_call(schedule, moved, INSIDE)
        return (level.dgamma * INSIDE + level.dsigma).sum()

    gradients = torch.autograd.grad(loss(0.0), list(parameters.values()))
    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    got = sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True))
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)


def test_linear_betas_are_the_limit_of_ddpms_thousand_steps() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DDPMScheduler
    reference = DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    ).alphas_cumprod.double()
    schedule = LinearBetaSchedule()
    u = torch.arange(1, 1001, dtype=F64) / 1000
    ours = schedule((u - schedule.t_0) / (1 - schedule.t_0)).alpha ** 2
    assert float((ours.log() / reference.log() - 1)[200:].abs().max()) < 0.01
    assert float((ours - reference).abs().max()) < 0.003


def test_cosine_matches_nichol_and_dhariwal_in_the_middle() -> None:
    level = CosineSchedule(-20.0, 20.0)(torch.linspace(0.05, 0.95, 19, dtype=F64))
    torch.testing.assert_close(level.alpha, torch.cos(math.pi / 2 * level.t), rtol=2e-3, atol=1e-4)


PRECISE: dict[str, Callable[[], Schedule]] = {
    "linear": LinearLogSNRSchedule,
    "cosine": CosineSchedule,
    "ddpm": LinearBetaSchedule,
    "flow": FlowMatchingSchedule,
    "learned": lambda: LearnedSchedule(-13.3, 5.0),
}


@pytest.mark.parametrize("name", PRECISE)
def test_float32_is_accurate_near_both_ends(name: str) -> None:
    t = torch.cat([torch.zeros(1), torch.logspace(-6, -1, 40), 1 - torch.logspace(-6, -1, 40)])
    schedule = PRECISE[name]()
    single, double = schedule(t), schedule.double()(t.double())
    for field in ("alpha", "sigma", "dalpha", "dsigma", "dgamma", "snr_decay", "inverse_dgamma"):
        torch.testing.assert_close(
            getattr(single, field).double(),
            getattr(double, field),
            rtol=3e-5,
            atol=0,
            msg=lambda m, f=field: f"{f}: {m}",
        )


def test_levels_expand_and_concatenate_field_by_field() -> None:
    schedule = FlowMatchingSchedule(0.1, 0.2)
    s, t = schedule(torch.tensor([0.1, 0.2])), schedule(torch.tensor([0.5]))
    both, direct = s.cat(t), schedule(torch.tensor([0.1, 0.2, 0.5]))
    wide = direct.expand(torch.zeros(3, 2, 4, 4))
    for field in ("t", "gamma", "alpha", "sigma", "dalpha", "dsigma"):
        assert torch.equal(getattr(both, field), getattr(direct, field))
        assert getattr(wide, field).shape == (3, 1, 1, 1)
        assert torch.equal(getattr(wide, field).flatten(), getattr(direct, field))
    assert isinstance(both, NoiseLevel)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearLogSNRSchedule(5.0, -13.3),
        lambda: LinearLogSNRSchedule(math.nan, 1.0),
        lambda: CosineSchedule(-math.inf, 1.0),
        lambda: LearnedSchedule(1.0, 1.0),
        lambda: LearnedSchedule(units=0),
        lambda: LinearBetaSchedule(0.0, 1.0),
        lambda: LinearBetaSchedule(t_0=0.0),
        lambda: FlowMatchingSchedule(0.0),
        lambda: FlowMatchingSchedule(0.1, 1.0),
    ],
)
def test_wrong_arguments_are_rejected_in_one_line(make: Callable[[], Schedule]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value) and "=" in str(caught.value)
