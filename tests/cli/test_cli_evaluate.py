"""``ndm evaluate``: its record, and two processes agree with one."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cli.commands import arguments, exit_code, run_command
from conftest import TINY
from ndm.cli.main import main
from ndm.evaluation.calibrate import Fit, GridKind, VarianceKind
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.relations import check_relations
from ndm.train.run import Run

MLP = {
    "class_path": "ndm.nn.MLP",
    "init_args": {"dims": 64, "hidden": 32, "blocks": 1, "max_frequency": 2.0},
}


def run_folder(folder: Path, **sections: Any) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump({**TINY, **sections}))
    run_command("train --config", folder / "config.yaml", "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of continuous data in continuous time."""
    return run_folder(tmp_path_factory.mktemp("table"), train={**TINY["train"], "steps": 60})


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLP on images with values on a grid."""
    model = {
        "schedule": {
            "class_path": "ndm.LinearLogSNRSchedule",
            "init_args": {"gamma_0": -6.0, "gamma_1": 4.0},
        },
        "transform": {"class_path": "ndm.GatedTransform", "init_args": {"network": MLP}},
        "predictor": {"class_path": "ndm.Predictor", "init_args": {"network": MLP}},
        "decoder": {"class_path": "ndm.DiscretizedGaussian", "init_args": {"num_values": 17}},
    }
    train = {**TINY["train"], "steps": 40, "learning_rate": 3e-3}
    return run_folder(
        tmp_path_factory.mktemp("digits"),
        data={"class_path": "ndm.data.Digits"},
        model=model,
        train=train,
    )


def read_record(file: Path) -> dict[str, Any]:
    """Read strict JSON, without NaN and Infinity."""
    record: dict[str, Any] = json.loads(
        file.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON")
    )
    return record


def evaluate(run: Path, file: Path, *options: str | Path) -> dict[str, Any]:
    """Evaluate a run and return the record in ``file``."""
    run_command("evaluate", run, "--json", file, *options)
    return read_record(file)


def test_one_call_computes_every_measure(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measures = "--nelbo --nll --steps 4,8,200 --iw 2 --calibrate"
    options = f"{measures} --draws 2 --solver rk4 --nodes 8 --markdown"
    record = evaluate(digits_run, tmp_path / "e.json", options, tmp_path / "e.md")
    assert set(record["nelbo_discrete_bpd"]) == {"4", "8", "200"}
    assert set(record["nelbo_iw_bpd"]) == {"4", "8"}, "none above --iw_steps"
    assert set(record["nelbo_discrete_calibrated_bpd"]) == {"4", "8", "200"}
    discrete = record["nelbo_discrete_bpd"]
    for steps in ("4", "8"):
        assert record["nelbo_discrete_calibrated_bpd"][steps] < discrete[steps]
        assert record["nelbo_iw_bpd"][steps] < discrete[steps]
    assert discrete["4"] > discrete["8"] > discrete["200"]
    assert record["nll_bpd_stderr"] > 0
    assert record["nfe_mean"] == 2 * (4 * 8 + 9)
    assert record["num_examples"] == record["split_size"] == 359
    names = [one["name"] for one in record["measurements"]]
    assert names.count("nelbo_discrete") == 3
    assert all(one["data_sha256"] == record["data_sha256"] for one in record["measurements"])
    assert all(isinstance(check["holds"], bool) for check in record["checks"])
    out = capsys.readouterr().out
    for number in (record["nelbo_bpd"], record["nll_bpd"], discrete["200"]):
        assert f"{number:.4f}" in out
    assert len((tmp_path / "e.md").read_text().splitlines()) == len(names) + 2


def test_a_violated_relation_prints_a_warning(
    digits_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The threshold is -100 standard errors, which no difference passes."""
    monkeypatch.setattr(
        "ndm.cli.evaluate.check_relations",
        lambda measurements: check_relations(measurements, errors=-100.0),
    )
    record = evaluate(digits_run, tmp_path / "e.json", "--nelbo --steps 100 --draws 1")
    assert [check["holds"] for check in record["checks"]] == [False]
    streams = capsys.readouterr()
    assert "ndm: warning: a relation that should hold does not: NELBO" in streams.err
    assert "check: NELBO" in streams.out


def test_continuous_densities_are_in_nats_and_in_the_units_of_the_source(
    table_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = "--nll --dequantization none"
    double = "--dtype float64"
    options = f"--nelbo {exact} --draws 4 {double}"
    record = evaluate(table_run, tmp_path / "e.json", options)
    assert record["nll_nats_source_units"] == pytest.approx(
        record["nll_nats"] + record["log_scale_nats"]
    )
    assert record["dtype"] == "float64"
    assert record["measurements"][1]["probes"] == "exact"
    assert "density in the units of the data" in capsys.readouterr().out
    file = tmp_path / "g.json"
    options = f"--nelbo --calibrate {double} --draws 1"
    assert main([*arguments("evaluate", table_run, "--json", file, options), "--steps", " "]) == 0
    fitted = read_record(file)
    assert "nelbo_calibrated_bpd" in fitted
    single = evaluate(table_run, tmp_path / "f.json", exact)
    assert single["nll_nats"] == pytest.approx(record["nll_nats"], abs=1e-3)
    assert "nelbo_bpd" not in single


def test_the_batch_size_does_not_change_the_result_and_the_limit_is_printed(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--nll --nelbo --solver rk4 --nodes 16 --limit 15 --draws 2 --batch_size"
    first, second = (
        evaluate(digits_run, tmp_path / "e.json", f"{options} {size}") for size in (4, 15)
    )
    for name in ("nll_bpd", "nelbo_bpd", "nll_bpd_stderr", "nelbo_bpd_stderr"):
        assert first[name] == pytest.approx(second[name], rel=2e-4)
    assert (first["num_examples"], first["split_size"], first["limit"]) == (15, 359, 15)
    assert "15 of 359 (--limit)" in capsys.readouterr().out


def test_two_processes_agree_with_one_and_do_not_wait_for_each_other(
    digits_run: Path, tmp_path: Path
) -> None:
    """Ranks have different numbers of batches and of adaptive solver steps."""
    options = "--nelbo --nll --steps 5 --draws 2 --limit 50 --batch_size 10 --probes 1 --rtol 1e-3"
    single = evaluate(digits_run, tmp_path / "one.json", options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = f"-m torch.distributed.run --nproc-per-node 2 --master-port {port} -m ndm.cli"
    file = tmp_path / "two.json"
    command = arguments(launcher, "evaluate", digits_run, "--json", file, options)
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1, "only one process prints"
    double = json.loads(file.read_text())
    assert double["measurements"][0]["processes"] == 2
    names = "nll_bpd nll_bpd_stderr nelbo_bpd nelbo_bpd_stderr nfe_mean num_examples"
    for name in arguments(names):
        assert double[name] == pytest.approx(single[name], rel=1e-9), name
    expected = single["nelbo_discrete_bpd"]["5"]
    assert double["nelbo_discrete_bpd"]["5"] == pytest.approx(expected, rel=1e-9)


def test_user_examples_are_evaluated_one_by_one(
    table_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with the test split gives the results of the split; an outlier has the largest NLL."""
    source = Run(table_run).data()
    x = source.to_source_units(source.split("test").__getitems__(range(100)).double()).numpy()
    examples, csv_file = tmp_path / "x.npy", tmp_path / "v.csv"
    np.save(examples, x)
    options = "--nll --nelbo --draws 2 --solver rk4 --nodes 8"
    expected = evaluate(table_run, tmp_path / "e.json", options)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "model"):  # the data of the run may be missing
        (run / name).symlink_to(table_run / name)
    record_file, of_examples = tmp_path / "f.json", (options, "--data", examples, "--csv", csv_file)
    found = evaluate(run, record_file, *of_examples)
    for key in ("nelbo_bpd", "nll_bpd", "nelbo_nats_source_units", "nll_nats_source_units"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    assert (found["data"], found["split"], found["num_examples"]) == ("x", "all", 100)
    with csv_file.open() as file:
        head, *rows = csv.reader(file)
    assert head[0] == "example" and len(head) == 4  # two numbers, and the error of the first
    assert [row[0] for row in rows] == [str(n) for n in range(100)]
    for column, key in ((1, "nelbo_nats_source_units"), (3, "nll_nats_source_units")):
        assert np.mean([float(row[column]) for row in rows]) == pytest.approx(found[key], rel=1e-6)
    of_model = evaluate(table_run / "model", tmp_path / "g.json", "--draws 2 --data", examples)
    assert of_model["nelbo_bpd"] == pytest.approx(expected["nelbo_bpd"], rel=1e-5)
    x[7] = 9.0
    np.save(examples, x)
    evaluate(table_run, record_file, *of_examples)
    values = np.loadtxt(csv_file, delimiter=",", skiprows=1, usecols=-1)
    assert int(values.argmax()) == 7
    capsys.readouterr()
    assert exit_code("evaluate", table_run, "--data", examples, "--split train") == 2
    assert "split=train does not go with data=" in capsys.readouterr().err


def test_every_column_of_the_scores_has_its_own_label(digits_run: Path, tmp_path: Path) -> None:
    """The labels are not in alphabetical order: T = 5 stands before T = 10."""
    file = tmp_path / "scores.csv"
    measures = "--nelbo --nll --steps 5,10 --iw 2 --calibrate --draws 2 --limit 9"
    options = f"{measures} --solver rk4 --nodes 8 --csv"
    record = evaluate(digits_run, tmp_path / "e.json", options, file)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["example"] for row in rows] == [str(n) for n in Evaluated(digits_run).numbers(9)]
    labels = [one["label"] for one in record["measurements"]]
    assert labels != sorted(labels)
    errors = [f"{label}, stderr" for label in labels if label.startswith("NELBO")]
    assert set(rows[0]) == {"example", *labels, *errors}
    for one in record["measurements"]:
        values = [float(row[one["label"]]) for row in rows]
        assert np.mean(values) == pytest.approx(one["nats"], rel=1e-6), one["label"]
    for name in errors:
        assert all(float(row[name]) > 0 for row in rows)


def test_the_error_of_an_example_is_unknown_with_one_draw(table_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    run_command("evaluate", table_run, "--nelbo --draws 1 --limit 5 --csv", file)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["NELBO, continuous time, stderr"] for row in rows} == {""}


def test_calibration_fits_on_the_train_split(digits_run: Path, tmp_path: Path) -> None:
    run = Evaluated(digits_run)
    options = "--nelbo --steps 4 --calibrate --draws 2 --limit 40"
    record = evaluate(digits_run, tmp_path / "e.json", options)
    on_train, on_test = (run.calibrated(4, split) for split in ("train", "test"))
    assert record["nelbo_discrete_calibrated_nats"]["4"] == pytest.approx(on_train, rel=1e-6)
    simple = evaluate(digits_run, tmp_path / "s.json", f"{options} --grid equal --variance step")
    by_step = run.calibrated(4, "train", grid="equal", variance="step")
    assert simple["nelbo_discrete_calibrated_nats"]["4"] == pytest.approx(by_step, rel=1e-6)
    assert on_train < by_step
    protocols = {one["label"]: one for one in record["measurements"]}
    times = protocols["NELBO, T = 4, fitted reverse process"]["times"]
    assert times[0] == 0 and times[-1] == 1 and len(times) == 5
    assert protocols["NELBO, T = 4"]["times"] is None
    assert on_train != pytest.approx(on_test, rel=1e-5), "the splits must make a difference"
    continuous = run.calibrated(None, "train")
    assert record["nelbo_calibrated_nats"] == pytest.approx(continuous, rel=1e-6)


class Evaluated:
    """A run evaluated in Python, with the settings of the test of calibration."""

    def __init__(self, folder: Path):
        self.model, self.data = Run(folder).model(), Run(folder).data()

    def numbers(self, limit: int) -> list[int]:
        return Evaluation(self.model, self.data.split("test"), limit=limit).numbers

    def calibrated(
        self,
        steps: int | None,
        split: str,
        grid: GridKind = "fitted",
        variance: VarianceKind = "dimension",
    ) -> float:
        evaluation = Evaluation(self.model, self.data.split("test"), limit=40)
        fit = Fit(self.data.split(split), grid=grid, variance=variance)
        return evaluation.nelbo(steps, 2, fit).nats
