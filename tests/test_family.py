"""Published models as special cases: DDPM's loss, flow matching, and the page on the family."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ndm.decoder import GaussianDecoder
from ndm.forward import ForwardProcess
from ndm.model import NDM
from ndm.nn import MLP
from ndm.predictor import DataPredictor, Predictor
from ndm.schedule import (
    CosineSchedule,
    FlowMatchingSchedule,
    LinearBetaSchedule,
    NoiseLevel,
    VariancePreserving,
)
from ndm.transform import Identity
from oracles import F64, GaussianProblem, constant, diffusion, randomized

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/family.md").read_text(encoding="utf-8")


def draw(count: int = 12, dims: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, noise = torch.randn(2, count, dims, dtype=F64, generator=generator)
    return x, noise, torch.rand(count, dtype=F64, generator=generator)


def network() -> MLP:
    torch.manual_seed(1)
    return randomized(MLP(3, hidden=16, blocks=1, max_frequency=2.0), 0.1)


@pytest.mark.parametrize(
    "schedule", [LinearBetaSchedule(), CosineSchedule(-8.0, 5.0)], ids=["linear", "cosine"]
)
def test_the_bound_is_ddpms_simple_loss_with_its_published_weight(
    schedule: VariancePreserving,
) -> None:
    """Ho et al. 2020, equations 12 and 14.

    In betas: beta²/(2 beta~ (1 - beta)(1 - abar)) ||eps - eps_theta||² for each of T steps.
    """
    x, noise, u = draw()
    steps, net = 25, network()
    process, predictor = ForwardProcess(schedule, Identity()), Predictor(net, "eps")
    found = diffusion(process, predictor, x, u, noise, steps)
    abar = schedule(torch.arange(steps + 1, dtype=F64) / steps).alpha ** 2
    step = torch.floor(u * steps).long() + 1
    after, before = abar[step], abar[step - 1]
    beta = 1 - after / before
    z = after.sqrt()[:, None] * x + (1 - after).sqrt()[:, None] * noise
    simple = ((noise - net(z, step.to(F64) / steps)) ** 2).sum(1)
    weight = beta**2 / (2 * (1 - before) / (1 - after) * beta * (1 - beta) * (1 - after))
    torch.testing.assert_close(found, steps * weight * simple, rtol=1e-7, atol=0)


FLOW = FlowMatchingSchedule(0.02)


def test_the_drift_along_a_path_is_the_target_of_flow_matching() -> None:
    """Lipman et al. 2023, equation 23, with time reversed: (1 - sigma_min) eps - x.

    This is the slope of the straight line from x to eps.
    """
    x, noise, t = draw()
    process = ForwardProcess(FLOW, Identity())
    level = process.schedule(t)
    path = (1 - t)[:, None] * x + (1 - (1 - 0.02) * (1 - t))[:, None] * noise
    torch.testing.assert_close(process.marginal(x, level).sample(noise), path)
    torch.testing.assert_close(process.drift(path, x, level, eta=0.0), (1 - 0.02) * noise - x)


def test_the_ode_is_the_velocity_that_flow_matching_learns() -> None:
    """The regression of (1 - sigma_min) eps - x on z_t, for Gaussian data in closed form."""
    problem = GaussianProblem(FLOW, constant(torch.eye(2, dtype=F64)))
    z = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.02, 1.0, 6, dtype=F64)
    level = problem.process.schedule(t)
    eye = torch.eye(2, dtype=F64)
    mean = problem.means[0]
    covariance = problem.covariances[0]
    found = problem.reverse.drift(z, level, 0.0)
    for row in range(6):
        alpha, sigma = 1 - t[row], 0.02 + 0.98 * t[row]
        cross = 0.98 * sigma * eye - alpha * covariance
        of_z = alpha**2 * covariance + sigma**2 * eye
        expected = -mean + cross @ torch.linalg.solve(of_z, z[row] - alpha * mean)
        torch.testing.assert_close(found[row], expected)


def test_the_bound_is_the_weighted_loss_of_flow_matching() -> None:
    """alpha/sigma ||velocity - target||²; on the straight path alpha sigma' - alpha' sigma = 1."""
    x, noise, t = draw()
    process, predictor = ForwardProcess(FLOW, Identity()), Predictor(network())
    level = process.schedule(t)
    alpha, sigma = (1 - t)[:, None], (0.02 + 0.98 * t)[:, None]
    z = alpha * x + sigma * noise
    guess = predictor(z, level)
    velocity = 0.98 * (z - alpha * guess) / sigma - guess  # (1 - sigma_min) eps^ - x^
    loss = ((velocity - (0.98 * noise - x)) ** 2).sum(1)
    found = diffusion(process, predictor, x, t, noise)
    torch.testing.assert_close(found, (1 - t) / (0.02 + 0.98 * t) * loss, rtol=1e-8, atol=0)


class Point(DataPredictor):
    """The exact predictor for data at a single point."""

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        return torch.tensor([1.5, -0.5], dtype=z.dtype).expand_as(z)


def test_one_euler_step_of_flow_matching_reaches_a_point_exactly() -> None:
    model = NDM(FLOW, Identity(), Point(), GaussianDecoder())
    noise = torch.randn(4, 2, dtype=F64)
    process = model.reverse_process
    moved = noise - process.drift(noise, model.process.level(1.0, noise), 0.0)
    torch.testing.assert_close(moved, Point()(noise, FLOW(torch.ones(4, dtype=F64))) + 0.02 * noise)
    samples = model.sample((4000, 2), method="ode", solver="euler", steps=1, seed=0)
    width = math.sqrt(2) * 0.02  # sigma_0 of the latent and as much of the decoder
    torch.testing.assert_close(samples.std(0), torch.full((2,), width), rtol=0.05, atol=0)
    torch.testing.assert_close(samples.mean(0), torch.tensor([1.5, -0.5]), rtol=0, atol=0.002)


def test_every_test_named_on_the_page_exists() -> None:
    names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(names) > 15
    for file, name in names:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
def test_every_snippet_on_the_page_runs() -> None:
    torch.manual_seed(0)
    first, *snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    headings = re.findall(r"^### .*$", PAGE, flags=re.MULTILINE)
    assert len(snippets) == len(headings) >= 9
    scope: dict[str, Any] = {}
    exec(first, scope)
    for heading, snippet in zip(headings, snippets, strict=True):
        scope.pop("model", None)
        exec(re.sub(r"steps=\d+", "steps=3", snippet), scope)
        assert scope["samples"].shape == scope["x"].shape, heading
        if not isinstance(scope["decoder"], GaussianDecoder):
            scope["decoder"].check(scope["samples"])  # raises unless every sample is on the grid
        bound = scope["model"].bound(scope["x"])
        bound.loss.mean().backward()
        assert all(bool(term.isfinite().all()) for term in bound.terms().values()), heading
