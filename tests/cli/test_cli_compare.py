"""``ndm compare``: rows under one budget, the widened baseline, resuming, and statistics over
seeds.
"""

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

from conftest import TINY
from ndm.cli.main import main
from ndm.compare.plan import build, plan_rows, read_rows
from ndm.compare.tables import cell, markdown, mean_and_error, summarize
from ndm.evaluation.evaluate import Evaluation
from ndm.train.run import Run

ROWS: dict[str, Any] = {
    "Plain": {"model.transform": "ndm.Identity"},
    "Learned F": {},
    "Direct": {"model.transform": "ndm.GatedTransform", "model.reverse": "direct"},
}


def comparison(folder: Path, rows: dict[str, Any] | None = None, **extra: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "compare.yaml").write_text(
        yaml.safe_dump({"base": "base.yaml", "rows": rows or ROWS, **extra}, sort_keys=False)
    )
    return folder / "compare.yaml"


def compare(folder: Path, *words: str) -> dict[str, Any]:
    assert (
        main(
            [
                "compare",
                "--config",
                str(folder / "compare.yaml"),
                "--out",
                str(folder / "out"),
                *words,
            ]
        )
        == 0
    )
    record: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text())
    return record


def test_a_plain_diffusion_at_least_as_large_as_the_largest_is_always_a_row(tmp_path: Path) -> None:
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


def test_a_comparison_end_to_end_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison(tmp_path)
    words = [
        "--seeds",
        "2",
        "--horizons",
        "3,5",
        "--calibrate",
        "--nll",
        "--limit",
        "20",
        "--draws",
        "2",
    ]
    record = compare(tmp_path, *words)
    summary = {row["name"]: row for row in record["summary"]}
    assert list(summary) == ["Plain", "Plain, widened", "Learned F", "Direct"]
    assert list(summary["Plain"]["measures"]) == [
        "continuous",
        "T = 3",
        "T = 5",
        "T = 3, fitted variance",
        "T = 5, fitted variance",
        "NLL",
    ]
    assert "NLL" not in summary["Direct"]["measures"], "a direct reverse without a score has none"
    assert {row["steps"] for row in record["summary"]} == {24}
    values = summary["Learned F"]["measures"]["continuous"]["values"]
    assert len(values) == 2 and values[0] != values[1]
    one = json.loads((tmp_path / "out" / "learned-f" / "seed-1" / "measures.json").read_text())
    assert one["measures"]["continuous"] == values[1] and one["unit"] == "nats per example"
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("\n| ") == 5 and "**" in text and "nats per example" in text
    for suffix in ("png", "pdf"):
        assert (tmp_path / "out" / f"compare.{suffix}").stat().st_size > 1000

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.json")}
    (tmp_path / "out" / "direct" / "seed-0" / "measures.json").unlink()
    again = compare(tmp_path, *words)
    assert again["summary"] == record["summary"], (
        "only what is missing is done again, with the same result"
    )
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.json")
    }
    other = compare(tmp_path, *words, "--horizons", "4")
    for row in other["summary"]:
        assert list(row["measures"])[:2] == [
            "continuous",
            "T = 4",
        ], "other bounds are measured, not mixed with the old ones"
        assert len(row["runs"]) == 2
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.json")
    }, "without training again"
    capsys.readouterr()
    assert (
        main(
            [
                "compare",
                "--config",
                str(tmp_path / "compare.yaml"),
                "--out",
                str(tmp_path / "out"),
                "--train-steps",
                "9",
            ]
        )
        == 2
    )
    assert "another budget" in capsys.readouterr().err


def test_a_budget_of_seconds_gives_slower_rows_fewer_steps(tmp_path: Path) -> None:
    comparison(tmp_path)
    record = compare(
        tmp_path,
        "--seeds",
        "1",
        "--horizons",
        "",
        "--limit",
        "4",
        "--draws",
        "1",
        "--budget",
        "seconds",
        "--seconds",
        "0.2",
    )
    for row in record["summary"]:
        assert row["steps"] == max(1, round(0.2 / row["seconds_per_step"]))
        assert row["measures"]["continuous"]["stderr"] is None
        assert row["training_seconds"][0] > 0
    plain, learned = record["summary"][0], record["summary"][2]
    assert (
        plain["seconds_per_step"] < learned["seconds_per_step"]
        and plain["steps"] > learned["steps"]
    )


def test_two_jobs_at_once_give_the_numbers_of_one(tmp_path: Path) -> None:
    words = ["--seeds", "1", "--horizons", "", "--limit", "8", "--draws", "1", "--rows", "Direct"]
    numbers = []
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        folder.mkdir()
        comparison(folder)
        record = compare(folder, *words, "--jobs", jobs)
        numbers.append([row["measures"]["continuous"]["mean"] for row in record["summary"]])
    assert len(numbers[0]) == 2, "the baseline comes with the chosen row"
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert (tmp_path / "2" / "out" / "plain-widened" / "seed-0" / "log.txt").exists()


def test_what_the_folder_holds_must_be_of_this_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = comparison(tmp_path, {"Plain": {"model.transform": "ndm.Identity"}})
    words = ["--seeds", "1", "--horizons", "", "--limit", "4", "--draws", "1"]
    compare(tmp_path, *words)
    again = [
        "compare",
        "--config",
        str(tmp_path / "elsewhere" / ".." / "compare.yaml"),
        "--out",
        str(tmp_path / "out"),
        *words,
    ]
    (tmp_path / "elsewhere").mkdir()
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
    comparison(
        tmp_path,
        {
            f"R{i}": {"model.transform": "ndm.Identity", "train.gradient_clip": 1.0 + i}
            for i in range(4)
        },
    )
    command = [
        sys.executable,
        "-m",
        "ndm.cli",
        "compare",
        "--config",
        str(tmp_path / "compare.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--seeds", "2", "--horizons", "", "--jobs", "2", "--train-steps", "1000000"],
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs, and their tests, ignore it
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while (
            not list((tmp_path / "out").glob("*/seed-*/config.yaml"))
            and time.monotonic() < deadline
        ):
            time.sleep(0.2)
        started = list((tmp_path / "out").glob("*/seed-*/config.yaml"))
        assert started, "no run began"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list((tmp_path / "out").glob("*/seed-*/config.yaml"))) <= 2, "nothing else was begun"


def test_words_after_two_dashes_go_to_every_run(tmp_path: Path) -> None:
    comparison(tmp_path)
    words = [
        "--seeds",
        "1",
        "--horizons",
        "",
        "--limit",
        "4",
        "--draws",
        "1",
        "--rows",
        "Plain",
        "--",
        "--train.steps",
        "5",
        "--model.steps",
        "3",
    ]
    record = compare(tmp_path, *words)
    assert record["summary"][0]["steps"] == 5
    config = yaml.safe_load((tmp_path / "out" / "plain" / "seed-0" / "config.yaml").read_text())
    assert config["model"]["init_args"]["steps"] == 3 and config["train"]["steps"] == 5


def test_one_run_that_fails_does_not_take_the_others_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison(
        tmp_path,
        {"Plain": {"model.transform": "ndm.Identity"}, "Wild": {"train.learning_rate": 1e30}},
    )
    words = ["--seeds", "1", "--horizons", "", "--limit", "4", "--draws", "1"]
    assert (
        main(
            [
                "compare",
                "--config",
                str(tmp_path / "compare.yaml"),
                "--out",
                str(tmp_path / "out"),
                *words,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Wild" in error and "not finite" in error
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())["summary"]
    assert [bool(row["measures"]) for row in summary if row["name"] in ("Plain", "Wild")] == [
        True,
        False,
    ]


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
        (
            {"A": {"model.transform": "ndm.Identity"}, "B": {}},
            {"width": "model.nothing"},
            "to widen",
        ),
        ({"A": {}}, {"rowz": 1}, "unknown key 'rowz'"),
        ({"A": {"model.predictor.network.hidden": -4}}, {}, "row 'A'"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: Any,
    extra: dict[str, Any],
    message: str,
) -> None:
    comparison(tmp_path, rows, **extra)
    assert (
        main(
            ["compare", "--config", str(tmp_path / "compare.yaml"), "--out", str(tmp_path / "out")]
        )
        == 2
    )
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "seeds=0"),
        (["--budget", "seconds"], "--seconds"),
        (["--seconds", "3"], "budget=seconds"),
        (["--budget", "seconds", "--seconds", "-1"], "positive"),
        (["--horizons", "1,x"], "integers from 1"),
        (["--rows", "Nobody"], "no row 'Nobody'"),
        (["--budget", "luck"], "budget"),
        (["--split", "nope"], "nope"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    comparison(tmp_path)
    assert (
        main(
            [
                "compare",
                "--config",
                str(tmp_path / "compare.yaml"),
                "--out",
                str(tmp_path / "out"),
                *words,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_errors_are_those_of_means_over_seeds_and_differences_are_paired() -> None:
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
    assert third["differences"]["m"]["values"] == [1.0], "by seed, not by place"
    assert third["measures"]["m"]["mean"] == 6.0
    assert fourth["measures"] == fourth["differences"] == {}
    assert mean_and_error([2.0])["stderr"] is None
    assert cell({"mean": 1.0, "stderr": None}) == "1.000"
    table = markdown([first, second], "bits/dim", "a", ["p."])
    assert "**3.000 ± 1.528**" in table and "+0.500 ± 0.000" in table


def test_densities_are_in_the_units_of_the_data_and_variances_are_fitted_on_the_train_split(
    tmp_path: Path,
) -> None:
    values = (
        100 * np.random.default_rng(0).normal(size=(300, 2)) @ np.array([[1.0, 0.4], [0.0, 0.3]])
    )
    np.save(tmp_path / "table.npy", values)
    base = {
        **TINY,
        "data": {
            "class_path": "ndm.data.Table",
            "init_args": {"path": str(tmp_path / "table.npy")},
        },
    }
    comparison(tmp_path, {"Plain": {"model.transform": "ndm.Identity"}})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    record = compare(tmp_path, "--seeds", "1", "--horizons", "3", "--draws", "2", "--calibrate")
    found = record["summary"][0]["runs"]["0"]
    folder = tmp_path / "out" / "plain" / "seed-0"
    model, data = Run(folder).model(), Run(folder).data()
    assert data.describe().log_scale > 5, "standardized data are far from their units"
    evaluation = Evaluation(model, data.split("test"))
    expected = {
        "continuous": evaluation.nelbo(None, 2),
        "T = 3": evaluation.nelbo(3, 2),
        "T = 3, fitted variance": evaluation.nelbo(3, 2, data.split("train"), 128),
    }
    assert found == pytest.approx(
        {name: one.nats + data.describe().log_scale for name, one in expected.items()}, rel=1e-6
    )
