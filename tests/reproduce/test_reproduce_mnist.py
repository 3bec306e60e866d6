"""``ndm reproduce mnist``: three models trained alike, their bounds those of an evaluation, curves
and figures complete.
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ndm.cli.main import main
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
    assert (
        main(
            [
                "reproduce",
                "mnist",
                "--size",
                "smoke",
                "--data",
                str(folder / "data"),
                "--out",
                str(folder / "out"),
            ]
        )
        == 0
    )
    return folder / "out"


def test_the_bounds_are_those_of_an_evaluation_of_the_saved_models(out: Path) -> None:
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


def test_page_and_figures_are_there(out: Path) -> None:
    page = (out / "README.md").read_text()
    for name in ("over-time", "learning", "samples"):
        assert "![" in page and f"({name}.png)" in page
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG") and (
            out / f"{name}.pdf"
        ).read_bytes().startswith(b"%PDF")


def test_the_same_command_again_trains_and_measures_nothing(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in [*out.glob("parts/*"), *out.glob("runs/*/model/*")]
    }
    assert before
    assert (
        main(
            [
                "reproduce",
                "mnist",
                "--size",
                "smoke",
                "--data",
                str(out.parent / "data"),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (
        main(
            [
                "reproduce",
                "mnist",
                "--size",
                "quick",
                "--data",
                str(out.parent / "data"),
                "--out",
                str(out),
            ]
        )
        == 2
    )
    assert "another experiment: size is 'smoke'" in capsys.readouterr().err


def test_the_paper_size_is_the_configuration_for_a_gpu(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def stop(self: Report, configs: Mapping[str, RunConfig]) -> None:
        found.update({name: config.to_dict() for name, config in configs.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "train_all", stop)
    assert (
        main(
            [
                "reproduce",
                "mnist",
                "--size",
                "paper",
                "--data",
                str(out.parent / "data"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 130
    )
    assert list(found) == ["vdm", "vdm-widened", "ndm"]
    expected = RunConfig.read(
        find_config("mnist"), {"data.path": str(out.parent / "data")}
    ).to_dict()
    expected["train"]["evaluation_limit"] = 1000
    assert found["ndm"] == expected
    channels = [
        one["model"]["init_args"]["predictor"]["init_args"]["network"]["init_args"]["channels"]
        for one in found.values()
    ]
    assert channels[0] == channels[2] == 128 < channels[1]


def test_without_data_one_line_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["reproduce", "mnist", "--out", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("mnist needs the folder of its data: --data FOLDER")
    )
    assert not (tmp_path / "out").exists()


def test_learning_curves_go_on_over_interrupted_calls(tmp_path: Path) -> None:
    """Later calls overwrite the steps that an earlier one lost."""
    for version, rows in (
        (0, {9: 3.0, 19: 2.5, 29: 9.0}),
        (1, {29: 2.0, 39: 1.5}),
        (10, {49: 1.0}),
    ):
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
