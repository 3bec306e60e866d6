r"""Few steps: the bound against the number of steps T, and sample quality against the number of
evaluations (NDM, section 4).

.. math::
    \text{NELBO}_T \to \text{NELBO}_\infty \quad (T \to \infty), \qquad
    \text{evaluations of } \hat x = \text{steps} \times (1 \text{ for ancestral, DDIM; } 2 \text{ for Heun on the ODE}) .

DDPM is F = x, with the same predictor unless the user names other runs; it is VDM with a fixed
schedule as well. A tied NDM evaluates F besides: at s and t in each step of ancestral sampling and
DDIM, once with its time derivative in each evaluation of the ODE. Evaluations are counted where
they happen, in the networks.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ndm.data import DataDescription, DataSource
from ndm.elbo import bits_per_dim
from ndm.errors import UserError
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.measurement import Measurement, standard_error
from ndm.evaluation.tables import plus_minus
from ndm.model import DiffusionModel
from ndm.reproduce.plane import both_configs
from ndm.reproduce.report import Report
from ndm.reproduce.steps_figures import CONTINUOUS, bound_figure, sample_figure
from ndm.reproduce.steps_plan import MODELS, Plan
from ndm.reproduce.steps_quality import pictures, quality
from ndm.serialize import read_json, to_config
from ndm.transform import Identity
from ndm.viz import is_image


def run(report: Report) -> None:
    """Train DDPM and NDM, or take the user's; measure bounds and sample quality, draw them."""
    plan = Plan.of(report)
    models, data = given(report) if report.runs else trained(report, plan)
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in model.parameters()):,}" for name, model in models.items()
    )
    alike = to_config(models["DDPM"].predictor) == to_config(models["NDM"].predictor)
    predictors = "the predictors are built alike" if alike else "the predictors differ"
    report.say(
        f"Data: {data.describe().name}, {data.describe().version}. Parameters: {sizes};"
        f" {predictors}."
    )
    bounds(report, plan, models, data)
    quality(report, plan, models, data)
    figure = sample_figure(pictures(report, plan, models, data))
    report.figure(
        "samples", figure, "Samples of one seed; above each grid, evaluations of the predictor"
    )


def trained(report: Report, plan: Plan) -> tuple[dict[str, DiffusionModel], DataSource]:
    """DDPM and NDM trained here, and their data."""
    found = report.train_all(both_configs(report, plan.config, plan.overrides))
    return {name: found[name.lower()][0] for name in MODELS}, found["ndm"][1]


def given(report: Report) -> tuple[dict[str, DiffusionModel], DataSource]:
    """DDPM and NDM of the runs that the user names, and their data.

    Raises:
        UserError: the first is no DDPM or the second is one, or the two were trained on different
            data or on no images with labels.
    """
    models = dict(zip(MODELS, report.models, strict=True))
    data, where = report.runs[0].data(), f"--runs {' '.join(report.settings.runs)}"
    what, other = (
        data.describe().to_dict(),
        DataDescription.from_dict(read_json(report.runs[1].data_path)).to_dict(),
    )
    if [isinstance(model.transform, Identity) for model in models.values()] != [True, False]:
        raise UserError(
            f"{where}: give first a run that does not transform its data, with --model.transform"
            " ndm.Identity, then one that does"
        )
    for key in what:
        if what[key] != other.get(key):
            raise UserError(
                f"{where}: trained on different data: {key} is {what[key]!r} and"
                f" {other.get(key)!r}; name two runs on the same"
            )
    if (
        not is_image(data.describe().event_shape)
        or data.split("train").labels is None
        or len(data.describe().classes) < 2
    ):
        raise UserError(
            f"{where}: {what['name']} are no images with labels, which the features for the quality"
            " of samples are learned from"
        )
    return models, data


def bounds(
    report: Report, plan: Plan, models: Mapping[str, DiffusionModel], data: DataSource
) -> None:
    """NELBO against T, plain and with the fitted reverse variance, and the NLL; figure 1."""
    kept: dict[str, dict[str, Any]] = {}
    about = data.describe().about("test")
    for name, model in models.items():
        evaluation = Evaluation(
            model,
            data.split("test"),
            seed=report.seed,
            limit=plan.limit,
            progress=True,
            about=about,
        )
        for horizon in plan.horizons:
            for fit in (None, data.split("train")) if horizon in plan.fitted else (None,):
                key = f"{name.lower()}-{horizon or CONTINUOUS}" + ("-fitted" if fit else "")
                kept[key] = report.cache(
                    f"nelbo-{key}", partial(_kept, evaluation.nelbo, horizon, plan.draws, fit)
                )
        likelihood = Evaluation(
            model,
            data.split("test"),
            seed=report.seed,
            limit=plan.nll_limit,
            progress=True,
            about=about,
        )
        kept[f"{name.lower()}-nll"] = report.cache(
            f"nll-{name.lower()}", partial(_kept, likelihood.nll, settings=plan.ode)
        )
    for key, one in kept.items():
        report.measured(key, one["record"])
    records = {key: one["record"] for key, one in kept.items()}
    report.figure(
        "nelbo",
        bound_figure(records, list(models), plan.horizons),
        "NELBO of the T-step model, with the posterior's variance v and with one fitted on the"
        f" train split; bars: standard error over {records['ddpm-' + CONTINUOUS]['num_examples']}"
        f" examples. Dotted: NLL in continuous time, of {records['ddpm-nll']['num_examples']} of"
        " them",
    )
    dims = math.prod(data.describe().event_shape)
    less = {
        horizon: _difference(kept, f"{horizon or CONTINUOUS}", dims) for horizon in plan.horizons
    }
    rows = [_bound_row(records, horizon, less[horizon]) for horizon in plan.horizons]
    rows.append(
        [
            "NLL, ODE",
            *_pair(records["ddpm-nll"], None),
            *_pair(records["ndm-nll"], None),
            plus_minus(*_difference(kept, "nll", dims)),
        ]
    )
    report.say(
        f"Bits/dim on {records['ddpm-' + CONTINUOUS]['num_examples']} test examples (NLL:"
        f" {records['ddpm-nll']['num_examples']}, one sample of z_0), ± over examples; the last"
        " column pairs them."
    )
    report.table(["T", "DDPM", "fitted", "NDM", "fitted", "NDM less DDPM"], rows)
    report.number(
        "ndm_less_ddpm_bpd",
        {str(h or CONTINUOUS): {"difference": d, "stderr": e} for h, (d, e) in less.items()},
    )
    if not report.smoke:
        report.expect(
            "largest NELBO of NDM less that of DDPM over T >= 10, bits/dim",
            max(less[h][0] for h in (10, 50, 100, 1000, None)),
            0.0,
        )
        gain = records["ndm-10-fitted"]["bpd"] - records["ndm-10"]["bpd"]
        report.expect("what a fitted variance adds to NDM's NELBO at T = 10, bits/dim", gain, 0.0)
        report.expect(
            "NDM's NELBO at T = 1000 less continuous time, bits/dim",
            records["ndm-1000"]["bpd"] - records[f"ndm-{CONTINUOUS}"]["bpd"],
            0.02,
        )


def _kept(measure: Callable[..., Measurement], *arguments: Any, **options: Any) -> dict[str, Any]:
    measurement = measure(*arguments, **options)
    return {"record": measurement.to_dict(), "values": measurement.values.tolist()}


def _difference(kept: Mapping[str, dict[str, Any]], key: str, dims: int) -> tuple[float, float]:
    """NDM less DDPM over the same examples and its standard error, bits/dim."""
    first, second = (
        torch.tensor(kept[f"{name.lower()}-{key}"]["values"], dtype=torch.float64)
        for name in ("NDM", "DDPM")
    )
    return float(bits_per_dim((first - second).mean(), dims)), float(
        bits_per_dim(standard_error(first - second), dims)
    )


def _bound_row(
    records: Mapping[str, dict[str, Any]], horizon: int | None, less: tuple[float, float]
) -> list[str]:
    row = [str(horizon or "continuous time")]
    for name in ("ddpm", "ndm"):
        row += _pair(
            records[f"{name}-{horizon or CONTINUOUS}"], records.get(f"{name}-{horizon}-fitted")
        )
    return [*row, plus_minus(*less)]


def _pair(plain: Mapping[str, Any], fitted: Mapping[str, Any] | None) -> list[str]:
    return [plus_minus(one["bpd"], one["bpd_stderr"]) if one else "" for one in (plain, fitted)]
