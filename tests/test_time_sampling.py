"""Time samplers estimate integrals without bias; importance sampling lowers the variance."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from ndm.errors import UserError
from ndm.time_sampling import (
    ImportanceTimeSampler,
    LowDiscrepancyTimeSampler,
    TimeSampler,
    TimeSamples,
    UniformTimeSampler,
)
from oracles import F64

LIKE = torch.zeros((), dtype=F64)
INTEGRALS = {
    "square": (lambda u: u**2, 1 / 3),
    "wave": (lambda u: torch.sin(6 * u) + 2, 2 + (1 - math.cos(6)) / 6),
    "peak": (lambda u: torch.exp(-((u - 0.8) ** 2) / 2e-4), math.sqrt(2e-4 * math.pi)),
    "step": (lambda u: (u > 0.29).to(u.dtype), 0.71),
}


def peak(u: Tensor) -> Tensor:
    return 0.05 + torch.exp(-((u - 0.7) ** 2) / 2e-3)


def trained(bins: int = 20, **options: float) -> ImportanceTimeSampler:
    """An importance sampler trained on the peak."""
    times = ImportanceTimeSampler(bins, **options).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        draw = times(400, LIKE, generator)
        times.update(draw, peak(draw.u))
    return times


SAMPLERS: dict[str, TimeSampler] = {
    "uniform": UniformTimeSampler(),
    "low": LowDiscrepancyTimeSampler(),
    "importance_new": ImportanceTimeSampler(7),
    "importance": trained(),
    "importance_sharp": trained(11, uniform=0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("integral", INTEGRALS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_integrals_are_estimated_without_bias(sampler: str, integral: str) -> None:
    function, expected = INTEGRALS[integral]
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(400):
        draw = SAMPLERS[sampler](25, LIKE, generator)
        estimates.append((draw.weight * function(draw.u)).mean())
    values = torch.stack(estimates)
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / 20 + 1e-9


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_times_lie_in_the_half_open_interval(sampler: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for count in (1, 2, 1000):
        for _ in range(30):
            draw = SAMPLERS[sampler](count, LIKE.to(dtype), generator)
            assert draw.u.shape == draw.weight.shape == (count,)
            assert draw.u.dtype == draw.weight.dtype == dtype
            assert bool((draw.u >= 0).all() and (draw.u < 1).all())


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_position_in_the_batch_has_the_full_density(sampler: str) -> None:
    """The first time of a draw has the full density: examples are not tied to times."""
    generator = torch.Generator().manual_seed(2)
    times = SAMPLERS[sampler]
    first = torch.stack([times(4, LIKE, generator).u[0] for _ in range(1500)])
    density = torch.ones(10, dtype=F64)
    if isinstance(times, ImportanceTimeSampler):
        density = times.density()
    edges = torch.cat([torch.zeros(1, dtype=F64), density.cumsum(0) / density.sum()])

    def cdf(u: Tensor) -> Tensor:
        place = torch.as_tensor(u) * len(density)
        index = place.long().clamp(max=len(density) - 1)
        return edges[index] + (place - index) * (edges[index + 1] - edges[index])

    assert stats.kstest(first.numpy(), lambda u: cdf(u).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_low_discrepancy_puts_one_time_in_every_stratum(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = []
    for _ in range(50):
        u = LowDiscrepancyTimeSampler()(count, LIKE, generator).u
        assert sorted((u * count).floor().int().tolist()) == list(range(count))
        offset = (u * count) % 1
        assert float((offset - offset[0]).abs().max()) < 1e-9
        offsets.append(float(offset[0]))
    assert max(offsets) > 0.8 and min(offsets) < 0.2


def test_the_density_is_proportional_to_the_root_mean_square_loss() -> None:
    times = trained(20, uniform=0.1)
    center = (torch.arange(20 * 200, dtype=F64) + 0.5) / 4000
    root = (peak(center) ** 2).reshape(20, 200).mean(1).sqrt()
    torch.testing.assert_close(times.density(), 0.9 * root / root.mean() + 0.1, rtol=0.1, atol=0.02)
    assert float(times.density().mean()) == pytest.approx(1.0)


def test_weights_are_one_over_the_density_and_bounded() -> None:
    times = trained(20, uniform=0.2)
    draw = times(4000, LIKE, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw.weight, 1 / times.density()[(draw.u * 20).long()])
    assert float(draw.weight.max()) <= 1 / 0.2 + 1e-12
    counts = torch.bincount((draw.u * 20).long(), minlength=20)
    torch.testing.assert_close(counts / 200.0, times.density().float(), rtol=0, atol=0.011)


@pytest.mark.slow
def test_importance_times_lower_the_variance_of_a_peaked_loss() -> None:
    generator, times = torch.Generator().manual_seed(5), trained()

    def variance(sampler: TimeSampler) -> float:
        draws = [sampler(1, LIKE, generator) for _ in range(2000)]
        return float(torch.stack([(d.weight * peak(d.u)).mean() for d in draws]).var())

    assert variance(times) < 0.3 * variance(UniformTimeSampler())


def test_the_density_stays_uniform_until_every_bin_has_a_loss() -> None:
    times = ImportanceTimeSampler(4).double()
    draw = TimeSamples(torch.tensor([0.1, 0.3, 0.6]), torch.ones(3))
    times.update(draw, torch.tensor([1.0, 5.0, 9.0]))
    assert times.density().tolist() == [1.0] * 4
    times.update(TimeSamples(torch.tensor([0.9]), torch.ones(1)), torch.tensor([1.0]))
    root = torch.tensor([1.0, 5.0, 9.0, 1.0], dtype=F64)
    torch.testing.assert_close(times.density(), 0.9 * root / 4 + 0.1)


def test_old_losses_decay() -> None:
    times = ImportanceTimeSampler(2, uniform=0.5, decay=0.75).double()
    u = TimeSamples(torch.tensor([0.1, 0.9]), torch.ones(2))
    times.update(u, torch.tensor([2.0, 1.0]))
    times.update(u, torch.tensor([4.0, 1.0]))
    first = math.sqrt((0.75 * 4 + 16) / 1.75)
    expected = 0.5 * torch.tensor([first, 1.0], dtype=F64) / ((first + 1) / 2) + 0.5
    torch.testing.assert_close(times.density(), expected)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_nonfinite_loss_leaves_the_density_unchanged(bad: float) -> None:
    times = trained()
    before = times.density()
    draw = times(50, LIKE, torch.Generator().manual_seed(0))
    loss = peak(draw.u)
    loss[3] = bad
    times.update(draw, loss)
    assert torch.equal(times.density(), before)
    times.update(draw, peak(draw.u))
    assert bool(times.density().isfinite().all())


def test_an_all_zero_loss_gives_a_uniform_density() -> None:
    times = ImportanceTimeSampler(3).double()
    times.update(TimeSamples(torch.tensor([0.1, 0.5, 0.9]), torch.ones(3)), torch.zeros(3))
    assert times.density().tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "options", [{"bins": 0}, {"uniform": 0.0}, {"uniform": 1.1}, {"decay": 1.0}, {"decay": -0.1}]
)
def test_wrong_arguments_are_rejected(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"bins=.*uniform=.*decay="):
        ImportanceTimeSampler(**options)  # type: ignore[arg-type]
