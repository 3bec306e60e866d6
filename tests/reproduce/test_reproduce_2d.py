"""``ndm reproduce`` on 2-D densities: complete pages, and measures that match closed forms."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from cli.commands import run_command
from ndm.data import Mixture, spread
from ndm.decoder import GaussianDecoder
from ndm.model import NDM
from ndm.ode import OdeSettings
from ndm.predictor import DataPredictor
from ndm.reproduce.plane import (
    Budget,
    cell_centers,
    density,
    detour,
    measure,
    trajectories,
    verdict,
)
from ndm.reproduce.plane_figures import histogram
from ndm.sample import Ancestral
from ndm.schedule import LinearLogSNRSchedule
from ndm.train.run import Run
from oracles import COVARIANCE, F64, MEAN, GaussianProblem, constant

FIGURES = {
    "checkerboard": ["transform", "density"],
    "distribution-2d": ["forward", "predictions", "trajectories", "ancestral", "samples"],
}
DATA = {"checkerboard": ["checkerboard"], "distribution-2d": ["mixture", "pinwheel"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reproduce")
    for name in FIGURES:
        run_command("reproduce", name, "--size smoke --out", folder / name, "--seed 3")
    return {name: folder / name for name in FIGURES}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", FIGURES)
def test_an_experiment_writes_its_page_figures_and_results(
    folders: dict[str, Path], name: str
) -> None:
    folder, found = folders[name], results(folders[name])
    assert found["experiment"] == name and found["size"] == "smoke" and found["seed"] == 3
    assert found["command"] == f"ndm reproduce {name} --size smoke --seed 3"
    assert found["figures"] == FIGURES[name]
    assert found["checks"] == []  # the smoke size has no targets
    page = (folder / "README.md").read_text()
    for figure in FIGURES[name]:
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert f"]({figure}.png)" in page and f"]({figure}.pdf)" in page
    for data in DATA[name]:
        for model in ("ddpm", "ndm"):
            for kind in ("nelbo", "nll"):
                measured = found["measurements"][f"{data}_{model}_{kind}"]
                value, error = found["numbers"][f"{data}_{model}"][kind]
                assert measured["nats"] == pytest.approx(value, rel=1e-12)
                assert measured["nats_stderr"] == error
                assert f"{value:.3f} ± {error:.3f}" in page
                assert measured["seed"] == 3 and len(measured["data_sha256"]) == 64


def test_the_excess_likelihood_is_relative_to_the_true_density(
    folders: dict[str, Path],
) -> None:
    """The likelihood is computed point by point, and the true density with SciPy."""
    found = results(folders["distribution-2d"])["numbers"]
    run = folders["distribution-2d"] / "runs" / "mixture-ndm"
    model, source = Run(run).model(), Run(run).data()
    assert isinstance(source, Mixture)
    test = source.split("test")
    points, settings = 48, OdeSettings(nodes=16)
    indices = spread(len(test), points)
    x = test.__getitems__(indices)
    nll = -model.log_likelihood(x, settings=settings, seed=3, examples=indices).log_p.numpy()
    parts = [multivariate_normal(mean, 0.25**2).pdf(x.double().numpy()) for mean in source.means]
    truth = -np.log(np.mean(parts, axis=0))
    assert found["mixture"]["sampled_entropy"][0] == pytest.approx(truth.mean(), abs=1e-6)
    for name, values in (("nll", nll), ("nll_above", nll - truth)):
        expected = [values.mean(), values.std(ddof=1) / math.sqrt(points)]
        assert found["mixture_ndm"][name] == pytest.approx(expected, rel=1e-4)
    difference = found["mixture_ndm"]["nll_above"][0] - found["mixture_ddpm"]["nll_above"][0]
    assert found["mixture"]["nll_difference"][0] == pytest.approx(difference, rel=1e-6)


def test_both_models_are_trained_with_the_same_steps_and_data(folders: dict[str, Path]) -> None:
    runs = {
        path.name: json.loads((path / "metrics.json").read_text())
        for path in (folders["checkerboard"] / "runs").iterdir()
    }
    assert set(runs) == {"ddpm", "ndm"}
    for key in ("training_steps", "data_sha256"):
        assert runs["ddpm"][key] == runs["ndm"][key]
    assert runs["ddpm"]["parameters"] < runs["ndm"]["parameters"]


class Exact(DataPredictor):
    """The exact predictor of a Gaussian. Its parameter sets the dtype of the model."""

    def __init__(self, problem: GaussianProblem):
        super().__init__()
        self.problem, self.precision = problem, nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, z: Tensor, level: object) -> Tensor:
        return self.problem(z, level)


def exact_model(
    mean: Tensor = MEAN, covariance: Tensor = COVARIANCE
) -> tuple[NDM, GaussianProblem]:
    transform = constant(torch.eye(2, dtype=F64))
    problem = GaussianProblem(LinearLogSNRSchedule(-9.0, 9.0), transform, mean, covariance)
    schedule, predictor = problem.process.schedule, Exact(problem)
    return NDM(schedule, transform, predictor, GaussianDecoder()), problem  # type: ignore[arg-type]


def test_the_excess_likelihood_of_another_gaussian_is_the_divergence() -> None:
    """KL(N(m, s² I) || N(m + d, s² I)) = |d|²/(2 s²).

    The bound of the exact model exceeds the entropy by its closed-form gaps.
    """
    std, shift = 0.5, torch.tensor([0.2, -0.3], dtype=F64)
    source = Mixture([[0.4, -0.9]], std, train_size=1, test_size=2000)
    mean, covariance = torch.tensor([0.4, -0.9], dtype=F64), std**2 * torch.eye(2, dtype=F64)
    exact, problem = exact_model(mean, covariance)
    shifted, _ = exact_model(mean + shift, covariance)
    record = measure({"DDPM": exact, "NDM": shifted}, source, Budget(draws=64, points=500), seed=0)
    divergence = float(shift @ shift) / (2 * std**2)
    assert record["entropy"] == pytest.approx(math.log(2 * math.pi * math.e * std**2), abs=1e-6)
    assert record["DDPM"]["nll_above"][0] == pytest.approx(0.0, abs=5e-3)
    for kind in ("nelbo", "nll"):
        value, error = record[f"{kind}_difference"]
        assert value == pytest.approx(divergence, abs=4 * error) and error < 0.05
    value, error = record["NDM"]["nll_above"]
    assert value == pytest.approx(divergence, abs=4 * error) and error < 0.05
    gaps = float((problem.prior_gap() + problem.decoder_gap()).detach())
    value, error = record["DDPM"]["nelbo_above"]
    assert value == pytest.approx(gaps, abs=4 * error) and error < 0.06


def test_the_density_of_the_exact_model_is_the_gaussian_density() -> None:
    model, _ = exact_model()
    found = density(model, 2.5, 12).numpy()
    x = cell_centers(2.5, 12).numpy()
    truth = multivariate_normal(MEAN.numpy(), COVARIANCE.numpy()).pdf(x)
    np.testing.assert_allclose(found.ravel(), truth, rtol=0.05, atol=1e-4)
    # The first coordinate varies along columns, as in a picture.
    assert x[1, 0] > x[0, 0] and x[1, 1] == x[0, 1]
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert abs(x.reshape(12, 12, 2)[row, column] - MEAN.numpy()).max() < 0.45


def test_a_histogram_is_a_density() -> None:
    uniform = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    points = uniform * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    heights = histogram(points, 2.0)
    assert heights.sum() * (4.0 / len(heights)) ** 2 == pytest.approx(1.0)
    right, left = heights[len(heights) // 2 :], heights[: len(heights) // 2]
    # The first index is the first coordinate.
    assert left.sum() == 0 and right.max() == pytest.approx(0.5, rel=0.5)


def test_trajectories_follow_the_marginals_from_the_prior_to_the_data() -> None:
    model, problem = exact_model()
    z = torch.randn(3000, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for step in (None, Ancestral(1.0)):
        path = trajectories(model, z, 100, step)
        assert path.shape == (101, 3000, 2) and torch.equal(path[0], z)
        for index in (60, 100):
            mean, covariance = (value.detach() for value in problem.marginal(1 - index / 100))
            torch.testing.assert_close(path[index].mean(0), mean, rtol=0, atol=0.1)
            torch.testing.assert_close(path[index].T.cov(), covariance, rtol=0.1, atol=0.05)
    assert not torch.equal(path[-1], trajectories(model, z, 100)[-1])


def test_the_detour_of_an_arc_matches_the_closed_form() -> None:
    angle = torch.linspace(0, math.pi / 2, 1001, dtype=F64)
    arc = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
    assert detour(arc) == pytest.approx(math.pi / 2 / math.sqrt(2) - 1, rel=1e-5)
    line = torch.linspace(0, 3, 5, dtype=F64)[:, None, None] * torch.tensor([[1.0, -2.0]])
    assert detour(line) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        ((-0.1, 0.04), "NDM's is lower in these two runs"),
        ((0.1, 0.04), "NDM's is higher in these two runs"),
        ((0.1, 0.06), "no significant difference"),
        ((math.nan, 0.1), "no significant difference"),
    ],
)
def test_a_difference_is_significant_above_two_standard_errors(
    difference: tuple[float, float], text: str
) -> None:
    assert verdict(difference) == text
