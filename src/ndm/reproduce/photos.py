r"""Photographs: a learned F against a plain diffusion, with few steps and in continuous time.

.. math::
    F(x, t) = x, \qquad F(x, t) = x + \sigma_t^2 \textstyle\sum_k \cos(\pi k t)
    (V a_k \odot V^\top x + b_k), \qquad F_\phi(x, t) .

These are the plain diffusion, gains by frequency without a network, and a network whose one
evaluation serves all times. The plain diffusion is also trained as large as the largest of them,
which is the baseline. Each is trained in continuous time and for T steps, with a learned reverse
variance. All take the same training steps on the same random crops.

Bounds are measured on the same test crops, so differences are paired. Lossless picture formats code
these crops, too, as one sheet and each by itself. Errors are over crops for one seed, and over
training runs for several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm.compare.plan import Row, plan_rows, read_rows
from ndm.data import DataSource, spread
from ndm.device import pick_device
from ndm.evaluation.baselines import PICTURE_FORMATS, installed_formats, picture_bpd
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.measurement import paired_difference, standard_error
from ndm.evaluation.tables import plus_minus
from ndm.model import DiffusionModel
from ndm.reproduce.images import sample_figure
from ndm.reproduce.photos_figures import bound_figure, time_label
from ndm.reproduce.report import Report, check_learned
from ndm.reproduce.steps_figures import CONTINUOUS
from ndm.reproduce.synthetic import write_photos
from ndm.train.config import as_options, find_config
from ndm.viz import transform_figure

LEARNED = "separable"
"""The row whose F(x, t) is a network."""
_CANDIDATES = 37  # crops to choose from for the figure of F(x, t)
_SHARED: Mapping[str, object] = {
    "data.splits": {"train": "train", "test": "test"},
    "train.sample_every": None,
    "train.sample_images": 16,
    "train.evaluation_limit": 100,  # run() measures more crops
}
_SMOKE: Mapping[str, object] = {
    "model.predictor.network.channels": 4,
    "model.transform.network.channels": 4,
    "train.steps": 4,
    "train.batch_size": 4,
    "train.warmup": 1,
    "train.sample_images": 4,
    "train.sample_steps": 2,
    "train.evaluation_limit": 4,
    "train.evaluation_draws": 1,
}


@dataclass(frozen=True)
class Plan:
    """The size of the experiment."""

    horizons: tuple[int | None, ...] = (8, 16, None)
    """Numbers of steps T to train for; None for continuous time."""
    seeds: int = 1
    """Runs of each row."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Overrides of every training run."""
    limit: int = 1000
    """Most test crops to measure, evenly spread over the split."""
    draws: int = 8
    """Times per crop in the bound."""
    side: int = 6
    """Samples per side of their figure."""
    steps: int = 100
    """Sampling steps of a model in continuous time."""
    checks: bool = True
    """Whether the training is long enough to check which model is better."""


PLANS: Mapping[str, Plan] = {
    "small": Plan(),
    "full": Plan(seeds=3, limit=10_000, draws=4),
    "quick": Plan(
        (8, None),
        overrides={"train.steps": 60, "train.warmup": 10, "train.ema": 0.9},
        limit=100,
        draws=4,
        steps=50,
        checks=False,
    ),
    "smoke": Plan((8, None), overrides=_SMOKE, limit=6, draws=2, side=2, steps=4, checks=False),
}


@dataclass
class Result:
    """The runs of a row that is trained for one number of steps, and their bounds on the crops."""

    row: Row
    horizon: int | None
    """T; None for continuous time."""
    models: list[DiffusionModel] = field(default_factory=list)
    """One for each seed."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of training."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Records of the measurements."""
    values: list[Tensor] = field(default_factory=list)
    """Bounds of the crops, ``(N,)``, nats."""

    def bound(self) -> tuple[float, float]:
        """Return the mean bound and its standard error, bits/dim."""
        return over_seeds([(one["bpd"], one["bpd_stderr"]) for one in self.records])

    def difference_to(self, other: "Result") -> tuple[float, float]:
        """Return the bound minus that of another row and its standard error, bits/dim."""
        dims = self.records[0]["dims"]
        pairs = zip(self.values, other.values, strict=True)
        return over_seeds([paired_difference(*pair, dims) for pair in pairs])


def over_seeds(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error.

    Args:
        found: the mean over crops and its standard error, for each seed. That of a single seed is
            returned unchanged.
    """
    if len(found) == 1:
        return found[0]
    means = torch.tensor([mean for mean, _ in found], dtype=torch.float64)
    return float(means.mean()), standard_error(means)


def run(report: Report) -> None:
    """Train the rows, measure them and the picture formats on the same crops, and plot them."""
    plan = PLANS[report.settings.size]
    results, data = _train(report, plan, _plan(report, plan))
    _measure(report, plan, results, data)
    formats = _measure_formats(report, plan, data)
    _introduce(report, plan, results[0].records[0], data)
    _tabulate(report, results, formats)
    _draw_bounds(report, plan, results, formats)
    _draw_images(report, plan, results, data)
    if plan.checks:
        _check(report, results, formats)


def _plan(report: Report, plan: Plan) -> list[Result]:
    """Return the rows of each number of steps, without results.

    Raises:
        UserError: overrides make the separable row a conventional model.
    """
    overrides = {**_SHARED, **plan.overrides}
    overrides |= report.synthetic_data(write_photos) if report.smoke else {}
    results = []
    for horizon in plan.horizons:
        options = [*as_options(overrides), *report.user_overrides]
        options += as_options({"model.steps": horizon})
        base = find_config("photos" if horizon is None else "photos-16-steps")
        rows, extra = read_rows(Path("compare-photos"), options, base)
        check_learned(next(row.config for row in rows if row.name == LEARNED))
        results += [Result(row, horizon) for row in plan_rows(rows, extra, "steps")]
    return results


def _name(result: Result, index: int, plan: Plan, seed: int) -> str:
    """Return the name of a run."""
    suffix = f"-seed-{seed + index}" if plan.seeds > 1 else ""
    return f"{result.row.folder}-{result.horizon or CONTINUOUS}{suffix}"


def _train(report: Report, plan: Plan, results: list[Result]) -> tuple[list[Result], DataSource]:
    """Train every row with every seed; return the results with their models, and the data."""
    for index in range(plan.seeds):
        names = [_name(result, index, plan, report.seed) for result in results]
        configs = {name: result.row.config for name, result in zip(names, results, strict=True)}
        trained = report.train_all(configs, report.seed + index)
        for name, result in zip(names, results, strict=True):
            model, data = trained[name]
            result.models.append(model.to(pick_device(configs[name].get("train.accelerator"))))
            result.seconds.append(float(report.run(name).metrics()["training_seconds"]))
    return results, data


def _measure(report: Report, plan: Plan, results: Sequence[Result], data: DataSource) -> None:
    """Measure the bound of each run, in the time that it is trained for."""
    test, about = data.split("test"), data.describe().about("test")
    for result in results:
        for index, model in enumerate(result.models):
            evaluation = Evaluation(
                model, test, report.seed, plan.limit, progress=True, about=about
            )
            record, values = report.measure_values(
                _name(result, index, plan, report.seed),
                partial(evaluation.nelbo, result.horizon, plan.draws),
            )
            result.records.append(record)
            result.values.append(values)


def _measure_formats(report: Report, plan: Plan, data: DataSource) -> dict[str, dict[str, float]]:
    """Return the bits/dim of each installed picture format on the crops."""
    test = data.split("test")
    crops = data.integers(test.__getitems__(spread(len(test), plan.limit)))
    images = crops.numpy().astype(np.uint8)
    found = {
        name: report.cache(
            f"format-{name.lower().replace(' ', '-')}", partial(picture_bpd, images, name)
        )
        for name in installed_formats()
    }
    report.add_number("formats", found)
    return found


def _baseline(results: Sequence[Result], horizon: int | None) -> Result:
    """Return the plain diffusion that is as large as the largest row."""
    return next(one for one in results if one.horizon == horizon and one.row.baseline)


def _introduce(report: Report, plan: Plan, record: Mapping[str, Any], data: DataSource) -> None:
    """Describe the data and the protocol on the page."""
    description = data.describe()
    report.text(
        f"Data: {description.name}, {description.version}; sha256 {description.sha256[:12]}."
        f" Bounds of {record['num_examples']:,} of {record['split_size']:,} test crops,"
        f" {record['time_samples_per_example']} times per crop; each model is measured in the time"
        " that it is trained for. Differences are paired."
    )
    report.text(
        "One run of each model, so ± is the standard error over crops."
        if plan.seeds == 1
        else f"Means over {plan.seeds} runs of each model; ± is the standard error over runs."
    )
    if report.smoke:
        report.text("**A few synthetic images and tiny models: these numbers mean nothing.**")


def _tabulate(
    report: Report, results: Sequence[Result], formats: Mapping[str, Mapping[str, float]]
) -> None:
    """Add the tables of the bounds and of the picture formats, and their numbers."""
    lines, numbers = [], dict[str, dict[str, Any]]()
    for one in results:
        bound, baseline = one.bound(), _baseline(results, one.horizon)
        seconds = sum(one.seconds) / len(one.seconds)
        entry: dict[str, Any] = {"bpd": bound[0], "stderr": bound[1]}
        entry |= {"parameters": one.row.parameters, "training_seconds": one.seconds}
        cells = [time_label(one.horizon), one.row.name, f"{one.row.parameters:,}", f"{seconds:.0f}"]
        cells.append(plus_minus(*bound, 4))
        if one is baseline:
            cells.append("—")
        else:
            difference = one.difference_to(baseline)
            entry |= {"difference": difference[0], "difference_stderr": difference[1]}
            cells.append(plus_minus(*difference, 4, sign=True))
        lines.append(cells)
        numbers.setdefault(str(one.horizon or CONTINUOUS), {})[one.row.name] = entry
    name = next(one.row.name for one in results if one.row.baseline)
    head = ["trained for", "F(x, t)", "parameters", "training (s)", "NELBO, bits/dim"]
    report.table([*head, f"minus {name}"], lines)
    report.add_number("bounds", numbers)
    report.text("Lossless picture formats on the same crops, bits/dim:")
    rates = [[name, f"{one['sheet']:.4f}", f"{one['each']:.4f}"] for name, one in formats.items()]
    report.table(["", "one sheet", "each crop by itself"], rates)
    missing = [name for name in PICTURE_FORMATS if name not in formats]
    if missing:
        report.text(
            f"Not measured: {', '.join(missing)}, which Pillow cannot write here. JPEG XL needs the"
            " package pillow-jxl-plugin."
        )


def _draw_bounds(
    report: Report,
    plan: Plan,
    results: Sequence[Result],
    formats: Mapping[str, Mapping[str, float]],
) -> None:
    """Plot bits/dim against T."""
    rows = list(dict.fromkeys(one.row.name for one in results))
    points = {
        name: {one.horizon: one.bound() for one in results if one.row.name == name} for name in rows
    }
    differences = {
        name: {
            one.horizon: one.difference_to(_baseline(results, one.horizon))
            for one in results
            if one.row.name == name and not one.row.baseline
        }
        for name in rows
    }
    rates = {name: one["sheet"] for name, one in formats.items()}
    report.figure(
        "bounds",
        bound_figure(points, differences, plan.horizons, rates),
        "Left: bits/dim of models trained for T steps and in continuous time; dotted, the smallest"
        " lossless picture format, as one sheet. Right: the differences to the widened plain"
        " diffusion. Bars: standard errors",
    )


def _draw_images(report: Report, plan: Plan, results: Sequence[Result], data: DataSource) -> None:
    """Plot samples of the best model, and F(x, t) over time."""
    best = min(results, key=lambda one: one.bound()[0])
    steps = best.horizon or plan.steps
    report.figure(
        "samples",
        sample_figure(best.models[0], data, plan.side, steps, report.seed),
        f"Left: all ancestral samples of seed {report.seed} from the model of the lowest bound"
        f" ({best.row.name}, {time_label(best.horizon)}), {steps} steps. Right: test crops",
    )
    learned = [one for one in results if one.row.name == LEARNED]
    test = data.split("test")
    crops = test.__getitems__(spread(len(test), _CANDIDATES))
    contrast = crops.flatten(1).std(1)
    chosen = crops[contrast.topk(2).indices]
    for one in (learned[0], learned[-1]):
        drawn = transform_figure(one.models[0], chosen, seed=report.seed)
        report.figure(
            f"transform-{one.horizon or CONTINUOUS}",
            drawn,
            f"{LEARNED}, {time_label(one.horizon)}: F(x, t), z_t and the prediction over time. The"
            f" crops are those of the most contrast among {len(crops)} of the test split",
        )


def _check(
    report: Report, results: Sequence[Result], formats: Mapping[str, Mapping[str, float]]
) -> None:
    """Check that the learned F pays, and that the best model beats the picture formats."""
    for one in results:
        if one.row.name == LEARNED:
            baseline = _baseline(results, one.horizon)
            report.expect(
                f"bits/dim of {LEARNED} minus {baseline.row.name}, {time_label(one.horizon)}",
                one.difference_to(baseline)[0],
                0.0,
            )
    if formats:
        smallest = min(rate for one in formats.values() for rate in one.values())
        report.expect(
            "bits/dim of the best model, compared with the smallest picture format",
            min(one.bound()[0] for one in results),
            smallest,
        )
