"""The 2-D checkerboard: F(x, t) over time, and density and samples compared with the data.

NDM, figure 1.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ndm.data.toy import ToySource
from ndm.model import DiffusionModel
from ndm.reproduce.plane import (
    LEARNED,
    PLAIN,
    SMOKE,
    Budget,
    cell_centers,
    density,
    measure,
    report_measurements,
    report_movement,
    train_both,
)
from ndm.reproduce.plane_figures import PREDICTION, TIMES, densities, over_time
from ndm.reproduce.report import Report
from ndm.viz import transform_over_time

BUDGET = Budget(overrides={"train.evaluation_limit": 1000})
WITHIN = 0.15
"""Tolerance of the NLL around the entropy, nats."""


def run(report: Report) -> None:
    """Train NDM and the conventional model on the checkerboard, measure and plot them."""
    budget = SMOKE if report.smoke else BUDGET
    models, source = train_both(report, "checkerboard", budget)
    record = report.cache("numbers", lambda: measure(models, source, budget, report.seed))
    report.text(
        f"{LEARNED} is F(x, t) = x + σ_t² f(x, t) with a learned f; {PLAIN} is F(x, t) = x with the"
        " same predictor, trained for as many steps."
    )
    report_measurements(report, {"checkerboard": record})
    states, colors = _states(models, source, budget, report.seed)
    report.figure(
        "transform",
        over_time(states, colors, TIMES),
        "F(x, t) of the test data over time, z_t, and the prediction. Both models use the same"
        " noise; color: the cell of x.",
    )
    report_movement(
        report, {"checkerboard": models[LEARNED]}, {"checkerboard": source}, TIMES, budget.shown
    )
    limit, test = 2.2, source.split("test")
    drawn = test.__getitems__(range(min(len(test), budget.samples)))
    true_density = source.log_prob(cell_centers(limit, budget.grid)).exp()
    columns: dict[str, tuple[Tensor, Tensor]] = {
        "data": (true_density.reshape(budget.grid, budget.grid), drawn)
    }
    for name, model in models.items():
        found = report.cache(
            f"density-{name.lower()}", partial(_density, model, limit, budget.grid)
        )
        samples = model.sample(
            tuple(drawn.shape), steps=budget.steps, seed=report.seed, progress=True
        ).cpu()
        cells = torch.tensor(found["cells"], dtype=torch.float64)
        mass = float(cells.sum()) * (2 * limit / budget.grid) ** 2
        report.add_number(f"mass_of_the_density_drawn_{name.lower()}", mass)
        outside = float(torch.isinf(source.log_prob(samples)).double().mean())
        report.add_number(f"samples_outside_the_cells_{name.lower()}", outside)
        columns[name] = (cells, samples)
    report.figure(
        "density",
        densities(columns, limit),
        "Top: the density of the data, and of each model by the ODE. Bottom: test data and"
        f" {budget.samples} ancestral samples ({budget.steps} steps) of each model.",
    )
    loss = record[LEARNED]["nll_above"][0]
    report.expect(f"{LEARNED}: NLL above the entropy, nats, in absolute value", abs(loss), WITHIN)


def _states(
    models: dict[str, DiffusionModel], source: ToySource, budget: Budget, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return F, z_t and x̂ of both models by row label, and the cell of each point."""
    test = source.split("test")
    x = test.__getitems__(range(min(len(test), budget.shown)))
    learned, plain = (
        transform_over_time(models[name], x, TIMES, seed) for name in (LEARNED, PLAIN)
    )
    rows = {
        f"{LEARNED}\n$F(x, t)$": learned["transformed"],
        f"{LEARNED}\n$z_t$": learned["latent"],
        f"{LEARNED}\n{PREDICTION}": learned["prediction"],
        f"{PLAIN}\n$z_t$": plain["latent"],
        f"{PLAIN}\n{PREDICTION}": plain["prediction"],
    }
    return {name: states.cpu() for name, states in rows.items()}, _cells(source, x)


def _density(model: DiffusionModel, limit: float, size: int) -> dict[str, Any]:
    return {"cells": density(model, limit, size).tolist()}


def _cells(source: ToySource, x: Tensor) -> Tensor:
    side = getattr(source, "cell", 1.0)
    index = torch.floor(x / side)
    return 4 * index[:, 0] + index[:, 1]
