"""Optimal transport in the plane: the known map, the two bounds on W2, and the smallest run from
end to end.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from ndm.cli.main import main
from ndm.reproduce.transport_plane import AXES, DATA, ROTATION, distances, optimal, prior_points
from oracles import F64


def test_the_optimal_map_makes_the_data_and_is_the_gradient_of_a_convex_function() -> None:
    z = prior_points(4096)
    x = optimal(z)
    sample = DATA.sample(400_000, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(x.mean(0), sample.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(x.T.cov(), sample.T.cov(), rtol=0, atol=0.03)
    assert -DATA.log_prob(x).mean().item() == pytest.approx(DATA.entropy(), abs=0.02)
    moved = optimal(z.flip(0))
    assert bool((((moved - x) * (z.flip(0) - z)).sum(1) >= -1e-9).all()), "monotone"
    step = 1e-5
    here, right, up = (
        optimal(z[:500] + shift)
        for shift in (torch.zeros(2), torch.tensor([step, 0]), torch.tensor([0, step]))
    )
    torch.testing.assert_close(
        (right - here)[:, 1] / step, (up - here)[:, 0] / step, rtol=0, atol=0.02
    )


def test_the_density_along_the_axes_is_a_product() -> None:
    u = torch.randn(200, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(200, dtype=F64)
    for axis, (means, weights) in enumerate(AXES):
        terms = [
            math.log(w)
            - 0.5 * ((u[:, axis] - m) / 0.5) ** 2
            - math.log(0.5 * math.sqrt(2 * math.pi))
            for m, w in zip(means, weights, strict=True)
        ]
        expected += torch.stack(terms).logsumexp(0)
    torch.testing.assert_close(DATA.log_prob(u @ ROTATION.T), expected)


def test_w2_is_enclosed() -> None:
    best = optimal(prior_points(1024))
    assert distances(best, best) == {"w2_least": 0.0, "w2_most": 0.0}
    shift = torch.tensor([0.3, -0.4], dtype=F64)
    for value in distances(best + shift, best).values():
        assert value == pytest.approx(0.5)  # of a shift both are exact
    shuffled = distances(best.flip(0), best)
    assert shuffled["w2_least"] == pytest.approx(0.0, abs=1e-12) and shuffled["w2_most"] > 0.5
    z = prior_points(1024)
    angle = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    turned = distances(z @ angle, z)  # the same Gaussian, by a map that turns
    assert turned["w2_least"] < 0.05 < 1.9 < turned["w2_most"] < 2.1


def test_the_smallest_run(tmp_path: Path) -> None:
    words = ["reproduce", "ot-2d", "--size", "smoke", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    models = results["numbers"]["models"]
    assert set(models) == {"ddpm", "lines", "exact"}
    for one in models.values():
        assert 0 < one["w2_least"] <= one["w2_most"]
    assert models["lines"]["bend"] < 0.01 < models["ddpm"]["bend"]
    assert "nelbo_over_log_p" not in models["exact"]
    assert results["figures"] == ["trajectories", "map"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/*")}
    assert main(words) == 0
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/*")
    } == before, "what is trained is read"
