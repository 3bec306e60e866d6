"""Training runs from the command line: logs, exact resuming after kill -9, several processes, EMA."""

import copy
import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import nn

import ndm
from ndm.cli.main import main
from ndm.data import Digits
from ndm.errors import UserError
from ndm.evaluation.processes import started_first
from ndm.nn import MLP
from ndm.serialize import read_json
from ndm.train.callbacks import EMA
from ndm.train.module import TrainingModule
from ndm.train.settings import TrainSettings
from oracles import Points

ConfigWriter = Callable[..., Path]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(config: Path, out: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "ndm.cli",
        "train",
        "--config",
        str(config),
        "--out",
        str(out),
        *overrides,
    ]


def train(config: Path, out: Path, *overrides: str) -> None:
    assert main(["train", "--config", str(config), "--out", str(out), *overrides]) == 0


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def log_rows(run: Path) -> list[dict[str, str]]:
    with (run / "logs/version_0/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_it_promises(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = write_config(), tmp_path / "run"
    train(config, run)
    for name in (
        "config.yaml",
        "data.json",
        "checkpoints/last.ckpt",
        "model/config.json",
        "metrics.json",
        "samples.png",
        "transform.png",
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
    for steps in (1, 250):
        train(
            config,
            tmp_path / f"run{steps}",
            "--train.steps",
            str(steps),
            "--train.learning_rate",
            "3e-3",
        )
    first, last = (
        float(str(read_json(tmp_path / f"run{steps}" / "metrics.json")["nelbo_nats"]))
        for steps in (1, 250)
    )
    assert last < first - 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_kill_in_mid_run_then_resume_equals_an_uninterrupted_run(
    optimizer: str, write_config: ConfigWriter, tmp_path: Path
) -> None:
    run = {
        "steps": 150,
        "batch_size": 16,
        "accelerator": "cpu",
        "devices": 1,
        "checkpoint_every": 5,
        "evaluation_draws": 1,
    }
    config = write_config(train=run | {"optimizer": optimizer})
    killed, checkpoint = tmp_path / "killed", tmp_path / "killed/checkpoints/last.ckpt"
    with subprocess.Popen(
        command(config, killed),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    content = torch.load(checkpoint, weights_only=True)
    assert 0 < content["global_step"] < 150
    assert not (killed / "metrics.json").exists()
    torch.save(content | {"seconds": content["seconds"] + 1000}, checkpoint)
    assert main(["train", "--out", str(killed)]) == 0  # the folder knows its configuration

    train(config, tmp_path / "whole")
    seconds = [
        float(str(read_json(tmp_path / name / "metrics.json")["training_seconds"]))
        for name in ("killed", "whole")
    ]
    assert 1000 < seconds[0] < 1000 + 2 * seconds[1] + 60, "of all calls"
    assert 0 < seconds[1] < 120
    expected = weights(tmp_path / "whole")
    for name, value in weights(killed).items():
        assert torch.equal(value, expected[name]), name
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        for name in ("killed", "whole")
    )
    for name, value in ours[
        "current_model_state"
    ].items():  # the trained weights beside their average
        assert torch.equal(value, theirs["current_model_state"][name]), name


def test_a_run_does_not_go_on_with_other_data(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row less draws another split, with rows in the test split that were trained on."""
    run, table = tmp_path / "run", tmp_path / "table.npy"
    rows = np.random.default_rng(0).normal(size=(50, 2))
    np.save(table, rows)
    config = write_config(data={"class_path": "ndm.data.Table", "init_args": {"path": str(table)}})
    train(config, run)
    (run / "metrics.json").unlink()  # as if interrupted before its end
    kept = (run / "checkpoints/last.ckpt").read_bytes(), (run / "data.json").read_bytes()
    np.save(table, rows[:-1])
    assert main(["train", "--out", str(run)]) == 2
    said = capsys.readouterr().err
    assert "table changed since" in said and said.count("\n") == 1
    assert ((run / "checkpoints/last.ckpt").read_bytes(), (run / "data.json").read_bytes()) == kept
    np.save(table, rows)
    assert main(["train", "--out", str(run)]) == 0
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.json").unlink()
    np.save(table, rows[:-1])
    assert main(["train", "--out", str(run)]) == 0, "from the beginning with any data"
    assert read_json(run / "data.json")["splits"] == {"train": 39, "test": 10}


def test_what_comes_after_the_last_step_may_change_until_it_is_done(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = write_config(), tmp_path / "run"
    train(config, run)
    assert main(["train", "--out", str(run), "--train.evaluation_limit", "7"]) == 2
    assert "another configuration: train.evaluation_limit" in capsys.readouterr().err
    before = weights(run)
    (run / "metrics.json").unlink()
    assert main(["train", "--out", str(run), "--train.learning_rate", "0.1"]) == 2
    assert (
        main(
            [
                "train",
                "--out",
                str(run),
                "--train.evaluation_limit",
                "7",
                "--train.evaluation_draws",
                "3",
            ]
        )
        == 0
    )
    metrics, stored = (
        read_json(run / "metrics.json"),
        yaml.safe_load((run / "config.yaml").read_text())["train"],
    )
    assert (metrics["num_examples"], stored["evaluation_limit"], stored["evaluation_draws"]) == (
        7,
        7,
        3,
    )
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())


def test_training_starts_from_the_weights_of_a_run(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, model = tmp_path / "first", tmp_path / "again", tmp_path / "model"
    train(write_config(), first)
    still = ["--train.steps", "1", "--train.learning_rate", "1e-12", "--train.ema", "0"]
    for folder, source in ((again, first), (model, first / "model")):
        train(write_config(), folder, "--train.start_from", str(source), *still)
        found, expected = (
            {name: value for name, value in weights(one).items() if "time_sampler." not in name}
            for one in (folder, first)
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    for option, value, place in (
        (
            "--model.predictor.network.hidden",
            "40",
            "predictor.network.hidden is 32 there and 40 here",
        ),
        (
            "--model.predictor.target",
            "x",
            "predictor.target is 'v' there and 'x' here",
        ),  # as many weights, of another meaning
        ("--model.schedule.gamma_0", "-5.0", "schedule.gamma_0 is -6.0 there and -5.0 here"),
    ):
        assert (
            main(
                command(
                    write_config(),
                    tmp_path / "other",
                    option,
                    value,
                    "--train.start_from",
                    str(first),
                )[3:]
            )
            == 2
        )
        error = capsys.readouterr().err
        assert f"train.start_from={first}: {place}" in error and error.count("\n") == 1
    assert not (tmp_path / "other").exists()
    train(
        write_config(),
        tmp_path / "longer",
        "--train.start_from",
        str(first),
        *still,
        "--model.steps",
        "7",
    )
    shutil.rmtree(first)  # what has a checkpoint does not need it any more
    (again / "metrics.json").unlink()
    assert main(["train", "--out", str(again)]) == 0


def test_two_cannot_train_into_one_folder(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt"
    config = write_config(
        train={
            "steps": 100_000,
            "batch_size": 4,
            "accelerator": "cpu",
            "devices": 1,
            "checkpoint_every": 5,
        }
    )
    with subprocess.Popen(
        command(config, run), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        before = (
            sorted(path.name for path in run.glob("logs/*")),
            (run / "config.yaml").read_bytes(),
        )
        assert main(["train", "--out", str(run), "--train.log_every", "7"]) == 2
        said = capsys.readouterr().err
        process.send_signal(signal.SIGKILL)
    assert "another process is training into this folder" in said and said.count("\n") == 1
    assert (
        sorted(path.name for path in run.glob("logs/*")),
        (run / "config.yaml").read_bytes(),
    ) == before
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"global_step": 100_000}, checkpoint)
    assert main(["train", "--out", str(run)]) == 0, "one that is killed lets go"


def test_a_folder_that_cannot_be_locked_is_trained_into(
    write_config: ConfigWriter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("ndm.train.run.FileLock.acquire", refuse)
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
def test_one_of_several_processes_is_the_first(
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
    train(config, tmp_path / "one", "--train.accumulate", "2")
    two = command(config, tmp_path / "two", "--train.devices", "2", "--train.strategy", "ddp")
    done = subprocess.run(two, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = weights(tmp_path / "one")
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_moving_average_is_the_exponential_one_after_its_warm_up() -> None:
    model = ndm.NDM(
        ndm.LinearLogSNRSchedule(),
        ndm.Identity(),
        ndm.Predictor(nn.Linear(1, 1)),
        ndm.GaussianDecoder(),
    )
    module, average = TrainingModule(model, TrainSettings(), 0, Points(torch.zeros(4, 1))), EMA(0.9)
    average.setup(Trainer(accelerator="cpu", logger=False), module, "fit")
    weight, seen = model.predictor.network.weight.data, []
    for count in range(400):
        weight.fill_(count)
        for _ in range(2):  # once a step, however many batches are accumulated
            average.on_train_batch_end(SimpleNamespace(global_step=count + 1), module)
        seen.append(float(average._average_model.module.model.predictor.network.weight.detach()))
    # The average of a ramp lags behind it by decay/(1 - decay).
    assert seen[-1] == pytest.approx(399 - 0.9 / 0.1, abs=1e-3)
    assert seen[0] == 0.0 and seen[1] == pytest.approx(1 - 2 / 11)


def test_mixed_precision_trains_close_to_full_precision(
    write_config: ConfigWriter, tmp_path: Path
) -> None:
    config = write_config()
    for precision in ("32-true", "bf16-mixed"):
        train(config, tmp_path / precision, "--train.precision", precision)
    full, mixed = (
        float(str(read_json(tmp_path / name / "metrics.json")["nelbo_nats"]))
        for name in ("32-true", "bf16-mixed")
    )
    assert mixed == pytest.approx(full, rel=0.02)
    assert mixed != full


def test_validation_leaves_training_untouched(write_config: ConfigWriter, tmp_path: Path) -> None:
    config = write_config()
    train(config, tmp_path / "without")
    train(config, tmp_path / "with", "--train.validate_every", "6")
    assert sum(bool(row.get("val/nelbo_bpd")) for row in log_rows(tmp_path / "with")) == 4
    expected = weights(tmp_path / "without")
    for name, value in weights(tmp_path / "with").items():
        assert torch.equal(value, expected[name]), name


def test_accumulation_logs_every_so_many_optimizer_steps(
    write_config: ConfigWriter, tmp_path: Path
) -> None:
    train(write_config(), tmp_path / "run", "--train.accumulate", "4", "--train.log_every", "6")
    assert (
        sum(bool(row.get("train/nelbo_bpd")) for row in log_rows(tmp_path / "run")) == 4
    )  # 24 steps, a row every 6


def test_events_that_are_no_pictures_finish_too(write_config: ConfigWriter, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(60, 4, 2, 2))
    np.save(tmp_path / "latents.npy", values)
    config = yaml.safe_load(write_config().read_text())
    config["data"] = {
        "class_path": "ndm.data.Table",
        "init_args": {"path": str(tmp_path / "latents.npy")},
    }
    for part in ("transform", "predictor"):
        config["model"][part]["init_args"]["network"]["init_args"]["dims"] = 16
    (tmp_path / "latents.yaml").write_text(yaml.safe_dump(config))
    train(tmp_path / "latents.yaml", tmp_path / "run")
    assert (tmp_path / "run/metrics.json").exists()
    assert (
        main(
            [
                "sample",
                str(tmp_path / "run"),
                "--n",
                "3",
                "--steps",
                "2",
                "--out",
                str(tmp_path / "x.NPY"),
            ]
        )
        == 0
    )
    assert np.load(tmp_path / "x.NPY").shape == (3, 4, 2, 2)
    assert not list(tmp_path.glob(".x*"))


def test_a_copy_of_the_module_shares_its_data() -> None:
    data = Digits().split("train")
    assert copy.deepcopy(data) is data


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_rates_and_decay_belong_to_groups(optimizer: str) -> None:
    """F has a rate of its own, here zero, and only matrices decay. SOAP's first step sets up its
    basis and moves nothing.
    """
    model = ndm.NDM(
        ndm.LearnedSchedule(),
        ndm.NetworkTransform(MLP(2, hidden=4, blocks=1)),
        ndm.Predictor(MLP(2, hidden=4, blocks=1)),
        ndm.GaussianDecoder(),
    )
    settings = TrainSettings(
        steps=10,
        optimizer=optimizer,
        learning_rate=0.1,
        transform_rate=0.0,
        weight_decay=0.5,
        warmup=0,
        decay="constant",
    )  # type: ignore[arg-type]
    module = TrainingModule(model, settings, 0, Points(torch.zeros(4, 2)))
    stepper = module.configure_optimizers()["optimizer"]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(2):
        for value in model.parameters():
            value.grad = torch.zeros_like(value)
        stepper.step()
    for name, value in model.named_parameters():
        factor = (
            0.95 ** (2 if optimizer == "adamw" else 1)
            if value.dim() >= 2 and ".transform." not in name
            else 1.0
        )
        torch.testing.assert_close(value.detach(), factor * before[name], msg=name)


def test_a_module_may_say_by_a_method_what_does_not_decay() -> None:
    """As networks of timm do, for all sizes of theirs, so that not every name is there."""

    class Network(nn.Linear):
        def no_weight_decay(self) -> set[str]:
            return {"weight", "position"}

    model = ndm.NDM(
        ndm.LinearLogSNRSchedule(),
        ndm.Identity(),
        ndm.Predictor(Network(2, 2)),
        ndm.GaussianDecoder(),
    )
    module = TrainingModule(model, TrainSettings(weight_decay=0.5), 0, Points(torch.zeros(4, 2)))
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 2


def test_pictures_that_cannot_be_drawn_cost_no_numbers(
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


def test_soap_with_sharded_weights_is_refused() -> None:
    with pytest.raises(UserError, match="optimizer=adamw"):
        TrainSettings(optimizer="soap", strategy="fsdp", ema=0, gradient_clip=0)
