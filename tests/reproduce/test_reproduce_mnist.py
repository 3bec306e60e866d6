"""``ndm reproduce mnist``: the bounds of three models, learning curves, the page and figures."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cli.commands import exit_code, run_command
from ndm.evaluation.evaluate import Evaluation
from ndm.reproduce.mnist import learning_curve
from ndm.reproduce.report import Report
from ndm.reproduce.synthetic import write_mnist
from ndm.train.config import RunConfig, find_config
from ndm.train.run import Run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder / "data", 0)
    run_command("reproduce mnist --size smoke --data", folder / "data", "--out", folder / "out")
    return folder / "out"


def test_the_bounds_equal_an_evaluation_of_the_saved_models(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert set(results["measurements"]) == {"vdm", "vdm-widened", "ndm"}
    sizes = {name: one["parameters"] for name, one in results["measurements"].items()}
    assert sizes["vdm"] < sizes["ndm"] <= sizes["vdm-widened"]
    for name, record in results["measurements"].items():
        assert record["data_sha256"] == Run(out / "runs" / name).data().describe().sha256
        run = Run(out / "runs" / name)
        again = Evaluation(run.model(), run.data().split("test"), limit=8).nelbo(None, 1)
        assert record["bpd"] == pytest.approx(again.bpd, rel=1e-5)
        assert record["steps"] is None and record["num_examples"] == 8


def test_the_page_and_its_figures_are_written(out: Path) -> None:
    page = (out / "README.md").read_text()
    for name in ("over-time", "learning", "samples"):
        assert "![" in page and f"({name}.png)" in page
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_a_repeated_command_recomputes_nothing(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [*out.glob("parts/*"), *out.glob("runs/*/model/*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert before
    run_command("reproduce mnist --size smoke --data", out.parent / "data", "--out", out)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert exit_code("reproduce mnist --size quick --data", out.parent / "data", "--out", out) == 2
    assert "another experiment: size is 'smoke'" in capsys.readouterr().err


def test_the_paper_size_uses_the_gpu_configuration(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def stop(self: Report, configs: Mapping[str, RunConfig]) -> None:
        found.update({name: config.to_dict() for name, config in configs.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "train_all", stop)
    data = out.parent / "data"
    command = ["reproduce mnist --size paper --data", data, "--out", tmp_path / "out"]
    assert exit_code(*command) == 130
    assert list(found) == ["vdm", "vdm-widened", "ndm"]
    expected = RunConfig.read(find_config("mnist"), {"data.path": str(data)}).to_dict()
    expected["train"]["evaluation_limit"] = 1000
    assert found["ndm"] == expected
    predictors = [one["model"]["init_args"]["predictor"] for one in found.values()]
    networks = [predictor["init_args"]["network"] for predictor in predictors]
    plain, widened, learned = (network["init_args"]["channels"] for network in networks)
    assert plain == learned == 128 < widened


def test_missing_data_are_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert exit_code("reproduce mnist --out", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("mnist needs the folder of its data: --data FOLDER")
    assert not (tmp_path / "out").exists()


def test_learning_curves_continue_over_interrupted_calls(tmp_path: Path) -> None:
    """Later calls replace steps that were lost in an interruption."""
    calls = {0: {9: 3.0, 19: 2.5, 29: 9.0}, 1: {29: 2.0, 39: 1.5}, 10: {49: 1.0}}
    for version, rows in calls.items():
        path = tmp_path / f"logs/version_{version}/metrics.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "train/nelbo_bpd", "lr"])
            writer.writeheader()
            for step, value in rows.items():
                writer.writerow({"step": step, "lr": 0.1})
                writer.writerow({"step": step, "train/nelbo_bpd": value})
    steps, bound = learning_curve(tmp_path)
    assert steps.tolist() == [9, 19, 29, 39, 49] and bound.tolist() == [3.0, 2.5, 2.0, 1.5, 1.0]
