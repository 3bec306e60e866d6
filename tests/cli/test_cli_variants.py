"""NFDM and optimal transport are trained, sampled and evaluated like every other model."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import ndm
from cli.commands import run_command
from ndm.data import TwoMoons, spread

SHORT = {
    "train.steps": "4",
    "train.batch_size": "16",
    "train.warmup": "1",
    "train.checkpoint_every": "2",
    "train.log_every": "2",
    "train.evaluation_draws": "1",
    "train.evaluation_limit": "50",
    "train.sample_steps": "2",
    "train.accelerator": "cpu",
}
CLASSES = {"nfdm": ndm.NFDM, "transport": ndm.variants.TransportNDM}


@pytest.fixture(scope="module", params=CLASSES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    options = [f"--{name}={value}" for name, value in SHORT.items()]
    run_command("train --config", request.param, "--out", folder, *options)
    return folder


def test_the_saved_model_has_the_class_of_the_configuration(run: Path) -> None:
    model = ndm.DiffusionModel.from_pretrained(run / "model")
    assert type(model) is CLASSES[run.name]
    assert (run / "samples.png").is_file()
    assert (run / "transform.png").is_file()


def test_the_command_draws_the_samples_of_the_model(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.npy"
    run_command("sample", run, "--n 6 --steps 3 --seed 7 --out", out)
    model = ndm.DiffusionModel.from_pretrained(run / "model").eval()
    expected = TwoMoons().to_source_units(model.sample(6, steps=3, seed=7, batch_size=256))
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-5, atol=1e-6)


def test_evaluate_returns_the_bound_and_the_likelihood(run: Path, tmp_path: Path) -> None:
    record, table = tmp_path / "evaluation.json", tmp_path / "examples.csv"
    options = "--nelbo --nll --dequantization none --limit 4 --draws 2 --solver rk4 --nodes 8"
    run_command("evaluate", run, options, "--json", record, "--csv", table)
    model = ndm.DiffusionModel.from_pretrained(run / "model").eval()
    points = TwoMoons().split("test")
    x = points[spread(len(points), 4)]
    settings = ndm.OdeSettings("rk4", nodes=8)
    likelihood = model.log_likelihood(x, dequantization="none", settings=settings)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    nll = next(name for name in rows[0] if name.startswith("NLL"))
    np.testing.assert_allclose([float(row[nll]) for row in rows], -likelihood.log_p, rtol=1e-4)
    found = {one["name"]: one for one in json.loads(record.read_text())["measurements"]}
    assert found["nll"]["nats"] == pytest.approx(-float(likelihood.log_p.mean()), rel=1e-4)
    assert np.isfinite(found["nelbo"]["nats"])
