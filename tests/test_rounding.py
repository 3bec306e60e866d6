"""Soft rounding to the grid of the data against sums over the whole grid and posteriors in closed form."""

import math
from dataclasses import replace

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
    """One example, place after place over a grid with many values to either side."""
    levels, spacing = rounding.levels, 2 / rounding.levels
    k = torch.arange(-60, levels + 60)
    grid, w = (k.double() + 0.5) * spacing - 1, log_weights[(k + 5).clamp(0, levels + 9)].exp()
    r = {place: torch.softmax(-0.5 * ((u[place] - grid) / (width * spacing)) ** 2, 0) for place in all_places(u)}
    offsets = [(a, b) for a in range(-2, 3) for b in range(-2, 3) if abs(a) + abs(b) in (1, 2)]
    out = torch.empty_like(m)
    for place in all_places(m):
        counted = ((k >= -5) & (k < levels + 5)).double()  # those beyond have no counts of their own
        weights = w + c[0] * counted * sum(r[other] for other in r if other != place)
        if m.dim() == 3:
            for strength, (a, b) in zip(c[1:], offsets, strict=True):
                weights = weights + strength * r.get((place[0], place[1] + a, place[2] + b), torch.zeros(()))
        logits = -0.5 * ((m[place] - grid) / (width * spacing)) ** 2 + (1 - width**2) * weights.log()
        out[place] = torch.softmax(logits, 0) @ grid
    return out


def all_places(x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(place.tolist()) for place in torch.ones_like(x).nonzero()]


@pytest.mark.parametrize("event", [(1, 3, 4), (2, 2, 3), (2, 4), (5,), (1,), (1, 2, 2, 2)])
@pytest.mark.parametrize("reach", [1.1, 6.0])
def test_values_held_elsewhere_are_likelier(event: tuple[int, ...], reach: float) -> None:
    """Images of one channel and of two, sequences, vectors, numbers and volumes, within the grid and far beyond; some latents are too noisy to be rounded."""
    levels, generator = 6, torch.Generator().manual_seed(0)
    widths = torch.tensor([0.1, 1.3, 0.4, 0.7], dtype=F64)
    log_weights, log_c = torch.randn(16, dtype=F64, generator=generator), torch.randn(13, dtype=F64, generator=generator)
    rounding = with_weights(Rounding(levels, repeats=True), log_weights, log_c)
    c = log_c.exp() * torch.tensor([0.02] + [1.0] * 12, dtype=F64)
    level = noise(widths, levels)
    m, u = (reach * (torch.rand(4, *event, dtype=F64, generator=generator) * 2 - 1) for _ in range(2))
    found = rounding(m, z := u * level.expand(u).alpha, level).detach()
    for index in (0, 2, 3):
        expected = by_loops(rounding, m[index], u[index], float(widths[index]), log_weights, c)
        torch.testing.assert_close(found[index], expected, rtol=0, atol=1e-6 if widths[index] < 0.5 else 1e-4)
    assert torch.equal(found[1], m[1])
    dm, dz = (torch.randn(m.shape, dtype=F64, generator=generator) for _ in range(2))
    within, moved = torch.func.jvp(lambda m, z: rounding(m, z, level), (m, z), (dm, dz))  # type: ignore[misc]
    torch.testing.assert_close(within.detach(), found)
    leaves = m.clone().requires_grad_(), z.clone().requires_grad_()
    probe = torch.randn(m.shape, dtype=F64, generator=generator)
    gradients = torch.autograd.grad((probe * rounding(*leaves, level)).sum(), leaves)
    torch.testing.assert_close((probe * moved).sum().detach(), (gradients[0] * dm).sum() + (gradients[1] * dz).sum())
    step = 1e-6
    change = (rounding(m + step * dm, z + step * dz, level) - rounding(m - step * dm, z - step * dz, level)) / (2 * step)
    torch.testing.assert_close(moved.detach(), change.detach(), rtol=1e-4, atol=1e-4)


def test_many_places_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same values and gradients as at once."""
    rounding, level = Rounding(6, repeats=True), noise(torch.tensor([0.3, 0.5, 1.5, 0.7]), 6)
    m, z = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()

    def found() -> list[Tensor]:
        leaves = [m.clone().requires_grad_(), z.clone().requires_grad_(), *rounding.parameters()]
        value = rounding(*leaves[:2], level)
        return [value.detach(), *torch.autograd.grad((value * m.flip(0)).sum(), leaves)]

    whole = found()
    monkeypatch.setattr("ndm.rounding._MOST", 10)
    torch.testing.assert_close(found(), whole)


def test_values_that_are_ruled_out_have_finite_gradients() -> None:
    for log_weight in (-200.0, 300.0):
        rounding, level = Rounding(6, repeats=True), noise(torch.tensor([0.3, 0.5]), 6)
        with torch.no_grad():
            rounding.weights.fill_(log_weight / 5)
        m = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        rounding(m, m.detach(), level).sum().backward()
        assert all(bool(value.grad.isfinite().all()) for value in (m, *rounding.parameters()))  # type: ignore[union-attr]


@pytest.mark.parametrize("repeats", [False, True])
def test_what_is_not_a_number_stays_so_and_types_stay(repeats: bool) -> None:
    rounding = Rounding(6, repeats)
    m = torch.tensor([[math.nan, 0.3], [0.1, 0.2]])
    found = rounding(m, m, noise(torch.tensor([0.3, 0.3]), 6))
    assert bool(found[0].isnan().any()) and bool(found[1].isfinite().all())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for widths in ([0.3, 2.0], [0.3, 0.4], [2.0, 2.0]):
            assert rounding(m.to(dtype), m.to(dtype), noise(torch.tensor(widths, dtype=F64), 6)).dtype == dtype


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


@pytest.mark.parametrize("repeats", [False, True])
def test_latents_without_signal_or_without_noise_have_finite_gradients(repeats: bool) -> None:
    level = replace(ndm.FlowMatching()(torch.tensor([0.0, 1.0])), sigma=torch.tensor([0.0, 1.0]))
    seen = torch.full((2, 1, 3, 3), 0.25, requires_grad=True)
    predictor, z = Predictor(Constant(seen), "x", 4, repeats, neighbours=True), torch.zeros(2, 1, 3, 3, requires_grad=True)  # type: ignore[arg-type]
    found = predictor(z, level)
    torch.testing.assert_close(found, seen)
    for value in torch.autograd.grad(found.sum(), [seen, z, *predictor.parameters()], allow_unused=True):
        assert value is None or bool(value.isfinite().all())


def test_repeats_need_a_grid() -> None:
    with pytest.raises(UserError, match="give levels"):
        Predictor(nn.Identity(), repeats=True)
