"""``ndm reproduce`` on 2-D densities: the pages are complete, the numbers are those of closed
forms, and the frame refuses and resumes.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from ndm.cli.main import main
from ndm.data import Mixture
from ndm.decoder import GaussianDecoder
from ndm.evaluation.evaluate import Evaluation
from ndm.model import NDM
from ndm.ode import OdeSettings
from ndm.predictor import DataPredictor
from ndm.reproduce import EXPERIMENTS, Report
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
from ndm.reproduce.report import ExperimentSettings
from ndm.sample import Ancestral
from ndm.schedule import LinearLogSNRSchedule
from ndm.train.config import RunConfig
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
        assert (
            main(["reproduce", name, "--size", "smoke", "--out", str(folder / name), "--seed", "3"])
            == 0
        )
    return {name: folder / name for name in FIGURES}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", FIGURES)
def test_an_experiment_leaves_a_page_its_figures_and_its_numbers(
    folders: dict[str, Path], name: str
) -> None:
    folder, found = folders[name], results(folders[name])
    assert found["experiment"] == name and found["size"] == "smoke" and found["seed"] == 3
    assert found["command"] == f"ndm reproduce {name} --size smoke --seed 3"
    assert found["figures"] == FIGURES[name]
    assert found["checks"] == []  # the smoke variant states nothing
    page = (folder / "README.md").read_text()
    for figure in FIGURES[name]:
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert f"]({figure}.png)" in page and f"]({figure}.pdf)" in page
    for data in DATA[name]:
        for model in ("ddpm", "ndm"):
            for kind in ("nelbo", "nll"):
                measured, number = (
                    found["measurements"][f"{data}_{model}_{kind}"],
                    found["numbers"][f"{data}_{model}"],
                )
                assert (
                    measured["nats"] == pytest.approx(number[kind][0], rel=1e-12)
                    and measured["nats_stderr"] == number[kind][1]
                )
                assert f"{number[kind][0]:.3f} ± {number[kind][1]:.3f}" in page
                assert measured["seed"] == 3 and len(measured["data_sha256"]) == 64


def test_the_distance_to_the_truth_is_the_likelihood_less_that_of_the_density(
    folders: dict[str, Path],
) -> None:
    """By another way for each part: the model's own likelihood, point by point, and the mixture by
    SciPy.
    """
    found, run = (
        results(folders["distribution-2d"])["numbers"],
        folders["distribution-2d"] / "runs" / "mixture-ndm",
    )
    model, source = Run(run).model(), Run(run).data()
    assert isinstance(source, Mixture)
    test = source.split("test")
    points, settings = 48, OdeSettings(nodes=16)
    x = test.__getitems__([index * len(test) // points for index in range(points)])
    numbers = [index * len(test) // points for index in range(points)]
    nll = -model.log_likelihood(x, settings=settings, seed=3, examples=numbers).log_p.numpy()
    truth = -np.log(
        np.mean(
            [multivariate_normal(mean, 0.25**2).pdf(x.double().numpy()) for mean in source.means],
            axis=0,
        )
    )
    assert found["mixture_ndm"]["nll"] == pytest.approx(
        [nll.mean(), nll.std(ddof=1) / math.sqrt(points)], rel=1e-4
    )
    assert found["mixture"]["sampled_entropy"][0] == pytest.approx(truth.mean(), abs=1e-6)
    above = nll - truth
    assert found["mixture_ndm"]["nll_above"] == pytest.approx(
        [above.mean(), above.std(ddof=1) / math.sqrt(points)], rel=1e-4
    )
    difference = found["mixture_ndm"]["nll_above"][0] - found["mixture_ddpm"]["nll_above"][0]
    assert found["mixture"]["nll_difference"][0] == pytest.approx(difference, rel=1e-6)


def test_both_models_are_trained_alike(folders: dict[str, Path]) -> None:
    runs = {
        path.name: json.loads((path / "metrics.json").read_text())
        for path in (folders["checkerboard"] / "runs").iterdir()
    }
    assert set(runs) == {"ddpm", "ndm"}
    for key in ("training_steps", "data_sha256"):
        assert runs["ddpm"][key] == runs["ndm"][key]
    assert runs["ddpm"]["parameters"] < runs["ndm"]["parameters"]


class Exact(DataPredictor):
    """The exact predictor of a Gaussian with a parameter, so that a model knows its precision."""

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
    return NDM(problem.process.schedule, transform, Exact(problem), GaussianDecoder()), problem  # type: ignore[arg-type]


def test_a_model_of_another_gaussian_is_as_far_as_its_divergence() -> None:
    """KL(N(m, s² I) || N(m + d, s² I)) = |d|²/(2 s²), and the bound of the exact model lies above
    by its closed-form gaps.
    """
    std, shift = 0.5, torch.tensor([0.2, -0.3], dtype=F64)
    source = Mixture([[0.4, -0.9]], std, train_size=1, test_size=2000)
    mean, covariance = torch.tensor([0.4, -0.9], dtype=F64), std**2 * torch.eye(2, dtype=F64)
    (exact, problem), (shifted, _) = (
        exact_model(mean, covariance),
        exact_model(mean + shift, covariance),
    )
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


def test_the_density_is_that_of_the_gaussian_with_its_axes_the_right_way() -> None:
    model, _ = exact_model()
    found = density(model, 2.5, 12).numpy()
    x = cell_centers(2.5, 12).numpy()
    truth = multivariate_normal(MEAN.numpy(), COVARIANCE.numpy()).pdf(x)
    np.testing.assert_allclose(found.ravel(), truth, rtol=0.05, atol=1e-4)
    assert (
        x[1, 0] > x[0, 0] and x[1, 1] == x[0, 1]
    )  # columns are the first coordinate, as in a picture
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert abs(x.reshape(12, 12, 2)[row, column] - MEAN.numpy()).max() < 0.45


def test_a_histogram_is_a_density() -> None:
    points = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 2.0]
    ) - torch.tensor([0.0, 1.0])
    heights = histogram(points, 2.0)
    assert heights.sum() * (4.0 / len(heights)) ** 2 == pytest.approx(1.0)
    right, left = heights[len(heights) // 2 :], heights[: len(heights) // 2]
    assert left.sum() == 0 and right.max() == pytest.approx(
        0.5, rel=0.5
    )  # the first index is the first coordinate


def test_paths_lead_from_the_prior_to_the_data() -> None:
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


def test_the_detour_of_an_arc() -> None:
    angle = torch.linspace(0, math.pi / 2, 1001, dtype=F64)
    arc = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
    assert detour(arc) == pytest.approx(math.pi / 2 / math.sqrt(2) - 1, rel=1e-5)
    assert detour(
        torch.linspace(0, 3, 5, dtype=F64)[:, None, None] * torch.tensor([[1.0, -2.0]])
    ) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ((-0.1, 0.04), "NDM's is lower in these two runs"),
        ((0.1, 0.04), "NDM's is higher in these two runs"),
        ((0.1, 0.06), "no significant difference"),
        ((math.nan, 0.1), "no significant difference"),
    ],
)
def test_a_difference_counts_from_two_standard_errors(
    pair: tuple[float, float], words: str
) -> None:
    assert verdict(pair) == words


# The frame.


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *culprits: str) -> None:
    capsys.readouterr()
    assert main(["reproduce", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ndm: error: "), lines
    for culprit in culprits:
        assert culprit in lines[0], lines[0]


def test_bad_words_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    refused(capsys, out, "give the name", "checkerboard", "distribution-2d")
    refused(capsys, ["chequers", *out], "'chequers'", "checkerboard", "--list")
    refused(capsys, ["checkerboard", "--size", "huge", *out], "--size huge", "small, smoke")
    refused(capsys, ["checkerboard", "--seed", "-1", *out], "seed=-1")
    refused(capsys, ["checkerboard", "--data", "somewhere", *out], "--data somewhere")
    refused(capsys, ["checkerboard", "--nonsense", *out], "nonsense")
    refused(
        capsys, ["checkerboard", "--size", "smoke", *out, "--", "--train.steps", "none"], "steps"
    )
    refused(
        capsys,
        ["distribution-2d", "--size", "smoke", *out, "--", "--data", "ndm.data.TwoMoons"],
        "-- --data: distribution-2d sets that",
    )
    refused(
        capsys,
        ["checkerboard", *out, "--", "--model.transform=ndm.Identity"],
        "the learned model would be the conventional one",
    )
    refused(
        capsys,
        [
            "mnist",
            "--size",
            "smoke",
            *out[:1],
            str(tmp_path / "mnist"),
            "--",
            "--model.transform=ndm.Identity",
        ],
        "would be the conventional one",
    )
    fading = [
        "--model.transform=ndm.FadingMask",
        "--model.predictor=ndm.Predictor",
        "--model.predictor.network=ndm.nn.UNet",
    ]
    refused(
        capsys,
        ["mnist", "--size", "smoke", *out[:1], str(tmp_path / "mnist"), "--", *fading],
        "give F a network",
    )
    refused(
        capsys,
        ["ot-1d", *out, "--", "--train.steps", "9"],
        "-- --train.steps 9: ot-1d does not use ndm train",
    )
    refused(capsys, ["ot-2d", *out, "--jobs", "2"], "--jobs 2", "one model at a time")
    refused(
        capsys,
        ["cifar10", "--data", "somewhere", *out, "--jobs", "2"],
        "--jobs 2",
        "one model at a time",
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("x")
    refused(
        capsys, ["checkerboard", "--size", "smoke", "--out", str(tmp_path / "file")], "is a file"
    )


def test_a_folder_keeps_to_its_experiment(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(folders["checkerboard"])]
    refused(
        capsys,
        ["distribution-2d", "--size", "smoke", "--seed", "3", *out],
        "'checkerboard'",
        "'distribution-2d'",
        "--out",
    )
    refused(
        capsys,
        ["checkerboard", "--size", "small", "--seed", "3", *out],
        "size",
        "'smoke'",
        "'small'",
    )
    refused(capsys, ["checkerboard", "--size", "smoke", "--seed", "4", *out], "seed")
    refused(
        capsys,
        ["checkerboard", "--size", "smoke", "--seed", "3", *out, "--", "--train.ema", "0"],
        "overrides",
    )


def test_the_same_command_again_computes_nothing_twice(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = folders["checkerboard"], results(folders["checkerboard"])
    stamps = {
        path: path.stat().st_mtime_ns
        for path in [*folder.glob("parts/*"), *folder.glob("runs/*/*.json")]
    }
    assert len(stamps) == 3 + 2 * 2
    (folder / "results.json").unlink()  # as if interrupted before the end
    monkeypatch.setattr(Evaluation, "nll", None)
    assert (
        main(["reproduce", "checkerboard", "--size", "smoke", "--out", str(folder), "--seed", "3"])
        == 0
    )
    after = results(folder)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert {**after, "seconds_of_this_call": None} == {**before, "seconds_of_this_call": None}


def test_trainings_at_once_give_the_same_models(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "reproduce",
        "checkerboard",
        "--size",
        "smoke",
        "--out",
        str(tmp_path / "at-once"),
        "--seed",
        "3",
        "--jobs",
        "2",
    ]
    assert main(words) == 0
    for name in ("ddpm", "ndm"):
        alone, beside = (
            load_file(folder / "runs" / name / "model/model.safetensors")
            for folder in (folders["checkerboard"], tmp_path / "at-once")
        )
        torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)
        assert "wrote" in (tmp_path / "at-once/runs" / name / "log.txt").read_text()
    assert (
        results(tmp_path / "at-once")["command"]
        == "ndm reproduce checkerboard --size smoke --seed 3 --jobs 2"
    )
    capsys.readouterr()
    assert (
        main(
            [
                *words[:4],
                "--out",
                str(tmp_path / "wrong"),
                "--jobs",
                "2",
                "--",
                "--train.learning_rate",
                "1e30",
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        error.startswith("ndm: error: ")
        and "'ddpm', seed 0: " in error
        and "'ndm', seed 0: " in error
        and "not finite" in error
    )
    refused(capsys, [*words[1:4], "--out", str(tmp_path / "wrong"), "--jobs", "0"], "jobs")


def test_what_is_kept_is_read_and_what_failed_is_computed_again(tmp_path: Path) -> None:
    report = Report(ExperimentSettings("name", "small", tmp_path))

    def fail() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.cache("part", fail)
    assert not (tmp_path / "parts" / "part.json").exists()
    assert report.cache("part", lambda: {"a": 0.1}) == {"a": 0.1}
    assert Report(report.settings).cache("part", fail) == {"a": 0.1}


def test_what_was_computed_with_another_model_is_computed_again(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["checkerboard"], tmp_path / "runs")

    def report(of: str) -> Report:
        one = Report(ExperimentSettings("checkerboard", "smoke", tmp_path, 3))
        shutil.rmtree(tmp_path / "runs" / "model", ignore_errors=True)
        shutil.copytree(tmp_path / "runs/runs" / of, tmp_path / "runs/model")
        one.train("model", RunConfig.read(tmp_path / "runs/model/config.yaml"))
        return one

    assert report("ddpm").cache("part", lambda: {"a": 1}) == {"a": 1}
    assert report("ddpm").cache("part", lambda: {"a": 2}) == {"a": 1}
    assert report("ndm").cache("part", lambda: {"a": 3}) == {"a": 3}


def test_overrides_of_the_user_make_no_ddpm_of_another_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come before those that make a model what the experiment calls it, where an experiment
    trains a plain diffusion (mnist by the rows of a comparison).
    """
    found: dict[str, str] = {}

    def stop(self: Report, configs: Mapping[str, RunConfig]) -> None:
        found.update(
            {name: config.get("model.transform.class_path") for name, config in configs.items()}
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "train_all", stop)
    for name in ("checkerboard", "distribution-2d", "steps"):
        found.clear()
        words = [
            "--size",
            "smoke",
            "--out",
            str(tmp_path / name),
            "--",
            "--model.transform",
            "ndm.FadingMask",
        ]
        assert main(["reproduce", name, *words]) == 130
        plain, learned = (
            [kind for key, kind in found.items() if ("ndm" in key) is is_ndm]
            for is_ndm in (False, True)
        )
        assert plain and all(kind.endswith(".Identity") for kind in plain)
        assert learned and all(kind.endswith(".FadingMask") for kind in learned)


def test_a_page_says_which_targets_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(ExperimentSettings("name", "small", tmp_path))
    report.expect("good", 0.1, 0.1)
    report.expect("bad", 0.2, 0.1)
    report.expect("broken", math.nan, 0.1)
    report.finish()
    assert [one["holds"] for one in results(tmp_path)["checks"]] == [True, False, False]
    page, printed = (tmp_path / "README.md").read_text(), capsys.readouterr().out
    assert "| good | 0.1 | 0.1 | yes |" in page and "| bad | 0.2 | 0.1 | **no** |" in page
    assert (
        "holds: good" in printed
        and "DOES NOT HOLD: bad" in printed
        and "DOES NOT HOLD: broken" in printed
    )


def test_the_list_names_every_experiment_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    text = capsys.readouterr().out
    for one in EXPERIMENTS.values():
        assert one.name in text and one.shows in text and "smoke" in one.sizes
        assert all(f"--size {size}" in text for size in one.sizes)
