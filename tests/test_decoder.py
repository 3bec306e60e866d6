"""Decoders: probabilities that sum to one, limits, and samples that follow them."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ndm.decoder import DiscretizedGaussian, GaussianDecoder, bin_centers
from ndm.errors import UserError
from ndm.schedule import FlowMatchingSchedule, LinearLogSNRSchedule, NoiseLevel
from oracles import F64, repeated


def start(gamma: float, count: int, dtype: torch.dtype = F64) -> NoiseLevel:
    return LinearLogSNRSchedule(gamma, gamma + 1)(torch.zeros(count, dtype=dtype))


grids = st.lists(st.integers(-50, 50), min_size=2, max_size=9, unique=True).map(
    lambda values: [v / 16 for v in sorted(values)]
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(grid=grids, gamma=st.floats(-9, 6), seed=st.integers(0, 1000))
def test_probabilities_are_the_softmax_of_squares_and_sum_to_one(
    grid: list[float], gamma: float, seed: int
) -> None:
    decoder, level = DiscretizedGaussian(grid), start(gamma, 3)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(3, 2, dtype=F64, generator=generator)
    alpha, width = math.sqrt(1 / (1 + math.exp(gamma))), math.exp(gamma)
    each = []
    for value in grid:
        log_p = decoder.log_prob(torch.full((3, 2), value, dtype=F64), z, level)
        logits = torch.stack([-((z / alpha - other) ** 2) / (2 * width) for other in grid])
        expected = -((z / alpha - value) ** 2) / (2 * width) - torch.logsumexp(logits, 0)
        torch.testing.assert_close(log_p, expected.sum(1), rtol=1e-9, atol=1e-9)
        each.append(decoder.log_prob(torch.full((3, 1), value, dtype=F64), z[:, :1], level).exp())
    torch.testing.assert_close(
        torch.stack(each).sum(0), torch.ones(3, dtype=F64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("gamma", [-13.3, -9.0, -6.5, -3.0])
@pytest.mark.parametrize("spread", [1.0, 5.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_omitted_levels_change_neither_value_nor_gradient(
    gamma: float, spread: float, dtype: torch.dtype
) -> None:
    decoder, level, exact = DiscretizedGaussian(256), start(gamma, 4, dtype), start(gamma, 4)
    generator = torch.Generator().manual_seed(0)
    x = decoder.values[torch.randint(256, (4, 200), generator=generator)]
    noise = torch.randn(4, 200, dtype=F64, generator=generator)
    z = (x + spread * math.exp(gamma / 2) * noise).to(dtype).requires_grad_()
    log_p = decoder.log_prob(x.to(dtype), z, level)
    z_exact = z.detach().double().requires_grad_()
    logits = decoder.logits(z_exact, exact)
    expected = logits.gather(-1, decoder.index(x)[..., None])[..., 0].sum(1)
    rtol = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(log_p.double(), expected, rtol=rtol, atol=1e-9)
    (found,) = torch.autograd.grad(log_p.sum(), z)
    (gradient,) = torch.autograd.grad(expected.sum(), z_exact)
    torch.testing.assert_close(
        found.double(), gradient, rtol=0, atol=rtol * float(gradient.abs().max())
    )


def uneven(count: int, seed: int) -> list[float]:
    """A grid with gaps of 1 in the middle and up to 3 at both ends."""
    gaps = 1 + 2 * torch.rand(count - 1, dtype=F64, generator=torch.Generator().manual_seed(seed))
    gaps[count // 4 : -(count // 4) or None] = 1
    return [0.0, *gaps.cumsum(0).tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.02, 0.11, 0.2, 0.3, 0.7, 1.0, 1.6, 3.0, 8.0, 1e3])
@pytest.mark.parametrize("count", [2, 9, 150])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_omitted_levels_are_below_rounding_for_every_latent(
    sigma: float, count: int, dtype: torch.dtype
) -> None:
    """Value and gradient match the softmax over all values: on the grid's values, between them and
    far outside.
    """
    decoder = DiscretizedGaussian(uneven(count, 1))
    span = float(decoder.values[-1])
    one, width = torch.ones(1, dtype=dtype), torch.full((1,), sigma, dtype=dtype)
    level = NoiseLevel(
        t=0 * one, gamma=2 * width.log(), alpha=one, sigma=width, dalpha=0 * one, dsigma=0 * one
    )
    inside = (decoder.values[:, None] + sigma * torch.linspace(-4, 4, 9, dtype=F64)).flatten()
    middles = (decoder.values[1:] + decoder.values[:-1]) / 2
    outside = torch.tensor([-3 * span, -span / 9, 1.2 * span, 5 * span], dtype=F64)
    places = torch.cat([inside, middles - 1e-4, middles + 1e-4, outside])
    z = places.to(dtype)[None].requires_grad_()
    exact = NoiseLevel(**{name: value.double() for name, value in vars(level).items()})
    rounding = 20 * torch.finfo(dtype).eps
    nearest = torch.bucketize(z.detach()[0].double(), middles)
    for shift in (0, 1, -1, 4):
        index = (nearest + shift).clamp(0, count - 1)
        z_exact = z.detach().double().requires_grad_()
        expected = decoder.logits(z_exact, exact)[0].gather(-1, index[:, None])[:, 0]
        x = decoder.values[index][None]
        # One dimension per example, so that no sum hides a difference.
        found = decoder.log_prob(x.to(dtype).T, z.T, repeated(level, len(index)))
        (slope,) = torch.autograd.grad(found.sum(), z)
        (gradient,) = torch.autograd.grad(expected.sum(), z_exact)
        # The squares that cancel set the scale of rounding.
        reach = (z_exact.detach()[0].abs() + span) / sigma
        size = 1 + (reach**2 if dtype == torch.float32 else expected.detach().abs())
        assert bool(((found.double() - expected).abs() <= rounding * size).all())
        steep = (1 + reach) / sigma
        scale = steep * (1 + span / sigma) ** 2 if dtype == torch.float32 else steep
        assert bool(((slope[0].double() - gradient[0]).abs() <= rounding * scale).all())


@pytest.mark.parametrize("num_values", [2, 17, 256])
def test_without_noise_all_mass_is_on_the_value(num_values: int) -> None:
    decoder = DiscretizedGaussian(num_values)
    x = decoder.values[torch.arange(num_values)][None]
    level = start(-30.0, 1)
    noise = torch.randn(1, num_values, dtype=F64, generator=torch.Generator().manual_seed(0))
    z = level.alpha[:, None] * x + level.sigma[:, None] * noise
    assert decoder.log_prob(x, z, level).item() == pytest.approx(0.0, abs=1e-9)
    assert torch.equal(decoder.sample(z, level), x)
    wrong = x.roll(1, 1)
    assert decoder.log_prob(wrong, z, level).item() < -1e3


def test_without_signal_all_levels_are_equally_likely() -> None:
    x, z = bin_centers(256)[None, :20], torch.randn(1, 20, dtype=F64)
    log_p = DiscretizedGaussian(256).log_prob(x, z, start(40.0, 1))
    assert log_p.item() == pytest.approx(-20 * math.log(256), rel=1e-6)


def test_bins_are_equal_parts_of_the_interval() -> None:
    centers = bin_centers(4)
    assert centers.tolist() == [-0.75, -0.25, 0.25, 0.75]
    widths = {round(b - a, 12) for a, b in pairwise(bin_centers(256).tolist())}
    assert widths == {round(2 / 256, 12)}


@pytest.mark.parametrize(
    ("count", "loudest"), [(4, 8.0), (256, -6.0)], ids=["all values", "near ones"]
)
def test_samples_drawn_in_blocks_use_their_own_noise_levels(
    count: int, loudest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples alternate between no noise and enough for several likely values; the noiseless ones
    must be recovered.
    """
    decoder = DiscretizedGaussian(count)
    x = decoder.values[torch.randint(count, (7, 5), generator=torch.Generator().manual_seed(0))]
    quiet, loud = start(-18.0, 1), start(loudest, 1)
    level = quiet
    for index in range(1, 7):
        level = level.cat(loud if index % 2 else quiet)
    candidates = min(count, 2 * decoder._reach(level) + 1)
    # Three examples per block, and one left over.
    monkeypatch.setattr("ndm.decoder.MOST_LOGITS", 3 * 5 * candidates)
    drawn = decoder.sample(level.expand(x).alpha * x, level, torch.Generator().manual_seed(1))
    assert drawn.shape == x.shape
    assert torch.equal(drawn[::2], x[::2])
    assert not torch.equal(drawn[1::2], x[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-0.98, -0.4, 0.0, 0.37])
@pytest.mark.parametrize(
    ("grid", "gamma"),
    [([-1.0, -0.6, 0.1, 0.2, 1.0], -1.0), (256, -9.0)],
    ids=["all values", "near ones"],
)
def test_sampled_levels_follow_their_probabilities(
    grid: list[float] | int, gamma: float, shift: float
) -> None:
    decoder, level, count = DiscretizedGaussian(grid), start(gamma, 1), 40_000
    z = torch.full((1, count), shift, dtype=F64)
    drawn = decoder.sample(z, level, torch.Generator().manual_seed(3))
    observed = torch.stack([(drawn == value).sum() for value in decoder.values])
    values = decoder.values[:, None, None]
    expected = torch.cat([decoder.log_prob(x, z[:, :1], level).exp() for x in values])
    assert int(observed.sum()) == count
    likely = count * expected > 5
    if not bool(likely.all()):  # the others form one class
        observed = torch.cat([observed[likely], observed[~likely].sum()[None]])
        expected = torch.cat([expected[likely], expected[~likely].sum()[None]])
    assert stats.chisquare(observed.numpy(), (count * expected).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    "level",
    [start(-3.0, 4), FlowMatchingSchedule(0.2)(torch.zeros(4, dtype=F64))],
    ids=["vp", "flow"],
)
@pytest.mark.parametrize("event", [(3,), (2, 2, 2)])
def test_gaussian_decoder_matches_torch_normal(level: NoiseLevel, event: tuple[int, ...]) -> None:
    x, z = torch.randn(2, 4, *event, dtype=F64, generator=torch.Generator().manual_seed(0))
    at = level.expand(z)
    normal = torch.distributions.Normal(z / at.alpha, torch.exp(0.5 * at.gamma))
    torch.testing.assert_close(
        GaussianDecoder().log_prob(x, z, level), normal.log_prob(x).flatten(1).sum(1)
    )
    noise = torch.randn(z.shape, dtype=F64, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(
        GaussianDecoder().sample(z, level, torch.Generator().manual_seed(9)),
        normal.mean + normal.stddev * noise,
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_index_finds_every_value_of_a_byte_grid(dtype: torch.dtype) -> None:
    grid = DiscretizedGaussian(256).values
    pixels = torch.arange(256).reshape(4, 1, 8, 8)
    assert torch.equal(DiscretizedGaussian(256).index(grid[pixels].to(dtype)), pixels)


def test_log_prob_of_an_image_equals_that_of_its_flattened_pixels() -> None:
    decoder, level = DiscretizedGaussian(16), start(-4.0, 2, torch.float32)
    x = decoder.values.float()[torch.randint(16, (2, 3, 4, 4))]
    z = level.expand(x).alpha * x + 0.1
    torch.testing.assert_close(
        decoder.log_prob(x, z, level), decoder.log_prob(x.flatten(1), z.flatten(1), level)
    )


@pytest.mark.parametrize("bad", [0.01, 1.5, -7.0, math.nan, math.inf])
def test_values_off_the_grid_are_rejected_and_named(bad: float) -> None:
    decoder = DiscretizedGaussian([-1.0, 0.0, 1.0])
    x = torch.tensor([[0.0, bad], [1.0, -1.0]])
    if bad == 0.01:
        decoder.check(x)  # within a hundredth of the gap
        assert decoder.index(x).tolist() == [[1, 1], [2, 0]]
        x[0, 1] = bad = 0.011
    with pytest.raises(UserError, match=f"{bad:g} is not on .*grid of 3") as caught:
        decoder.check(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "num_values", [1, 0, [0.0], [0.0, 0.0], [1.0, 0.0], [0.0, math.nan], [0.0, math.inf]]
)
def test_invalid_grids_are_rejected(num_values: int | list[float]) -> None:
    with pytest.raises(UserError, match="num_values="):
        DiscretizedGaussian(num_values)


def test_gradients_reach_the_latent() -> None:
    decoder, level = DiscretizedGaussian(8), start(-2.0, 1)
    x = decoder.values[None, :3]
    z = torch.randn(1, 3, dtype=F64, requires_grad=True)

    def loss(latent: Tensor) -> Tensor:
        return decoder.log_prob(x, latent, level)

    assert torch.autograd.gradcheck(loss, (z,))
