"""Runs that end early: removed folders, killed processes, full disks, interruptions, bad files."""

import errno
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ndm
from cli.commands import arguments, exit_code, rejected, run_command
from ndm.errors import UserError
from ndm.serialize import read_json, write_atomically, write_json
from ndm.train.callbacks import Interrupts
from ndm.train.run import Run

ConfigWriter = Callable[..., Path]
LONG = "--train.steps 100000 --train.checkpoint_every 5"


def start(config: Path, run: Path, options: str = LONG) -> subprocess.Popen[str]:
    """Train in another process, up to its first checkpoint."""
    command = arguments("-m ndm.cli train --config", config, "--out", run, options)
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    return process


def messages(process: subprocess.Popen[str]) -> list[str]:
    """The lines on standard error, without the progress bar."""
    lines = process.communicate(timeout=60)[1].replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "it/s]" not in line and "it/s," not in line]


def test_a_run_whose_folder_is_removed_ends_with_one_line(
    write_config: ConfigWriter, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(write_config(), run)
    run.rename(tmp_path / "elsewhere")
    lines = messages(process)
    assert process.returncode == 2
    assert len(lines) == 1 and f"{run} was removed or renamed while it trained" in lines[0], lines
    assert not run.exists(), "no checkpoint without its configuration"


def test_the_others_end_with_one_line_when_a_process_is_killed(
    write_config: ConfigWriter, tmp_path: Path
) -> None:
    options = f"{LONG} --train.devices 2 --train.strategy ddp"
    process = start(write_config(), tmp_path / "run", options)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    lines = messages(process)
    assert process.returncode == 2
    assert "another process of this training ended" in lines[-1], lines
    assert "Traceback" not in "".join(lines)


def test_an_interrupted_run_prints_one_line(write_config: ConfigWriter, tmp_path: Path) -> None:
    process = start(write_config(), tmp_path / "run")
    process.send_signal(signal.SIGINT)
    assert messages(process) == ["ndm: interrupted; rerun the command to resume"]
    assert process.returncode == 130


def test_interruptions_wait_for_the_end_of_a_batch_and_a_second_one_does_not() -> None:
    interrupts = Interrupts()
    with interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.pending
        with pytest.raises(KeyboardInterrupt):
            interrupts.on_train_batch_start()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_full_disk_at_any_byte_of_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    content = {str(index): torch.zeros(16) for index in range(100)}
    path = tmp_path / "last.ckpt"

    def save(temporary: Path) -> None:
        torch.save(content, temporary)

    write_atomically(path, save)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for missing in (1, 100, 1000, 5000, 10_000, len(before) // 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - missing, hard))
            with pytest.raises(UserError, match="is the disk full"):
                write_atomically(path, save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_whose_pictures_found_the_disk_full_is_not_finished(
    write_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        def write(_: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        write_atomically(path, write)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ndm.train.results.write_transform", full)
        assert exit_code("train --config", write_config(), "--out", run) == 2
    assert not (run / "metrics.json").exists()
    run_command("train --out", run)
    assert (run / "transform.png").exists()


@pytest.mark.parametrize("bits", [None, "3", [], True])
def test_metrics_without_a_bound_are_rejected(
    bits: object, write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_command("train --config", write_config(), "--out", run, "--train.steps 2")
    write_json(run / "metrics.json", read_json(run / "metrics.json") | {"nelbo_bpd": bits})
    rejected(capsys, ["train --out", run], "metrics.json", "nelbo_bpd", "delete it")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_rejected(
    value: float, write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_command("train --config", write_config(), "--out", run, "--train.steps 2")
    path = run / "model/model.safetensors"
    weights = load_file(path)
    name = next(name for name, tensor in weights.items() if tensor.dim() == 2)
    weights[name][0, 0] = value
    save_file(weights, path)
    rejected(capsys, ["evaluate", run], "model.safetensors", name, "not finite")
    with pytest.raises(UserError, match="not finite"):
        ndm.DiffusionModel.from_pretrained(run / "model")
    shutil.rmtree(run / "model")
    checkpoint = run / "checkpoints/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"][f"model.{name}"][0, 0] = value
    torch.save(content, checkpoint)
    rejected(capsys, ["evaluate", run], "last.ckpt", name, "not finite")


@pytest.mark.parametrize(
    "option",
    [
        f"--seed {2**64}",
        f"--seed {10**30}",
        f"--train.steps {10**30}",
        f"--train.steps {2**31}",
        f"--train.accumulate {10**30}",
        f"--train.batch_size {10**30}",
        f"--train.warmup {10**400}",
        f"--train.threads {10**6}",
        f"--train.workers {10**9}",
        f"--train.devices {10**30}",
        f"--train.log_every {10**30}",
        f"--train.sample_images {10**30}",
    ],
)
def test_integers_out_of_range_are_rejected(
    option: str, write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = option.split()[0].removeprefix("--")
    command = ["train --config", write_config(), "--out", tmp_path / "run", option]
    line = rejected(capsys, command, name, "give an integer")
    assert len(line) < 300
    assert not (tmp_path / "run").exists()


def test_the_greatest_seed_trains(write_config: ConfigWriter, tmp_path: Path) -> None:
    options = f"--seed {2**64 - 1} --train.steps 2"
    run_command("train --config", write_config(), "--out", tmp_path / "run", options)
    assert Run(tmp_path / "run").metrics()["training_steps"] == 2


def test_partial_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    partial = {
        ".config-ab_cd123.yaml",
        ".data-abcd1234.json",
        ".metrics-abcd1234.json",
        ".samples-abcd1234.png",
        ".transform-abcd1234.png",
        "samples/.step-0000010-abcd1234.png",
        "checkpoints/.last-abcd1234.ckpt",
        "model/.config-abcd1234.json",
        "model/.model-abcd1234.safetensors",
    }
    kept = {"config.yaml", ".notes-abcd1234.txt", "samples/step-0000010.png"}
    for name in partial | kept:
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).touch()
    with run.lock():
        pass
    files = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert files - {".lock"} == kept
