"""The README's way to data of one's own: a configuration that is there, a path, and what has to fit
it.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ndm.cli.main import main
from ndm.serialize import read_json
from ndm.train.config import find_config

SHORT = (
    "--train.steps=2",
    "--train.batch_size=4",
    "--train.accelerator=cpu",
    "--train.devices=1",
    "--train.precision=32-true",
)
SMALL = (
    "--train.sample_steps=2",
    "--train.sample_images=4",
    "--train.evaluation_draws=1",
    "--train.evaluation_limit=4",
)


def test_images_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.jpg")
    words = [
        "--config",
        str(find_config("images.yaml")),
        "--data.path",
        str(tmp_path / "photos"),
        "--data.size",
        "8",
    ]
    small = [
        "--model.transform.network.channels=8",
        "--model.predictor.network.channels=8",
        "--model.predictor.network.blocks=1",
    ]
    assert main(["train", *words, *small, *SHORT, *SMALL, "--out", str(tmp_path / "run")]) == 0
    assert read_json(tmp_path / "run/data.json")["event_shape"] == [3, 8, 8]
    assert (
        main(
            [
                "evaluate",
                str(tmp_path / "run"),
                "--draws",
                "1",
                "--data",
                str(tmp_path / "photos"),
                "--csv",
                str(tmp_path / "x.csv"),
            ]
        )
        == 0
    )
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert len(lines) == 11 and all(f"{index}.jpg" in line for index, line in enumerate(lines[1:]))


def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).normal(5, 2, (30, 3))
    np.savetxt(tmp_path / "table.csv", rows, delimiter=",", header="a,b,c", comments="")
    words = ["--config", str(find_config("table.yaml")), "--data.path", str(tmp_path / "table.csv")]
    assert main(["train", *words, *SHORT, *SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "set dims to fit the data" in capsys.readouterr().err and not (tmp_path / "run").exists()
    dims = ["--model.transform.network.dims=3", "--model.predictor.network.dims=3"]
    assert main(["train", *words, *dims, *SHORT, *SMALL, "--out", str(tmp_path / "run")]) == 0
    assert (
        main(
            [
                "sample",
                str(tmp_path / "run"),
                "--n",
                "50",
                "--steps",
                "4",
                "--out",
                str(tmp_path / "x.npy"),
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "sample",
                str(tmp_path / "run"),
                "--n",
                "50",
                "--steps",
                "4",
                "--out",
                str(tmp_path / "x.csv"),
            ]
        )
        == 0
    )
    assert (tmp_path / "x.csv").read_text().startswith("a,b,c\n")
    np.testing.assert_allclose(
        np.loadtxt(tmp_path / "x.csv", delimiter=",", skiprows=1),
        np.load(tmp_path / "x.npy"),
        rtol=1e-6,
    )
    assert np.load(tmp_path / "x.npy").shape == (50, 3)
    assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "folder")]) == 2
    assert "are not images" in capsys.readouterr().err and not (tmp_path / "folder").exists()
