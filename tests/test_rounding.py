"""Soft rounding to the grid of the data against sums over the whole grid and posteriors in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

import ndm
from ndm import LinearLogSNR
from ndm.errors import UserError
from ndm.predictor import Predictor
from ndm.rounding import Rounding
from ndm.schedule import NoiseLevel
from oracles import F64, Constant


def noise(widths: Tensor, levels: int) -> NoiseLevel:
    """Levels whose sigma/alpha is so many spacings."""
    return LinearLogSNR(0.0, 1.0)(2 * torch.log(widths * 2 / levels))


def with_weights(rounding: Rounding, log_weights: Tensor, log_copies: Tensor | None = None) -> Rounding:
    """In float64, with log w of the values and, if any, log c over its value at the start."""
    rounding.double()
    with torch.no_grad():
        rounding.weights.copy_(log_weights / 5)
        if rounding.copies is not None and log_copies is not None:
            rounding.copies.copy_(log_copies / 5)
    return rounding


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("width", [0.02, 0.1, 0.3, 0.7, 0.99, 1.0, 1.5])
def test_soft_rounding_is_the_mean_over_the_grid(levels: int, width: float) -> None:
    """Over all of an endless grid whose values beyond the data have the weight of the last; weights fade out as the width reaches the spacing, where
    the mean is m itself."""
    generator = torch.Generator().manual_seed(0)
    spacing, m = 2 / levels, 1.5 * torch.randn(200, 1, dtype=F64, generator=generator)
    log_weights = (
        2 * torch.randn(levels + 10, dtype=F64, generator=generator) * (width < 0.5)
    )  # far values count less the narrower the width
    number = torch.arange(-40 * levels, 40 * levels, dtype=F64)
    grid, log_w = (number + 0.5) * spacing - 1, log_weights[(number + 5).clamp(0, levels + 9).long()]
    log_w, grid = log_w[grid.abs() < 16], grid[grid.abs() < 16]
    logits = -0.5 * ((m - grid) / (width * spacing)) ** 2 + max(0, 1 - width**2) * log_w
    level = noise(torch.full((200,), width, dtype=F64), levels)
    found = with_weights(Rounding(levels), log_weights)(m, torch.full_like(m, torch.nan), level)
    torch.testing.assert_close(found[:, 0], torch.softmax(logits, dim=1) @ grid, rtol=0, atol=1e-6 * spacing)


def test_a_pixel_of_known_frequencies_is_predicted_by_its_posterior_mean() -> None:
    """The network says nothing (v = 0 would be alpha z; here x̂ = z/alpha), the weights are the frequencies, the noise is low: no error beats it."""
    levels, frequencies = 4, torch.tensor([0.7, 0.2, 0.0999, 0.0001], dtype=F64)
    predictor = Predictor(Constant(torch.zeros(2000, 1, dtype=F64)), "eps", levels).double()
    with torch.no_grad():
        predictor.rounding.weights.fill_(-20.0)  # type: ignore[union-attr]
        predictor.rounding.weights[5:-5] = frequencies.log() / 5  # type: ignore[index]
    level = LinearLogSNR(-4.0, 5.0)(torch.zeros(2000, dtype=F64))  # s = 0.135, the spacing 0.5
    z = torch.linspace(-1.2, 1.2, 2000, dtype=F64)[:, None] * level.alpha[:, None]
    m, s = z / level.alpha[:, None], float(level.sigma[0] / level.alpha[0])
    values = ndm.DiscretizedGaussian(levels).values
    faded = 1 - (s / 0.5) ** 2
    posterior = torch.softmax(-0.5 * ((m - values) / s) ** 2 + faded * frequencies.log(), dim=1)
    torch.testing.assert_close(predictor(z, level)[:, 0], posterior @ values, rtol=0, atol=1e-6)


def by_loops(rounding: Rounding, m: Tensor, u: Tensor, width: float, log_weights: Tensor, c: Tensor) -> Tensor:
    """One image (H, W), place after place over a grid with ten values to either side."""
    levels, spacing = rounding.levels, 2 / rounding.levels
    k = torch.arange(-10, levels + 10)
    grid, w = (k.double() + 0.5) * spacing - 1, log_weights[(k + 5).clamp(0, levels + 9)].exp()
    r = {place: torch.softmax(-0.5 * ((u[place] - grid) / (width * spacing)) ** 2, 0) for place in all_places(u)}
    offsets = [(a, b) for a in range(-2, 3) for b in range(-2, 3) if abs(a) + abs(b) in (1, 2)]
    out = torch.empty_like(m)
    for place in all_places(m):
        weights = w + c[0] * sum(r[other] for other in r if other != place)
        if m.dim() == 2:
            for strength, (a, b) in zip(c[1:], offsets, strict=True):
                weights = weights + strength * r.get((place[0] + a, place[1] + b), torch.zeros(()))
        logits = -0.5 * ((m[place] - grid) / (width * spacing)) ** 2 + (1 - width**2) * weights.log()
        out[place] = torch.softmax(logits, 0) @ grid
    return out


def all_places(x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(place.tolist()) for place in torch.ones_like(x).nonzero()]


@pytest.mark.parametrize("event", [(1, 3, 4), (5,), (1,)])
def test_values_held_elsewhere_are_likelier(event: tuple[int, ...]) -> None:
    """Images, vectors and numbers, some of whose latents are too noisy to be rounded."""
    levels, generator = 6, torch.Generator().manual_seed(0)
    widths = torch.tensor([0.1, 1.3, 0.4, 0.7], dtype=F64)
    log_weights, log_c = torch.randn(16, dtype=F64, generator=generator), torch.randn(13, dtype=F64, generator=generator)
    rounding = with_weights(Rounding(levels, repeats=True), log_weights, log_c)
    c = log_c.exp() * torch.tensor([0.02] + [1.0] * 12, dtype=F64)
    level = noise(widths, levels)
    m, u = (torch.rand(4, *event, dtype=F64, generator=generator) * 2.2 - 1.1 for _ in range(2))
    m, z = m.requires_grad_(), (u * level.expand(u).alpha).requires_grad_()
    found = rounding(m, z, level)
    for index in (0, 2, 3):
        expected = by_loops(rounding, m[index].squeeze(0), u[index].squeeze(0), float(widths[index]), log_weights, c)
        torch.testing.assert_close(found[index].squeeze(0), expected, rtol=0, atol=1e-6 if widths[index] < 0.5 else 1e-4)
    assert torch.equal(found[1], m[1])
    within = torch.func.jvp(lambda m: rounding(m, z, level), (m,), (torch.ones_like(m),))[0]  # type: ignore[misc]
    torch.testing.assert_close(within, found)


def test_odds_of_two_values_are_those_of_an_urn() -> None:
    """Seven of eight numbers lie on values, three of them on the fourth; the last lies between the fourth and the fifth."""
    levels, weight, count = 8, 0.25, 2.0
    log_weights = torch.full((18,), math.log(weight), dtype=F64)
    rounding = with_weights(Rounding(levels, repeats=True), log_weights, torch.full((13,), math.log(count / 0.02), dtype=F64))
    values = ndm.DiscretizedGaussian(levels).values.double()
    level = noise(torch.full((1,), 0.05, dtype=F64), levels)
    u = torch.cat([values[[0, 3, 3, 3, 6, 7, 7]], (values[3:4] + values[4:5]) / 2])[None]
    odds = ((weight + 3 * count) / weight) ** (1 - 0.05**2)
    found = rounding(u, u * level.alpha[:, None], level)
    assert float(found[0, -1].detach()) == pytest.approx(float(values[3] * odds + values[4]) / (1 + odds), abs=1e-9)
    torch.testing.assert_close(found[0, :-1], u[0, :-1], rtol=0, atol=1e-9)


def test_every_weight_takes_part_whatever_the_noise() -> None:
    """Processes that train together expect gradients of the same parameters from each."""
    for width in (0.5, 2.0):
        rounding, m = Rounding(4, repeats=True), torch.rand(2, 1, 3, 3)
        rounding(m, m, noise(torch.full((2,), width), 4)).sum().backward()
        assert all(parameter.grad is not None for parameter in rounding.parameters())


def test_latents_without_signal_or_without_noise_have_finite_gradients() -> None:
    level = ndm.FlowMatching()(torch.tensor([0.0, 1.0]))
    for repeats in (False, True):
        predictor, z = Predictor(nn.Identity(), "x", 4, repeats), torch.rand(2, 3, requires_grad=True)
        predictor.network.forward = lambda z, t: 0.5 * z  # type: ignore[assignment,method-assign]
        predictor(z, level).sum().backward()
        assert z.grad is not None and bool(z.grad.isfinite().all())


def test_repeats_need_a_grid() -> None:
    with pytest.raises(UserError, match="give levels"):
        Predictor(nn.Identity(), repeats=True)
