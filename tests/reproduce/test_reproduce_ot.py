"""The optimal-transport experiment: its measures against closed forms, and a smoke run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ndm.reproduce.transport_measures as experiment
from cli.commands import run_command
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
    """E[x|z_t] of the mixture with F the identity."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        level = self.schedule(t).expand(z)
        means = torch.tensor(experiment.MEANS, dtype=z.dtype)
        weights = torch.tensor(experiment.WEIGHTS, dtype=z.dtype)
        variance = level.alpha**2 * experiment.STD**2 + level.sigma**2
        residual = z - level.alpha * means
        posterior = torch.softmax(weights.log() - residual**2 / (2 * variance), 1)
        conditional = means + level.alpha * experiment.STD**2 / variance * residual
        return (posterior * conditional).sum(1, keepdim=True)


def diffusion(schedule: Schedule | None = None) -> NDM:
    schedule = schedule or LinearLogSNRSchedule(-9.0, 9.0)
    return NDM(schedule, Identity(), Predictor(Exact(schedule), "x"), GaussianDecoder()).double()


def test_nodes_integrate_over_the_data() -> None:
    x, weights = data_nodes()
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(weights @ x[:, 0]) == pytest.approx(0.3)
    assert float(weights @ x[:, 0] ** 2) == pytest.approx(2.25 + 0.25)
    assert -float(weights @ DATA.log_prob(x)) == pytest.approx(DATA.entropy(), abs=1e-4)


def test_the_optimal_map_transports_the_prior_to_the_data() -> None:
    z, best = prior_grid(20_000)
    assert bool((best.diff(dim=0) > 0).all())
    assert best.mean().item() == pytest.approx(0.3, abs=1e-3)
    assert best.square().mean().item() == pytest.approx(2.5, abs=2e-3)
    left = (best < 0).double().mean().item()
    assert left == pytest.approx(0.4 * 0.99865 + 0.6 * 0.00135, abs=1e-4)
    assert w2(z, best) == pytest.approx((z - best).square().mean().sqrt().item())
    assert w2(best.flip(0), best) == 0.0
    assert w2(best + 0.3, best) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "schedule", [LinearLogSNRSchedule(-9.0, 9.0), LinearBetaSchedule()], ids=["linear", "ddpm"]
)
def test_the_bound_of_the_exact_diffusion_is_the_entropy(schedule: Schedule) -> None:
    """In continuous time the bound is tight up to the ends, also if the schedule starts steeply."""
    found = expected_bound(diffusion(schedule), 256)
    assert found["nelbo"] == pytest.approx(DATA.entropy(), abs=2e-3)
    terms = found["prior"] + found["diffusion"] + found["reconstruction"]
    assert found["nelbo"] == pytest.approx(terms)


def test_the_flow_of_the_exact_diffusion_is_the_optimal_map_with_bent_paths() -> None:
    """This holds in one dimension."""
    model = diffusion()
    z, best = prior_grid(400)
    path = trajectories(model, z, 400)
    assert w2(path[0], best) < 0.03
    assert bend(path) > 0.05
    ends = few_steps(model, z, 1)
    # One DDIM step gives alpha_0 x̂ + sigma_0 (z - alpha_1 x̂)/sigma_1.
    level = model.process.level(1.0, z)
    x_hat = model.predictor(z, level)
    start, end = level.expand(z), model.process.level(0.0, z).expand(z)
    noise = (z - start.alpha * x_hat) / start.sigma
    expected = (end.alpha * x_hat + end.sigma * noise) / end.alpha
    torch.testing.assert_close(ends["DDIM"], expected, rtol=0, atol=1e-9)
    std = math.sqrt(2.5 - 0.09)
    assert w2(ends["DDIM"], best) == pytest.approx(std, rel=0.05), "one step lands at the mean"


def test_transport_has_straight_paths_and_is_exact_in_one_step() -> None:
    transport = randomized(MonotoneMap(6, scale=1.3), 0.4, 1)
    schedule = LinearLogSNRSchedule(-9.0, -1.0)
    model = TransportNDM(schedule, Identity(), transport, GaussianDecoder()).double()
    z, _ = prior_grid(50)
    path = trajectories(model, z, 10)
    alpha = model.process.level(0.0, z[:1]).alpha
    expected = transport(z).detach()
    torch.testing.assert_close(path[0] * alpha, expected, rtol=0, atol=1e-9)
    assert bend(path) < 1e-4  # not zero because of alpha_0
    for steps in (1, 3):
        found = few_steps(model, z, steps)["Euler"] * alpha
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_bend_matches_the_closed_form() -> None:
    t = torch.linspace(0, 1, 2001, dtype=F64)[:, None, None]
    sine = 0.3 * torch.sin(math.pi * t)
    path = torch.cat([2 * t + sine, -2 * t + sine], 1)
    assert bend(path) == pytest.approx(0.3 * (2 / math.pi) / 2, rel=1e-3)
    turned = torch.cat([path, 0.75 * path], -1)  # in the plane, 1.25 times as long
    assert bend(turned) == pytest.approx(bend(path))
    bow = torch.cat([2 * t, sine], -1)
    assert bend(bow) == pytest.approx(0.3 * (2 / math.pi) / 2, rel=1e-3)


def test_the_smoke_size_runs_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def numbers() -> dict[str, Any]:
        return json.loads((out / "results.json").read_text())["numbers"]

    def training_times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}

    run_command("reproduce ot-1d --size smoke --out", out)
    found = numbers()
    models = found["models"]
    assert "nelbo" not in models["exact"][0]
    for kind in ("ddpm", "ndm", "nfdm", "lines"):
        (one,) = models[kind]
        terms = one["prior"] + one["diffusion"] + one["reconstruction"]
        assert one["nelbo"] == pytest.approx(terms)
        assert one["nelbo"] > found["entropy"] - 0.05
    assert models["ndm"][0]["bend"] < 0.01 < models["ddpm"][0]["bend"]
    assert json.loads((out / "results.json").read_text())["figures"] == ["trajectories", "map"]
    figures = {"trajectories.png", "trajectories.pdf", "map.png", "map.pdf"}
    assert {path.name for path in out.glob("*.p*")} == figures
    before = training_times()
    run_command("reproduce ot-1d --size smoke --out", out)
    assert training_times() == before, "trained models are read"
    assert numbers() == found
