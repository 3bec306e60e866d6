"""The contract of the command line: help, samples, evaluation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ndm
from cli.commands import exit_code, rejected, run_command
from conftest import TINY
from ndm.cli.main import COMMANDS, main
from ndm.data import Digits
from ndm.evaluation.calibrate import Fit, fitted_sampler
from ndm.train.run import Run
from ndm.viz import write_images


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    network = {
        "class_path": "ndm.nn.UNet",
        "init_args": {"channels": 8, "multiples": [1], "attention": True, "fourier": [3]},
    }
    model = {
        "schedule": {
            "class_path": "ndm.LearnedSchedule",
            "init_args": {"gamma_0": -6.0, "gamma_1": 4.0, "learn_ends": True},
        },
        "transform": {"class_path": "ndm.GatedTransform", "init_args": {"network": {**network}}},
        "predictor": {"class_path": "ndm.Predictor", "init_args": {"network": network}},
        "decoder": {"class_path": "ndm.DiscretizedGaussian", "init_args": {"num_values": 17}},
        "steps": 10,
    }
    config = {
        "data": {"class_path": "ndm.data.Digits"},
        "model": model,
        "train": {**TINY["train"], "steps": 3, "evaluation_draws": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run_command("train --config", folder / "config.yaml", "--out", folder / "run")
    return folder / "run"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([*command.split(), "--help"])
    except SystemExit as error:  # raised by the parser after its help
        code = error.code
    assert code == 0
    text = capsys.readouterr().out
    if command == "train":
        for phrase in (
            "Number of optimizer steps",
            "--model.help ndm.NDM",
            "Example: ndm train",
            "exponential moving average",
        ):
            assert phrase in " ".join(text.split())
    elif command == "":
        assert all(f"  {name}" in text for name in COMMANDS)
    else:
        phrases = {
            "inspect": "the archive",
            "decompress": "folder to write into",
            "compress": "images, folders of images, .npy or .npz",
            "compare": "a base and rows with their overrides",
            "reproduce": "name of the experiment; see --list",
        }
        assert phrases.get(command, "folder of the run") in " ".join(text.split())


def test_evaluate_writes_the_documented_keys(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "evaluation.json"
    run_command("evaluate", digits_run, "--split test --json", file, "--draws 3 --seed 5")
    record = json.loads(file.read_text())
    keys = (
        "nelbo_bpd nelbo_bpd_stderr prior_bpd diffusion_bpd reconstruction_bpd num_examples seed"
        " time_samples_per_example parameters data_sha256"
    )
    assert set(keys.split()) <= set(record)
    assert record["nelbo_bpd"] == pytest.approx(
        record["prior_bpd"] + record["diffusion_bpd"] + record["reconstruction_bpd"], abs=1e-9
    )
    assert (record["seed"], record["time_samples_per_example"]) == (5, 3)
    assert record["num_examples"] == 359
    assert record["data_sha256"] == Digits().describe().sha256
    model = ndm.NDM.from_pretrained(digits_run / "model")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert f"{record['nelbo_bpd']:.4f}" in capsys.readouterr().out

    run_command("evaluate", digits_run, "--json", tmp_path / "again.json", "--draws 3 --seed 5")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["nelbo_bpd"] == record["nelbo_bpd"]


@pytest.mark.parametrize(
    "options",
    [
        "--method ancestral",
        "--method ddim",
        "--method sde --solver heun",
        "--method sde --solver torchsde-euler",
        "--method ode",
        "--method ode --solver dopri5 --rtol 1e-2 --atol 1e-2",
    ],
)
def test_samples_are_digit_levels_and_reproducible_from_the_seed(
    options: str, digits_run: Path, tmp_path: Path
) -> None:
    files = [tmp_path / f"{name}.npy" for name in "abc"]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        run_command("sample", digits_run, f"--n 5 --steps 4 --seed {seed} --out", file, options)
    first, second, other = (np.load(file) for file in files)
    assert first.shape == (5, 1, 8, 8)
    assert set(np.unique(first)) <= set(range(17))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_options_accept_dashes_and_underscores(digits_run: Path, tmp_path: Path) -> None:
    for index, option in enumerate(("--batch-size 3", "--batch-size=3", "--batch_size 3")):
        file = tmp_path / f"{index}.npy"
        run_command("sample", digits_run, "--n 5 --steps 2 --out", file, option)
    first, *others = (np.load(tmp_path / f"{index}.npy") for index in range(3))
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_the_png_shows_the_samples(digits_run: Path, tmp_path: Path) -> None:
    for name in ("x.png", "x.npy"):
        run_command("sample", digits_run, "--n 4 --steps 3 --out", tmp_path / name)
    values = np.load(tmp_path / "x.npy")
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("L"))
    scale = picture.shape[0] // (2 * 9 + 1)  # two rows of eight pixels, gaps of one
    small = picture[::scale, ::scale]
    cells = [
        small[1 + 9 * row : 9 + 9 * row, 1 + 9 * column : 9 + 9 * column]
        for row in range(2)
        for column in range(2)
    ]
    for value, cell in zip(values[:, 0], cells, strict=True):
        np.testing.assert_array_equal(np.round(cell / 255 * 17 - 0.5), value)


def test_a_folder_receives_one_file_per_image(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder and the array hold the same samples, as integers that ``ndm compress`` accepts."""
    for name in ("x.npy", "x"):
        run_command("sample", digits_run, "--n 5 --steps 3 --out", tmp_path / name)
    values = np.load(tmp_path / "x.npy")
    assert values.dtype == np.uint8
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert names == [f"{n:06d}.png" for n in range(5)]
    for number, value in enumerate(values[:, 0]):
        image = np.asarray(Image.open(tmp_path / f"x/{number:06d}.png"))
        np.testing.assert_array_equal(np.round(image / 255 * 17 - 0.5), value)
    assert exit_code("sample", digits_run, "--n 5 --out", tmp_path / "x") == 2
    assert "already exists" in capsys.readouterr().err
    assert exit_code("sample", digits_run, "--n 5 --out", tmp_path / "x.csv") == 2
    assert "do not fit into rows of a table" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.npy"]


def test_image_files_hold_the_exact_bytes(tmp_path: Path) -> None:
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (2, channels, 6, 5), dtype=np.uint8)
        write_images(tmp_path / f"{channels}", pixels)
        for number, expected in enumerate(pixels):
            image = np.asarray(Image.open(tmp_path / f"{channels}/{number:06d}.png"))
            np.testing.assert_array_equal(np.atleast_3d(image).transpose(2, 0, 1), expected)


def test_the_library_loads_the_model_of_a_run(digits_run: Path) -> None:
    model = ndm.NDM.from_pretrained(digits_run / "model")
    assert model.steps == 10
    x = Digits().split("test").__getitems__(range(8))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    first, second = (model.bound(x, generator=g, draws=2).total for g in generators)
    assert torch.equal(first, second)
    assert model.info["data"]["name"] == "digits"  # type: ignore[index]


def test_an_unfinished_run_is_used_from_its_checkpoint(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint holds the averaged weights. A model folder works too."""
    half = shutil.copytree(digits_run, tmp_path / "half")
    shutil.rmtree(half / "model")
    (half / "metrics.json").unlink()
    for name, run in (("half", half), ("whole", digits_run), ("model", digits_run / "model")):
        run_command("sample", run, "--n 4 --steps 3 --out", tmp_path / f"{name}.npy")
        warned = f"{half} is not finished; using its model after 3 steps"
        assert (warned in capsys.readouterr().err) is (name == "half")
    samples = [np.load(tmp_path / f"{name}.npy") for name in ("half", "whole", "model")]
    np.testing.assert_array_equal(samples[0], samples[1])
    np.testing.assert_array_equal(samples[2], samples[1])
    shutil.rmtree(half / "checkpoints")
    assert exit_code("sample", half, "--n 4 --out", tmp_path / "none.npy") == 2
    assert "holds no trained model yet" in capsys.readouterr().err


def test_a_user_network_works_with_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``config.yaml`` gives its import path; a model folder does not import it."""
    model = TINY["model"] | {
        "predictor": {
            "class_path": "ndm.Predictor",
            "init_args": {"network": {"class_path": "oracles.OwnNetwork"}},
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY | {"model": model}))
    run = tmp_path / "run"
    run_command("train --config", tmp_path / "config.yaml", "--out", run)
    trained = float(json.loads((run / "metrics.json").read_text())["nelbo_bpd"])
    run_command("evaluate", run, "--draws 2 --json", tmp_path / "e.json")
    evaluated = json.loads((tmp_path / "e.json").read_text())["nelbo_bpd"]
    assert evaluated == pytest.approx(trained, rel=1e-5)
    run_command("sample", run, "--n 4 --steps 3 --out", tmp_path / "x.npy")
    capsys.readouterr()
    assert exit_code("sample", run / "model", "--n 4 --out", tmp_path / "y.npy") == 2
    assert "OwnNetwork, which is not part of ndm" in capsys.readouterr().err


def test_samples_of_a_fitted_grid_are_those_of_the_fitted_sampler(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "run", tmp_path / "fitted.npy"
    run_command("train --config", write_config(), "--out", folder)
    run_command("sample", folder, "--n 3 --steps 4 --grid fitted --seed 5 --out", out)
    run = Run(folder)
    model, data = run.model(), run.data()
    fit = Fit(data.split("train"), grid="fitted", variance="dimension")
    sampler = fitted_sampler(model, fit, 4)
    assert sampler.grid.times is not None and sampler.steps == 4
    expected = model.sample((3, *data.describe().event_shape), sampler, seed=5, batch_size=256)
    np.testing.assert_array_equal(np.load(out), data.describe().to_source_units(expected).numpy())
    for options, culprit in (("--method ode", "method=ode"), ("--eta 0.5", "eta")):
        command = ["sample", folder, "--grid fitted --out", tmp_path / "x.npy", options]
        rejected(capsys, command, "grid=fitted", culprit)
