"""``ndm quality``: from a run to numbers with their fingerprint, the same again, and bad input
refused.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from conftest import TINY
from ndm.cli.main import main
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
    assert (
        main(["train", "--config", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
    )
    return folder / "run"


class Halves(nn.Module):
    """Means of the upper and of the lower half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, :4].mean((1, 2)), x[:, 0, 4:].mean((1, 2))], 1)


@pytest.fixture(scope="module")
def halves(run: Path) -> Path:
    path = run.parent / "halves.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(Halves()), str(path))
    return path


def measure(run: Path, file: Path, *words: str) -> dict[str, Any]:
    assert main(["quality", str(run), "--json", str(file), "--steps", "3", *words]) == 0
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def test_numbers_with_a_network_of_the_user(
    run: Path, halves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--features",
        str(halves),
        "--features-scale",
        "unit",
        "--features-channels",
        "1",
        "--n",
        "50",
    ]
    first = measure(run, tmp_path / "a.json", *words)
    out = capsys.readouterr().out
    assert f"{first['samples']['fid']:.4f}" in out
    assert first["features_sha256"] in out
    assert (first["samples"]["generated_images"], first["samples"]["real_images"]) == (50, 1438)
    assert first["samples"]["fid"] > 5 * first["test_images"]["fid"], (
        "an untrained model is worse than real images"
    )
    assert measure(run, tmp_path / "b.json", *words)["samples"] == first["samples"]
    assert (
        measure(run, tmp_path / "c.json", *words, "--seed", "1")["samples"]["fid"]
        != first["samples"]["fid"]
    )
    other = measure(run, tmp_path / "d.json", *words, "--split", "test")
    assert other["samples"]["real_images"] == 359
    assert set(other) - set(first) == {"train_images"}
    train, test = (Digits().split(name) for name in ("train", "test"))
    gaps = [
        x.__getitems__(list(range(len(x))))[:, 0].unflatten(1, (2, 4)).mean((2, 3)) / 2
        for x in (train, test)
    ]
    shift = (gaps[0].mean(0) - gaps[1].mean(0)).square().sum()
    assert first["test_images"]["fid"] >= float(shift), "the distance of the means is a part of it"
    assert first["test_images"]["fid"] == pytest.approx(float(shift), abs=1e-3)


def test_the_classifier_is_trained_once_and_can_be_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ndm.quality.classifier.train_classifier.__defaults__", (0, 20, 64, 2e-3, False)
    )
    first = measure(run, tmp_path / "a.json", "--n", "10")
    assert (run / "classifier" / "model.safetensors").exists()
    monkeypatch.setattr(
        "ndm.quality.classifier.train_classifier",
        lambda *_, **__: pytest.fail("it is there already"),
    )
    assert measure(run, tmp_path / "b.json", "--n", "10") == first
    assert "accuracy" in capsys.readouterr().out
    assert (
        measure(run, tmp_path / "c.json", "--n", "10", "--features", str(run / "classifier"))[
            "samples"
        ]
        == first["samples"]
    )


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *culprits: str) -> None:
    capsys.readouterr()
    assert main(["quality", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert all(culprit in lines[0] for culprit in culprits), lines[0]


def test_bad_input(
    run: Path, halves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word = str(run)
    refused(capsys, [str(tmp_path / "nothing")], "there is no run")
    refused(capsys, [word, "--n", "3"], "n=3", "at least 4")
    refused(capsys, [word, "--split", "validation"], "its splits are: train, test")
    refused(capsys, [word, "--json", str(tmp_path)], "is a folder")
    refused(capsys, [word, "--features", str(tmp_path / "none.pt")], "none.pt", "TorchScript")
    refused(capsys, [word, "--features", str(run / "model")], "not a classifier")
    refused(capsys, [word, "--features", str(halves), "--features-size", "0"], "size=0")


def test_data_that_are_no_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY))
    assert (
        main(
            [
                "train",
                "--config",
                str(tmp_path / "config.yaml"),
                "--out",
                str(tmp_path / "run"),
                "--train.steps",
                "2",
            ]
        )
        == 0
    )
    refused(capsys, [str(tmp_path / "run")], "does not contain images", "ndm evaluate")
