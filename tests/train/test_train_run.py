"""Training runs from the command line: files, exact resuming, several processes, precision."""

import contextlib
import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import ndm
from cli.commands import arguments, exit_code, run_command
from ndm.errors import UserError
from ndm.evaluation.processes import started_first
from ndm.serialize import read_json
from ndm.train.run import Run

ConfigWriter = Callable[..., Path]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(config: Path, out: Path, overrides: str = "") -> list[str]:
    """The command that trains in another process."""
    train = arguments("-m ndm.cli train --config", config, "--out", out, overrides)
    return [sys.executable, *train]


@contextlib.contextmanager
def training(config: Path, out: Path) -> Iterator[None]:
    """Train in another process, from its first checkpoint until it is killed at the end."""
    checkpoint = out / "checkpoints/last.ckpt"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(config, out), env=ENVIRONMENT, **quiet) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield
        finally:
            process.send_signal(signal.SIGKILL)


def train(config: Path, out: Path, *overrides: str | Path) -> None:
    run_command("train --config", config, "--out", out, *overrides)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def log_rows(run: Path) -> list[dict[str, str]]:
    with (run / "logs/version_0/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def metric(run: Path, name: str) -> float:
    return float(str(read_json(run / "metrics.json")[name]))


def test_a_run_writes_its_documented_files(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = write_config(), tmp_path / "run"
    train(config, run)
    for name in arguments(
        "config.yaml data.json checkpoints/last.ckpt model/config.json metrics.json"
        " samples.png transform.png"
    ):
        assert (run / name).stat().st_size > 0, name
    metrics = read_json(run / "metrics.json")
    terms = [metrics[f"{name}_bpd"] for name in ("prior", "diffusion", "reconstruction")]
    assert sum(terms) == pytest.approx(metrics["nelbo_bpd"], abs=1e-9)
    assert metrics["num_examples"] == 100

    model = ndm.NDM.from_pretrained(run / "model")
    averaged = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, averaged[f"model.{name}"])

    rows = [row for row in log_rows(run) if row.get("train/nelbo_bpd")]
    assert len(rows) == 6  # 24 steps, a row every 4
    for row in rows:
        parts = [
            float(row[f"train/{name}_bpd"]) for name in ("prior", "diffusion", "reconstruction")
        ]
        assert sum(parts) == pytest.approx(float(row["train/nelbo_bpd"]), rel=1e-5)
    assert list((run / "logs/version_0").glob("events.out.tfevents*"))

    before = (run / "metrics.json").stat().st_mtime_ns
    capsys.readouterr()
    train(config, run)
    assert "is finished" in capsys.readouterr().out
    assert (run / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_training_lowers_the_bound(
    optimizer: str, write_config: ConfigWriter, tmp_path: Path
) -> None:
    config = write_config(train={"optimizer": optimizer})
    for steps in (1, 120):
        options = f"--train.steps {steps} --train.learning_rate 3e-3"
        train(config, tmp_path / f"run{steps}", options)
    first, last = (metric(tmp_path / f"run{steps}", "nelbo_nats") for steps in (1, 120))
    assert last < first - 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(
    optimizer: str, write_config: ConfigWriter, tmp_path: Path
) -> None:
    run = {
        "steps": 100,
        "batch_size": 16,
        "accelerator": "cpu",
        "devices": 1,
        "checkpoint_every": 5,
        "evaluation_draws": 1,
    }
    config = write_config(train=run | {"optimizer": optimizer})
    killed, checkpoint = tmp_path / "killed", tmp_path / "killed/checkpoints/last.ckpt"
    with training(config, killed):
        pass
    content = torch.load(checkpoint, weights_only=True)
    assert 0 < content["global_step"] < 100
    assert not (killed / "metrics.json").exists()
    torch.save(content | {"seconds": content["seconds"] + 1000}, checkpoint)
    run_command("train --out", killed)  # the folder holds its configuration

    train(config, tmp_path / "whole")
    seconds, whole = (metric(tmp_path / name, "training_seconds") for name in ("killed", "whole"))
    assert 1000 < seconds < 1000 + 2 * whole + 60, "summed over all calls"
    assert 0 < whole < 120
    expected = weights(tmp_path / "whole")
    for name, value in weights(killed).items():
        assert torch.equal(value, expected[name]), name
    found, expected = (
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["current_model_state"]
        for run in (killed, tmp_path / "whole")
    )
    for name, value in found.items():  # the weights before averaging
        assert torch.equal(value, expected[name]), name


def test_a_run_does_not_resume_with_other_data(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one row, another split is drawn, and training rows leak into the test split."""
    run, table = tmp_path / "run", tmp_path / "table.npy"
    rows = np.random.default_rng(0).normal(size=(50, 2))
    np.save(table, rows)
    config = write_config(data={"class_path": "ndm.data.Table", "init_args": {"path": str(table)}})
    train(config, run)
    (run / "metrics.json").unlink()  # as if interrupted before its end
    stored = (run / "checkpoints/last.ckpt").read_bytes(), (run / "data.json").read_bytes()
    np.save(table, rows[:-1])
    assert exit_code("train --out", run) == 2
    error = capsys.readouterr().err
    assert "table changed since" in error and error.count("\n") == 1
    assert (
        (run / "checkpoints/last.ckpt").read_bytes(),
        (run / "data.json").read_bytes(),
    ) == stored
    np.save(table, rows)
    run_command("train --out", run)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.json").unlink()
    np.save(table, rows[:-1])
    assert exit_code("train --out", run) == 0, "without a checkpoint, any data are accepted"
    assert read_json(run / "data.json")["splits"] == {"train": 39, "test": 10}


def test_evaluation_settings_may_change_until_the_run_is_finished(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = write_config(), tmp_path / "run"
    train(config, run)
    assert exit_code("train --out", run, "--train.evaluation_limit 7") == 2
    assert "another configuration: train.evaluation_limit" in capsys.readouterr().err
    before = weights(run)
    (run / "metrics.json").unlink()
    assert exit_code("train --out", run, "--train.learning_rate 0.1") == 2
    run_command("train --out", run, "--train.evaluation_limit 7 --train.evaluation_draws 3")
    settings = yaml.safe_load((run / "config.yaml").read_text())["train"]
    assert (settings["evaluation_limit"], settings["evaluation_draws"]) == (7, 3)
    assert read_json(run / "metrics.json")["num_examples"] == 7
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())


def test_training_starts_from_the_weights_of_a_run(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, model = tmp_path / "first", tmp_path / "again", tmp_path / "model"
    train(write_config(), first)
    tiny_step = "--train.steps 1 --train.learning_rate 1e-12 --train.ema 0"
    for folder, source in ((again, first), (model, first / "model")):
        train(write_config(), folder, "--train.start_from", source, tiny_step)
        found, expected = (
            {name: value for name, value in weights(one).items() if "time_sampler." not in name}
            for one in (folder, first)
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    for option, difference in (
        ("--model.predictor.network.hidden=40", "predictor.network.hidden is 32 there and 40 here"),
        # the same number of weights, with another meaning
        ("--model.predictor.target=x", "predictor.target is 'v' there and 'x' here"),
        ("--model.schedule.gamma_0=-5.0", "schedule.gamma_0 is -6.0 there and -5.0 here"),
    ):
        options = ["--out", tmp_path / "other", option, "--train.start_from", first]
        assert exit_code("train --config", write_config(), *options) == 2
        error = capsys.readouterr().err
        assert f"train.start_from={first}: {difference}" in error and error.count("\n") == 1
    assert not (tmp_path / "other").exists()
    options = ["--train.start_from", first, tiny_step, "--model.steps 7"]
    train(write_config(), tmp_path / "longer", *options)
    shutil.rmtree(first)  # a run with a checkpoint does not need it
    (again / "metrics.json").unlink()
    run_command("train --out", again)


def test_two_processes_cannot_train_into_one_folder(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = write_config(
        train={
            "steps": 100_000,
            "batch_size": 4,
            "accelerator": "cpu",
            "devices": 1,
            "checkpoint_every": 5,
        }
    )

    def state() -> tuple[list[str], bytes]:
        return sorted(path.name for path in run.glob("logs/*")), (run / "config.yaml").read_bytes()

    with training(config, run):
        before = state()
        assert exit_code("train --out", run, "--train.log_every 7") == 2
        error = capsys.readouterr().err
    assert "another process is training into this folder" in error and error.count("\n") == 1
    assert state() == before
    with Run(run).lock():
        pass  # a killed process releases its lock


def test_a_folder_without_file_locks_is_accepted_with_a_warning(
    write_config: ConfigWriter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("ndm.train.run.FileLock.acquire", no_locks)
    train(write_config(), tmp_path / "run")
    assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"RANK": "4", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_exactly_one_process_is_the_first(
    ranks: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert started_first() is first


def test_two_processes_agree_with_one_on_the_same_global_batch(
    write_config: ConfigWriter, tmp_path: Path
) -> None:
    config = write_config(model={"time_sampler": {"class_path": "ndm.LowDiscrepancyTimeSampler"}})
    train(config, tmp_path / "one", "--train.accumulate 2")
    two = command(config, tmp_path / "two", "--train.devices 2 --train.strategy ddp")
    done = subprocess.run(two, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = weights(tmp_path / "one")
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_mixed_precision_trains_close_to_full_precision(
    write_config: ConfigWriter, tmp_path: Path
) -> None:
    config = write_config()
    for precision in ("32-true", "bf16-mixed"):
        train(config, tmp_path / precision, "--train.precision", precision)
    full, mixed = (metric(tmp_path / name, "nelbo_nats") for name in ("32-true", "bf16-mixed"))
    assert mixed == pytest.approx(full, rel=0.02)
    assert mixed != full


def test_validation_leaves_training_untouched(write_config: ConfigWriter, tmp_path: Path) -> None:
    config = write_config()
    train(config, tmp_path / "without")
    train(config, tmp_path / "with", "--train.validate_every 6")
    assert sum(bool(row.get("val/nelbo_bpd")) for row in log_rows(tmp_path / "with")) == 4
    expected = weights(tmp_path / "without")
    for name, value in weights(tmp_path / "with").items():
        assert torch.equal(value, expected[name]), name


def test_accumulation_logs_by_optimizer_steps(write_config: ConfigWriter, tmp_path: Path) -> None:
    train(write_config(), tmp_path / "run", "--train.accumulate 4 --train.log_every 6")
    rows = [row for row in log_rows(tmp_path / "run") if row.get("train/nelbo_bpd")]
    assert len(rows) == 4  # 24 steps, a row every 6


def test_runs_on_data_other_than_images_finish(write_config: ConfigWriter, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(60, 4, 2, 2))
    np.save(tmp_path / "latents.npy", values)
    config = yaml.safe_load(write_config().read_text())
    path = str(tmp_path / "latents.npy")
    config["data"] = {"class_path": "ndm.data.Table", "init_args": {"path": path}}
    for part in ("transform", "predictor"):
        config["model"][part]["init_args"]["network"]["init_args"]["dims"] = 16
    (tmp_path / "latents.yaml").write_text(yaml.safe_dump(config))
    train(tmp_path / "latents.yaml", tmp_path / "run")
    assert (tmp_path / "run/metrics.json").exists()
    run_command("sample", tmp_path / "run", "--n 3 --steps 2 --out", tmp_path / "x.NPY")
    assert np.load(tmp_path / "x.NPY").shape == (3, 4, 2, 2)
    assert not list(tmp_path.glob(".x*"))


def test_a_run_without_samples_still_has_its_metrics(
    write_config: ConfigWriter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def diverges(*_: object, **__: object) -> torch.Tensor:
        raise UserError("samples are not finite")

    monkeypatch.setattr(ndm.NDM, "sample", diverges)
    train(write_config(), tmp_path / "run")
    assert read_json(tmp_path / "run/metrics.json")["nelbo_bpd"]
    assert "has no pictures: samples are not finite" in capsys.readouterr().err
