"""Train a shipped configuration on a folder of images and on a table, as the README shows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.commands import exit_code, run_command
from ndm.serialize import read_json
from ndm.train.config import find_config

SHORT = (
    "--train.steps=2 --train.batch_size=4 --train.accelerator=cpu --train.devices=1"
    " --train.precision=32-true --train.sample_steps=2 --train.sample_images=4"
    " --train.evaluation_draws=1 --train.evaluation_limit=4"
)


def test_images_of_a_folder_are_trained_and_evaluated(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.jpg")
    data = ["--data.path", tmp_path / "photos", "--data.size 8"]
    small = (
        "--model.transform.network.channels=8 --model.predictor.network.channels=8"
        " --model.predictor.network.blocks=1"
    )
    config = find_config("images.yaml")
    run_command("train --config", config, *data, small, SHORT, "--out", tmp_path / "run")
    assert read_json(tmp_path / "run/data.json")["event_shape"] == [3, 8, 8]
    options = ["--draws 1 --data", tmp_path / "photos", "--csv", tmp_path / "x.csv"]
    run_command("evaluate", tmp_path / "run", *options)
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert len(lines) == 11
    assert all(f"{index}.jpg" in line for index, line in enumerate(lines[1:]))


def test_a_table_is_trained_and_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).normal(5, 2, (30, 3))
    np.savetxt(tmp_path / "table.csv", rows, delimiter=",", header="a,b,c", comments="")
    data = ["--config", find_config("table.yaml"), "--data.path", tmp_path / "table.csv"]
    run = tmp_path / "run"
    assert exit_code("train", *data, SHORT, "--out", run) == 2
    assert "set dims to fit the data" in capsys.readouterr().err
    assert not run.exists()
    dims = "--model.transform.network.dims=3 --model.predictor.network.dims=3"
    run_command("train", *data, dims, SHORT, "--out", run)
    run_command("sample", run, "--n 50 --steps 4 --out", tmp_path / "x.npy")
    run_command("sample", run, "--n 50 --steps 4 --out", tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().startswith("a,b,c\n")
    samples = np.load(tmp_path / "x.npy")
    assert samples.shape == (50, 3)
    written = np.loadtxt(tmp_path / "x.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(written, samples, rtol=1e-6)
    assert exit_code("sample", run, "--out", tmp_path / "folder") == 2
    assert "are not images" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
