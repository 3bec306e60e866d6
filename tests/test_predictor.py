"""The preconditioned predictor inverts z = alpha x + sigma eps for every reading of its network."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ndm.errors import UserError
from ndm.predictor import Predictor
from ndm.schedule import Cosine, FlowMatching, LinearLogSNR, NoiseLevel, Schedule
from oracles import F64


class Constant(nn.Module):
    def __init__(self, output: object):
        super().__init__()
        self.output, self.seen = output, None

    def forward(self, z: Tensor, t: Tensor) -> object:
        self.seen = t
        return self.output


TRUE: dict[str, Callable[[Tensor, Tensor, NoiseLevel], Tensor]] = {
    "v": lambda x, noise, at: at.alpha * noise - at.sigma * x,
    "eps": lambda x, noise, at: noise,
    "x": lambda x, noise, at: x,
}


@pytest.mark.parametrize("event", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("target", TRUE)
@pytest.mark.parametrize(
    "schedule", [LinearLogSNR(-8.0, 6.0), Cosine(-8.0, 6.0), FlowMatching(0.01, 0.02)], ids=["linear", "cosine", "flow"]
)
def test_the_true_output_gives_the_data_back(schedule: Schedule, target: str, event: tuple[int, ...]) -> None:
    x, noise = torch.randn(2, 9, *event, dtype=F64, generator=torch.Generator().manual_seed(0))
    level = schedule(torch.linspace(0, 1, 9, dtype=F64))
    at = level.expand(x)
    network = Constant(TRUE[target](x, noise, at))
    guess = Predictor(network, target)(at.alpha * x + at.sigma * noise, level)  # type: ignore[arg-type]
    torch.testing.assert_close(guess, x, rtol=1e-9, atol=1e-9)
    assert network.seen is level.t


def test_errors_of_the_network_reach_the_prediction_with_the_right_gain() -> None:
    """d x̂/d output is -sigma, -sigma/alpha and 1 on a variance-preserving schedule."""
    level, z = LinearLogSNR(-8.0, 6.0)(torch.linspace(0, 1, 5, dtype=F64)), torch.zeros(5, 1, dtype=F64)
    gains = {"v": -level.sigma, "eps": -level.sigma / level.alpha, "x": torch.ones(5, dtype=F64)}
    for target, gain in gains.items():
        torch.testing.assert_close(Predictor(Constant(torch.ones(5, 1, dtype=F64)), target)(z, level)[:, 0], gain)  # type: ignore[arg-type]


def test_half_precision_output_is_returned_in_the_precision_of_z() -> None:
    level = LinearLogSNR()(torch.rand(2))
    guess = Predictor(Constant(torch.ones(2, 3, dtype=torch.bfloat16)), "v")(torch.zeros(2, 3), level)
    assert guess.dtype == torch.float32
    torch.testing.assert_close(guess, -level.sigma[:, None].expand(2, 3))


def test_wrong_targets_networks_and_shapes_are_refused_in_one_line() -> None:
    level, z = LinearLogSNR()(torch.rand(2)), torch.zeros(2, 3)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Predictor(Constant(z), "score"), "'score'.*v, eps, x"),  # type: ignore[arg-type]
        (lambda: Predictor(lambda z, t: z), "nn.Module"),  # type: ignore[arg-type]
        (lambda: Predictor(Constant(torch.zeros(2, 1)))(z, level), r"\(2, 3\) to \(2, 1\)"),
        (lambda: Predictor(Constant((z,)))(z, level), "tuple.*FromDiffusers"),
        (lambda: Predictor(Constant(z), "eps")(z, FlowMatching()(torch.ones(2))), "alpha"),
    ]
    for call, pattern in cases:
        with pytest.raises(UserError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["v", "x"])
def test_no_signal_at_the_end_is_fine_for_v_and_x(target: str) -> None:
    guess = Predictor(Constant(torch.full((2, 3), 0.5)), target)(torch.ones(2, 3), FlowMatching()(torch.ones(2)))  # type: ignore[arg-type]
    assert torch.equal(guess, torch.full((2, 3), {"v": -0.5, "x": 0.5}[target]))
