"""``ndm reproduce steps``: a smoke run, counted network evaluations, and resuming."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.commands import exit_code, rejected, run_command
from ndm.decoder import GaussianDecoder
from ndm.model import NDM
from ndm.nn import MLP
from ndm.predictor import Predictor
from ndm.reproduce.steps_quality import count_evaluations
from ndm.schedule import LinearLogSNRSchedule
from ndm.transform import GatedTransform, Identity


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps") / "out"
    run_command("reproduce steps --size smoke --out", folder)
    return folder


def read(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "results.json").read_text())
    return record


def test_bounds_and_quality_are_measured_for_both_models(out: Path) -> None:
    record = read(out)
    bounds, quality = record["measurements"], record["numbers"]["quality"]
    for name in ("ddpm", "ndm"):
        assert bounds[f"{name}-nll"]["num_examples"] == 4
        plain, fitted = bounds[f"{name}-4"], bounds[f"{name}-4-fitted"]
        assert (plain["steps"], fitted["steps"]) == (4, 4)
        assert fitted["bpd"] < plain["bpd"]
        assert "fitted" in fitted["reverse_variance"]
        assert f"{name}-1-fitted" not in bounds, "this size fits variances only at T = 4"
        one, four, continuous = (bounds[f"{name}-{t}"]["bpd"] for t in ("1", "4", "continuous"))
        assert one > four > continuous
    less = record["numbers"]["ndm_less_ddpm_bpd"]
    assert set(less) == {"1", "4", "continuous"}
    expected = bounds["ndm-4"]["bpd"] - bounds["ddpm-4"]["bpd"]
    assert less["4"]["difference"] == pytest.approx(expected)
    for points in quality["samplers"].values():
        for point in points:
            first, second = point["sets"]
            assert first["fid"] != second["fid"], "sets are independent"
            assert first["seed"] != second["seed"]
            assert first["features_sha256"] == quality["features_sha256"]
            assert first["features_sha256"] == quality["classifier"]["sha256"]
            assert (first["real_images"], first["generated_images"]) == (100, 12)
            assert first["fid"] > quality["test_images"]["fid"], (
                "an untrained model is worse than real images"
            )
    for suffix in (".png", ".pdf"):
        figures = {path.stem for path in out.iterdir() if path.suffix == suffix}
        assert figures == {"nelbo", "quality", "samples"}


def test_recorded_evaluations_match_the_sampler_steps(out: Path) -> None:
    for name, points in read(out)["numbers"]["quality"]["samplers"].items():
        heun = "Heun" in name
        assert [point["evaluations"] for point in points] == ([2, 4] if heun else [1, 2, 4])
        for point in points:
            of_transform = point["evaluations"] if heun else 2 * point["steps"]
            if name.startswith("DDPM"):
                of_transform = 0
            for one in point["sets"]:
                assert one["predictor_evaluations"] == point["evaluations"]
                assert one["transform_evaluations"] == of_transform


def test_a_repeated_command_reads_stored_results(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(out)
    (out / "parts" / "quality-ndm-ddim-2-1.json").unlink()
    (out / "results.json").unlink()

    def fail(*_: object, **__: object) -> None:
        pytest.fail("a stored bound is computed again")

    monkeypatch.setattr("ndm.evaluation.evaluate.Evaluation.nelbo", fail)
    monkeypatch.setattr("ndm.evaluation.evaluate.Evaluation.nll", fail)
    run_command("reproduce steps --size smoke --out", out)
    after = read(out)
    assert after["measurements"] == before["measurements"]
    again, first = (
        record["numbers"]["quality"]["samplers"]["NDM, DDIM"][1]["sets"][1]
        for record in (after, before)
    )
    assert {**again, "seconds": None} == {**first, "seconds": None}, "it depends only on the seed"
    assert exit_code("reproduce steps --size smoke --seed 1 --out", out) == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "cost", "of_transform"),
    [("ancestral", 1, 2), ("ddim", 1, 2), ("ode", 2, 2), ("sde", 1, 1)],
)
def test_evaluations_of_predictor_and_transformation_are_counted(
    method: str, cost: int, of_transform: int
) -> None:
    for transform, expected in ((GatedTransform(MLP(2, 8, 1)), of_transform), (Identity(), 0)):
        model = NDM(
            LinearLogSNRSchedule(-4.0, 3.0), transform, Predictor(MLP(2, 8, 1)), GaussianDecoder()
        )
        with count_evaluations(model) as count:
            model.sample((6, 2), method, steps=5, seed=0)  # type: ignore[arg-type]
        assert count == {"predictor": 6 * 5 * cost, "transform": 6 * 5 * expected}
        model.predict(torch.zeros(3, 2), 0.5)
        assert count["predictor"] == 6 * 5 * cost, "counting stops with the context"


def test_existing_runs_are_measured_without_training(
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ddpm, ndm, other = out / "runs" / "ddpm", out / "runs" / "ndm", tmp_path / "other"
    command = "reproduce steps --size smoke --out"
    monkeypatch.setattr(
        "ndm.reproduce.report.train_run", lambda *_: pytest.fail("a run is trained")
    )
    monkeypatch.setattr("ndm.reproduce.steps.quality", lambda *_: None)
    culprit = "give first a run that does not transform"
    rejected(capsys, [command, other, "--runs", ndm, ddpm], culprit)
    assert not other.exists(), "a rejected command writes nothing"
    run_command(command, other, "--runs", ddpm, ndm)
    first, second = read(out), read(other)
    assert {k: v["bpd"] for k, v in second["measurements"].items()} == {
        k: v["bpd"] for k, v in first["measurements"].items()
    }
    assert f"--runs {ddpm} {ndm}" in second["command"]
    assert list(second["runs"]) == [str(ddpm), str(ndm)]
    rejected(capsys, [command, other], "runs measured is")
    culprit = "runs measured is 'not given' there"
    rejected(capsys, [command, out, "--runs", ddpm, ndm], culprit)


def test_incomparable_runs_are_rejected(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ddpm, ndm, other = out / "runs" / "ddpm", out / "runs" / "ndm", tmp_path / "run"
    shutil.copytree(ndm, other)
    description = (other / "data.json").read_text()
    (other / "data.json").write_text(description.replace("80/20", "70/30"))

    def check(culprit: str, *options: str | Path, experiment: str = "steps") -> None:
        command = [f"reproduce {experiment} --size smoke --out", tmp_path / "out", "--runs", ddpm]
        rejected(capsys, [*command, *options], culprit)

    check("then one that does", ddpm)
    check("there is no run", tmp_path / "none")
    check("--runs uses the data of the runs; leave it out", ndm, "--data", tmp_path)
    check("nothing is trained", ndm, "-- --train.steps 3")
    check("trains its models itself", ndm, experiment="ot-1d")
    check("trained on different data: version is", other)


def test_data_are_accepted_only_where_the_experiment_uses_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    def check(culprit: str, experiment: str, *options: str | Path) -> None:
        rejected(capsys, ["reproduce --out", tmp_path / "out", experiment, *options], culprit)

    check("train-images-idx3-ubyte", "steps --size smoke --data", empty)
    check("makes its data itself", "checkerboard --size smoke --data", empty)
    check("has the sizes small, smoke", "steps --size huge")
    run_command("reproduce --list")
    listing = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    accepts = {line.split(":")[0]: "(or --data FOLDER)" in line for line in listing}
    assert not accepts["checkerboard"] and accepts["steps"]
