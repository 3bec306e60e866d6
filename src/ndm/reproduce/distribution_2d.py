"""The conventional model beside the learned forward process on smooth 2-D densities: what z_t, x̂
and the ways back to the data look like, and what likelihood and bound say (NDM, section 4).
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
    tell,
    tell_movement,
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
"""The densities, and what they override in the configuration; the smoke variant takes the first
two.
"""
BUDGET = Budget(overrides={"train.evaluation_limit": 500}, draws=16, points=2000, samples=2500)
WITHIN = 0.05
"""Nats by which the likelihood of the smooth mixture may miss the entropy."""


def run(report: Report) -> None:
    """Train both models on each density, measure them, draw them."""
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
    report.say(
        f"{LEARNED} is F(x, t) = (1 − t) x + t g(x, t) with a learned g; {PLAIN} is F(x, t) = x"
        " with the same predictor, trained for as many steps."
    )
    tell(report, records)
    _forward(report, models, sources, budget)
    tell_movement(
        report,
        {data: of_data[LEARNED] for data, of_data in models.items()},
        sources,
        TIMES,
        budget.shown,
    )
    _reverse(report, models, budget)
    _samples(report, models, sources, budget)
    for model in (LEARNED, PLAIN):
        loss = records["mixture"][model]["nll_above"][0]
        report.expect(
            f"smooth mixture, {model}: NLL above the entropy, nats, in absolute value",
            abs(loss),
            WITHIN,
        )


def _forward(
    report: Report,
    models: Mapping[str, Mapping[str, DiffusionModel]],
    sources: Mapping[str, ToySource],
    budget: Budget,
) -> None:
    """Figures of z_t with F, and of the predictions."""
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
    note = "Both models with the same noise; color: the angle of x to the first axis."
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


def _reverse(
    report: Report, models: Mapping[str, Mapping[str, DiffusionModel]], budget: Budget
) -> None:
    """Figures of the paths from z_1 to z_0."""
    generator = torch.Generator().manual_seed(part_seed(report.seed, 0))
    z = torch.randn(budget.trajectories, 2, generator=generator)
    ode, ancestral, lengths = {}, {}, []
    for data, of_data in models.items():
        ode[data] = {
            name: trajectories(of_data[name], z, 2 * budget.steps) for name in (PLAIN, LEARNED)
        }
        few = z[: len(z) // 5 or 1]  # random paths cross
        ancestral[data] = {
            name: trajectories(of_data[name], few, budget.steps, Ancestral(1.0), report.seed)
            for name in (PLAIN, LEARNED)
        }
        found = [detour(ode[data][name]) for name in (PLAIN, LEARNED)]
        lengths.append([data, *(f"{100 * one:.1f} %" for one in found)])
        report.number(
            f"detour_{data.replace(' ', '_')}", dict(zip((PLAIN, LEARNED), found, strict=True))
        )
    where = "from the same starts z_1, in the plane and over time"
    report.figure(
        "trajectories",
        paths(ode, "the ODE"),
        f"Deterministic ways back to the data, by the ODE, {where}.",
    )
    report.figure(
        "ancestral",
        paths(ancestral, "ancestral steps"),
        f"Random ways back, by {budget.steps} ancestral steps, {where}.",
    )
    report.say("How much longer the paths of the ODE are than the straight way from z_1 to z_0:")
    report.table(["data", PLAIN, LEARNED], lengths)


def _samples(
    report: Report,
    models: Mapping[str, Mapping[str, DiffusionModel]],
    sources: Mapping[str, ToySource],
    budget: Budget,
) -> None:
    """A figure of samples beside the data."""
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
