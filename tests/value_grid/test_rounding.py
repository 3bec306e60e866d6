"""Soft rounding to the grid of the data against sums over the grid and closed-form posteriors."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ndm
from ndm import LinearLogSNRSchedule
from ndm.schedule import NoiseLevel
from ndm.value_grid.rounding import Rounding, RoundingPredictor
from oracles import F64, Constant


def noise(widths: Tensor, num_values: int) -> NoiseLevel:
    """Levels whose sigma/alpha is ``widths`` grid spacings."""
    return LinearLogSNRSchedule(0.0, 1.0)(2 * torch.log(widths * 2 / num_values))


def with_weights(rounding: Rounding, log_weights: Tensor) -> Rounding:
    """Convert to float64 and set log w of the values."""
    rounding.double()
    with torch.no_grad():
        rounding.weights.copy_(log_weights / 5)
    return rounding


@pytest.mark.parametrize("num_values", [2, 17, 256])
@pytest.mark.parametrize("width", [0.02, 0.1, 0.3, 0.7, 0.99, 1.0, 1.5])
def test_soft_rounding_is_the_mean_over_the_grid(num_values: int, width: float) -> None:
    """Over an infinite grid whose outer values have the last weight. The weights fade out as the
    width reaches the spacing, where the mean is m.
    """
    generator = torch.Generator().manual_seed(0)
    spacing, m = 2 / num_values, 1.5 * torch.randn(200, 1, dtype=F64, generator=generator)
    # Weights matter only for narrow widths.
    log_weights = 2 * torch.randn(num_values + 10, dtype=F64, generator=generator) * (width < 0.5)
    number = torch.arange(-40 * num_values, 40 * num_values, dtype=F64)
    grid = (number + 0.5) * spacing - 1
    log_w = log_weights[(number + 5).clamp(0, num_values + 9).long()]
    log_w, grid = log_w[grid.abs() < 16], grid[grid.abs() < 16]
    logits = -0.5 * ((m - grid) / (width * spacing)) ** 2 + max(0, 1 - width**2) * log_w
    level = noise(torch.full((200,), width, dtype=F64), num_values)
    found = with_weights(Rounding(num_values), log_weights)(m, level)
    expected = torch.softmax(logits, dim=1) @ grid
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-6 * spacing)


def test_with_known_frequencies_the_prediction_is_the_posterior_mean() -> None:
    """At low noise, for a network that predicts x̂ = z/alpha and the frequencies as weights."""
    num_values, frequencies = 4, torch.tensor([0.7, 0.2, 0.0999, 0.0001], dtype=F64)
    network = Constant(torch.zeros(2000, 1, dtype=F64))
    predictor = RoundingPredictor(network, num_values, "eps").double()
    with torch.no_grad():
        predictor.rounding.weights.fill_(-20.0)  # type: ignore[union-attr]
        predictor.rounding.weights[5:-5] = frequencies.log() / 5  # type: ignore[index]
    # s = 0.135, the spacing 0.5.
    level = LinearLogSNRSchedule(-4.0, 5.0)(torch.zeros(2000, dtype=F64))
    z = torch.linspace(-1.2, 1.2, 2000, dtype=F64)[:, None] * level.alpha[:, None]
    m, s = z / level.alpha[:, None], float(level.sigma[0] / level.alpha[0])
    values = ndm.DiscretizedGaussian(num_values).values
    faded = 1 - (s / 0.5) ** 2
    posterior = torch.softmax(-0.5 * ((m - values) / s) ** 2 + faded * frequencies.log(), dim=1)
    torch.testing.assert_close(predictor(z, level)[:, 0], posterior @ values, rtol=0, atol=1e-6)


def test_derivatives_match_finite_differences() -> None:
    """Forward and backward, on the grid and far outside, also for latents too noisy to round."""
    generator = torch.Generator().manual_seed(0)
    rounding = with_weights(Rounding(6), torch.randn(16, dtype=F64, generator=generator))
    level = noise(torch.tensor([0.1, 1.3, 0.4, 0.7], dtype=F64), 6)
    m, dm, probe = (3 * torch.randn(4, 1, 3, 4, dtype=F64, generator=generator) for _ in range(3))
    found, moved = torch.func.jvp(lambda m: rounding(m, level), (m,), (dm,))  # type: ignore[misc]
    assert torch.equal(found[1], m[1])
    leaf = m.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((probe * rounding(leaf, level)).sum(), leaf)
    torch.testing.assert_close((probe * moved).sum().detach(), (gradient * dm).sum())
    change = (rounding(m + 1e-6 * dm, level) - rounding(m - 1e-6 * dm, level)) / 2e-6
    torch.testing.assert_close(moved.detach(), change.detach(), rtol=1e-4, atol=1e-4)


def test_nans_and_dtypes_are_preserved() -> None:
    rounding = Rounding(6)
    m = torch.tensor([[math.nan, 0.3], [0.1, 0.2]])
    found = rounding(m, noise(torch.tensor([0.3, 0.3]), 6))
    assert bool(found[0].isnan().any()) and bool(found[1].isfinite().all())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for widths in ([0.3, 2.0], [0.3, 0.4], [2.0, 2.0]):
            assert rounding(m.to(dtype), noise(torch.tensor(widths, dtype=F64), 6)).dtype == dtype


def test_every_parameter_has_a_gradient_at_any_noise() -> None:
    """Distributed training expects gradients of the same parameters from each process."""
    for width in (0.5, 2.0):
        rounding, m = Rounding(4), torch.rand(2, 1, 3, 3)
        rounding(m, noise(torch.full((2,), width), 4)).sum().backward()
        assert all(parameter.grad is not None for parameter in rounding.parameters())


def test_latents_without_signal_or_noise_have_finite_gradients() -> None:
    ends = torch.tensor([0.0, 1.0])
    level = replace(ndm.FlowMatchingSchedule()(ends), sigma=ends)
    output = torch.full((2, 1, 3, 3), 0.25, requires_grad=True)
    predictor = RoundingPredictor(Constant(output), 4, "x")
    z = torch.zeros(2, 1, 3, 3, requires_grad=True)
    found = predictor(z, level)
    torch.testing.assert_close(found, output)
    inputs = [output, z, *predictor.parameters()]
    for value in torch.autograd.grad(found.sum(), inputs, allow_unused=True):
        assert value is None or bool(value.isfinite().all())
