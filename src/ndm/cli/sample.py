"""``ndm sample``: draw samples from a trained run."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ndm.cli.conditions import bound_to, wanted
from ndm.cli.parsing import run_parser
from ndm.data import DataDescription, WithoutConditions
from ndm.data.delimited import looks_like_names
from ndm.device import Precision, autocast, pick_device
from ndm.errors import UserError, check_whole
from ndm.evaluation.calibrate import Fit, GridKind, fitted_sampler
from ndm.guidance import Guide
from ndm.sample import Sampler
from ndm.serialize import write_atomically
from ndm.train.config import parse
from ndm.train.run import Run
from ndm.viz import is_image, to_pixels, write_images, write_samples
from ndm.writing import check_name, check_option


def run_sample(arguments: Sequence[str]) -> None:
    """Parse the arguments of ``ndm sample`` and draw samples."""
    parser = run_parser(
        "sample",
        "Draw samples from a trained run.",
        "Example: ndm sample runs/digits --out samples.png --n 100 --method ddim --steps 50",
    )
    parser.add_function_arguments(sample, as_positional=False, skip={"run"})
    sample(**vars(parse(parser, arguments)))


def sample(
    run: str,
    out: str,
    n: int = 64,
    method: str | None = None,
    steps: int | None = None,
    grid: GridKind = "equal",
    condition: str | None = None,
    guidance: float = 1.0,
    guide: Guide = "curve",
    seed: int = 0,
    eta: float | None = None,
    solver: str | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    batch_size: int = 256,
    device: str = "auto",
    precision: Precision = "32-true",
) -> None:
    """Draw samples from a trained run.

    Args:
        run: folder of the run.
        out: output. A .png file shows all samples in one picture. A .npy file, or a .csv file for
            vectors, contains values in the units of the data (integers for discrete data). A new
            folder, a name without suffix, contains one PNG file per image.
        n: number of samples; with --condition, of each class.
        method: ancestral (DDPM), ddim, sde, ode, or transport for a TransportNDM. By default
            transport for a TransportNDM, sde for a model without discrete time, else ancestral.
        steps: steps of the time grid; by default the T of the model, or 100 in continuous time.
        grid: times of the steps of ancestral sampling: equal, or fitted on the train split together
            with the variance of each step, which samples better in few steps.
        condition: classes to sample of a model that takes them, such as 3 or 0,1,2; for a table
            with known columns, their numbers; a file with one of these in each line; or nothing,
            for p(x). By default conditions are as frequent as in training. A picture has a class in
            each row.
        guidance: weight of the condition; 1 samples p(x|c), more follows the condition more than
            the data do.
        guide: what is guided: curve, as in classifier-free guidance, or x, which evaluates F once.
        seed: random seed; the same seed and batch size give the same samples.
        eta: noise of the reverse process for ancestral and sde; 1 is DDPM, 0 is deterministic.
        solver: euler, heun, torchsde-euler or torchsde-srk for sde; heun, euler or dopri5 for ode.
        rtol: relative tolerance of dopri5.
        atol: absolute tolerance of dopri5.
        batch_size: samples per batch.
        device: auto, cpu or cuda.
        precision: 32-true, bf16-mixed or 16-mixed. The mixed ones run the network of the predictor
            in half precision: faster on hardware that supports it, with slightly other samples.
    """
    target = Path(out)
    _check_target(target)
    check_whole("seed", seed, 0)
    if n < 1 or batch_size < 1:
        raise UserError(f"n={n}, batch_size={batch_size}: give integers of at least 1")
    model = Run(Path(run)).model().to(pick_device(device))
    description = DataDescription.from_dict(model.info.get("data"))
    _check_fits(target, description)
    asked = wanted(
        condition, n, model, description, seed, lambda: Run(Path(run)).data().split("train")
    )
    given = bound_to(asked, model, guidance, guide)
    chosen: str | Sampler | None = method
    if grid == "fitted":
        _check_fitted(method or model.default_method, eta)
        train = Run(Path(run)).data().split("train")
        if asked.given is None:
            train = WithoutConditions(train)
        fit = Fit(train, grid="fitted", variance="dimension")
        chosen = fitted_sampler(model, fit, steps or model.steps or 100, progress=True)
        steps = None
    options: dict[str, Any] = {"eta": eta, "solver": solver, "rtol": rtol, "atol": atol}
    with autocast(model.like.device, precision):
        samples = given.sample(
            (asked.count, *description.event_shape),
            chosen,
            seed=seed,
            batch_size=batch_size,
            progress=True,
            steps=steps,
            guidance=guidance,
            guide=guide,
            **options,
        )
    write_values(target, samples, description, asked.columns)
    print(f"wrote {asked.count} samples to {target}")


def _check_fitted(method: str, eta: float | None) -> None:
    """Check the options of a fitted grid.

    Raises:
        UserError: it does not go with another option.
    """
    if method != "ancestral":
        raise UserError(
            f"grid=fitted does not go with method={method}: use --method ancestral, or leave grid"
            " out"
        )
    if eta is not None:
        raise UserError(
            "grid=fitted has the eta of the model, which it is fitted for: leave eta out"
        )


def _check_fits(target: Path, description: DataDescription) -> None:
    """Check that the file can hold samples of the data."""
    if not target.suffix and not is_image(description.event_shape):
        raise UserError(
            f"--out {target} is a folder for image files, but samples of {description.name} are not"
            " images; give a file that ends in .npy or .csv"
        )
    if target.suffix.lower() == ".csv" and len(description.event_shape) != 1:
        raise UserError(
            f"--out {target}: samples of {description.name} have the shape"
            f" {description.event_shape} and do not fit into rows of a table; give a .npy file"
        )


def _check_target(target: Path) -> None:
    suffix = target.suffix.lower()
    if suffix not in (".png", ".npy", ".csv", ""):
        raise UserError(
            f"--out {target}: give a file that ends in .png, .npy or .csv, or a new folder without"
            " suffix"
        )
    if suffix:
        check_option("out", str(target))
    else:
        check_name(target)
    if target.exists() and not suffix:
        raise UserError(
            f"--out {target} already exists; give a new folder, or a file that ends in .png, .npy"
            " or .csv"
        )


def write_values(
    target: Path, samples: Tensor, description: DataDescription, columns: int | None = None
) -> None:
    """Write samples x ``(n, *event)`` in the format given by the suffix.

    A picture has ``columns`` images in each row, or is about square.
    """
    suffix = target.suffix.lower()
    if suffix == ".png":
        write_samples(target, samples, columns=columns)
        return
    values = description.to_source_units(samples).numpy()
    if description.num_values is None:
        values = values.astype(np.float64)
    else:
        least, most = (int(value or 0) for value in (description.low, description.high))
        values = values.astype(np.result_type(np.min_scalar_type(least), np.min_scalar_type(most)))
    if not suffix:
        write_images(target, to_pixels(samples)[..., : samples.shape[1]].transpose(0, 3, 1, 2))
    elif suffix == ".csv":
        write_atomically(target, lambda path: _write_table(path, values, description.columns))
    else:
        write_atomically(target, lambda path: _write_array(path, values))


def _write_table(path: Path, values: np.ndarray, columns: Sequence[str]) -> None:
    """Write rows ``(n, D)`` so that :class:`ndm.data.Table` reads the same names and numbers."""
    rows: list[list[Any]] = values.tolist()
    if not columns and looks_like_names([str(cell) for cell in rows[0]]):
        # Without a sign, a first row 0,1,2 would be read as the names of the columns.
        rows[0] = [f"+{cell}" for cell in rows[0]]
    with path.open("w", encoding="utf-8", newline="") as file:
        if columns:
            file.write(",".join(_quoted(name) for name in columns) + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)


def _quoted(name: str) -> str:
    """Return a cell of a CSV file, in quotes if it needs them (csv leaves a lone \\r unquoted)."""
    special = any(character in name for character in ',"\r\n')
    return '"' + name.replace('"', '""') + '"' if special else name


def _write_array(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would append .npy to a name that ends in .NPY
        np.save(file, values)
