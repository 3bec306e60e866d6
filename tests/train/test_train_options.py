"""Training options for images: samples while training, and horizontal flips."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cli.commands import exit_code, run_command
from ndm.data import Digits
from ndm.serialize import read_json

DIGITS: dict[str, Any] = {
    "data": {"class_path": "ndm.data.Digits", "init_args": {}},
    "model": {
        "transform": {"class_path": "ndm.Identity"},
        "predictor": {
            "class_path": "ndm.Predictor",
            "init_args": {
                "network": {
                    "class_path": "ndm.nn.UNet",
                    "init_args": {"channels": 8, "multiples": [1], "dropout": 0.2},
                }
            },
        },
        "decoder": {"class_path": "ndm.DiscretizedGaussian", "init_args": {"num_values": 17}},
    },
    "train": {"sample_images": 4, "evaluation_limit": 10},
}


def train(config: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    run_command("train --config", config, "--out", out, *options)
    return load_file(out / "model" / "model.safetensors")


def test_drawing_samples_while_training_changes_no_weights(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(**DIGITS)
    plain = train(config, tmp_path / "plain", "--train.accumulate 2")
    options = "--train.sample_every 10 --train.accumulate 2"
    pictured = train(config, tmp_path / "pictured", options)
    assert not (tmp_path / "plain" / "samples").exists()
    pictures = sorted((tmp_path / "pictured" / "samples").iterdir())
    assert [path.name for path in pictures] == ["step-0000010.png", "step-0000020.png"]
    assert Image.open(pictures[0]).tobytes() != Image.open(pictures[1]).tobytes()
    for name, value in plain.items():
        assert torch.equal(value, pictured[name]), name


def test_the_last_samples_while_training_are_those_of_the_trained_model(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(write_config(**DIGITS), run, "--train.sample_every 24")
    while_training = Image.open(run / "samples" / "step-0000024.png")
    assert while_training.tobytes() == Image.open(run / "samples.png").tobytes()


def test_failed_samples_do_not_stop_training(
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("ndm.train.fit.draw_samples", fail)
    monkeypatch.setattr("ndm.train.results.draw", lambda *arguments: None)
    run = tmp_path / "run"
    train(write_config(**DIGITS), run, "--train.sample_every 12")
    assert "no samples at step 12: no memory" in capsys.readouterr().err
    assert read_json(run / "metrics.json")["training_steps"] == 24


def test_flips_train_on_mirror_images(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(**DIGITS)
    plain = train(config, tmp_path / "plain")
    flipped = train(config, tmp_path / "flipped", "--train.horizontal_flips true")
    assert any(not torch.equal(value, flipped[name]) for name, value in plain.items())
    assert "horizontal flips" in capsys.readouterr().out
    data = read_json(tmp_path / "flipped" / "data.json")
    assert data["splits"]["train"] == len(
        Digits().split("train")
    )  # the data set itself is unchanged


def test_horizontal_flips_of_vectors_are_rejected(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train --config", write_config(), "--out", tmp_path / "run"]
    assert exit_code(*command, "--train.horizontal_flips true") == 2
    assert "holds no images but examples of shape (2,)" in capsys.readouterr().err
