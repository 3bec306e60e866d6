"""``ndm evaluate``: the contract of its numbers, and two processes that agree with one."""

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

from conftest import TINY
from ndm.cli.main import main
from ndm.evaluation.relations import check_relations
from ndm.train.run import Run

MLP = {
    "class_path": "ndm.nn.MLP",
    "init_args": {"dims": 64, "hidden": 32, "blocks": 1, "max_frequency": 2.0},
}


def run_folder(folder: Path, **sections: Any) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump({**TINY, **sections}))
    assert (
        main(["train", "--config", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
    )
    return folder / "run"


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Continuous data, continuous time."""
    return run_folder(tmp_path_factory.mktemp("table"), train={**TINY["train"], "steps": 60})


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Values on a grid, an MLP on images."""
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


def evaluate(run: Path, file: Path, *words: str) -> dict[str, Any]:
    assert main(["evaluate", str(run), "--json", str(file), *words]) == 0
    record: dict[str, Any] = json.loads(
        file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON")
    )
    return record


def test_all_numbers_at_once(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--nelbo",
        "--nll",
        "--steps",
        "4,8,200",
        "--iw",
        "2",
        "--calibrate",
        "--draws",
        "2",
        "--solver",
        "rk4",
        "--nodes",
        "8",
    ]
    record = evaluate(digits_run, tmp_path / "e.json", *words, "--markdown", str(tmp_path / "e.md"))
    assert set(record["nelbo_discrete_bpd"]) == {"4", "8", "200"}
    assert set(record["nelbo_iw_bpd"]) == {
        "4",
        "8",
    }, "no importance-weighted bound above --iw_steps"
    assert set(record["nelbo_discrete_calibrated_bpd"]) == {"4", "8", "200"}
    for steps in ("4", "8"):
        assert record["nelbo_discrete_calibrated_bpd"][steps] < record["nelbo_discrete_bpd"][steps]
        assert record["nelbo_iw_bpd"][steps] < record["nelbo_discrete_bpd"][steps]
    assert (
        record["nelbo_discrete_bpd"]["4"]
        > record["nelbo_discrete_bpd"]["8"]
        > record["nelbo_discrete_bpd"]["200"]
    )
    assert record["nll_bpd_stderr"] > 0
    assert record["nfe_mean"] == 2 * (4 * 8 + 9)
    assert record["num_examples"] == record["split_size"] == 359
    names = [one["name"] for one in record["measurements"]]
    assert names.count("nelbo_discrete") == 3
    assert all(one["data_sha256"] == record["data_sha256"] for one in record["measurements"])
    assert all(isinstance(check["holds"], bool) for check in record["checks"])
    out = capsys.readouterr().out
    for number in (record["nelbo_bpd"], record["nll_bpd"], record["nelbo_discrete_bpd"]["200"]):
        assert f"{number:.4f}" in out
    assert len((tmp_path / "e.md").read_text().splitlines()) == len(names) + 2


def test_a_violated_relation_is_a_visible_warning(
    digits_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Minus a hundred standard errors is asked for: no difference passes that."""
    monkeypatch.setattr(
        "ndm.cli.evaluate.check_relations",
        lambda measurements: check_relations(measurements, errors=-100.0),
    )
    record = evaluate(digits_run, tmp_path / "e.json", "--nelbo", "--steps", "100", "--draws", "1")
    assert [check["holds"] for check in record["checks"]] == [False]
    streams = capsys.readouterr()
    assert "ndm: warning: a relation that should hold does not: NELBO" in streams.err
    assert "check: NELBO" in streams.out


def test_density_of_continuous_data_in_nats_and_in_the_units_of_the_source(
    table_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = evaluate(
        table_run,
        tmp_path / "e.json",
        "--nelbo",
        "--nll",
        "--dequantization",
        "none",
        "--draws",
        "4",
        "--dtype",
        "float64",
    )
    assert record["nll_nats_source_units"] == pytest.approx(
        record["nll_nats"] + record["log_scale_nats"]
    )
    assert record["dtype"] == "float64"
    assert record["measurements"][1]["probes"] == "exact"
    assert "density in the units of the data" in capsys.readouterr().out
    fitted = evaluate(
        table_run,
        tmp_path / "g.json",
        "--steps",
        " ",
        "--nelbo",
        "--calibrate",
        "--dtype",
        "float64",
        "--draws",
        "1",
    )
    assert "nelbo_calibrated_bpd" in fitted
    single = evaluate(table_run, tmp_path / "f.json", "--nll", "--dequantization", "none")
    assert single["nll_nats"] == pytest.approx(record["nll_nats"], abs=1e-3)
    assert "nelbo_bpd" not in single


def test_the_batch_size_does_not_change_the_number_and_a_limit_is_told(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (
        evaluate(
            *(
                digits_run,
                tmp_path / "e.json",
                "--nll",
                "--nelbo",
                "--solver",
                "rk4",
                "--nodes",
                "16",
            ),
            *("--limit", "15", "--draws", "2", "--batch_size", size),
        )
        for size in ("4", "15")
    )
    for name in ("nll_bpd", "nelbo_bpd", "nll_bpd_stderr", "nelbo_bpd_stderr"):
        assert first[name] == pytest.approx(second[name], rel=2e-4)
    assert (first["num_examples"], first["split_size"], first["limit"]) == (15, 359, 15)
    assert "15 of 359 (--limit)" in capsys.readouterr().out


def test_two_processes_agree_with_one_and_do_not_wait_for_each_other(
    digits_run: Path, tmp_path: Path
) -> None:
    """With an adaptive solver, whose ranks take different numbers of steps, and an odd number of
    batches.
    """
    words = [
        "--nelbo",
        "--nll",
        "--steps",
        "5",
        "--draws",
        "2",
        "--limit",
        "50",
        "--batch_size",
        "10",
        "--probes",
        "1",
        "--rtol",
        "1e-3",
    ]
    alone = evaluate(digits_run, tmp_path / "one.json", *words)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
        "-m",
        "ndm.cli",
    ]
    command = [*launcher, "evaluate", str(digits_run), "--json", str(tmp_path / "two.json"), *words]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1, "one process speaks for both"
    together = json.loads((tmp_path / "two.json").read_text())
    assert together["measurements"][0]["processes"] == 2
    for name in (
        "nll_bpd",
        "nll_bpd_stderr",
        "nelbo_bpd",
        "nelbo_bpd_stderr",
        "nfe_mean",
        "num_examples",
    ):
        assert together[name] == pytest.approx(alone[name], rel=1e-9), name
    assert together["nelbo_discrete_bpd"]["5"] == pytest.approx(
        alone["nelbo_discrete_bpd"]["5"], rel=1e-9
    )


def test_examples_of_the_user_are_measured_one_by_one(
    table_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of the test split in a file of their own have the numbers of the test split, and a
    row that lies far off has the worst.
    """
    source = Run(table_run).data()
    x = source.to_source_units(source.split("test").__getitems__(range(100)).double()).numpy()
    np.save(tmp_path / "x.npy", x)
    words = ["--nll", "--nelbo", "--draws", "2", "--solver", "rk4", "--nodes", "8"]
    expected = evaluate(table_run, tmp_path / "e.json", *words)
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "model"):  # the data of the run need not be there
        (tmp_path / "run" / name).symlink_to(table_run / name)
    found = evaluate(
        tmp_path / "run",
        tmp_path / "f.json",
        *words,
        "--data",
        str(tmp_path / "x.npy"),
        "--csv",
        str(tmp_path / "v.csv"),
    )
    for key in ("nelbo_bpd", "nll_bpd", "nelbo_nats_source_units", "nll_nats_source_units"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    assert (found["data"], found["split"], found["num_examples"]) == ("x", "all", 100)
    with (tmp_path / "v.csv").open() as file:
        head, *rows = csv.reader(file)
    assert (
        head[0] == "example"
        and len(head) == 3
        and [row[0] for row in rows] == [str(n) for n in range(100)]
    )
    for column, key in ((1, "nelbo_nats_source_units"), (2, "nll_nats_source_units")):
        assert np.mean([float(row[column]) for row in rows]) == pytest.approx(found[key], rel=1e-6)
    alone = evaluate(
        table_run / "model", tmp_path / "g.json", "--draws", "2", "--data", str(tmp_path / "x.npy")
    )
    assert alone["nelbo_bpd"] == pytest.approx(expected["nelbo_bpd"], rel=1e-5)
    x[7] = 9.0
    np.save(tmp_path / "x.npy", x)
    evaluate(
        table_run,
        tmp_path / "f.json",
        *words,
        "--data",
        str(tmp_path / "x.npy"),
        "--csv",
        str(tmp_path / "v.csv"),
    )
    values = np.loadtxt(tmp_path / "v.csv", delimiter=",", skiprows=1, usecols=-1)
    assert int(values.argmax()) == 7
    capsys.readouterr()
    assert (
        main(["evaluate", str(table_run), "--data", str(tmp_path / "x.npy"), "--split", "train"])
        == 2
    )
    assert "split=train does not go with data=" in capsys.readouterr().err
