"""``ndm quality``: its record, the stored classifier, and invalid input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from cli.commands import rejected, run_command
from conftest import TINY
from ndm.data import Digits

MLP = {
    "class_path": "ndm.nn.MLP",
    "init_args": {"dims": 64, "hidden": 32, "blocks": 1, "max_frequency": 2.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    model = {
        **TINY["model"],
        "transform": {"class_path": "ndm.Identity"},
        "predictor": {"class_path": "ndm.Predictor", "init_args": {"network": MLP}},
        "decoder": {"class_path": "ndm.DiscretizedGaussian", "init_args": {"num_values": 17}},
    }
    config = {**TINY, "data": {"class_path": "ndm.data.Digits"}, "model": model}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run_command("train --config", folder / "config.yaml", "--out", folder / "run")
    return folder / "run"


class Halves(nn.Module):
    """The means of the upper and the lower half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, :4].mean((1, 2)), x[:, 0, 4:].mean((1, 2))], 1)


@pytest.fixture(scope="module")
def halves(run: Path) -> Path:
    path = run.parent / "halves.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(Halves()), str(path))
    return path


def measure(run: Path, file: Path, *options: str | Path) -> dict[str, Any]:
    """Run ``ndm quality`` and return its record."""
    run_command("quality", run, "--json", file, "--steps 3", *options)
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def test_measures_with_a_user_network(
    run: Path, halves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--features", halves, "--features-scale unit --features-channels 1 --n 50"]
    first = measure(run, tmp_path / "a.json", *options)
    out = capsys.readouterr().out
    assert f"{first['samples']['fid']:.4f}" in out
    assert first["features_sha256"] in out
    assert (first["samples"]["generated_images"], first["samples"]["real_images"]) == (50, 1438)
    assert first["samples"]["fid"] > 5 * first["test_images"]["fid"], (
        "an untrained model is worse than real images"
    )
    assert measure(run, tmp_path / "b.json", *options)["samples"] == first["samples"]
    other_seed = measure(run, tmp_path / "c.json", *options, "--seed 1")
    assert other_seed["samples"]["fid"] != first["samples"]["fid"]
    other = measure(run, tmp_path / "d.json", *options, "--split test")
    assert other["samples"]["real_images"] == 359
    assert set(other) - set(first) == {"train_images"}
    train, test = (Digits().split(name) for name in ("train", "test"))
    gaps = [
        x.__getitems__(list(range(len(x))))[:, 0].unflatten(1, (2, 4)).mean((2, 3)) / 2
        for x in (train, test)
    ]
    shift = (gaps[0].mean(0) - gaps[1].mean(0)).square().sum()
    assert first["test_images"]["fid"] >= float(shift), "it includes the distance of the means"
    assert first["test_images"]["fid"] == pytest.approx(float(shift), abs=1e-3)


def test_the_classifier_is_trained_once_and_accepted_by_path(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ndm.quality.classifier.train_classifier.__defaults__", (0, 20, 64, 2e-3, False)
    )
    first = measure(run, tmp_path / "a.json", "--n 10")
    assert (run / "classifier" / "model.safetensors").exists()
    monkeypatch.setattr(
        "ndm.quality.classifier.train_classifier",
        lambda *_, **__: pytest.fail("the classifier is trained again"),
    )
    assert measure(run, tmp_path / "b.json", "--n 10") == first
    assert "accuracy" in capsys.readouterr().out
    named = measure(run, tmp_path / "c.json", "--n 10 --features", run / "classifier")
    assert named["samples"] == first["samples"]


def test_invalid_input_is_rejected(
    run: Path, halves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rejected(capsys, ["quality", tmp_path / "nothing"], "there is no run")
    rejected(capsys, ["quality", run, "--n 3"], "n=3", "at least 4")
    rejected(capsys, ["quality", run, "--split validation"], "its splits are: train, test")
    rejected(capsys, ["quality", run, "--json", tmp_path], "is a folder")
    rejected(capsys, ["quality", run, "--features", tmp_path / "none.pt"], "none.pt", "TorchScript")
    rejected(capsys, ["quality", run, "--features", run / "model"], "not a classifier")
    rejected(capsys, ["quality", run, "--features", halves, "--features-size 0"], "size=0")


def test_data_other_than_images_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY))
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    run_command("train --config", config, "--out", run, "--train.steps 2")
    rejected(capsys, ["quality", run], "does not contain images", "ndm evaluate")
