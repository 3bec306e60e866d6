"""Conventional and learned forward process on smooth 2-D densities (NDM, section 4).

Plots z_t, x̂ and reverse trajectories, and measures likelihood and bound.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ndm.data.toy import ToySource
from ndm.model import DiffusionModel
from ndm.random import part_seed
from ndm.reproduce.plane import (
    LEARNED,
    PLAIN,
    SMOKE,
    Budget,
    detour,
    measure,
    report_measurements,
    report_movement,
    train_both,
    trajectories,
)
from ndm.reproduce.plane_figures import PREDICTION, TIMES, over_time, paths, sample_panels
from ndm.reproduce.report import Report
from ndm.sample import Ancestral
from ndm.viz import transform_over_time

CONFIG = "distribution-2d"
DATA: Mapping[str, Mapping[str, object]] = {
    "mixture": {},
    "pinwheel": {"data": "ndm.data.Pinwheel"},
    "two moons": {"data": "ndm.data.TwoMoons"},
}
"""The densities and their configuration overrides; the smoke size uses the first two."""
BUDGET = Budget(overrides={"train.evaluation_limit": 500}, draws=16, points=2000, samples=2500)
WITHIN = 0.05
"""Tolerance of the smooth mixture's NLL around the entropy, nats."""


def run(report: Report) -> None:
    """Train both models on each density, measure and plot them."""
    budget = SMOKE if report.smoke else BUDGET
    models: dict[str, dict[str, DiffusionModel]] = {}
    sources: dict[str, ToySource] = {}
    records = {}
    for data, overrides in list(DATA.items())[: 2 if report.smoke else None]:
        key = data.replace(" ", "-")
        models[data], sources[data] = train_both(report, CONFIG, budget, key, overrides)
        records[data] = report.cache(
            key, partial(measure, models[data], sources[data], budget, report.seed)
        )
    report.text(
        f"{LEARNED} is F(x, t) = (1 − t) x + t g(x, t) with a learned g; {PLAIN} is F(x, t) = x"
        " with the same predictor, trained for as many steps."
    )
    report_measurements(report, records)
    _draw_forward(report, models, sources, budget)
    learned = {data: of_data[LEARNED] for data, of_data in models.items()}
    report_movement(report, learned, sources, TIMES, budget.shown)
    _draw_reverse(report, models, budget)
    _draw_samples(report, models, sources, budget)
    for model in (LEARNED, PLAIN):
        loss = records["mixture"][model]["nll_above"][0]
        report.expect(
            f"smooth mixture, {model}: NLL above the entropy, nats, in absolute value",
            abs(loss),
            WITHIN,
        )


def _draw_forward(
    report: Report,
    models: Mapping[str, Mapping[str, DiffusionModel]],
    sources: Mapping[str, ToySource],
    budget: Budget,
) -> None:
    """Plot F with z_t, and the predictions."""
    latents: dict[str, Tensor] = {}
    predictions: dict[str, Tensor] = {}
    colors = []
    for data, of_data in models.items():
        test = sources[data].split("test")
        x = test.__getitems__(range(min(len(test), budget.shown)))
        colors.append(torch.atan2(x[:, 1], x[:, 0]).abs())
        states = {
            name: transform_over_time(model, x, TIMES, report.seed)
            for name, model in of_data.items()
        }
        latents[f"{data}\n{LEARNED} $F(x,t)$"] = states[LEARNED]["transformed"].cpu()
        for name in (LEARNED, PLAIN):
            latents[f"{data}\n{name} $z_t$"] = states[name]["latent"].cpu()
            predictions[f"{data}\n{name} {PREDICTION}"] = states[name]["prediction"].cpu()
    note = "Both models use the same noise; color: the angle of x to the first axis."
    report.figure(
        "forward",
        over_time(latents, torch.stack(colors).repeat_interleave(3, 0)),
        f"F(x, t), and z_t of both models. {note}",
    )
    report.figure(
        "predictions",
        over_time(predictions, torch.stack(colors).repeat_interleave(2, 0)),
        f"The predictions. {note}",
    )


def _draw_reverse(
    report: Report, models: Mapping[str, Mapping[str, DiffusionModel]], budget: Budget
) -> None:
    """Plot the paths from z_1 to z_0, and tabulate their detours."""
    generator = torch.Generator().manual_seed(part_seed(report.seed, 0))
    z = torch.randn(budget.trajectories, 2, generator=generator)
    ode, ancestral, lengths = {}, {}, []
    for data, of_data in models.items():
        ode[data] = {
            name: trajectories(of_data[name], z, 2 * budget.steps) for name in (PLAIN, LEARNED)
        }
        few = z[: len(z) // 5 or 1]  # random paths cross: many would be illegible
        ancestral[data] = {
            name: trajectories(of_data[name], few, budget.steps, Ancestral(1.0), report.seed)
            for name in (PLAIN, LEARNED)
        }
        found = [detour(ode[data][name]) for name in (PLAIN, LEARNED)]
        lengths.append([data, *(f"{100 * one:.1f} %" for one in found)])
        report.add_number(
            f"detour_{data.replace(' ', '_')}", dict(zip((PLAIN, LEARNED), found, strict=True))
        )
    where = "from the same starts z_1, in the plane and over time"
    report.figure(
        "trajectories",
        paths(ode, "the ODE"),
        f"Deterministic paths back to the data, by the ODE, {where}.",
    )
    report.figure(
        "ancestral",
        paths(ancestral, "ancestral steps"),
        f"Random paths back, by {budget.steps} ancestral steps, {where}.",
    )
    report.text("Excess length of the ODE's paths over the straight line from z_1 to z_0:")
    report.table(["data", PLAIN, LEARNED], lengths)


def _draw_samples(
    report: Report,
    models: Mapping[str, Mapping[str, DiffusionModel]],
    sources: Mapping[str, ToySource],
    budget: Budget,
) -> None:
    """Plot samples of each model next to the data."""
    rows: dict[str, dict[str, Tensor]] = {}
    for data, of_data in models.items():
        test = sources[data].split("test")
        rows[data] = {"data": test.__getitems__(range(min(len(test), budget.samples)))}
        for name, model in of_data.items():
            rows[data][name] = model.sample(
                tuple(rows[data]["data"].shape), steps=budget.steps, seed=report.seed, progress=True
            ).cpu()
    report.figure(
        "samples",
        sample_panels(rows),
        f"Test data, and {budget.samples} ancestral samples ({budget.steps} steps) of each model.",
    )
