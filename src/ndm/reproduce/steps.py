r"""Few steps: the bound against T, and sample quality against evaluations (NDM, section 4).

.. math::
    \text{NELBO}_T \to \text{NELBO}_\infty \quad (T \to \infty), \qquad
    \text{evaluations of } \hat x
    = \text{steps} \times (1 \text{ for ancestral, DDIM; } 2 \text{ for Heun on the ODE}) .

DDPM is F = x (equivalently, VDM with a fixed schedule), with the same predictor unless the user
names other runs. A tied NDM also evaluates F: at s and t in each step of ancestral sampling and
DDIM, and once with its time derivative in each evaluation of the ODE. Evaluations are counted by
hooks on the networks.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ndm.data import DataDescription, DataSource
from ndm.errors import UserError
from ndm.evaluation.calibrate import Fit
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.measurement import paired_difference
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
    """Train DDPM and NDM, or load the user's; measure and plot bounds and sample quality."""
    plan = Plan.of(report)
    models, data = load_runs(report) if report.runs else train_models(report, plan)
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in model.parameters()):,}" for name, model in models.items()
    )
    alike = to_config(models["DDPM"].predictor) == to_config(models["NDM"].predictor)
    predictors = "the predictors are the same" if alike else "the predictors differ"
    report.text(
        f"Data: {data.describe().name}, {data.describe().version}. Parameters: {sizes};"
        f" {predictors}."
    )
    bounds(report, plan, models, data)
    quality(report, plan, models, data)
    figure = sample_figure(pictures(report, plan, models, data))
    report.figure("samples", figure, "Samples of one seed; titles are evaluations of the predictor")


def train_models(report: Report, plan: Plan) -> tuple[dict[str, DiffusionModel], DataSource]:
    """Train DDPM and NDM, and return them with their data."""
    trained = report.train_all(both_configs(report, plan.config, plan.overrides))
    return {name: trained[name.lower()][0] for name in MODELS}, trained["ndm"][1]


def load_runs(report: Report) -> tuple[dict[str, DiffusionModel], DataSource]:
    """Load DDPM and NDM from the user's runs, and their data.

    Raises:
        UserError: the first is not a DDPM, the second is one, their data differ, or the data are
            not images with labels.
    """
    models = dict(zip(MODELS, report.models, strict=True))
    data, where = report.runs[0].data(), f"--runs {' '.join(report.settings.runs)}"
    first = data.describe().to_dict()
    second = DataDescription.from_dict(read_json(report.runs[1].data_path)).to_dict()
    if [isinstance(model.transform, Identity) for model in models.values()] != [True, False]:
        raise UserError(
            f"{where}: give first a run that does not transform its data, with --model.transform"
            " ndm.Identity, then one that does"
        )
    for key in first:
        if first[key] != second.get(key):
            raise UserError(
                f"{where}: trained on different data: {key} is {first[key]!r} and"
                f" {second.get(key)!r}; give two runs on the same data"
            )
    if (
        not is_image(data.describe().event_shape)
        or data.split("train").labels is None
        or len(data.describe().classes) < 2
    ):
        raise UserError(
            f"{where}: {first['name']} does not consist of images with labels, which the features"
            " for sample quality are learned from; give runs on such images"
        )
    return models, data


def bounds(
    report: Report, plan: Plan, models: Mapping[str, DiffusionModel], data: DataSource
) -> None:
    """Measure NELBO against T, with plain and fitted reverse variance, and NLL; figure 1."""
    results: dict[str, tuple[dict[str, Any], Tensor]] = {}
    for name, model in models.items():
        results |= _measure_bounds(report, plan, name.lower(), model, data)
    records = {key: record for key, (record, _) in results.items()}
    examples = records[f"ddpm-{CONTINUOUS}"]["num_examples"]
    nll_examples = records["ddpm-nll"]["num_examples"]
    report.figure(
        "nelbo",
        bound_figure(records, list(models), plan.horizons),
        "NELBO of the T-step model, with the posterior's variance v and with a variance fitted on"
        f" the train split; bars: standard error over {examples} examples. Dotted: NLL in"
        f" continuous time on {nll_examples} of them",
    )
    dims = math.prod(data.describe().event_shape)

    def difference(key: str) -> tuple[float, float]:
        """Return NDM minus DDPM over the same examples, and its standard error, bits/dim."""
        return paired_difference(results[f"ndm-{key}"][1], results[f"ddpm-{key}"][1], dims)

    differences = {horizon: difference(f"{horizon or CONTINUOUS}") for horizon in plan.horizons}
    rows = [_bound_row(records, horizon, differences[horizon]) for horizon in plan.horizons]
    nlls = [*_pair(records["ddpm-nll"], None), *_pair(records["ndm-nll"], None)]
    rows.append(["NLL, ODE", *nlls, plus_minus(*difference("nll"))])
    report.text(
        f"Bits/dim on {examples} test examples (NLL: {nll_examples}, one sample of z_0), ± over"
        " examples; differences are paired."
    )
    report.table(["T", "DDPM", "fitted", "NDM", "fitted", "NDM minus DDPM"], rows)
    report.add_number(
        "ndm_less_ddpm_bpd",
        {str(h or CONTINUOUS): {"difference": d, "stderr": e} for h, (d, e) in differences.items()},
    )
    if not report.smoke:
        report.expect(
            "largest NELBO of NDM minus that of DDPM over T >= 10, bits/dim",
            max(differences[h][0] for h in (10, 50, 100, 1000, None)),
            0.0,
        )
        change = records["ndm-10-fitted"]["bpd"] - records["ndm-10"]["bpd"]
        report.expect("change of NDM's NELBO at T = 10 by a fitted variance, bits/dim", change, 0.0)
        report.expect(
            "NDM's NELBO at T = 1000 minus continuous time, bits/dim",
            records["ndm-1000"]["bpd"] - records[f"ndm-{CONTINUOUS}"]["bpd"],
            0.02,
        )


def _measure_bounds(
    report: Report, plan: Plan, name: str, model: DiffusionModel, data: DataSource
) -> dict[str, tuple[dict[str, Any], Tensor]]:
    """Measure a model's NELBO for each horizon and its NLL; records and values by key."""
    results: dict[str, tuple[dict[str, Any], Tensor]] = {}
    train, test, about = data.split("train"), data.split("test"), data.describe().about("test")
    bound = Evaluation(model, test, report.seed, plan.limit, progress=True, about=about)
    for horizon in plan.horizons:
        for fit in (None, Fit(train)) if horizon in plan.fitted else (None,):
            key = f"{name}-{horizon or CONTINUOUS}" + ("-fitted" if fit else "")
            take = partial(bound.nelbo, horizon, plan.draws, fit)
            results[key] = report.measure_values(key, take)
    likelihood = Evaluation(model, test, report.seed, plan.nll_limit, progress=True, about=about)
    key = f"{name}-nll"
    results[key] = report.measure_values(key, partial(likelihood.nll, settings=plan.ode))
    return results


def _bound_row(
    records: Mapping[str, dict[str, Any]], horizon: int | None, difference: tuple[float, float]
) -> list[str]:
    row = [str(horizon or "continuous time")]
    for name in ("ddpm", "ndm"):
        plain = records[f"{name}-{horizon or CONTINUOUS}"]
        row += _pair(plain, records.get(f"{name}-{horizon}-fitted"))
    return [*row, plus_minus(*difference)]


def _pair(plain: Mapping[str, Any], fitted: Mapping[str, Any] | None) -> list[str]:
    return [
        plus_minus(record["bpd"], record["bpd_stderr"]) if record else ""
        for record in (plain, fitted)
    ]
