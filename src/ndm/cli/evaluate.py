"""``ndm evaluate``: bounds and likelihoods of a trained run, each with its error and its protocol,
checked against one another.
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ActionYesNo

from ndm.cli.parsing import run_parser, step_numbers
from ndm.data import DataDescription, DataSource, EventDataset
from ndm.data.other import ALL, read_like
from ndm.device import pick_device
from ndm.elbo import MOST_STEPS
from ndm.errors import UserError, check_whole
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.measurement import Measurement
from ndm.evaluation.processes import Processes, processes
from ndm.evaluation.relations import check_relations
from ndm.evaluation.tables import (
    flat_record,
    markdown_table,
    text_table,
)
from ndm.likelihood import Dequantization
from ndm.ode import OdeSettings
from ndm.serialize import write_atomically, write_json
from ndm.train.config import parse
from ndm.train.run import Run

FLAGS = {
    "nelbo": (
        "measure the NELBO in the time, discrete or continuous, that the model was trained in; the"
        " default when nothing else is asked for"
    ),
    "nll": "measure the negative log-likelihood by the generative ODE",
    "calibrate": (
        "measure the NELBOs once more with the best reverse variance of each step, or the best eta,"
        " fitted on the train split"
    ),
}


@dataclass
class EvaluateSettings:
    """What to measure, and how."""

    run: str
    """Folder of the run."""
    split: str = "test"
    """The split of the data."""
    data: str | None = None
    """Other examples to measure, all of them, in the place of a split: a .npy, .npz, .csv or
    .parquet file in the units of the data that the model was trained on, or for images of 256
    values a folder.
    """
    nelbo: bool = False
    """Measure the NELBO."""
    nll: bool = False
    """Measure the negative log-likelihood."""
    calibrate: bool = False
    """Measure the NELBOs with a fitted reverse process, too."""
    steps: str = ""
    """Discrete-time NELBOs: numbers of steps T, separated by commas, such as 10,50,100,1000."""
    iw: int = 1
    """K: importance samples for the likelihood, and for an importance-weighted bound at every T of
    --steps up to --iw_steps.
    """
    iw_steps: int = 100
    """Largest T for the importance-weighted bound, which takes T K evaluations of the predictor for
    each example.
    """
    draws: int = 16
    """Times drawn for each example in a NELBO."""
    dequantization: Dequantization = "variational"
    """From z_0 to x in the likelihood: variational (through q(z_0|x)), uniform (discrete data) or
    none (continuous data).
    """
    limit: int | None = None
    """Measure only this many examples, evenly spread over the split; by default all."""
    batch_size: int | None = None
    """Examples at once; by default 256, fewer for large images."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of all computations."""
    seed: int = 0
    """Seed of times, noise, latents and probes; the same seed gives the same numbers, whatever the
    batch size.
    """
    device: str = "auto"
    """Device: auto, cpu or cuda."""
    csv: str | None = None
    """CSV file to write the numbers of each example to, in nats: of a likelihood, -log p."""
    json: str | None = None
    """File to write all numbers and protocols to, as JSON."""
    markdown: str | None = None
    """File to write a Markdown table to, a row for each number."""
    ode: OdeSettings = field(default_factory=OdeSettings)
    """How the generative ODE and its trace are computed."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UserError: a value is out of range.
        """
        if self.data is not None and self.split != "test":
            raise UserError(
                f"split={self.split} does not go with data={self.data}, all of which is measured;"
                " leave one of them out"
            )
        for name, least in (("seed", 0), ("iw", 1), ("iw_steps", 1), ("draws", 1)):
            check_whole(name, getattr(self, name), least)
        self.horizons()
        if self.iw > 1 and not (self.nll or self.horizons()):
            raise UserError(
                f"iw={self.iw} goes with --nll, or with --steps for the bound in discrete time;"
                " give one of them"
            )
        if self.iw > 1 and self.nll and self.dequantization == "none":
            raise UserError(
                f"iw={self.iw} does not go with dequantization=none, which draws nothing"
            )
        if not (self.nll or self.horizons()):
            self.nelbo = True

    def horizons(self) -> list[int]:
        """The numbers of steps T, increasing.

        Raises:
            UserError: they are not whole numbers.
        """
        return step_numbers("steps", self.steps, MOST_STEPS, "10,50,100,1000")


def run_evaluate(words: Sequence[str]) -> None:
    """``ndm evaluate``: parse and measure."""
    parser = run_parser(
        "evaluate", "Measure bounds and likelihoods of a trained run on a split of its data."
    )
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, help=text)
    parser.add_class_arguments(EvaluateSettings, as_positional=False, skip={"run", "ode", *FLAGS})
    parser.add_class_arguments(OdeSettings, as_positional=False)
    values = vars(parse(parser, words))
    ode = OdeSettings(**{part.name: values.pop(part.name) for part in fields(OdeSettings)})
    settings = EvaluateSettings(**values, ode=ode)
    with processes() as group:
        evaluate(settings, group)


def evaluate(settings: EvaluateSettings, group: Processes) -> None:
    """Measure what the settings ask for, print it, and write it where they say.

    Raises:
        UserError: the run, the split or the device is not there, or a bound is not finite.
    """
    for name in ("json", "markdown", "csv"):
        target = getattr(settings, name)
        if target is not None and Path(target).is_dir():
            raise UserError(f"--{name} {target} is a folder; give a file")
    folder, run = Path(settings.run), Run(Path(settings.run))
    model = run.model().to(
        device=pick_device(settings.device), dtype=getattr(torch, settings.dtype)
    )
    source: DataSource | None
    if settings.data is None:
        source, split = run.data(), settings.split
        description, examples = source.describe(), source.split(split)
        if group.first:
            warn_of_changed_data(model.info.get("data"), description)
    else:
        # A model folder has no configuration.
        source = run.data() if settings.calibrate or run.config_path.is_file() else None
        other, split = (
            read_like(source, settings.data, DataDescription.from_dict(model.info.get("data"))),
            ALL,
        )
        description, examples = other.description, other.splits[split]
    evaluation = Evaluation(
        model,
        examples,
        seed=settings.seed,
        limit=settings.limit,
        batch_size=settings.batch_size,
        processes=group,
        progress=True,
        about={"run": str(folder), **description.about(split)},
    )
    measurements = measure(
        evaluation,
        settings,
        source.split("train") if source is not None and settings.calibrate else None,
    )
    if group.first:
        report(measurements, settings, description)
        if settings.csv is not None:
            write_examples(Path(settings.csv), measurements, evaluation, description)


def warn_of_changed_data(stored: object, now: DataDescription) -> None:
    """Say so if the data are not those that the model was trained on."""
    trained = DataDescription.from_dict(stored)
    if trained.sha256 != now.sha256:
        _warn(
            f"the data changed since training (sha256 {trained.sha256[:12]} then, {now.sha256[:12]}"
            " now)"
        )


def measure(
    evaluation: Evaluation, settings: EvaluateSettings, train: EventDataset | None
) -> list[Measurement]:
    """All the numbers that the settings ask for, each told on standard error as soon as it is
    there; fitted on ``train``, too, if it is given.
    """
    measurements: list[Measurement] = []

    def add(measurement: Measurement) -> None:
        measurements.append(measurement)
        if evaluation.processes.first:
            print(
                f"{measurement.label}: {measurement.bpd:.4f} bits/dim", file=sys.stderr, flush=True
            )

    fitted_eta = _check_reverse(evaluation, settings)
    fits = [None] if train is None else [None, train]
    for fit in fits:
        if settings.nelbo and (fit is None or evaluation.model.steps or fitted_eta):
            add(evaluation.nelbo(draws=settings.draws, calibrate_on=fit))
        for steps in settings.horizons():
            if not (settings.nelbo and steps == evaluation.model.steps):
                add(evaluation.nelbo(steps, settings.draws, fit))
        if settings.iw > 1:
            for steps in settings.horizons():
                if steps <= settings.iw_steps:
                    add(evaluation.nelbo_iw(steps, settings.iw, fit))
    if settings.nll:
        add(evaluation.nll(settings.iw, settings.dequantization, settings.ode))
    return measurements


def _check_reverse(evaluation: Evaluation, settings: EvaluateSettings) -> bool:
    """Whether the reverse process can have a fitted eta; says so where one was asked for in vain.

    Raises:
        UserError: the likelihood was asked for, and it has none.
    """
    reverse = evaluation.model.reverse_process
    if settings.nll:
        reverse.check_eta(0.0)  # before anything is computed
    free = reverse.serves_every_eta
    if (
        settings.calibrate
        and settings.nelbo
        and not (evaluation.model.steps or free)
        and evaluation.processes.first
    ):
        _warn(
            "a direct reverse process knows the eta of its training alone: the bound in continuous"
            " time has no fitted one"
        )
    return free


def report(
    measurements: Sequence[Measurement], settings: EvaluateSettings, description: DataDescription
) -> None:
    """Print the numbers and the relations between them, and write the files."""
    protocol = measurements[0].protocol
    print(text_table(measurements))
    part = (
        f" of {protocol.split_size} (--limit)"
        if protocol.num_examples < protocol.split_size
        else ""
    )
    print(
        f"{protocol.num_examples}{part} examples of {description.name}/{protocol.about['split']},"
        f" seed {settings.seed}, {protocol.dtype}"
    )
    record = {
        "run": protocol.about["run"],
        "data": description.name,
        "split": protocol.about["split"],
        **flat_record(measurements),
        "data_sha256": description.sha256,
        "torch_version": protocol.versions["torch"],
        "ndm_version": protocol.versions["ndm"],
        "seconds": round(sum(one.protocol.seconds for one in measurements), 3),
    }
    if description.num_values is None:
        for one in measurements:
            nats = one.nats + description.log_scale
            error = f" ± {one.stderr:.4f}" if len(one.values) > 1 else ""
            print(
                f"density in the units of the data, {one.label}: {nats:.4f}{error} nats an example"
            )
        record["log_scale_nats"] = description.log_scale
        record |= {
            f"{one.name}_nats_source_units": one.nats + description.log_scale
            for one in measurements
            if one.name in ("nelbo", "nll")
        }
    checks = check_relations(measurements)
    for check in checks:
        print(f"check: {check.text}")
        if not check.holds:
            _warn(f"a relation that should hold does not: {check.text}")
    record["checks"] = [{"text": check.text, "holds": check.holds} for check in checks]
    record["measurements"] = [one.to_dict() for one in measurements]
    if settings.json is not None:
        write_json(Path(settings.json), record)
        print(f"wrote {settings.json}")
    if settings.markdown is not None:
        write_atomically(
            Path(settings.markdown),
            lambda path: path.write_text(markdown_table(measurements), encoding="utf-8"),
        )
        print(f"wrote {settings.markdown}")


def write_examples(
    path: Path,
    measurements: Sequence[Measurement],
    evaluation: Evaluation,
    description: DataDescription,
) -> None:
    """Write a row for each example: its number in the data, the file that it comes from if there is
    one, and all measurements.

    In nats, of continuous data those of the density in the units of the data.
    """
    where = getattr(evaluation.data, "where", None)
    columns = [(one.values + description.log_scale).tolist() for one in measurements]

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["example", *(["file"] if where else []), *(one.label for one in measurements)]
            )
            for number, values in zip(evaluation.numbers, zip(*columns, strict=True), strict=True):
                writer.writerow([number, *([where(number)] if where else []), *values])

    write_atomically(path, write)
    print(f"wrote {path}")


def _warn(text: str) -> None:
    print(f"ndm: warning: {text}", file=sys.stderr)
