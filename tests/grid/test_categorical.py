"""The categorical predictor against posteriors in closed form, loops over places and finite
differences.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ndm
from ndm import CategoricalPredictor, LinearLogSNRSchedule
from ndm.errors import UserError
from ndm.nn import UNet
from ndm.schedule import NoiseLevel
from oracles import F64


class Says(nn.Module):
    """A network that gives the same features everywhere, and keeps what it has seen."""

    def __init__(self, features: Tensor, channels: int = 1):
        super().__init__()
        self.features, self.outputs, self.channels = features, len(features), channels
        self.seen = torch.empty(0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen = x.detach()
        return self.features[None, :, None, None, None].expand(
            len(x), -1, self.channels, *x.shape[2:]
        )


def saying(
    log_frequencies: Tensor, channels: int = 1, log_c: float = -50.0
) -> CategoricalPredictor:
    """One whose logits are those numbers everywhere; unless log c says otherwise, copies count for
    nothing.
    """
    predictor = CategoricalPredictor(
        Says(torch.ones(1, dtype=F64), channels), len(log_frequencies), 3, 2
    ).double()
    with torch.no_grad():
        predictor.logits.weight.copy_(log_frequencies[:, None])
        predictor.copies.fill_(log_c / 5)
    return predictor


def at(log_snr: float, count: int) -> NoiseLevel:
    return LinearLogSNRSchedule(log_snr, 20.0)(torch.zeros(count, dtype=F64))


@pytest.mark.parametrize("gamma", [-14.0, -6.0, -3.0, -1.0, 2.0, 8.0])
def test_a_pixel_of_known_frequencies_is_predicted_by_its_posterior_mean(gamma: float) -> None:
    """Whatever the noise: by integration over the values, and no error of any other prediction is
    below it.
    """
    frequencies = torch.tensor([0.7, 0.2, 0.0999, 0.0001], dtype=F64)
    predictor, level = saying(frequencies.log()), at(gamma, 1)
    alpha, sigma = float(level.alpha), float(level.sigma)
    values = ndm.DiscretizedGaussian(4).values.double()
    z = torch.linspace(-2.0, 2.0, 400, dtype=F64).reshape(1, 1, 20, 20)
    density = frequencies * torch.exp(-0.5 * ((z[..., None] - alpha * values) / sigma) ** 2)
    expected = (density @ values) / density.sum(-1)
    known = density.sum(-1) > 1e-200
    torch.testing.assert_close(predictor(z, level)[known], expected[known], rtol=0, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_network_sees_values_and_frequencies(channels: int) -> None:
    """Loops over the places of two examples of different noise."""
    torch.manual_seed(0)
    num_values, shape = 5, (2, channels, 2, 3)
    predictor = saying(torch.zeros(num_values, dtype=F64), channels)
    level = LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.2, 0.7], dtype=F64))
    z = torch.randn(shape, dtype=F64)
    predictor(z, level)
    seen = predictor.network.seen
    assert seen.shape == (2, channels + 3 * channels + 2, 2, 3) and torch.equal(
        seen[:, :channels], z
    )
    values = ndm.DiscretizedGaussian(num_values).values.double()
    for example in range(2):
        alpha, sigma, counts = (
            float(level.alpha[example]),
            float(level.sigma[example]),
            torch.zeros(num_values, dtype=F64),
        )
        for channel in range(channels):
            for row in range(2):
                for column in range(3):
                    r = torch.softmax(
                        -0.5 * ((z[example, channel, row, column] - alpha * values) / sigma) ** 2, 0
                    )
                    counts += r
                    first = channels + 3 * channel
                    torch.testing.assert_close(
                        seen[example, first : first + 3, row, column],
                        (predictor.values.weight @ r).detach(),
                    )
        histogram = (
            predictor.frequencies.weight @ torch.log1p(counts) + predictor.frequencies.bias
        ).detach()
        torch.testing.assert_close(
            seen[example, -2:], histogram[:, None, None].expand(-1, 2, 3), rtol=1e-5, atol=1e-6
        )


def test_odds_of_two_values_are_those_of_an_urn() -> None:
    """Three of seven pixels lie on the fourth value, one on the seventh; the last lies between the
    fourth and the fifth, where it counts itself for nothing.
    """
    count, values = 2.0, ndm.DiscretizedGaussian(8).values.double()
    predictor, level = saying(torch.zeros(8, dtype=F64), log_c=math.log(count)), at(-11.0, 1)
    x = torch.cat([values[[0, 3, 3, 3, 6, 7, 7]], (values[3:4] + values[4:5]) / 2]).reshape(
        1, 1, 2, 4
    )
    odds = 1 + 3 * count
    found = predictor(x * level.expand(x).alpha, level).flatten().detach()
    # The last is half on each of both values for the others, and for itself it is not there.
    assert float(found[-1]) == pytest.approx(
        float(values[3] * odds + values[4]) / (1 + odds), abs=1e-9
    )
    torch.testing.assert_close(found[:-1], x.flatten()[:-1], rtol=0, atol=1e-9)


def full(num_values: int = 6, outputs: int = 4, noisy: float = 0.5) -> CategoricalPredictor:
    """With a small U-Net and weights at random."""
    torch.manual_seed(0)
    predictor = CategoricalPredictor(
        UNet(2, 8, (1,), outputs=outputs, context=2 * 3 + 2), num_values, 3, 2
    )
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(noisy * torch.randn_like(parameter))
    return predictor.double()


def test_derivatives_are_those_of_the_formula() -> None:
    predictor, level = full(), LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.2, 0.5], dtype=F64))
    z, dz, probe = (torch.randn(2, 2, 4, 4, dtype=F64) for _ in range(3))
    _, moved = torch.func.jvp(lambda z: predictor(z, level), (z,), (dz,))  # type: ignore[misc]
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((probe * predictor(leaf, level)).sum(), leaf)
    torch.testing.assert_close((probe * moved).sum().detach(), (gradient * dz).sum())
    change = (predictor(z + 1e-6 * dz, level) - predictor(z - 1e-6 * dz, level)) / 2e-6
    torch.testing.assert_close(moved.detach(), change.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_that_can_be_differentiated_again_are_the_same() -> None:
    """Of latents, weights and a learned schedule, which reach the prediction on several ways; and
    within autocast.
    """
    predictor, schedule = full(), ndm.LearnedSchedule(-6.0, 5.0, learn_ends=True).double()
    z = torch.randn(3, 2, 4, 4, dtype=F64, requires_grad=True)
    wanted = [z, *predictor.parameters(), *schedule.parameters()]
    loss = predictor(z, schedule(torch.tensor([0.1, 0.4, 0.8], dtype=F64))).square().sum()
    once = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    for first, second in zip(once, again, strict=True):
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            torch.testing.assert_close(second.detach(), first)
    predictor.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = (
            predictor(z.float(), LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.1, 0.4, 0.8])))
            .square()
            .sum()
        )
        inside = torch.autograd.grad(loss, list(predictor.parameters()), retain_graph=True)
    outside = torch.autograd.grad(loss, list(predictor.parameters()))
    for first, second in zip(inside, outside, strict=True):
        assert torch.equal(first, second)


def test_examples_weighed_in_blocks_without_a_gradient_are_those_weighed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five examples of different noise, two at once and one left over."""
    predictor, level = (
        full(),
        LinearLogSNRSchedule(-6.0, 5.0)(torch.linspace(0.1, 0.9, 5, dtype=F64)),
    )
    z = torch.randn(5, 2, 4, 4, dtype=F64)
    together = predictor(z, level).detach()
    monkeypatch.setattr("ndm.grid.kernels._CPU_BLOCK", 2 * z[0].numel() * 6)
    with torch.no_grad():
        torch.testing.assert_close(predictor(z, level), together, rtol=0, atol=1e-12)
        torch.testing.assert_close(predictor(z[:0], level.rows(slice(0, 0))), together[:0])


def test_latents_without_signal_or_without_noise() -> None:
    """Without noise, x̂ is the nearest value; without signal, the mean of what the network says;
    all gradients are finite.
    """
    level = replace(
        ndm.FlowMatchingSchedule()(torch.tensor([0.0, 1.0])), sigma=torch.tensor([0.0, 1.0])
    )
    predictor = saying(torch.tensor([0.1, 0.2, 0.3, 0.4]).log()).float()
    predictor.network.features = predictor.network.features.float()
    z = torch.full((2, 1, 3, 3), 0.2, requires_grad=True)
    found = predictor(z, level)
    torch.testing.assert_close(found[0], torch.full_like(found[0], 0.25))
    torch.testing.assert_close(
        found[1], torch.full_like(found[1], 0.1 * -0.75 + 0.2 * -0.25 + 0.3 * 0.25 + 0.4 * 0.75)
    )
    for value in torch.autograd.grad(found.sum(), [z, *predictor.parameters()], allow_unused=True):
        assert value is None or bool(value.isfinite().all())


@torch.no_grad()
def test_single_precision_and_autocast_stay_near_double() -> None:
    """At every noise of a schedule for 256 gray values; autocast reaches the network and its logits
    only.
    """
    schedule, t = LinearLogSNRSchedule(-13.3, 5.0), torch.linspace(0, 1, 64)
    values = ndm.DiscretizedGaussian(256).values
    x = values[torch.randint(256, (64, 2, 4, 4), generator=torch.Generator().manual_seed(0))]
    predictor = full(256, noisy=0.1)
    level = schedule(t.double())
    z = level.expand(x).alpha * x + level.expand(x).sigma * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(1)
    )
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


def test_values_that_no_example_holds_stay_near_double() -> None:
    """Predictions and gradients, at every noise of a schedule for 256 gray values, of images of
    eight values.
    """
    schedule, t, values = (
        LinearLogSNRSchedule(-13.3, 5.0),
        torch.linspace(0, 1, 16),
        ndm.DiscretizedGaussian(256).values,
    )
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([[0, 17, 34, 51, 68, 85, 102, 255], [0, 23, 46, 69, 92, 115, 138, 255]])[
        torch.arange(16) % 2
    ]
    x = values[chosen.gather(1, torch.randint(8, (16, 2 * 12 * 12), generator=generator))].reshape(
        16, 2, 12, 12
    )
    predictor = full(256, noisy=0.02)
    level = schedule(t.double())
    z = level.expand(x).alpha * x + level.expand(x).sigma * torch.randn(
        x.shape, generator=generator
    )
    found = []
    for dtype in (F64, torch.float32):
        predictor.to(dtype)
        prediction = predictor(z.to(dtype), schedule(t.to(dtype)))
        scale = (
            (level.sigma / level.alpha).clamp(max=0.3).to(dtype)[:, None, None, None]
        )  # of the error that the noise allows
        gradients = torch.autograd.grad(
            ((prediction - x) / scale).square().mean(), list(predictor.parameters())
        )
        found.append((prediction.detach() / scale, *gradients))
    assert float((found[0][0] - found[1][0]).abs().max()) < 1e-3
    for double, single in zip(found[0][1:], found[1][1:], strict=True):
        assert float((double - single).norm()) <= 1e-3 * float(double.norm()) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_predictor_held_in_half_precision_weighs_in_single(dtype: torch.dtype) -> None:
    predictor, values = full(16, noisy=0.1).float(), ndm.DiscretizedGaussian(16).values
    level = LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.2, 0.5]))
    z = (level.alpha[:, None, None, None] * values[torch.arange(64) % 16].reshape(2, 2, 4, 4)).to(
        dtype
    )
    expected = predictor(z.float(), level)
    found = predictor.to(dtype)(
        z, LinearLogSNRSchedule(-6.0, 5.0)(torch.tensor([0.2, 0.5], dtype=dtype))
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


def test_a_value_counts_for_much_and_for_all_others_at_once() -> None:
    """However much: an urn that holds each value once has no favorite."""
    values = ndm.DiscretizedGaussian(16).values.double()
    for log_c in (10.0, 20.0, 60.0):
        predictor, level = saying(torch.zeros(16, dtype=F64), log_c=log_c).float(), at(-9.0, 1)
        predictor.network.features = predictor.network.features.float()
        z = (values.reshape(1, 1, 4, 4) * level.alpha).float().requires_grad_()
        found = predictor(z, LinearLogSNRSchedule(-9.0, 20.0)(torch.zeros(1)))
        assert bool(found.isfinite().all())
        assert all(
            bool(value.isfinite().all())
            for value in torch.autograd.grad(found.sum(), [z, predictor.copies])
        )


def test_a_model_returns_bit_by_bit_and_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    predictor = CategoricalPredictor(UNet(1, 4, (1,), outputs=3, context=5), 8, 4, 1)
    network = UNet(1, 4, (1,), outputs=2)
    model = ndm.NDM(
        LinearLogSNRSchedule(-8.0, 3.0),
        ndm.SeparableTransform(network),
        predictor,
        ndm.DiscretizedGaussian(8),
    )
    x = ndm.DiscretizedGaussian(8).values[torch.randint(8, (4, 1, 4, 4))].float()
    model.bound(x).loss.mean().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.isfinite().all())
        for parameter in predictor.parameters()
    )
    model.save_pretrained(tmp_path)
    back = ndm.NDM.from_pretrained(tmp_path)
    assert (
        torch.equal(back.predict(x, 0.3), model.eval().predict(x, 0.3))
        and back.predictor.embedding == 4
    )


def test_what_does_not_fit_is_refused() -> None:
    level = at(0.0, 2)
    network = UNet(1, 8, (1,), outputs=4, context=32)
    good = CategoricalPredictor(network, 8)
    schedule, decoder = LinearLogSNRSchedule(), ndm.DiscretizedGaussian(8)
    moving = ndm.GatedTransform(UNet(1, 4, (1,)))
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: CategoricalPredictor(UNet(1, 8, (1,)), 8), "outputs, for example 64"),
        (lambda: CategoricalPredictor(None, 8), "needs an nn.Module"),  # type: ignore[arg-type]
        (lambda: CategoricalPredictor(network, 1), "num_values=1"),
        (lambda: CategoricalPredictor(network, 8, embedding=0), "embedding=0"),
        (
            lambda: CategoricalPredictor(network, 8, histogram=8)(torch.zeros(2, 1, 4, 4), level),
            r"\(2, 25, 4, 4\); set image_channels .*context",
        ),
        (lambda: good(torch.zeros(2, 3), level), "predicts images"),
        (
            lambda: CategoricalPredictor(Says(torch.ones(2), channels=3), 8, 1, 1)(
                torch.zeros(2, 1, 4, 4), level
            ),
            r"must return \(2, 2, 1, 4, 4\)",
        ),
        (
            lambda: ndm.NDM(schedule, ndm.Identity(), good, ndm.DiscretizedGaussian(16)),
            "another grid, of 16 values",
        ),
        (
            lambda: ndm.NDM(schedule, moving, good, decoder, reverse="direct"),
            "reverse=direct .*use reverse=tied",
        ),
        (
            lambda: ndm.NDM(schedule, ndm.Identity(), good, decoder, reverse="direct-score"),
            "reverse=direct-score",
        ),
        (
            lambda: ndm.NDM(schedule, ndm.NetworkTransform(UNet(1, 4, (1,))), good, decoder),
            "NetworkTransform moves data",
        ),
        (
            lambda: ndm.NDM(
                schedule, ndm.SeparableTransform(UNet(1, 4, (1,), outputs=2), "time"), good, decoder
            ),
            "gate=noise",
        ),
    ]
    for call, pattern in cases:
        with pytest.raises(UserError, match=pattern):
            call()
    ndm.NDM(schedule, ndm.Identity(), good, decoder, reverse="direct")
    ndm.NDM(schedule, moving, good, decoder)
