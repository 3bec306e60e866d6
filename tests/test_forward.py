"""The forward process: consistent posteriors, DDPM and DDIM by diffusers, the conditional SDE."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from ndm.errors import UserError
from ndm.forward import ForwardProcess, Gaussian, posterior_coefficients
from ndm.predictor import Predictor
from ndm.reverse import ReverseProcess
from ndm.sample import Ancestral
from ndm.schedule import (
    FlowMatchingSchedule,
    LearnedSchedule,
    LinearBetaSchedule,
    LinearLogSNRSchedule,
    NoiseLevel,
    Schedule,
)
from ndm.transform import Identity
from oracles import F64, SHEAR, Constant, LinearTransform

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import DDIMScheduler, DDPMScheduler

SCHEDULES: dict[str, Schedule] = {
    "linear": LinearLogSNRSchedule(-6.0, 4.0),
    "ddpm": LinearBetaSchedule(),
    "flow": FlowMatchingSchedule(0.01, 0.0),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
EARLY = torch.tensor([0.0, 0.1, 0.5, 0.85], dtype=F64)
LATE = torch.tensor([0.1, 0.5, 0.55, 1.0], dtype=F64)


def setting(name: str) -> tuple[ForwardProcess, Tensor, NoiseLevel, NoiseLevel]:
    process = ForwardProcess(SCHEDULES[name], LinearTransform(start=SHEAR))
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    return process, x, process.schedule(EARLY), process.schedule(LATE)


def pushed(
    process: ForwardProcess, x: Tensor, s: NoiseLevel, t: NoiseLevel, posterior: object
) -> tuple[Tensor, Tensor]:
    """Mean and variance of z_s when z_t ~ q(z_t|x) goes through the affine posterior."""
    at_t = process.marginal(x, t)
    center, ahead = posterior(at_t.mean), posterior(at_t.mean + 1.0)  # type: ignore[operator]
    gain = ahead.mean - center.mean
    return center.mean, gain**2 * at_t.std**2 + center.std**2


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_posterior_maps_the_marginal_at_t_to_the_marginal_at_s(name: str, eta: float) -> None:
    process, x, s, t = setting(name)
    mean, variance = pushed(process, x, s, t, lambda z: process.posterior(z, x, s, t, eta))
    expected = process.marginal(x, s)
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(variance, (expected.std**2).expand_as(variance))


@every_schedule
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_posteriors_of_any_variance_are_consistent(name: str, share: float) -> None:
    process, x, s, t = setting(name)

    def posterior(z: Tensor) -> Gaussian:
        return process.posterior_with_variance(z, x, s, t, share * s.sigma**2)

    mean, variance = pushed(process, x, s, t, posterior)
    expected = process.marginal(x, s)
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(variance, (expected.std**2).expand_as(variance))
    torch.testing.assert_close(posterior(x).std[:, 0], math.sqrt(share) * s.sigma)


@every_schedule
def test_marginal_has_mean_alpha_f_and_deviation_sigma(name: str) -> None:
    process, x, s, _ = setting(name)
    matrix = SHEAR + EARLY[:, None, None] * process.transform.tilt  # type: ignore[operator]
    shifted = (matrix @ x[..., None])[..., 0] + EARLY[:, None] * process.transform.offset  # type: ignore[operator]
    marginal = process.marginal(x, s)
    torch.testing.assert_close(marginal.mean, s.alpha[:, None] * shifted)
    deviation = marginal.sample(torch.ones_like(x)) - marginal.mean
    torch.testing.assert_close(deviation, s.sigma[:, None].expand(4, 2))


def test_eta_one_is_the_posterior_of_ddpm() -> None:
    """Ho et al. 2020, equations 6 and 7, in betas."""
    process = ForwardProcess(LinearBetaSchedule(), Identity())
    s = process.schedule(torch.tensor([0.2, 0.6], dtype=F64))
    t = process.schedule(torch.tensor([0.25, 0.7], dtype=F64))
    before, after = (s.alpha**2)[:, None], (t.alpha**2)[:, None]
    beta = 1 - after / before
    x, z = torch.randn(2, 2, 3, dtype=F64)
    mean = before.sqrt() * beta * x + (1 - beta).sqrt() * (1 - before) * z
    posterior = process.posterior(z, x, s, t)
    torch.testing.assert_close(posterior.mean, mean / (1 - after))
    torch.testing.assert_close(posterior.std**2, (1 - before) / (1 - after) * beta)


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_weight_of_the_target_is_alpha_s_minus_k_alpha_t(name: str, eta: float) -> None:
    _, _, s, t = setting(name)
    coefficients = posterior_coefficients(s, t, eta)
    weight = s.alpha - coefficients.k * t.alpha
    torch.testing.assert_close(coefficients.target_weight, weight, rtol=1e-10, atol=1e-14)
    k = (s.sigma**2 - coefficients.variance).clamp(min=0).sqrt() / t.sigma
    torch.testing.assert_close(coefficients.k, k, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.7])
def test_close_steps_keep_full_accuracy_in_float32(eta: float) -> None:
    gap, alpha, sigma = 2.0**-20, math.sqrt(0.5), math.sqrt(0.5)
    one, zero = torch.ones(1), torch.zeros(1)
    late = NoiseLevel(one, zero, alpha * one, sigma * one, zero, zero)
    early = NoiseLevel(zero, zero - gap, alpha * one, sigma * one, zero, zero)
    got = posterior_coefficients(early, late, eta)
    weight = alpha * -math.expm1(0.5 * (-gap + math.log1p(eta**2 * math.expm1(-gap))))
    assert got.target_weight.item() == pytest.approx(weight, rel=1e-5)
    assert got.variance.item() == pytest.approx(eta**2 * 0.5 * -math.expm1(-gap), rel=1e-5)


def test_the_largest_eta_is_allowed_and_finite() -> None:
    """v = sigma_s² up to float32 rounding: k = 0, and nothing may be NaN."""
    s = LinearLogSNRSchedule(-6.0, 4.0)(torch.linspace(0, 0.9, 50))
    t = LinearLogSNRSchedule(-6.0, 4.0)(torch.linspace(0, 0.9, 50) + 0.07)
    largest = (-torch.expm1(s.gamma - t.gamma)).rsqrt()
    for scale in (1 - 1e-7, 1.0, 1 + 2e-7):
        found = posterior_coefficients(s, t, scale * largest)
        for value in (found.k, found.target_weight, found.variance):
            assert bool(value.isfinite().all())
        torch.testing.assert_close(found.target_weight, s.alpha, rtol=2e-3, atol=0)
        torch.testing.assert_close(found.variance, s.sigma**2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("eta", [-0.1, 1.2, math.nan])
def test_eta_out_of_range_is_rejected_with_the_range(eta: float) -> None:
    s, t = SCHEDULES["linear"](EARLY), SCHEDULES["linear"](LATE)
    with pytest.raises(UserError, match=r"eta=.*eta <= 1") as caught:
        posterior_coefficients(s, t, eta)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [-0.1, 1.1])
def test_variances_out_of_range_are_rejected(factor: float) -> None:
    process, x, s, t = setting("linear")
    with pytest.raises(UserError, match="variance"):
        process.posterior_with_variance(x, x, s, t, factor * s.sigma**2)


@pytest.mark.parametrize("target", ["x", "eps", "v"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
def test_steps_match_diffusers(target: str, eta: float | None) -> None:
    """Without eta against DDPMScheduler, with eta against DDIMScheduler.

    Their index i is our t = i/T, so their step to 0 has our alpha_0, too.
    """
    steps, schedule = 12, LinearLogSNRSchedule(-4.0, 3.0)
    grid = schedule(torch.arange(steps + 1, dtype=F64) / steps)
    abar = grid.alpha**2
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
    options = {
        "num_train_timesteps": steps + 1,
        "trained_betas": betas.tolist(),
        "clip_sample": False,
        "timestep_spacing": "leading",
        "prediction_type": {"x": "sample", "eps": "epsilon", "v": "v_prediction"}[target],
    }
    if eta is None:
        reference = DDPMScheduler(**options, variance_type="fixed_small")
    else:
        reference = DDIMScheduler(**options, steps_offset=0)
    reference.set_timesteps(steps + 1)
    process = ForwardProcess(schedule, Identity())
    generator = torch.Generator().manual_seed(1)
    for i in range(steps, 0, -1):
        z, output = torch.randn(2, 5, 3, generator=generator)
        seed = torch.Generator().manual_seed(i)
        noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(i))
        extra = {} if eta is None else {"eta": eta}
        expected = reference.step(output, i, z, generator=seed, **extra).prev_sample
        reverse = ReverseProcess(process, Predictor(Constant(output), target))  # type: ignore[arg-type]
        t, s = process.level(i / steps, z), process.level((i - 1) / steps, z)
        ours = Ancestral(1.0 if eta is None else eta)(reverse, z, t, s, noise)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.5])
def test_the_conditional_sde_has_the_forward_marginals(name: str, eta: float) -> None:
    """For f affine in z, d mean/dt = f(mean) and d sigma²/dt = 2 (df/dz) sigma² - g²."""
    process, x, _, _ = setting(name)
    t, width = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=F64), 1e-6
    level, ahead, behind = (process.schedule(t + shift) for shift in (0.0, width, -width))
    marginal = process.marginal(x, level)
    with torch.no_grad():
        change = process.marginal(x, ahead).mean - process.marginal(x, behind).mean
        variance_slope = (ahead.sigma**2 - behind.sigma**2) / (2 * width)
        drift = process.drift(marginal.mean, x, level, eta)
        torch.testing.assert_close(drift, change / (2 * width), rtol=1e-6, atol=1e-6)
        rate = process.drift(marginal.mean + 1, x, level, eta) - drift
    expected = 2 * rate[:, 0] * level.sigma**2 - level.diffusion(eta) ** 2
    torch.testing.assert_close(expected, variance_slope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rate[:, 0], rate[:, 1])
    gamma_slope = (ahead.gamma - behind.gamma) / (2 * width)
    squared = eta**2 * level.sigma**2 * gamma_slope
    torch.testing.assert_close(level.diffusion(eta) ** 2, squared, rtol=1e-6, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.5])
def test_the_drift_is_the_limit_of_the_posterior(eta: float) -> None:
    process, x, _, _ = setting("linear")
    t, h = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=F64), 1e-6
    level = process.schedule(t)
    z = torch.randn(4, 2, dtype=F64)
    posterior = process.posterior(z, x, process.schedule(t - h), level, eta)
    drift, squared = process.drift(z, x, level, eta), level.diffusion(eta) ** 2
    torch.testing.assert_close((z - posterior.mean) / h, drift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.std[:, 0] ** 2 / h, squared, rtol=1e-4, atol=0)


def test_without_signal_the_sde_is_rejected_and_the_ode_works() -> None:
    process, x, _, _ = setting("flow")
    end = process.level(1.0, x)
    with pytest.raises(UserError, match=r"alpha = 0.*alpha_1"):
        process.drift(x, x, end, 1.0)
    with torch.no_grad():
        value, derivative = process.transform.with_derivative(x, end)
        torch.testing.assert_close(process.drift(x, x, end, 0.0), -value + 0.99 * x)
        process.posterior(x, x, process.level(0.9, x), end, 1.0)
    assert derivative.isfinite().all()


@pytest.mark.parametrize("event", [(), (1,), (2, 3, 3)])
def test_events_of_any_shape_are_treated_elementwise(event: tuple[int, ...]) -> None:
    process = ForwardProcess(LinearLogSNRSchedule(-6.0, 4.0), Identity())
    x, z = torch.randn(2, 4, *event, dtype=F64)
    s, t = process.schedule(EARLY), process.schedule(LATE)
    flat = process.posterior(z.reshape(4, -1), x.reshape(4, -1), s, t, 0.5)
    posterior: Gaussian = process.posterior(z, x, s, t, 0.5)
    torch.testing.assert_close(posterior.sample(x).reshape(4, -1), flat.sample(x.reshape(4, -1)))
    flat_drift = process.drift(z.reshape(4, -1), x.reshape(4, -1), s)
    torch.testing.assert_close(process.drift(z, x, s).reshape(4, -1), flat_drift)


def test_one_step_over_the_whole_range_has_finite_gradients() -> None:
    """In float32 exp(gamma_0 - gamma_1) - 1 rounds to -1, where log1p has an infinite slope."""
    schedule = LearnedSchedule(-13.3, 5.0, learn_ends=True)
    s, t = schedule(torch.zeros(2)), schedule(torch.ones(2))
    coefficients = posterior_coefficients(s, t, 1.0)
    (coefficients.target_weight**2 / coefficients.variance).sum().backward()
    for name, parameter in schedule.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    assert schedule.start_and_log_range.grad.abs().sum() > 0
