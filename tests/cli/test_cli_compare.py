"""``ndm compare``: equal budgets, the widened baseline, resuming, statistics over seeds."""

import contextlib
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cli.commands import arguments, rejected
from conftest import TINY
from ndm.cli.main import main
from ndm.compare.plan import build, plan_rows, read_rows
from ndm.compare.tables import cell, markdown, mean_and_error, summarize
from ndm.evaluation.calibrate import Fit
from ndm.evaluation.evaluate import Evaluation
from ndm.train.run import Run

ROWS: dict[str, Any] = {
    "Plain": {"model.transform": "ndm.Identity"},
    "Learned F": {},
    "Direct": {"model.transform": "ndm.GatedTransform", "model.reverse": "direct"},
}
# One seed and the smallest evaluation.
QUICK = "--seeds 1 --horizons= --limit 4 --draws 1"


def comparison(folder: Path, rows: dict[str, Any] | None = None, **extra: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(TINY))
    content = {"base": "base.yaml", "rows": rows or ROWS, **extra}
    (folder / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "compare.yaml"


def command(folder: Path, options: str = "") -> list[str]:
    """The arguments that compare into ``folder / "out"``."""
    config, out = folder / "compare.yaml", folder / "out"
    return arguments("compare --config", config, "--out", out, options)


def compare(folder: Path, options: str) -> dict[str, Any]:
    """Run the comparison and return its record."""
    assert main(command(folder, options)) == 0
    record: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text())
    return record


def training_times(folder: Path) -> dict[Path, int]:
    """When the metrics of each run were written."""
    return {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("metrics.json")}


def test_a_plain_diffusion_as_large_as_the_largest_model_is_always_a_row(tmp_path: Path) -> None:
    rows, extra = read_rows(comparison(tmp_path))
    planned = plan_rows(rows, extra, "steps")
    assert [row.name for row in planned] == ["Plain", "Plain, widened", "Learned F", "Direct"]
    largest, wide = max(build(row).num_parameters for row in rows), planned[1]
    assert wide.parameters == build(wide).num_parameters >= largest
    width = wide.config.get("model.predictor.network.hidden")
    assert [row.baseline for row in planned] == [False, True, False, False]
    narrower = wide.config.override({"model.predictor.network.hidden": width - 2})
    assert narrower.build().num_parameters < largest, "no wider than needed"
    assert type(build(wide).model.transform).__name__ == "Identity"
    matched = plan_rows(rows, extra, "parameters")
    assert [row.baseline for row in matched] == [True, False, False]
    assert all(largest <= row.parameters < 1.15 * largest for row in matched)


def test_a_comparison_runs_end_to_end_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison(tmp_path, {name: ROWS[name] for name in ("Plain", "Direct")})
    options = "--seeds 2 --horizons 3,5 --calibrate --nll --limit 6 --draws 2"
    record = compare(tmp_path, options)
    summary = {row["name"]: row for row in record["summary"]}
    assert list(summary) == ["Plain", "Plain, widened", "Direct"]
    assert list(summary["Plain"]["measures"]) == [
        "continuous",
        "T = 3",
        "T = 5",
        "T = 3, calibrated",
        "T = 5, calibrated",
        "NLL",
    ]
    assert "NLL" not in summary["Direct"]["measures"], "a direct reverse without a score has none"
    assert {row["steps"] for row in record["summary"]} == {24}
    values = summary["Direct"]["measures"]["continuous"]["values"]
    assert len(values) == 2 and values[0] != values[1]
    one = json.loads((tmp_path / "out" / "direct" / "seed-1" / "measures.json").read_text())
    assert one["measures"]["continuous"] == values[1] and one["unit"] == "nats per example"
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("\n| ") == 4 and "**" in text and "nats per example" in text
    for suffix in ("png", "pdf"):
        assert (tmp_path / "out" / f"compare.{suffix}").stat().st_size > 1000

    before = training_times(tmp_path)
    (tmp_path / "out" / "direct" / "seed-0" / "measures.json").unlink()
    again = compare(tmp_path, options)
    assert again["summary"] == record["summary"], "missing measures are recomputed identically"
    assert training_times(tmp_path) == before
    other = compare(tmp_path, f"{options} --horizons 4")
    for row in other["summary"]:
        assert list(row["measures"])[:2] == ["continuous", "T = 4"], "old bounds are not mixed in"
        assert len(row["runs"]) == 2
    assert training_times(tmp_path) == before, "nothing is trained again"
    capsys.readouterr()
    assert main(command(tmp_path, "--train-steps 9")) == 2
    assert "another budget" in capsys.readouterr().err


def test_a_budget_of_seconds_gives_slower_rows_fewer_steps(tmp_path: Path) -> None:
    comparison(tmp_path)
    record = compare(tmp_path, f"{QUICK} --budget seconds --seconds 0.2")
    for row in record["summary"]:
        assert row["steps"] == max(1, round(0.2 / row["seconds_per_step"]))
        assert row["measures"]["continuous"]["stderr"] is None
        assert row["training_seconds"][0] > 0
    plain, learned = record["summary"][0], record["summary"][2]
    assert plain["seconds_per_step"] < learned["seconds_per_step"]
    assert plain["steps"] > learned["steps"]


def test_rows_trained_for_t_steps_are_measured_in_t_steps(tmp_path: Path) -> None:
    comparison(tmp_path, {"Plain": {"model.transform": "ndm.Identity"}})
    options = ["--seeds", "1", "--limit", "4", "--draws", "1", "--calibrate", "--grid", "equal"]
    fixed = ["--", "--model.steps", "3", "--train.steps", "2"]
    assert main([*command(tmp_path), *options, "--variance", "step", *fixed]) == 0
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    found = record["summary"][0]["runs"]["0"]
    run = Run(tmp_path / "out" / "plain" / "seed-0")
    evaluation = Evaluation(run.model(), run.data().split("test"), limit=4)
    fit = Fit(run.data().split("train"), grid="equal", variance="step")
    expected = {
        "T = 3": evaluation.nelbo(3, 1).nats,
        "T = 3, calibrated": evaluation.nelbo(3, 1, fit).nats,
    }
    shift = run.data().describe().log_scale
    assert found == pytest.approx({name: value + shift for name, value in expected.items()})


def test_rows_in_continuous_and_in_discrete_time_share_a_table(tmp_path: Path) -> None:
    rows = {
        "Plain": {"model.transform": "ndm.Identity"},
        "Few": {"model.transform": "ndm.Identity", "model.steps": 4},
    }
    comparison(tmp_path, rows)
    record = compare(tmp_path, "--seeds 1 --limit 4 --draws 1 --train_steps 2")
    plain, few = record["summary"]
    assert list(plain["measures"]) == ["continuous", "T = 4"]
    assert list(few["measures"]) == ["T = 4"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "T = 4, difference to" in text
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000


def test_two_parallel_jobs_give_the_numbers_of_one(tmp_path: Path) -> None:
    numbers = []
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        folder.mkdir()
        comparison(folder)
        record = compare(folder, f"{QUICK} --limit 8 --rows Direct --jobs {jobs}")
        numbers.append([row["measures"]["continuous"]["mean"] for row in record["summary"]])
    assert len(numbers[0]) == 2, "the baseline comes with the chosen row"
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert (tmp_path / "2" / "out" / "plain-widened" / "seed-0" / "log.txt").exists()


def test_a_folder_of_another_comparison_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = comparison(tmp_path, {"Plain": {"model.transform": "ndm.Identity"}})
    compare(tmp_path, QUICK)
    (tmp_path / "elsewhere").mkdir()
    same_file = tmp_path / "elsewhere" / ".." / "compare.yaml"
    again = arguments("compare --config", same_file, "--out", tmp_path / "out", QUICK)
    assert main(again) == 0, "the same file by another path"
    base = {**TINY, "train": {**TINY["train"], "learning_rate": 1e-4}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    capsys.readouterr()
    assert main(again) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "learning_rate" in error and "another" in error
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TINY))
    measures = tmp_path / "out" / "plain" / "seed-0" / "measures.json"
    measures.write_text(measures.read_text().replace('"data_sha256": "', '"data_sha256": "0'))
    assert main(again) == 2
    assert "other data" in capsys.readouterr().err
    assert file.exists()


def test_an_interruption_stops_all_processes(tmp_path: Path) -> None:
    clips = {f"R{i}": {"train.gradient_clip": 1.0 + i} for i in range(4)}
    comparison(tmp_path, {name: {**ROWS["Plain"], **clip} for name, clip in clips.items()})
    options = "--seeds 2 --horizons= --jobs 2 --train-steps 1000000"

    def started() -> list[Path]:
        return list((tmp_path / "out").glob("*/seed-*/config.yaml"))

    process = subprocess.Popen(
        [sys.executable, "-m", "ndm.cli", *command(tmp_path, options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # Background jobs of a shell ignore SIGINT, and so would the tests that run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not started() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert started(), "no run began"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(started()) <= 2, "no other run began"


def test_arguments_after_two_dashes_apply_to_every_run(tmp_path: Path) -> None:
    comparison(tmp_path)
    record = compare(tmp_path, f"{QUICK} --rows Plain -- --train.steps 5 --model.steps 3")
    assert record["summary"][0]["steps"] == 5
    config = yaml.safe_load((tmp_path / "out" / "plain" / "seed-0" / "config.yaml").read_text())
    assert config["model"]["init_args"]["steps"] == 3 and config["train"]["steps"] == 5


def test_a_failed_run_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison(tmp_path, {"Plain": ROWS["Plain"], "Wild": {"train.learning_rate": 1e30}})
    assert main(command(tmp_path, QUICK)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Wild" in error and "not finite" in error
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())["summary"]
    measured = {row["name"]: bool(row["measures"]) for row in summary}
    assert (measured["Plain"], measured["Wild"]) == (True, False)


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        ({"A": {"model.transfrom": "ndm.Identity"}}, {}, "row 'A'"),
        ({"A": {"steps": 3}}, {}, "model. or train."),
        ({"A": {"train.steps": 3}}, {}, "all rows share"),
        ({"A": {"data.train_size": 3}}, {}, "all rows share"),
        ({"A": {"model.eta": datetime.date(2024, 1, 1)}}, {}, "numbers, lists"),
        ({"A": {"model.transform": "ndm.Identity"}, "A, widened": {}}, {}, "added by ndm compare"),
        ({"A": 3}, {}, "overrides such as"),
        ({"A": {}}, {}, "as large as the largest"),
        ({"A": {"model.transform": "ndm.Identity"}, "a": {}}, {}, "names that differ"),
        ({"A": {"model.transform": "ndm.Identity"}, "B": {}}, {"widen": "C"}, "no row 'C'"),
        ({"A": ROWS["Plain"], "B": {}}, {"width": "model.nothing"}, "to widen"),
        ({"A": {}}, {"rowz": 1}, "unknown key 'rowz'"),
        ({"A": {"model.predictor.network.hidden": -4}}, {}, "row 'A'"),
    ],
)
def test_an_invalid_file_is_reported_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: Any,
    extra: dict[str, Any],
    message: str,
) -> None:
    comparison(tmp_path, rows, **extra)
    rejected(capsys, command(tmp_path), message)
    assert not (tmp_path / "out").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seeds 0", "seeds=0"),
        ("--budget seconds", "--seconds"),
        ("--seconds 3", "budget=seconds"),
        ("--budget seconds --seconds -1", "positive"),
        ("--horizons 1,x", "integers from 1"),
        ("--rows Nobody", "no row 'Nobody'"),
        ("--budget luck", "budget"),
        ("--split nope", "nope"),
    ],
)
def test_invalid_options_are_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    comparison(tmp_path)
    rejected(capsys, command(tmp_path, options), message)


def test_standard_errors_are_over_seeds_and_differences_are_paired() -> None:
    runs = {
        "a": {0: 1.0, 1: 2.0, 2: 6.0},
        "b": {0: 1.5, 1: 2.5, 2: 6.5},
        "c": {1: 3.0, 5: 9.0},
        "d": {},
    }
    rows = [
        {
            "name": name,
            "parameters": 1,
            "steps": 1,
            "seconds_per_step": 1.0,
            "runs": {seed: {"m": value} for seed, value in values.items()},
        }
        for name, values in runs.items()
    ]
    first, second, third, fourth = summarize(rows, "a")
    assert first["measures"]["m"]["mean"] == 3.0
    assert first["measures"]["m"]["stderr"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert first["differences"] == {}
    assert second["differences"]["m"]["mean"] == pytest.approx(0.5)
    assert second["differences"]["m"]["stderr"] == pytest.approx(0.0), "what seeds share drops out"
    assert third["differences"]["m"]["values"] == [1.0], "by seed, not by position"
    assert third["measures"]["m"]["mean"] == 6.0
    assert fourth["measures"] == fourth["differences"] == {}
    assert mean_and_error([2.0])["stderr"] is None
    assert cell({"mean": 1.0, "stderr": None}) == "1.000"
    table = markdown([first, second], "bits/dim", "a", ["p."])
    assert "**3.000 ± 1.528**" in table and "+0.500 ± 0.000" in table


def test_densities_are_in_the_units_of_the_data_and_variances_are_fitted_on_the_train_split(
    tmp_path: Path,
) -> None:
    normal = np.random.default_rng(0).normal(size=(300, 2))
    np.save(tmp_path / "table.npy", 100 * normal @ np.array([[1.0, 0.4], [0.0, 0.3]]))
    table = {"class_path": "ndm.data.Table", "init_args": {"path": str(tmp_path / "table.npy")}}
    base = {**TINY, "data": table}
    comparison(tmp_path, {"Plain": {"model.transform": "ndm.Identity"}})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    record = compare(tmp_path, "--seeds 1 --horizons 3 --draws 2 --calibrate")
    found = record["summary"][0]["runs"]["0"]
    folder = tmp_path / "out" / "plain" / "seed-0"
    model, data = Run(folder).model(), Run(folder).data()
    assert data.describe().log_scale > 5, "standardized data are far from their units"
    evaluation = Evaluation(model, data.split("test"))
    fit = Fit(data.split("train"), grid="fitted", variance="dimension")
    expected = {
        "continuous": evaluation.nelbo(None, 2),
        "T = 3": evaluation.nelbo(3, 2),
        "T = 3, calibrated": evaluation.nelbo(3, 2, fit),
    }
    assert found == pytest.approx(
        {name: one.nats + data.describe().log_scale for name, one in expected.items()}, rel=1e-6
    )
