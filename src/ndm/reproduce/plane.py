r"""Bound and likelihood of models of known 2-D densities, compared with the entropy.

If the density p of the data is known, a model's loss is a mean of differences at the same points,
which vary much less than their terms:

.. math::
    KL(p \,\|\, p_\theta) = E_p[\log p(x) - \log p_\theta(x)] = \text{NLL} - H[p] , \qquad
    \text{NELBO} - H[p] = KL(p \,\|\, p_\theta) + \text{gap of the bound} .

Two models are also compared point by point, at the same times and with the same noise. All standard
errors are over test points; they do not include the variation between training seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data.source import DataSource
from ndm.data.toy import ToySource
from ndm.errors import UserError
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.measurement import standard_error
from ndm.evaluation.tables import plus_minus
from ndm.model import DiffusionModel
from ndm.ode import OdeSettings
from ndm.reproduce.report import Report, check_learned
from ndm.sample import GridSampler, Heun, Step
from ndm.train.config import RunConfig

PLAIN, LEARNED = "DDPM", "NDM"
"""Names of the two models: F(x, t) = x, and a learned F."""
CONVENTIONAL = {"model.transform": "ndm.Identity"}
"""Overrides that turn a configuration into the conventional diffusion model."""
_BATCH = 1024


@dataclass(frozen=True)
class Budget:
    """How much to train, measure and plot."""

    overrides: Mapping[str, object] = field(default_factory=dict)
    """Overrides of every training run."""
    bound_points: int | None = None
    """Test points for the bound; None for all."""
    draws: int = 64
    """Times per test point in the bound."""
    points: int = 4000
    """Test points for the likelihood."""
    nodes: int = 32
    """Times at which the trace is evaluated along each path, see :class:`ndm.ode.OdeSettings`."""
    shown: int = 2000
    """Points in a figure."""
    samples: int = 8000
    """Samples per model."""
    steps: int = 100
    """Sampling steps."""
    grid: int = 80
    """Points per axis of a density."""
    trajectories: int = 60
    """Number of trajectories."""


SMOKE = Budget(
    overrides={
        "train.steps": 10,
        "train.batch_size": 32,
        "train.evaluation_limit": 32,
        "train.evaluation_draws": 1,
        "model.predictor.network.hidden": 16,
        "model.predictor.network.blocks": 1,
        "data.train_size": 500,
        "data.test_size": 300,
        "train.sample_steps": 4,
    },
    draws=4,
    points=48,
    nodes=16,
    shown=200,
    samples=200,
    steps=4,
    grid=10,
    trajectories=5,
)
"""Budget of the smoke size; a learned F also takes :data:`SMALL_TRANSFORM`."""
SMALL_TRANSFORM = {"model.transform.network.hidden": 8, "model.transform.network.blocks": 1}


def with_density(source: DataSource) -> ToySource:
    """Return the source if its density is known.

    Raises:
        UserError: the density is unknown.
    """
    if not isinstance(source, ToySource):
        raise UserError(
            f"--data {type(source).__name__}: this experiment needs data with a known density,"
            " such as ndm.data.TwoMoons"
        )
    return source


def both_configs(
    report: Report,
    config: str,
    *overrides: Mapping[str, object],
    learned: Mapping[str, object] = MappingProxyType({}),
    prefix: str = "",
) -> dict[str, RunConfig]:
    """Return the configurations of both models by run name.

    Args:
        report: the experiment.
        config: the learned model's configuration, one that ships with the library.
        overrides: overrides of both models, applied in order.
        learned: further overrides of the learned model.
        prefix: prefix of the run names.
    """
    return {
        f"{prefix}{PLAIN.lower()}": report.config(config, *overrides, last=CONVENTIONAL),
        f"{prefix}{LEARNED.lower()}": check_learned(report.config(config, *overrides, learned)),
    }


def train_both(
    report: Report,
    config: str,
    budget: Budget,
    name: str = "",
    overrides: Mapping[str, object] = MappingProxyType({}),
) -> tuple[dict[str, DiffusionModel], ToySource]:
    """Train the conventional and the learned model on the same data, for the same number of steps.

    Args:
        report: the experiment.
        config: the learned model's configuration, one that ships with the library.
        budget: how much to train.
        name: prefix of the run names.
        overrides: further overrides of both models.

    Returns:
        The models by name, and the data.
    """
    prefix = f"{name}-" if name else ""
    small = SMALL_TRANSFORM if report.smoke else {}
    configs = both_configs(
        report, config, overrides, budget.overrides, learned=small, prefix=prefix
    )
    (plain, _), (learned, source) = report.train_all(configs).values()
    return {PLAIN: plain, LEARNED: learned}, with_density(source)


def measure(
    models: Mapping[str, DiffusionModel], source: ToySource, budget: Budget, seed: int
) -> dict[str, Any]:
    """Measure bound and likelihood of each model on the test split, and their differences.

    Numbers are nats in the units of the source; pairs are a mean and its standard error.

    Returns:
        A JSON-ready record: ``entropy`` (exact) and ``sampled_entropy`` (the mean of -log p over
        the points of the likelihood); for each model, under its name, ``parameters``, ``nelbo``,
        ``nll``, their excess over the entropy ``nelbo_above`` and ``nll_above``, and the two
        ``measurements``; ``nelbo_difference`` and ``nll_difference``, the last model minus the
        first.
    """
    description = source.describe()
    test = source.split("test")
    record: dict[str, Any] = {"entropy": source.entropy()}
    values: dict[str, list[Tensor]] = {"nelbo": [], "nll": []}
    for name, model in models.items():
        about = {"model": name, **description.about("test")}
        one: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "measurements": {},
        }
        for kind, limit in (("nelbo", budget.bound_points), ("nll", budget.points)):
            evaluation = Evaluation(
                model, test, seed, limit, batch_size=_BATCH, progress=True, about=about
            )
            found = (
                evaluation.nelbo(None, budget.draws)
                if kind == "nelbo"
                else evaluation.nll(settings=OdeSettings(nodes=budget.nodes))
            )
            truth = source.log_prob(test.__getitems__(evaluation.numbers).double())
            nats = found.values + description.log_scale
            one[kind] = [float(nats.mean()), found.stderr]
            one[f"{kind}_above"] = _mean(nats + truth)
            one["measurements"][kind] = found.to_dict()
            values[kind].append(nats)
            if kind == "nll":
                record["sampled_entropy"] = _mean(-truth)
        record[name] = one
    for kind, (first, *_, last) in values.items():
        record[f"{kind}_difference"] = _mean(last - first)
    return record


def _mean(values: Tensor) -> list[float]:
    return [float(values.mean()), standard_error(values)]


def pm(pair: Sequence[float], digits: int = 3) -> str:
    """Format a mean and its standard error for a table."""
    return plus_minus(pair[0], pair[1], digits)


def verdict(pair: Sequence[float]) -> str:
    """Describe a difference, last minus first; it is significant beyond two standard errors."""
    if not abs(pair[0]) > 2 * pair[1]:
        return "no significant difference"
    return f"{LEARNED}'s is {'lower' if pair[0] < 0 else 'higher'} in these two runs"


def report_measurements(report: Report, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the records of :func:`measure`, by data name, to the results and the page."""
    rows, differences = [], []
    for data, record in records.items():
        key = data.replace(" ", "_")
        for name in (PLAIN, LEARNED):
            one = record[name]
            cells = [
                pm(one[kind]) if not kind.endswith("above") else pm(one[kind], 4)
                for kind in ("nelbo", "nelbo_above", "nll", "nll_above")
            ]
            rows.append([data, f"{record['entropy']:.4f}", name, f"{one['parameters']:,}", *cells])
            for kind, measurement in one["measurements"].items():
                report.add_measurement(f"{key}_{name.lower()}_{kind}", measurement)
        row = [data]
        for kind in ("nelbo", "nll"):
            difference = record[f"{kind}_difference"]
            row += [pm(difference, 4), verdict(difference)]
        differences.append(row)
        report.add_number(
            key, {name: value for name, value in record.items() if name not in (PLAIN, LEARNED)}
        )
        for name in (PLAIN, LEARNED):
            report.add_number(
                f"{key}_{name.lower()}",
                {part: value for part, value in record[name].items() if part != "measurements"},
            )
    report.text(
        "Nats in the units of the data; ± is the standard error over test points. NLL is by the"
        " ODE; its excess over the entropy is KL(p ‖ p_θ)."
    )
    head = ["data", "entropy H", "model", "parameters", "NELBO", "NELBO − H", "NLL", "NLL − H"]
    report.table(head, rows)
    report.text(
        f"{LEARNED} minus {PLAIN}, point by point at the same times and noise. One training run"
        " each: the errors do not include the variation between training seeds."
    )
    report.table(["data", "NELBO", "", "NLL", ""], differences)


@torch.no_grad()
def report_movement(
    report: Report,
    models: Mapping[str, DiffusionModel],
    sources: Mapping[str, ToySource],
    times: Sequence[float],
    shown: int,
) -> None:
    """Tabulate the root mean square of F(x, t) - x on test points, for models by data name."""
    rows = []
    for data, model in models.items():
        test = sources[data].split("test")
        x = test.__getitems__(range(min(len(test), shown))).to(model.like)
        moves = [(model.transformed(x, time) - x).cpu() for time in times]
        rms = [float(move.square().sum(1).mean().sqrt()) for move in moves]
        spread = [float((move - move.mean(0)).square().sum(1).mean().sqrt()) for move in moves]
        report.add_number(
            f"movement_{data.replace(' ', '_')}",
            {"times": list(times), "rms": rms, "rms_without_mean": spread},
        )
        rows += [
            [data, "F(x, t) − x", *(f"{value:.3f}" for value in rms)],
            [data, "minus its mean", *(f"{value:.3f}" for value in spread)],
        ]
    report.text(
        "How far the learned F moves the data: root mean square over the test points, in the units"
        " of the data."
    )
    report.table(["data", "", *(f"t = {time:g}" for time in times)], rows)


@torch.no_grad()
def density(model: DiffusionModel, limit: float, size: int, seed: int = 0) -> Tensor:
    """Return the density of z_0/alpha_0 under the ODE on a grid over the square [-limit, limit]².

    Returns:
        ``(size, size)``, float64, at the centers of the grid's cells, in the model's units of the
        data; rows go along the second coordinate, upward.
    """
    points = cell_centers(limit, size).to(model.like)
    parts = []
    for part in tqdm(points.split(_BATCH), desc="density", unit="batch", delay=1, leave=False):
        likelihood = model.log_likelihood(
            part, dequantization="none", settings=OdeSettings(nodes=32), seed=seed
        )
        parts.append(likelihood.log_p.exp())
    return torch.cat(parts).reshape(size, size)


def cell_centers(limit: float, size: int) -> Tensor:
    """Return the centers of ``size`` x ``size`` cells of the square [-limit, limit]².

    Returns:
        ``(size², 2)``, float64; the first coordinate varies fastest.
    """
    middles = (2 * (torch.arange(size, dtype=torch.float64) + 0.5) / size - 1) * limit
    return torch.cartesian_prod(middles, middles).flip(1)


@torch.no_grad()
def trajectories(
    model: DiffusionModel, z: Tensor, steps: int, step: Step | None = None, seed: int = 0
) -> Tensor:
    """Return paths of the reverse process from ``z`` = z_1 ``(B, 2)``, by default of the ODE.

    Returns:
        ``(steps + 1, B, 2)``, from t = 1 to 0.
    """
    model.eval()
    sampler = GridSampler(step or Heun(0.0), steps)
    path = sampler.path(
        model.reverse_process,
        z.to(model.like),
        torch.Generator(model.like.device).manual_seed(seed),
        progress=True,
    )
    return torch.stack([state.cpu() for _, state in path])


def detour(path: Tensor) -> float:
    """Return the excess length of paths ``(T + 1, B, 2)``: mean length over mean distance, minus 1.

    The distance is the straight line from start to end.
    """
    length = path.diff(dim=0).norm(dim=-1).sum(0)
    return float(length.mean() / (path[-1] - path[0]).norm(dim=-1).mean() - 1)
