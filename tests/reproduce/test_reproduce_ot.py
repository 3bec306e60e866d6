"""The optimal-transport experiment: its rulers against closed forms, and the smallest run from end
to end.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ndm.reproduce.transport_measures as experiment
from ndm.cli.main import main
from ndm.decoder import GaussianDecoder
from ndm.model import NDM
from ndm.predictor import Predictor
from ndm.reproduce.transport_measures import (
    DATA,
    bend,
    data_nodes,
    expected_bound,
    few_steps,
    prior_grid,
    trajectories,
    w2,
)
from ndm.schedule import LinearBetaSchedule, LinearLogSNRSchedule, Schedule
from ndm.transform import Identity
from ndm.variants.monotone import MonotoneMap
from ndm.variants.transport import TransportNDM
from oracles import F64, randomized


class Exact(nn.Module):
    """E[x|z_t] of the mixture, for an identity F."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        level = self.schedule(t).expand(z)
        means, weights = (
            torch.tensor(experiment.MEANS, dtype=z.dtype),
            torch.tensor(experiment.WEIGHTS, dtype=z.dtype),
        )
        spread = level.alpha**2 * experiment.STD**2 + level.sigma**2
        away = z - level.alpha * means
        share = torch.softmax(weights.log() - away**2 / (2 * spread), 1)
        return (share * (means + level.alpha * experiment.STD**2 / spread * away)).sum(
            1, keepdim=True
        )


def diffusion(schedule: Schedule | None = None) -> NDM:
    schedule = schedule or LinearLogSNRSchedule(-9.0, 9.0)
    return NDM(schedule, Identity(), Predictor(Exact(schedule), "x"), GaussianDecoder()).double()


def test_nodes_integrate_over_the_data() -> None:
    x, share = data_nodes()
    assert float(share.sum()) == pytest.approx(1.0)
    assert float(share @ x[:, 0]) == pytest.approx(0.3)
    assert float(share @ x[:, 0] ** 2) == pytest.approx(2.25 + 0.25)
    assert -float(share @ DATA.log_prob(x)) == pytest.approx(DATA.entropy(), abs=1e-4)


def test_the_optimal_map_makes_the_data_of_the_prior() -> None:
    z, best = prior_grid(20_000)
    assert bool((best.diff(dim=0) > 0).all())
    assert best.mean().item() == pytest.approx(0.3, abs=1e-3)
    assert best.square().mean().item() == pytest.approx(2.5, abs=2e-3)
    assert (best < 0).double().mean().item() == pytest.approx(
        0.4 * 0.99865 + 0.6 * 0.00135, abs=1e-4
    )
    assert w2(z, best) == pytest.approx((z - best).square().mean().sqrt().item())
    assert w2(best.flip(0), best) == 0.0
    assert w2(best + 0.3, best) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "schedule", [LinearLogSNRSchedule(-9.0, 9.0), LinearBetaSchedule()], ids=["linear", "ddpm"]
)
def test_the_bound_of_the_exact_diffusion_is_the_entropy(schedule: Schedule) -> None:
    """Tight in continuous time but for the ends, so both the quadrature and its nodes are right,
    also where the schedule starts steeply.
    """
    found = expected_bound(diffusion(schedule), 256)
    assert found["nelbo"] == pytest.approx(DATA.entropy(), abs=2e-3)
    assert found["nelbo"] == pytest.approx(
        found["prior"] + found["diffusion"] + found["reconstruction"]
    )


def test_the_flow_of_the_exact_diffusion_is_the_optimal_map() -> None:
    """On a line; and its paths are bent, while those of the interpolation are not."""
    model = diffusion()
    z, best = prior_grid(400)
    path = trajectories(model, z, 400)
    assert w2(path[0], best) < 0.03
    assert bend(path) > 0.05
    ends = few_steps(model, z, 1)
    level = model.process.level(1.0, z)
    once = model.predictor(
        z, level
    )  # DDIM's step lands at alpha_0 x̂ + sigma_0 (z - alpha_1 x̂)/sigma_1
    first = model.process.level(0.0, z).expand(z)
    at = level.expand(z)
    expected = (first.alpha * once + first.sigma * (z - at.alpha * once) / at.sigma) / first.alpha
    torch.testing.assert_close(ends["DDIM"], expected, rtol=0, atol=1e-9)
    assert w2(ends["DDIM"], best) == pytest.approx(math.sqrt(2.5 - 0.09), rel=0.05), (
        "all at the mean"
    )


def test_transport_is_straight_from_its_velocity_and_one_step_does() -> None:
    transport = randomized(MonotoneMap(6, scale=1.3), 0.4, 1)
    model = TransportNDM(
        LinearLogSNRSchedule(-9.0, -1.0), Identity(), transport, GaussianDecoder()
    ).double()
    z, _ = prior_grid(50)
    path = trajectories(model, z, 10)
    alpha = model.process.level(0.0, z[:1]).alpha
    torch.testing.assert_close(path[0] * alpha, transport(z).detach(), rtol=0, atol=1e-9)
    assert bend(path) < 1e-4  # what is left is alpha_0
    for steps in (1, 3):
        torch.testing.assert_close(
            few_steps(model, z, steps)["Euler"] * alpha, transport(z).detach(), rtol=0, atol=1e-9
        )


def test_a_bend_is_measured() -> None:
    t = torch.linspace(0, 1, 2001, dtype=F64)[:, None, None]
    path = torch.cat(
        [2 * t + 0.3 * torch.sin(math.pi * t), -2 * t + 0.3 * torch.sin(math.pi * t)], 1
    )
    assert bend(path) == pytest.approx(0.3 * (2 / math.pi) / 2, rel=1e-3)
    turned = torch.cat([path, 0.75 * path], -1)  # in the plane: 1.25 times as long, and as far away
    assert bend(turned) == pytest.approx(bend(path))
    bow = torch.cat([2 * t, 0.3 * torch.sin(math.pi * t)], -1)
    assert bend(bow) == pytest.approx(0.3 * (2 / math.pi) / 2, rel=1e-3)


def test_the_smallest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reproduce", "ot-1d", "--size", "smoke", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "nelbo" not in results["numbers"]["models"]["exact"][0]
    for kind in ("ddpm", "ndm", "nfdm", "lines"):
        (one,) = results["numbers"]["models"][kind]
        assert one["nelbo"] == pytest.approx(
            one["prior"] + one["diffusion"] + one["reconstruction"]
        )
        assert one["nelbo"] > results["numbers"]["entropy"] - 0.05
    assert (
        results["numbers"]["models"]["ndm"][0]["bend"]
        < 0.01
        < results["numbers"]["models"]["ddpm"][0]["bend"]
    )
    assert results["figures"] == ["trajectories", "map"]
    assert {path.name for path in (tmp_path / "out").glob("*.p*")} == {
        "trajectories.png",
        "trajectories.pdf",
        "map.png",
        "map.pdf",
    }
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/*")}
    assert main(words) == 0
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/*")
    } == before, "what is trained is read"
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["numbers"] == results["numbers"]
    )
