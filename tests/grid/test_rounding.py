"""Soft rounding to the grid of the data against sums over the whole grid and posteriors in closed
form.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ndm
from ndm import LinearLogSNRSchedule
from ndm.grid.rounding import Rounding, RoundingPredictor
from ndm.schedule import NoiseLevel
from oracles import F64, Constant


def noise(widths: Tensor, num_values: int) -> NoiseLevel:
    """Levels whose sigma/alpha is so many spacings."""
    return LinearLogSNRSchedule(0.0, 1.0)(2 * torch.log(widths * 2 / num_values))


def with_weights(rounding: Rounding, log_weights: Tensor) -> Rounding:
    """In float64, with log w of the values."""
    rounding.double()
    with torch.no_grad():
        rounding.weights.copy_(log_weights / 5)
    return rounding


@pytest.mark.parametrize("num_values", [2, 17, 256])
@pytest.mark.parametrize("width", [0.02, 0.1, 0.3, 0.7, 0.99, 1.0, 1.5])
def test_soft_rounding_is_the_mean_over_the_grid(num_values: int, width: float) -> None:
    """Over all of an endless grid whose values beyond the data have the weight of the last; weights
    fade out as the width reaches the spacing, where the mean is m itself.
    """
    generator = torch.Generator().manual_seed(0)
    spacing, m = 2 / num_values, 1.5 * torch.randn(200, 1, dtype=F64, generator=generator)
    log_weights = (
        2 * torch.randn(num_values + 10, dtype=F64, generator=generator) * (width < 0.5)
    )  # far values count less the narrower the width
    number = torch.arange(-40 * num_values, 40 * num_values, dtype=F64)
    grid, log_w = (
        (number + 0.5) * spacing - 1,
        log_weights[(number + 5).clamp(0, num_values + 9).long()],
    )
    log_w, grid = log_w[grid.abs() < 16], grid[grid.abs() < 16]
    logits = -0.5 * ((m - grid) / (width * spacing)) ** 2 + max(0, 1 - width**2) * log_w
    level = noise(torch.full((200,), width, dtype=F64), num_values)
    found = with_weights(Rounding(num_values), log_weights)(m, level)
    torch.testing.assert_close(
        found[:, 0], torch.softmax(logits, dim=1) @ grid, rtol=0, atol=1e-6 * spacing
    )


def test_a_pixel_of_known_frequencies_is_predicted_by_its_posterior_mean() -> None:
    """The network says nothing (v = 0 would be alpha z; here x̂ = z/alpha), the weights are the
    frequencies, the noise is low: no error beats it.
    """
    num_values, frequencies = 4, torch.tensor([0.7, 0.2, 0.0999, 0.0001], dtype=F64)
    predictor = RoundingPredictor(
        Constant(torch.zeros(2000, 1, dtype=F64)), num_values, "eps"
    ).double()
    with torch.no_grad():
        predictor.rounding.weights.fill_(-20.0)  # type: ignore[union-attr]
        predictor.rounding.weights[5:-5] = frequencies.log() / 5  # type: ignore[index]
    level = LinearLogSNRSchedule(-4.0, 5.0)(
        torch.zeros(2000, dtype=F64)
    )  # s = 0.135, the spacing 0.5
    z = torch.linspace(-1.2, 1.2, 2000, dtype=F64)[:, None] * level.alpha[:, None]
    m, s = z / level.alpha[:, None], float(level.sigma[0] / level.alpha[0])
    values = ndm.DiscretizedGaussian(num_values).values
    faded = 1 - (s / 0.5) ** 2
    posterior = torch.softmax(-0.5 * ((m - values) / s) ** 2 + faded * frequencies.log(), dim=1)
    torch.testing.assert_close(predictor(z, level)[:, 0], posterior @ values, rtol=0, atol=1e-6)


def test_derivatives_are_those_of_the_formula() -> None:
    """Forward and backward, with latents that are too noisy to be rounded among them, within the
    grid and far beyond.
    """
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


def test_what_is_not_a_number_stays_so_and_types_stay() -> None:
    rounding = Rounding(6)
    m = torch.tensor([[math.nan, 0.3], [0.1, 0.2]])
    found = rounding(m, noise(torch.tensor([0.3, 0.3]), 6))
    assert bool(found[0].isnan().any()) and bool(found[1].isfinite().all())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for widths in ([0.3, 2.0], [0.3, 0.4], [2.0, 2.0]):
            assert rounding(m.to(dtype), noise(torch.tensor(widths, dtype=F64), 6)).dtype == dtype


def test_every_weight_takes_part_whatever_the_noise() -> None:
    """Processes that train together expect gradients of the same parameters from each."""
    for width in (0.5, 2.0):
        rounding, m = Rounding(4), torch.rand(2, 1, 3, 3)
        rounding(m, noise(torch.full((2,), width), 4)).sum().backward()
        assert all(parameter.grad is not None for parameter in rounding.parameters())


def test_latents_without_signal_or_without_noise_have_finite_gradients() -> None:
    level = replace(
        ndm.FlowMatchingSchedule()(torch.tensor([0.0, 1.0])), sigma=torch.tensor([0.0, 1.0])
    )
    seen = torch.full((2, 1, 3, 3), 0.25, requires_grad=True)
    predictor = RoundingPredictor(Constant(seen), 4, "x")
    z = torch.zeros(2, 1, 3, 3, requires_grad=True)
    found = predictor(z, level)
    torch.testing.assert_close(found, seen)
    for value in torch.autograd.grad(
        found.sum(), [seen, z, *predictor.parameters()], allow_unused=True
    ):
        assert value is None or bool(value.isfinite().all())
