"""The categorical predictor against closed forms, loops over pixels and finite differences."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ndm
from ndm import CategoricalPredictor, LinearLogSNRSchedule
from ndm.errors import UserError
from ndm.nn import UNet
from ndm.schedule import NoiseLevel
from oracles import F64


class FixedFeatures(nn.Module):
    """A network that returns the same features at every pixel and records its input."""

    def __init__(self, features: Tensor, channels: int = 1):
        super().__init__()
        self.features, self.outputs, self.channels = features, len(features), channels
        self.seen = torch.empty(0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen = x.detach()
        return self.features[None, :, None, None, None].expand(
            len(x), -1, self.channels, *x.shape[2:]
        )


def fixed_predictor(
    log_frequencies: Tensor, channels: int = 1, log_c: float = -50.0
) -> CategoricalPredictor:
    """A predictor with these logits at every pixel; by default copies have no weight."""
    network = FixedFeatures(torch.ones(1, dtype=F64), channels)
    predictor = CategoricalPredictor(network, len(log_frequencies), 3, 2).double()
    with torch.no_grad():
        predictor.logits.weight.copy_(log_frequencies[:, None])
        predictor.copies.fill_(log_c / 5)
    return predictor


def at(log_snr: float, count: int) -> NoiseLevel:
    return LinearLogSNRSchedule(log_snr, 20.0)(torch.zeros(count, dtype=F64))


@pytest.mark.parametrize("gamma", [-14.0, -6.0, -3.0, -1.0, 2.0, 8.0])
def test_with_known_frequencies_the_prediction_is_the_posterior_mean(gamma: float) -> None:
    """By integration over the values, at any noise."""
    frequencies = torch.tensor([0.7, 0.2, 0.0999, 0.0001], dtype=F64)
    predictor, level = fixed_predictor(frequencies.log()), at(gamma, 1)
    alpha, sigma = float(level.alpha), float(level.sigma)
    values = ndm.DiscretizedGaussian(4).values.double()
    z = torch.linspace(-2.0, 2.0, 400, dtype=F64).reshape(1, 1, 20, 20)
    density = frequencies * torch.exp(-0.5 * ((z[..., None] - alpha * values) / sigma) ** 2)
    expected = (density @ values) / density.sum(-1)
    known = density.sum(-1) > 1e-200
    torch.testing.assert_close(predictor(z, level)[known], expected[known], rtol=0, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_network_input_holds_values_and_frequencies(channels: int) -> None:
    """By loops over the pixels of two examples with different noise."""
    torch.manual_seed(0)
    num_values, shape = 5, (2, channels, 2, 3)
    predictor = fixed_predictor(torch.zeros(num_values, dtype=F64), channels)
    level = LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.2, 0.7], dtype=F64))
    z = torch.randn(shape, dtype=F64)
    predictor(z, level)
    seen = predictor.network.seen
    assert seen.shape == (2, channels + 3 * channels + 2, 2, 3)
    assert torch.equal(seen[:, :channels], z)
    values = ndm.DiscretizedGaussian(num_values).values.double()
    for example in range(2):
        alpha = float(level.alpha[example])
        sigma = float(level.sigma[example])
        counts = torch.zeros(num_values, dtype=F64)
        for channel, row, column in itertools.product(range(channels), range(2), range(3)):
            distance = (z[example, channel, row, column] - alpha * values) / sigma
            r = torch.softmax(-0.5 * distance**2, 0)
            counts += r
            first = channels + 3 * channel
            found = seen[example, first : first + 3, row, column]
            torch.testing.assert_close(found, (predictor.values.weight @ r).detach())
        histogram = predictor.frequencies(torch.log1p(counts)).detach()
        expected = histogram[:, None, None].expand(-1, 2, 3)
        torch.testing.assert_close(seen[example, -2:], expected, rtol=1e-5, atol=1e-6)


def test_odds_of_two_values_follow_the_urn() -> None:
    """Of seven pixels three have the fourth value. The last pixel lies between the fourth and
    fifth, and does not count itself.
    """
    count, values = 2.0, ndm.DiscretizedGaussian(8).values.double()
    predictor, level = (
        fixed_predictor(torch.zeros(8, dtype=F64), log_c=math.log(count)),
        at(-11.0, 1),
    )
    pixels = torch.cat([values[[0, 3, 3, 3, 6, 7, 7]], (values[3:4] + values[4:5]) / 2])
    x = pixels.reshape(1, 1, 2, 4)
    odds = 1 + 3 * count
    found = predictor(x * level.expand(x).alpha, level).flatten().detach()
    # For the others the last pixel has half of each value; it does not count itself.
    expected = float(values[3] * odds + values[4]) / (1 + odds)
    assert float(found[-1]) == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(found[:-1], pixels[:-1], rtol=0, atol=1e-9)


def random_predictor(
    num_values: int = 6, outputs: int = 4, noisy: float = 0.5
) -> CategoricalPredictor:
    """A predictor with a small U-Net and random weights."""
    torch.manual_seed(0)
    network = UNet(2, 8, (1,), outputs=outputs, context=2 * 3 + 2)
    predictor = CategoricalPredictor(network, num_values, 3, 2)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(noisy * torch.randn_like(parameter))
    return predictor.double()


def test_derivatives_match_finite_differences() -> None:
    predictor, level = (
        random_predictor(),
        LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.2, 0.5], dtype=F64)),
    )
    z, dz, probe = (torch.randn(2, 2, 4, 4, dtype=F64) for _ in range(3))
    _, moved = torch.func.jvp(lambda z: predictor(z, level), (z,), (dz,))  # type: ignore[misc]
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((probe * predictor(leaf, level)).sum(), leaf)
    torch.testing.assert_close((probe * moved).sum().detach(), (gradient * dz).sum())
    change = (predictor(z + 1e-6 * dz, level) - predictor(z - 1e-6 * dz, level)) / 2e-6
    torch.testing.assert_close(moved.detach(), change.detach(), rtol=1e-5, atol=1e-6)


def test_create_graph_and_autocast_leave_gradients_unchanged() -> None:
    """Gradients in latents, weights and a learned schedule, with create_graph and in autocast."""
    predictor, schedule = (
        random_predictor(),
        ndm.LearnedSchedule(-6.0, 5.0, learn_ends=True).double(),
    )
    z = torch.randn(3, 2, 4, 4, dtype=F64, requires_grad=True)
    inputs = [z, *predictor.parameters(), *schedule.parameters()]
    loss = predictor(z, schedule(torch.tensor([0.1, 0.4, 0.8], dtype=F64))).square().sum()
    once = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    for first, second in zip(once, again, strict=True):
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            torch.testing.assert_close(second.detach(), first)
    predictor.float()
    level = LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.1, 0.4, 0.8]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = predictor(z.float(), level).square().sum()
        inside = torch.autograd.grad(loss, list(predictor.parameters()), retain_graph=True)
    outside = torch.autograd.grad(loss, list(predictor.parameters()))
    for first, second in zip(inside, outside, strict=True):
        assert torch.equal(first, second)


def test_blocks_without_gradients_match_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five examples of different noise: two per block and one left over."""
    predictor = random_predictor()
    level = LinearLogSNRSchedule(-6.0, 5.0)(torch.linspace(0.1, 0.9, 5, dtype=F64))
    z = torch.randn(5, 2, 4, 4, dtype=F64)
    together = predictor(z, level).detach()
    monkeypatch.setattr("ndm.value_grid.kernels._CPU_BLOCK", 2 * z[0].numel() * 6)
    with torch.no_grad():
        torch.testing.assert_close(predictor(z, level), together, rtol=0, atol=1e-12)
        torch.testing.assert_close(predictor(z[:0], level.rows(slice(0, 0))), together[:0])


def test_latents_without_signal_or_noise_have_exact_predictions_and_finite_gradients() -> None:
    """Without noise x̂ is the nearest value, without signal the mean under the network's logits."""
    ends = torch.tensor([0.0, 1.0])
    level = replace(ndm.FlowMatchingSchedule()(ends), sigma=ends)
    predictor = fixed_predictor(torch.tensor([0.1, 0.2, 0.3, 0.4]).log()).float()
    predictor.network.features = predictor.network.features.float()
    z = torch.full((2, 1, 3, 3), 0.2, requires_grad=True)
    found = predictor(z, level)
    torch.testing.assert_close(found[0], torch.full_like(found[0], 0.25))
    mean = 0.1 * -0.75 + 0.2 * -0.25 + 0.3 * 0.25 + 0.4 * 0.75
    torch.testing.assert_close(found[1], torch.full_like(found[1], mean))
    for value in torch.autograd.grad(found.sum(), [z, *predictor.parameters()], allow_unused=True):
        assert value is None or bool(value.isfinite().all())


@torch.no_grad()
def test_float32_and_autocast_stay_close_to_float64() -> None:
    """At all noise levels for 256 gray values; autocast affects only the network and its logits."""
    schedule, t = LinearLogSNRSchedule(-13.3, 5.0), torch.linspace(0, 1, 64)
    values = ndm.DiscretizedGaussian(256).values
    x = values[torch.randint(256, (64, 2, 4, 4), generator=torch.Generator().manual_seed(0))]
    predictor = random_predictor(256, noisy=0.1)
    level = schedule(t.double())
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    z = level.expand(x).alpha * x + level.expand(x).sigma * noise
    exact = predictor(z, level)
    predictor.float()
    single = predictor(z.float(), schedule(t))
    with torch.autocast("cpu", torch.bfloat16):
        half = predictor(z.float(), schedule(t))
    assert single.dtype == half.dtype == torch.float32
    scale = level.expand(x).sigma / level.expand(x).alpha  # of the error that the noise allows
    allowed = scale.clamp(max=0.3)
    assert float(((single - exact).abs() / allowed).max()) < 1e-3
    assert float(((half - exact) / allowed).square().mean().sqrt()) < 1e-2


def test_float32_stays_close_to_float64_where_values_are_missing() -> None:
    """Predictions and gradients at all noise levels, for images with eight of 256 gray values."""
    schedule = LinearLogSNRSchedule(-13.3, 5.0)
    t = torch.linspace(0, 1, 16)
    values = ndm.DiscretizedGaussian(256).values
    generator = torch.Generator().manual_seed(0)
    rows = [[0, 17, 34, 51, 68, 85, 102, 255], [0, 23, 46, 69, 92, 115, 138, 255]]
    present = torch.tensor(rows)[torch.arange(16) % 2]
    index = torch.randint(8, (16, 2 * 12 * 12), generator=generator)
    x = values[present.gather(1, index)].reshape(16, 2, 12, 12)
    predictor = random_predictor(256, noisy=0.02)
    level = schedule(t.double())
    noise = torch.randn(x.shape, generator=generator)
    z = level.expand(x).alpha * x + level.expand(x).sigma * noise
    found = []
    for dtype in (F64, torch.float32):
        predictor.to(dtype)
        prediction = predictor(z.to(dtype), schedule(t.to(dtype)))
        # The scale of the error that the noise allows.
        scale = (level.sigma / level.alpha).clamp(max=0.3).to(dtype)[:, None, None, None]
        loss = ((prediction - x) / scale).square().mean()
        gradients = torch.autograd.grad(loss, list(predictor.parameters()))
        found.append((prediction.detach() / scale, *gradients))
    assert float((found[0][0] - found[1][0]).abs().max()) < 1e-3
    for double, single in zip(found[0][1:], found[1][1:], strict=True):
        assert float((double - single).norm()) <= 1e-3 * float(double.norm()) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_predictor_computes_posteriors_in_float32(dtype: torch.dtype) -> None:
    predictor, values = random_predictor(16, noisy=0.1).float(), ndm.DiscretizedGaussian(16).values
    level = LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.2, 0.5]))
    x = values[torch.arange(64) % 16].reshape(2, 2, 4, 4)
    z = (level.alpha[:, None, None, None] * x).to(dtype)
    expected = predictor(z.float(), level)
    half_level = LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.2, 0.5], dtype=dtype))
    found = predictor.to(dtype)(z, half_level)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


def test_large_copy_weights_stay_finite() -> None:
    """For an image that holds each value once, predictions and gradients stay finite."""
    values = ndm.DiscretizedGaussian(16).values.double()
    for log_c in (10.0, 20.0, 60.0):
        predictor, level = (
            fixed_predictor(torch.zeros(16, dtype=F64), log_c=log_c).float(),
            at(-9.0, 1),
        )
        predictor.network.features = predictor.network.features.float()
        z = (values.reshape(1, 1, 4, 4) * level.alpha).float().requires_grad_()
        found = predictor(z, LinearLogSNRSchedule(-9.0, 20.0)(torch.zeros(1)))
        gradients = torch.autograd.grad(found.sum(), [z, predictor.copies])
        for value in (found, *gradients):
            assert bool(value.isfinite().all())


def test_a_model_trains_and_loads_bit_by_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    predictor = CategoricalPredictor(UNet(1, 4, (1,), outputs=3, context=5), 8, 4, 1)
    transform = ndm.SeparableTransform(UNet(1, 4, (1,), outputs=2))
    decoder = ndm.DiscretizedGaussian(8)
    model = ndm.NDM(LinearLogSNRSchedule(-8.0, 3.0), transform, predictor, decoder)
    x = decoder.values[torch.randint(8, (4, 1, 4, 4))].float()
    model.bound(x).loss.mean().backward()
    for parameter in predictor.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
    model.save_pretrained(tmp_path)
    back = ndm.NDM.from_pretrained(tmp_path)
    assert torch.equal(back.predict(x, 0.3), model.eval().predict(x, 0.3))
    assert back.predictor.embedding == 4


def test_incompatible_parts_are_rejected() -> None:
    level = at(0.0, 2)
    network = UNet(1, 8, (1,), outputs=4, context=32)
    good = CategoricalPredictor(network, 8)
    narrow = CategoricalPredictor(network, 8, histogram=8)
    wide = CategoricalPredictor(FixedFeatures(torch.ones(2), channels=3), 8, 1, 1)
    images = torch.zeros(2, 1, 4, 4)
    identity, moving = ndm.Identity(), ndm.GatedTransform(UNet(1, 4, (1,)))
    by_time = ndm.SeparableTransform(UNet(1, 4, (1,), outputs=2), "time")

    def build(
        transform: ndm.Transform, decoder: ndm.Decoder | None = None, **options: Any
    ) -> ndm.NDM:
        decoder = decoder or ndm.DiscretizedGaussian(8)
        return ndm.NDM(LinearLogSNRSchedule(), transform, good, decoder, **options)

    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: CategoricalPredictor(UNet(1, 8, (1,)), 8), "outputs, for example 64"),
        (lambda: CategoricalPredictor(None, 8), "needs an nn.Module"),  # type: ignore[arg-type]
        (lambda: CategoricalPredictor(network, 1), "num_values=1"),
        (lambda: CategoricalPredictor(network, 8, embedding=0), "embedding=0"),
        (lambda: narrow(images, level), r"\(2, 25, 4, 4\); set image_channels .*context"),
        (lambda: good(torch.zeros(2, 3), level), "predicts images"),
        (lambda: wide(images, level), r"must return \(2, 2, 1, 4, 4\)"),
        (lambda: build(identity, ndm.DiscretizedGaussian(16)), "another grid, of 16 values"),
        (lambda: build(moving, reverse="direct"), "reverse=direct .*use reverse=tied"),
        (lambda: build(identity, reverse="direct-score"), "reverse=direct-score"),
        (lambda: build(ndm.NetworkTransform(UNet(1, 4, (1,)))), "NetworkTransform moves data"),
        (lambda: build(by_time), "gate=noise"),
    ]
    for call, pattern in cases:
        with pytest.raises(UserError, match=pattern):
            call()
    build(identity, reverse="direct")
    build(moving)
