r"""MNIST: VDM, VDM with as many parameters as NDM, and NDM (NDM, section 4.2, figures 3 and 4).

.. math::
    \text{VDM: } F(x, t) = x, \qquad
    \text{VDM, widened: the same with as many parameters as NDM}, \qquad \text{NDM: } F_\phi(x, t) .

All take the same steps on the same batches. The bound is measured in continuous time on the 10,000
test images.
"""

import csv
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ndm.compare.plan import Row, plan_rows, read_rows
from ndm.data import DataSource, spread
from ndm.device import pick_device
from ndm.errors import UserError
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.tables import plus_minus
from ndm.model import DiffusionModel
from ndm.quality import classifier_features, compare_features, find_classifier
from ndm.random import part_seed
from ndm.reproduce.report import Report, check_learned
from ndm.reproduce.synthetic import write_mnist
from ndm.train.config import as_options, find_config
from ndm.train.run import Run
from ndm.viz import draw_over_time, image_grid, new_figure, transform_over_time

ROWS = ("VDM", "VDM, widened", "NDM")
TIMES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 1.0)
_STEPS = {"quick": 800, "smoke": 4}
_TARGETS = {"small": 0.95, "paper": 0.5}
_SMOKE = {
    "model.predictor.network.channels": 4,
    "model.transform.network.channels": 4,
    "train.batch_size": 4,
    "train.evaluation_limit": 4,
    "train.sample_images": 4,
    "train.sample_steps": 2,
}


def run(report: Report) -> None:
    """Train the three models, measure them on the test split and plot them."""
    planned = _plan(report)
    models, lines = dict[str, DiffusionModel](), list[list[str]]()
    limit, draws = (8, 1) if report.smoke else (None, 2)
    data: DataSource
    trained = report.train_all({planned[name].folder: planned[name].config for name in ROWS})
    for name in ROWS:
        model, data = trained[planned[name].folder]
        models[name] = model.to(pick_device())
        about = data.describe().about("test")
        evaluation = Evaluation(
            model, data.split("test"), report.seed, limit, progress=True, about=about
        )
        record = report.measure(planned[name].folder, partial(evaluation.nelbo, None, draws))
        metrics = report.run(planned[name].folder).metrics()
        lines.append(_row(name, planned[name].parameters, record, metrics))
    report.text(
        f"Bound in continuous time on {record['num_examples']} test images of"
        f" {data.describe().name} (sha256 {data.describe().sha256[:12]}),"
        f" {record['time_samples_per_example']} times per image; bits/dim is the sum of the last"
        " three columns. Standard errors are over images; one training run each."
    )
    report.table(["model", "parameters", "steps", "minutes", "bits/dim", *TERMS], lines)
    _measure_quality(report, models, data)
    _draw(report, models, data, {name: report.run(planned[name].folder) for name in ROWS})
    target = _TARGETS.get(report.settings.size)
    if target is not None:
        report.expect("bits/dim of NDM on the test images", record["bpd"], target)


def _plan(report: Report) -> dict[str, Row]:
    """Return the three training runs by the names of their models.

    Raises:
        UserError: overrides make NDM a conventional model, or no larger than VDM.
    """
    size = report.settings.size
    overrides: dict[str, object] = {"train.evaluation_limit": 1000}  # run() measures all images
    if size in _STEPS:
        overrides |= {
            **(_SMOKE if report.smoke else {}),
            "train.steps": _STEPS[size],
            "train.ema": 0.99,
        }
    overrides |= report.synthetic_data(write_mnist) if report.smoke else {}
    base = find_config("mnist") if size == "paper" else None
    rows, extra = read_rows(
        Path("compare-mnist-baselines"), [*as_options(overrides), *report.user_overrides], base
    )
    for row in rows:
        if row.name == "NDM":
            check_learned(row.config)
    planned = {row.name: row for row in plan_rows(rows, extra, "steps")}
    if set(planned) != set(ROWS):
        raise UserError(
            f"-- {' '.join(report.settings.overrides)}: NDM would have no more parameters than VDM,"
            " so there is no size to widen VDM to; give F a network"
        )
    return planned


STYLES = (("#1b1b1b", "-", "o"), ("#8a8a8a", "--", "s"), ("#c0392b", "-", "D"))
TERMS = ("prior", "diffusion", "reconstruction")


def _row(
    name: str, parameters: int, record: Mapping[str, Any], metrics: Mapping[str, Any]
) -> list[str]:
    minutes = float(metrics["training_seconds"]) / 60
    terms = [f"{record[f'{term}_bpd']:.4f}" for term in TERMS]
    return [
        name,
        f"{parameters:,}",
        f"{metrics['training_steps']:,}",
        f"{minutes:.1f}",
        f"**{plus_minus(record['bpd'], record['bpd_stderr'], 4)}**",
        *terms,
    ]


def _measure_quality(
    report: Report, models: Mapping[str, DiffusionModel], data: DataSource
) -> None:
    """Measure FID, KID, precision and recall of samples by the features of a digit classifier."""
    train, test, shape = data.split("train"), data.split("test"), data.describe().event_shape
    images, steps, classifier_steps = {"smoke": (8, 2, 2), "quick": (250, 50, 1000)}.get(
        report.settings.size, (500, 50, 1000)
    )
    classifier = find_classifier(
        report.out / "classifier", data, report.seed, progress=True, steps=classifier_steps
    )
    network = classifier_features(classifier)
    real = network(train.__getitems__(spread(len(train), 10 * images)), progress=True)

    def measure(x: torch.Tensor) -> dict[str, Any]:
        return compare_features(
            real, network(x), network, kid_subset_size=500, seed=report.seed
        ).to_dict()

    def measure_samples(model: DiffusionModel) -> dict[str, Any]:
        seed = part_seed(report.seed, 1)
        x = model.sample((images, *shape), seed=seed, steps=steps, batch_size=256, progress=True)
        return measure(x)

    found = {
        "test images": report.cache(
            "quality-test", lambda: measure(test.__getitems__(spread(len(test), images)))
        )
    }
    found |= {
        name: report.cache(
            f"quality-{name.lower().replace(', ', '-')}", partial(measure_samples, model)
        )
        for name, model in models.items()
    }
    report.add_number("quality", {"classifier": classifier.info, **found})
    report.text(
        f"Quality of {images:,} ancestral samples of {steps} steps, and of as many test images,"
        f" against {len(real):,} train images. Features: a classifier, test accuracy"
        f" {classifier.info['accuracy']['test']:.3f}, seed {classifier.info['seed']}, sha256"
        f" {network.sha256[:12]}, d = {network.dims}."
    )
    report.quality_table(found, (3, 4, 3, 3))


def _draw(
    report: Report, models: Mapping[str, DiffusionModel], data: DataSource, runs: Mapping[str, Run]
) -> None:
    """Plot F over time, learning curves and samples."""
    test, shape = data.split("test"), data.describe().event_shape
    chosen = {name: models[name] for name in ("VDM", "NDM")}
    _draw_over_time(report, chosen, test.__getitems__([0, len(test) // 2]))
    _draw_curves(report, runs)
    count, steps = (4, 2) if report.smoke else (64, 100)
    figure = new_figure(13.2, 3.8)
    panels = {"test images": test.__getitems__(range(count))}
    for name, model in models.items():
        panels[name] = model.sample(
            (count, *shape), seed=report.seed, steps=steps, batch_size=256, progress=True
        )
    for axis, (name, x) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        axis.imshow(image_grid(x, gap=0), interpolation="nearest")
        axis.set(title=name, xticks=[], yticks=[])
    report.figure(
        "samples",
        figure,
        f"Test images and unselected samples, ancestral sampling with {steps} steps",
    )


def _draw_over_time(report: Report, models: Mapping[str, DiffusionModel], x: torch.Tensor) -> None:
    """Plot F(x, t), z_t and x̂ over time for each model, side by side."""
    figure = new_figure(13.2, 6.2)
    parts: Any = figure.subfigures(1, len(models), wspace=0.04)
    for part, (name, model) in zip(parts, models.items(), strict=True):
        part.suptitle("DDPM (VDM), $F(x,t)=x$" if name == "VDM" else name)
        states = transform_over_time(model, x, TIMES, report.seed)
        draw_over_time(part, states, TIMES, 10, 10)
    report.figure(
        "over-time",
        figure,
        "F(x, t), z_t and the prediction over time for two test images, with the same noise at"
        " every time; clipped to the range of the data",
    )


def _draw_curves(report: Report, runs: Mapping[str, Run]) -> None:
    """Plot the bound of the training batches, smoothed over twenty logged values."""
    figure = new_figure(5.4, 3.6)
    axis = figure.subplots()
    for (name, one), (color, line, marker) in zip(runs.items(), STYLES, strict=True):
        steps, bound = learning_curve(one.folder)
        width = max(1, min(20, len(bound) // 4))
        smooth = np.convolve(bound, np.ones(width) / width, mode="valid")
        axis.plot(
            steps[width - 1 :],
            smooth,
            label=name,
            color=color,
            linestyle=line,
            marker=marker,
            markevery=0.12,
            markersize=5,
        )
    axis.set(xlabel="training steps", ylabel="bound of the training batches (bits/dim)")
    axis.set_ylim(top=2.0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    caption = (
        "The bound during training, before the weights are averaged: means over twenty logged"
        " batches, up to 2 bits/dim"
    )
    report.figure("learning", figure, caption)


def learning_curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and bounds (bits/dim) that a run logged in training, over all its calls."""

    def version(path: Path) -> int:
        return int(path.parent.name.removeprefix("version_"))

    rows = dict[int, float]()
    for path in sorted(folder.glob("logs/version_*/metrics.csv"), key=version):
        with path.open(encoding="utf-8", newline="") as file:
            rows |= {
                int(row["step"]): float(row["train/nelbo_bpd"])
                for row in csv.DictReader(file)
                if row.get("train/nelbo_bpd")
            }
    steps = sorted(rows)
    return np.array(steps), np.array([rows[step] for step in steps])
