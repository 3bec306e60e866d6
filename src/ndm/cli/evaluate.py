"""``ndm evaluate``: bounds and likelihoods of a trained run, with errors, protocols and checks."""

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ActionYesNo

from ndm.cli.parsing import run_parser, step_numbers
from ndm.data import DataDescription, DataSource, EventDataset, WithoutConditions
from ndm.data.other import ALL, read_like
from ndm.device import pick_device
from ndm.errors import UserError, check_whole
from ndm.evaluation.calibrate import Fit, GridKind, VarianceKind
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.measurement import Measurement
from ndm.evaluation.processes import Processes, processes
from ndm.evaluation.relations import check_relations
from ndm.evaluation.tables import flat_record, markdown_table, text_table
from ndm.likelihood import Dequantization
from ndm.ode import OdeSettings
from ndm.serialize import write_atomically, write_json
from ndm.time_grid import MOST_STEPS
from ndm.train.config import parse
from ndm.train.run import Run
from ndm.writing import check_option

FLAGS = {
    "nelbo": (
        "measure the NELBO in the discrete or continuous time of training; the default without"
        " --nll and --steps"
    ),
    "nll": "measure the negative log-likelihood under the generative ODE",
    "calibrate": (
        "repeat the NELBOs with the best reverse process, fitted on the train split: times and"
        " variance of the T steps, or eta in continuous time"
    ),
}


@dataclass
class EvaluateSettings:
    """Settings of an evaluation."""

    run: str
    """Folder of the run."""
    split: str = "test"
    """Split of the data to measure."""
    data: str | None = None
    """Measure other data instead of a split: a .npy, .npz, .csv, .tsv, .csv.gz, .tsv.gz or .parquet
    file in the units of the training data or, for data with 256 values, a folder of images.
    """
    given: Literal["both", "condition", "nothing"] = "both"
    """What a model that takes a condition is given: the condition of each example, for p(x|c);
    nothing, for p(x); or one after the other.
    """
    nelbo: bool = False
    """Measure the NELBO."""
    nll: bool = False
    """Measure the negative log-likelihood."""
    calibrate: bool = False
    """Repeat the NELBOs with a fitted reverse process."""
    grid: GridKind = "fitted"
    """Times of the T steps with --calibrate: fitted to the model, or equal."""
    variance: VarianceKind = "dimension"
    """Reverse variance with --calibrate: one for each step and dimension of the latents, or one for
    each step.
    """
    steps: str = ""
    """Measure discrete-time NELBOs with these numbers of steps T, such as 10,50,100,1000."""
    iw: int = 1
    """K: importance samples for the likelihood and, for every T of --steps up to --iw_steps, for an
    importance-weighted bound.
    """
    iw_steps: int = 100
    """Largest T of an importance-weighted bound; it evaluates the predictor T K times per example.
    """
    draws: int = 16
    """Number of times t drawn per example in a NELBO."""
    dequantization: Dequantization = "variational"
    """Dequantization of the likelihood: variational (through q(z_0|x)), uniform (discrete data) or
    none (continuous data).
    """
    limit: int | None = None
    """Number of examples to measure, evenly spread over the split; by default all."""
    batch_size: int | None = None
    """Examples per batch; by default 256, or fewer for large images."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of all computations."""
    seed: int = 0
    """Seed of times, noise, latents and probes; the same seed gives the same results, up to
    rounding, for any batch size.
    """
    device: str = "auto"
    """Device: auto, cpu or cuda."""
    csv: str | None = None
    """CSV file for the results of each example, in nats, and the standard error of its bounds. To
    score examples use --nll, -log p of the likelihood: a bound from a few times t is much noisier.
    """
    json: str | None = None
    """JSON file for all results and protocols."""
    markdown: str | None = None
    """Markdown file for a table with one row per measurement."""
    ode: OdeSettings = field(default_factory=OdeSettings)
    """How the generative ODE and its trace are computed."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UserError: a value is out of range.
        """
        if self.data is not None and self.split != "test":
            raise UserError(
                f"split={self.split} does not go with data={self.data}, which has no splits; leave"
                " one of them out"
            )
        for name, least in (("seed", 0), ("iw", 1), ("iw_steps", 1), ("draws", 1)):
            check_whole(name, getattr(self, name), least)
        self.horizons()
        if self.iw > 1 and not (self.nll or self.horizons()):
            raise UserError(
                f"iw={self.iw} needs --nll, or --steps for the bound in discrete time; give one of"
                " them"
            )
        if self.iw > 1 and self.nll and self.dequantization == "none":
            raise UserError(
                f"iw={self.iw} does not go with dequantization=none, which draws no samples; leave"
                " one of them out"
            )
        if not (self.nll or self.horizons()):
            self.nelbo = True

    def horizons(self) -> list[int]:
        """Return the numbers of steps T, increasing.

        Raises:
            UserError: they are not integers.
        """
        return step_numbers("steps", self.steps, MOST_STEPS, "10,50,100,1000")


def run_evaluate(arguments: Sequence[str]) -> None:
    """Parse the arguments of ``ndm evaluate`` and measure."""
    parser = run_parser(
        "evaluate",
        "Measure bounds and likelihoods of a trained run on a split of its data.",
        "Example: ndm evaluate runs/digits --nelbo --nll --steps 10,100 --json evaluation.json",
    )
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, help=text)
    parser.add_class_arguments(EvaluateSettings, as_positional=False, skip={"run", "ode", *FLAGS})
    parser.add_class_arguments(OdeSettings, as_positional=False)
    values = vars(parse(parser, arguments))
    ode = OdeSettings(**{part.name: values.pop(part.name) for part in fields(OdeSettings)})
    settings = EvaluateSettings(**values, ode=ode)
    with processes() as group:
        evaluate(settings, group)


def evaluate(settings: EvaluateSettings, group: Processes) -> None:
    """Measure the quantities in the settings, print them and write the output files.

    Raises:
        UserError: the run, the split or the device does not exist, or a bound is not finite.
    """
    for name in ("json", "markdown", "csv"):
        check_option(name, getattr(settings, name))
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
        # A folder with only a model has no configuration.
        source = run.data() if settings.calibrate or run.config_path.is_file() else None
        trained, split = DataDescription.from_dict(model.info.get("data")), ALL
        other = read_like(source, settings.data, trained)
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
    left_out = leave_out(evaluation)
    if left_out and group.first:
        warn_of_rows(settings.data, evaluation)
    train = source.split("train") if source is not None and settings.calibrate else None
    measurements = measure_given(evaluation, settings, train)
    if group.first:
        report(measurements, settings, description)
        if settings.csv is not None:
            write_examples(Path(settings.csv), measurements, evaluation, description, left_out)


def leave_out(evaluation: Evaluation) -> list[int]:
    """Leave out examples too far from the training data to compute with; return their numbers.

    Raises:
        UserError: no example is left.
    """
    unusable = getattr(evaluation.data, "unusable", {})
    usable = [number for number in evaluation.numbers if number not in unusable]
    if not usable:
        raise UserError(
            f"all of the {len(evaluation.numbers)} examples are too far from the training data to"
            f" compute with: {next(iter(unusable.values()))}; raise --limit"
        )
    left_out = [number for number in evaluation.numbers if number in unusable]
    evaluation.numbers = usable
    return left_out


def warn_of_rows(path: str | None, evaluation: Evaluation) -> None:
    """Print a warning that names the rows that are left out."""
    rows: dict[int, str] = getattr(evaluation.data, "unusable", {})
    shown = "; ".join(list(rows.values())[:3]) + ("; ..." if len(rows) > 3 else "")
    _warn(
        f"{path}: {len(rows)} of {len(evaluation.data)} rows are left out, because they are too far"
        f" from the training data to compute with: {shown}"
    )


def warn_of_changed_data(stored: object, now: DataDescription) -> None:
    """Print a warning if the data differ from the training data of the model."""
    trained = DataDescription.from_dict(stored)
    if trained.sha256 != now.sha256:
        before, after = trained.sha256[:12], now.sha256[:12]
        _warn(f"the data changed since training (sha256 {before} then, {after} now)")
    known = trained.condition_sha256, now.condition_sha256
    if all(known) and known[0] != known[1]:
        _warn("what is known of the data, classes or images, changed since training")


def measure_given(
    evaluation: Evaluation, settings: EvaluateSettings, train: EventDataset | None
) -> list[Measurement]:
    """Measure p(x|c), p(x), or both, in a model that takes a condition.

    Raises:
        UserError: the model has no p(x), or the data have no conditions.
    """
    condition, known = evaluation.model.condition, evaluation.condition != "none"
    if condition is None and settings.given != "both":
        raise UserError(f"given={settings.given}: this model takes no condition; leave it out")
    if condition is None or (not known and settings.given == "both"):
        return measure(evaluation, settings, train)
    if not known and settings.given == "condition":
        raise UserError("given=condition: these data have no conditions; use --given nothing")
    measurements = [] if settings.given == "nothing" else measure(evaluation, settings, train)
    if settings.given == "nothing" or (settings.given == "both" and condition.has_null):
        condition.encode(None)  # raises an error if the model has no p(x)
        nothing = replace(evaluation, data=WithoutConditions(evaluation.data))
        nothing.numbers = evaluation.numbers
        of_train = None if train is None else WithoutConditions(train)
        measurements += measure(nothing, settings, of_train)
    return measurements


def measure(
    evaluation: Evaluation, settings: EvaluateSettings, train: EventDataset | None
) -> list[Measurement]:
    """Measure all quantities in the settings, and report each on standard error.

    With ``train``, bounds are also measured with a reverse process fitted on it.
    """
    measurements: list[Measurement] = []

    def add(measurement: Measurement) -> None:
        measurements.append(measurement)
        if evaluation.processes.first:
            text = f"{measurement.label}: {measurement.bpd:.4f} bits/dim"
            print(text, file=sys.stderr, flush=True)

    fitted_eta = _check_reverse(evaluation, settings)
    fits: list[Fit | None] = [None]
    if train is not None:
        fits.append(Fit(train, grid=settings.grid, variance=settings.variance))
    for fit in fits:
        if settings.nelbo and (fit is None or evaluation.model.steps or fitted_eta):
            add(evaluation.nelbo(draws=settings.draws, fit=fit))
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
    """Return whether eta can be fitted; print a warning if it should be but cannot.

    Raises:
        UserError: the settings include the likelihood, but the reverse process has none.
    """
    reverse = evaluation.model.reverse_process
    if settings.nll:
        reverse.check_eta(0.0)  # fail before the long computation
    free = reverse.serves_every_eta
    if (
        settings.calibrate
        and settings.nelbo
        and not (evaluation.model.steps or free)
        and evaluation.processes.first
    ):
        _warn(
            "a direct reverse process works only with the eta of its training, so the bound in"
            " continuous time is not repeated with a fitted eta"
        )
    return free


def report(
    measurements: Sequence[Measurement], settings: EvaluateSettings, description: DataDescription
) -> None:
    """Print the results and the relations between them, and write the files."""
    protocol = measurements[0].protocol
    print(text_table(measurements))
    limited = protocol.num_examples < protocol.split_size
    part = f" of {protocol.split_size}" if limited else ""
    part += " (--limit)" if limited and settings.limit is not None else ""
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
                f"density in the units of the data, {one.label}: {nats:.4f}{error} nats per example"
            )
        record["log_scale_nats"] = description.log_scale
        record |= {
            f"{one.name}_nats_source_units": one.nats + description.log_scale
            for one in measurements
            if one.name in ("nelbo", "nll", "nelbo_unconditional", "nll_unconditional")
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
        table = markdown_table(measurements)
        write_atomically(
            Path(settings.markdown), lambda path: path.write_text(table, encoding="utf-8")
        )
        print(f"wrote {settings.markdown}")


def write_examples(
    path: Path,
    measurements: Sequence[Measurement],
    evaluation: Evaluation,
    description: DataDescription,
    left_out: Sequence[int] = (),
) -> None:
    """Write one row per example: its index in the data, its file, if any, and all measurements.

    Values are in nats; for continuous data, of the density in the units of the data. The column
    after a bound has its standard error for each example. Cells of examples that are left out, and
    of unknown errors, are empty.
    """
    where = getattr(evaluation.data, "where", None)
    columns: dict[str, list[float | str]] = {}
    for one in measurements:
        columns[one.label] = (one.values + description.log_scale).tolist()
        if one.errors is not None:
            errors = one.errors.tolist()
            columns[f"{one.label}, stderr"] = ["" if math.isnan(e) else e for e in errors]
    found = dict(zip(evaluation.numbers, zip(*columns.values(), strict=True), strict=True))

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["example", *(["file"] if where else []), *columns])
            for number in sorted([*found, *left_out]):
                values = found.get(number, [""] * len(columns))
                writer.writerow([number, *([where(number)] if where else []), *values])

    write_atomically(path, write)
    print(f"wrote {path}")


def _warn(text: str) -> None:
    print(f"ndm: warning: {text}", file=sys.stderr)
