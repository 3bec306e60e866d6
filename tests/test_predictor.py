"""The predictor inverts z = alpha x + sigma eps for every target of its network."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ndm
from ndm.errors import UserError
from ndm.evaluation.evaluate import Evaluation
from ndm.predictor import Predictor
from ndm.schedule import (
    CosineSchedule,
    FlowMatchingSchedule,
    LinearLogSNRSchedule,
    NoiseLevel,
    Schedule,
)
from ndm.value_grid.rounding import RoundingPredictor
from oracles import F64, Constant, Points

TRUE: dict[str, Callable[[Tensor, Tensor, NoiseLevel], Tensor]] = {
    "v": lambda x, noise, at: at.alpha * noise - at.sigma * x,
    "eps": lambda x, noise, at: noise,
    "x": lambda x, noise, at: x,
}


@pytest.mark.parametrize("event", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("target", TRUE)
@pytest.mark.parametrize(
    "schedule",
    [LinearLogSNRSchedule(-8.0, 6.0), CosineSchedule(-8.0, 6.0), FlowMatchingSchedule(0.01, 0.02)],
    ids=["linear", "cosine", "flow"],
)
def test_the_true_output_recovers_the_data(
    schedule: Schedule, target: str, event: tuple[int, ...]
) -> None:
    x, noise = torch.randn(2, 9, *event, dtype=F64, generator=torch.Generator().manual_seed(0))
    level = schedule(torch.linspace(0, 1, 9, dtype=F64))
    at = level.expand(x)
    network = Constant(TRUE[target](x, noise, at))
    guess = Predictor(network, target)(at.alpha * x + at.sigma * noise, level)  # type: ignore[arg-type]
    torch.testing.assert_close(guess, x, rtol=1e-9, atol=1e-9)
    assert network.seen is level.t


def test_errors_of_the_network_reach_the_prediction_with_the_right_gain() -> None:
    """d x̂/d output is -sigma, -sigma/alpha and 1 on a variance-preserving schedule."""
    level = LinearLogSNRSchedule(-8.0, 6.0)(torch.linspace(0, 1, 5, dtype=F64))
    z = torch.zeros(5, 1, dtype=F64)
    gains = {"v": -level.sigma, "eps": -level.sigma / level.alpha, "x": torch.ones(5, dtype=F64)}
    for target, gain in gains.items():
        predictor = Predictor(Constant(torch.ones(5, 1, dtype=F64)), target)  # type: ignore[arg-type]
        torch.testing.assert_close(predictor(z, level)[:, 0], gain)


def test_half_precision_output_is_returned_in_the_precision_of_z() -> None:
    level = LinearLogSNRSchedule()(torch.rand(2))
    predictor = Predictor(Constant(torch.ones(2, 3, dtype=torch.bfloat16)), "v")
    guess = predictor(torch.zeros(2, 3), level)
    assert guess.dtype == torch.float32
    torch.testing.assert_close(guess, -level.sigma[:, None].expand(2, 3))


def test_wrong_targets_networks_and_shapes_are_rejected_in_one_line() -> None:
    level, z = LinearLogSNRSchedule()(torch.rand(2)), torch.zeros(2, 3)

    def build_without_signal() -> object:
        predictor = Predictor(Constant(z), "eps")
        return ndm.NDM(FlowMatchingSchedule(), ndm.Identity(), predictor, ndm.GaussianDecoder())

    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Predictor(Constant(z), "score"), "'score'.*v, eps, x"),  # type: ignore[arg-type]
        (lambda: Predictor(lambda z, t: z), "nn.Module"),  # type: ignore[arg-type]
        (lambda: Predictor(Constant(torch.zeros(2, 1)))(z, level), r"\(2, 3\) to \(2, 1\)"),
        (lambda: Predictor(Constant((z,)))(z, level), "tuple.*FromDiffusers"),
        (build_without_signal, "alpha.*target='v'"),
    ]
    for call, pattern in cases:
        with pytest.raises(UserError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["v", "x"])
def test_v_and_x_work_without_signal_at_the_end(target: str) -> None:
    predictor = Predictor(Constant(torch.full((2, 3), 0.5)), target)  # type: ignore[arg-type]
    guess = predictor(torch.ones(2, 3), FlowMatchingSchedule()(torch.ones(2)))
    assert torch.equal(guess, torch.full((2, 3), {"v": -0.5, "x": 0.5}[target]))


class GaussianPrediction(nn.Module):
    """The v that yields E[x|z] for x ~ N(0, s²) under z = alpha x + sigma eps."""

    def __init__(self, schedule: Schedule, s: float):
        super().__init__()
        self.schedule, self.s = schedule, s

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        at = self.schedule(t).expand(z)
        mean = at.alpha * self.s**2 / (at.alpha**2 * self.s**2 + at.sigma**2) * z
        return (at.alpha * z - mean) / at.sigma


@pytest.mark.slow
def test_rounding_brings_the_bound_of_a_quantized_gaussian_to_its_entropy() -> None:
    """For s many spacings wide, the posterior mean of the quantized value is the rounded Gaussian
    mean. Without rounding the same network has a higher bound.
    """
    num_values, s, schedule = 64, 0.2, LinearLogSNRSchedule(-12.0, 5.0)
    values = ndm.DiscretizedGaussian(num_values).values
    log_p = torch.log_softmax(-0.5 * (values / s) ** 2, 0)
    entropy = -float((log_p.exp() * log_p).sum())
    counts = (log_p.exp() * 4000).round().long()
    x = values.repeat_interleave(counts)[:, None].float()

    def nelbo(rounding: int | None) -> float:
        network = GaussianPrediction(schedule, s)
        predictor = RoundingPredictor(network, rounding) if rounding else Predictor(network)
        model = ndm.NDM(schedule, ndm.Identity(), predictor, ndm.DiscretizedGaussian(num_values))
        found = Evaluation(model, Points(x)).nelbo(None, 64)
        assert found.stderr < 0.03
        return found.nats

    prior = 0.5 * s**2 * math.exp(-5.0)  # of the signal left at t = 1
    assert nelbo(num_values) == pytest.approx(entropy + prior, abs=0.06)
    assert nelbo(None) > entropy + 0.3


def test_rounding_to_another_grid_than_the_data_is_rejected() -> None:
    network, parts = Constant(torch.zeros(2, 3)), (LinearLogSNRSchedule(), ndm.Identity())
    ndm.NDM(*parts, RoundingPredictor(network, 17), ndm.DiscretizedGaussian(17))
    cases: list[Callable[[], object]] = [
        lambda: ndm.NDM(*parts, RoundingPredictor(network, 17), ndm.DiscretizedGaussian(16)),
        lambda: ndm.NDM(*parts, RoundingPredictor(network, 2), ndm.DiscretizedGaussian([0.0, 1.0])),
        lambda: ndm.NDM(*parts, RoundingPredictor(network, 17), ndm.GaussianDecoder()),
        lambda: RoundingPredictor(network, 1),
    ]
    for call in cases:
        with pytest.raises(UserError, match="num_values="):
            call()
