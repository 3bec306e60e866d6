"""Optimal transport in the plane: the exact map, the two bounds on W2, and a smoke run."""

import json
import math
from pathlib import Path

import pytest
import torch

from cli.commands import run_command
from ndm.reproduce.transport_plane import AXES, DATA, ROTATION, distances, optimal, prior_points
from oracles import F64


def test_the_optimal_map_gives_the_data_and_is_the_gradient_of_a_convex_function() -> None:
    z = prior_points(4096)
    x = optimal(z)
    sample = DATA.sample(400_000, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(x.mean(0), sample.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(x.T.cov(), sample.T.cov(), rtol=0, atol=0.03)
    assert -DATA.log_prob(x).mean().item() == pytest.approx(DATA.entropy(), abs=0.02)
    moved = optimal(z.flip(0))
    assert bool((((moved - x) * (z.flip(0) - z)).sum(1) >= -1e-9).all()), "monotone"
    step = 1e-5
    center, right, up = (
        optimal(z[:500] + torch.tensor(shift)) for shift in ([0.0, 0.0], [step, 0.0], [0.0, step])
    )
    d1_x2, d2_x1 = (right - center)[:, 1] / step, (up - center)[:, 0] / step
    torch.testing.assert_close(d1_x2, d2_x1, rtol=0, atol=0.02)


def test_the_density_along_the_axes_is_a_product() -> None:
    u = torch.randn(200, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(200, dtype=F64)
    for axis, (means, weights) in enumerate(AXES):
        normalizer = math.log(0.5 * math.sqrt(2 * math.pi))
        terms = [
            math.log(w) - 0.5 * ((u[:, axis] - m) / 0.5) ** 2 - normalizer
            for m, w in zip(means, weights, strict=True)
        ]
        expected += torch.stack(terms).logsumexp(0)
    torch.testing.assert_close(DATA.log_prob(u @ ROTATION.T), expected)


def test_w2_is_between_its_two_bounds() -> None:
    best = optimal(prior_points(1024))
    assert distances(best, best) == {"w2_least": 0.0, "w2_most": 0.0}
    shift = torch.tensor([0.3, -0.4], dtype=F64)
    for value in distances(best + shift, best).values():
        assert value == pytest.approx(0.5)  # both bounds are exact for a shift
    shuffled = distances(best.flip(0), best)
    assert shuffled["w2_least"] == pytest.approx(0.0, abs=1e-12) and shuffled["w2_most"] > 0.5
    z = prior_points(1024)
    quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    rotated = distances(z @ quarter_turn, z)  # a rotation maps the Gaussian to itself
    assert rotated["w2_least"] < 0.05 < 1.9 < rotated["w2_most"] < 2.1


def test_the_smoke_size_runs_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def training_times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}

    run_command("reproduce ot-2d --size smoke --out", out)
    results = json.loads((out / "results.json").read_text())
    models = results["numbers"]["models"]
    assert set(models) == {"ddpm", "lines", "exact"}
    for one in models.values():
        assert 0 < one["w2_least"] <= one["w2_most"]
    assert models["lines"]["bend"] < 0.01 < models["ddpm"]["bend"]
    assert "nelbo_over_log_p" not in models["exact"]
    assert results["figures"] == ["trajectories", "map"]
    before = training_times()
    run_command("reproduce ot-2d --size smoke --out", out)
    assert training_times() == before, "trained models are read"
