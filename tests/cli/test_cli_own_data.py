"""Train a shipped configuration on a folder of images and on a table, as the README shows."""

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cli.commands import exit_code, run_command
from ndm.cli.sample import write_values
from ndm.data import DataDescription, Table
from ndm.data.columns import clean
from ndm.data.other import read_like
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


def name_lists(count: int) -> st.SearchStrategy[list[str]]:
    """Return lists of different names: any text, with a preference for difficult ones."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    hard = st.sampled_from(
        ["a,b", 'a"b', "a\nb", "a\r\nb", "2020", "no", "1.5", "NA", "0", "1", "a;b"]
    )
    names = (text | hard).filter(lambda name: bool(clean(name)))
    return st.lists(names, min_size=count, max_size=count, unique_by=clean)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_samples_of_any_table_are_read_back_exactly(data: st.DataObject) -> None:
    """What ndm sample writes, ndm evaluate --data reads: names, magnitudes, types."""
    width, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
    names = data.draw(name_lists(width) | st.none())
    suffix = data.draw(st.sampled_from([".csv", ".npy"]))
    levels = data.draw(st.sampled_from([None, 2, 3, 300]))
    random = np.random.default_rng(seed)
    low = 0
    if levels is None:
        scale = 10.0 ** data.draw(st.integers(-60, 60))
        values = scale * (random.normal(size=(30, width)) + data.draw(st.sampled_from([0, 1e7])))
    else:
        low = data.draw(st.sampled_from([0, 1, -5, 20260101, 2**52]))
        values = low + random.integers(0, levels, (30, width))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if names is None:
            np.save(folder / "t.npy", values)
            path = folder / "t.npy"
        else:
            path = folder / "t.parquet"
            table = pyarrow.table(list(values.T), names=names)
            pyarrow.parquet.write_table(table, path)
        source = Table(str(path), num_values=levels, low=low if levels else None)
        description = DataDescription.from_dict(json.loads(json.dumps(source.describe().to_dict())))
        x = source.split("train")[:]
        write_values(folder / f"samples{suffix}", x, description)
        for reader in (source, None):
            back = read_like(reader, str(folder / f"samples{suffix}"), description)
            found = back.splits["all"][:]
            if levels is None:
                torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(found, x)


def read_cells(path: Path) -> list[list[str]]:
    """Return the cells of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("kind", ["julian", "unix", "dates"])
def test_training_sampling_and_evaluation_close(kind: str, tmp_path: Path) -> None:
    """Samples have the units of the data, and rows score the same through every file."""
    random = np.random.default_rng(0)
    options, values = "", random.normal(size=(60, 2))
    if kind == "dates":
        values = random.integers(20260101, 20260129, (60, 2))
        options = "--data.num_values 28 --data.low 20260101 --model.decoder ndm.DiscretizedGaussian"
        options += " --model.decoder.num_values 28"
    else:
        values = 2460000.5 + 0.01 * values if kind == "julian" else 1.7e9 + values
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["day, first", 'a "b"'], *values.tolist()])
    data = ["--config", find_config("table.yaml"), "--data.path", tmp_path / "t.csv", options]
    run = tmp_path / "run"
    run_command("train", *data, SHORT, "--out", run)
    for suffix in (".csv", ".npy"):
        samples = tmp_path / f"s{suffix}"
        run_command("sample", run, "--n 50 --steps 4 --out", samples)
        scores = tmp_path / f"scores{suffix}.csv"
        run_command("evaluate", run, "--draws 1 --data", samples, "--csv", scores)
    array = np.load(tmp_path / "s.npy")
    assert array.dtype.kind == ("u" if kind == "dates" else "f") and array.dtype.itemsize >= 4
    assert all(len(np.unique(column)) > 5 for column in array.T)
    rows = read_cells(tmp_path / "s.csv")
    assert rows[0] == ["day, first", 'a "b"']
    np.testing.assert_array_equal(np.array(rows[1:], dtype=float), array)
    if kind == "dates":
        assert array.min() >= 20260101 and array.max() <= 20260128
    first, second = ((tmp_path / f"scores{end}.csv").read_text() for end in (".csv", ".npy"))
    assert first == second and len(first.splitlines()) == 51


def test_a_row_too_far_away_is_named_and_all_others_are_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).normal(size=(40, 2))
    np.save(tmp_path / "t.npy", values)
    data = ["--config", find_config("table.yaml"), "--data.path", tmp_path / "t.npy"]
    run_command("train", *data, SHORT, "--out", tmp_path / "run")
    values[7, 1] = 1e20
    np.save(tmp_path / "new.npy", values)
    capsys.readouterr()
    options = ["--data", tmp_path / "new.npy", "--csv", tmp_path / "scores.csv"]
    run_command("evaluate", tmp_path / "run", "--draws 1", *options)
    captured = capsys.readouterr()
    assert "1 of 40 rows are left out" in captured.err
    assert "row 7 (the first is 0), column 1 holds 1e+20" in captured.err
    assert "39 of 40 examples" in captured.out
    rows = read_cells(tmp_path / "scores.csv")[1:]
    assert [int(row[0]) for row in rows] == list(range(40))
    assert [index for index, row in enumerate(rows) if not row[1]] == [7]
    assert all(np.isfinite(float(row[1])) for row in rows if row[1])
