r"""Models of 2-D densities that are known: their bound and likelihood beside the truth.

With the density p of the data known, what a model loses is a mean of differences on the same
points, which vary much less than the points do:

.. math::
    KL(p \,\|\, p_\theta) = E_p[\log p(x) - \log p_\theta(x)] = \text{NLL} - H[p] , \qquad
    \text{NELBO} - H[p] = KL(p \,\|\, p_\theta) + \text{gap of the bound} .

Two models are compared by the differences of single points, too, at the same times and with the
same noise. All errors are over test points; what another seed of the training would give is not in
them.
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
"""The names of the two models: F(x, t) = x, and F learned."""
CONVENTIONAL = {"model.transform": "ndm.Identity"}
"""Overrides that make the conventional diffusion model of a configuration."""
_BATCH = 1024


@dataclass(frozen=True)
class Budget:
    """How much is trained, measured and drawn."""

    overrides: Mapping[str, object] = field(default_factory=dict)
    """Overrides of every training run."""
    bound_points: int | None = None
    """Test points of the bound; None for all."""
    draws: int = 64
    """Times for each of them."""
    points: int = 4000
    """Test points of the likelihood."""
    nodes: int = 32
    """Times at which the trace is taken on the way of each, see
    :class:`ndm.likelihood.OdeSettings`.
    """
    shown: int = 2000
    """Points of a figure."""
    samples: int = 8000
    """Samples of a model."""
    steps: int = 100
    """Steps of a sampler."""
    grid: int = 80
    """Points of a density along each axis."""
    trajectories: int = 60
    """Points whose path is followed."""


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
"""What a check in seconds takes, together with :data:`SMALL_TRANSFORM` where F is learned."""
SMALL_TRANSFORM = {"model.transform.network.hidden": 8, "model.transform.network.blocks": 1}


def with_density(source: DataSource) -> ToySource:
    """The source, if its density is known.

    Raises:
        UserError: it is not.
    """
    if not isinstance(source, ToySource):
        raise UserError(
            f"--data {type(source).__name__}: this experiment needs data whose density is known,"
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
    """The configurations of both models, by the names of their runs.

    Args:
        report: the experiment.
        config: the learned model's configuration, one that comes with the library.
        overrides: overrides of both models, in turn.
        learned: further overrides of the learned model.
        prefix: put before the names of the runs.
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
    """Train the conventional model and the learned one on the same data, for as many steps, and
    give them by name with the data.

    Args:
        report: the experiment.
        config: the learned model's configuration, one that comes with the library.
        budget: how long.
        name: put before the names of the runs.
        overrides: further overrides of both.
    """
    prefix = f"{name}-" if name else ""
    learned_too = SMALL_TRANSFORM if report.smoke else {}
    trained = report.train_all(
        both_configs(
            report, config, overrides, budget.overrides, learned=learned_too, prefix=prefix
        )
    )
    (plain, _), (learned, source) = trained.values()
    return {PLAIN: plain, LEARNED: learned}, with_density(source)


def measure(
    models: Mapping[str, DiffusionModel], source: ToySource, budget: Budget, seed: int
) -> dict[str, Any]:
    """Bound and likelihood of each model on the test split, above the entropy, and how the models
    differ; JSON-ready.

    Numbers are nats in the units of the source; pairs are a mean and its standard error.

    Returns:
        ``entropy`` (exact), ``sampled_entropy`` (the mean of -log p over the points of the
        likelihood); of each model by its name ``parameters``, ``nelbo``, ``nelbo_above``, ``nll``,
        ``nll_above`` and the two ``measurements``; ``nelbo_difference`` and ``nll_difference``, of
        the last model less the first.
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
    """A mean and its standard error, for a table."""
    return plus_minus(pair[0], pair[1], digits)


def verdict(pair: Sequence[float]) -> str:
    """Whether a difference, last less first, is more than two of its standard errors, in words."""
    if not abs(pair[0]) > 2 * pair[1]:
        return "no significant difference"
    return f"{LEARNED}'s is {'lower' if pair[0] < 0 else 'higher'}, of these two runs"


def tell(report: Report, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the numbers of :func:`measure`, by the name of the data, into the results and as tables
    onto the page.
    """
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
                report.measured(f"{key}_{name.lower()}_{kind}", measurement)
        differences.append(
            [
                data,
                *(
                    cell
                    for kind in ("nelbo", "nll")
                    for cell in (
                        pm(record[f"{kind}_difference"], 4),
                        verdict(record[f"{kind}_difference"]),
                    )
                ),
            ]
        )
        report.number(
            key, {name: value for name, value in record.items() if name not in (PLAIN, LEARNED)}
        )
        for name in (PLAIN, LEARNED):
            report.number(
                f"{key}_{name.lower()}",
                {part: value for part, value in record[name].items() if part != "measurements"},
            )
    report.say(
        "Nats in the units of the data; ± is the standard error over test points. NLL is by the"
        " ODE; what it lies above the entropy is KL(p ‖ p_θ)."
    )
    head = ["data", "entropy H", "model", "parameters", "NELBO", "NELBO − H", "NLL", "NLL − H"]
    report.table(head, rows)
    report.say(
        f"{LEARNED} less {PLAIN}, point by point at the same times and noise. One training run"
        " each: another seed of the training moves these numbers as well, and the errors do not"
        " know of it."
    )
    report.table(["data", "NELBO", "", "NLL", ""], differences)


@torch.no_grad()
def tell_movement(
    report: Report,
    models: Mapping[str, DiffusionModel],
    sources: Mapping[str, ToySource],
    times: Sequence[float],
    shown: int,
) -> None:
    """Say how far F takes the test data from where they are: root mean squares over the points, for
    each model by the name of its data.
    """
    rows = []
    for data, model in models.items():
        test = sources[data].split("test")
        x = test.__getitems__(range(min(len(test), shown))).to(model.like)
        moves = [(model.transformed(x, time) - x).cpu() for time in times]
        rms = [float(move.square().sum(1).mean().sqrt()) for move in moves]
        spread = [float((move - move.mean(0)).square().sum(1).mean().sqrt()) for move in moves]
        report.number(
            f"movement_{data.replace(' ', '_')}",
            {"times": list(times), "rms": rms, "rms_without_mean": spread},
        )
        rows += [
            [data, "F(x, t) − x", *(f"{value:.3f}" for value in rms)],
            [data, "less its mean", *(f"{value:.3f}" for value in spread)],
        ]
    report.say(
        "How far the learned F takes the data, root mean square over the test points, in the units"
        " of the data:"
    )
    report.table(["data", "", *(f"t = {time:g}" for time in times)], rows)


@torch.no_grad()
def density(model: DiffusionModel, limit: float, size: int, seed: int = 0) -> Tensor:
    """The density of z_0/alpha_0 under the ODE at the centers of ``size`` x ``size`` cells of the
    square from -limit to limit.

    Returns:
        ``(size, size)``, float64, in the units in which the model sees the data; rows go along the
        second coordinate, upward.
    """
    points = cell_centers(limit, size).to(model.like)
    parts = []
    for part in tqdm(points.split(_BATCH), desc="density", unit="batch", delay=1, leave=False):
        found = model.log_likelihood(
            part, dequantization="none", settings=OdeSettings(nodes=32), seed=seed
        )
        parts.append(found.log_p.exp())
    return torch.cat(parts).reshape(size, size)


def cell_centers(limit: float, size: int) -> Tensor:
    """Centers of ``size`` x ``size`` cells of the square from -limit to limit, ``(size², 2)``,
    float64, the first coordinate fastest.
    """
    middles = (2 * (torch.arange(size, dtype=torch.float64) + 0.5) / size - 1) * limit
    return torch.cartesian_prod(middles, middles).flip(1)


@torch.no_grad()
def trajectories(
    model: DiffusionModel, z: Tensor, steps: int, step: Step | None = None, seed: int = 0
) -> Tensor:
    """Paths of the reverse process from ``z`` = z_1 ``(B, 2)``, ``(steps + 1, B, 2)`` from t = 1 to
    0; by the ODE unless told otherwise.
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
    """How much longer paths ``(T + 1, B, 2)`` are than the way from their starts to their ends:
    mean length over mean distance, minus 1.
    """
    length = path.diff(dim=0).norm(dim=-1).sum(0)
    return float(length.mean() / (path[-1] - path[0]).norm(dim=-1).mean() - 1)
