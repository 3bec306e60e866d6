"""Dynamic optimal transport in one dimension, with a diffusion beside it (NDM, the section on dynamic
optimal transport).

The models are trained here; :mod:`ndm.reproduce.transport_measures` measures them by quadrature, so
that only the randomness of training is left.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ndm.data import Mixture
from ndm.decoder import GaussianDecoder
from ndm.model import NDM, DiffusionModel
from ndm.nn import MLP
from ndm.predictor import Predictor
from ndm.random import part_seed
from ndm.reproduce.report import Report
from ndm.reproduce.transport_figures import NAMES, draw_map, draw_trajectories
from ndm.reproduce.transport_measures import (
    DATA,
    FEW_STEPS,
    measure,
)
from ndm.schedule import LinearBetaSchedule, LinearLogSNRSchedule
from ndm.transform import Identity, SeparableTransform
from ndm.variants.interpolation import InterpolationScale, InterpolationTransform
from ndm.variants.monotone import MonotoneMap
from ndm.variants.nfdm import SeparableScale
from ndm.variants.transport import TransportNDM

if TYPE_CHECKING:
    pass

SEEDS, STEPS, BATCH, RATE, AVERAGE = 3, 3000, 1024, 4e-3, 0.998


def make(kind: str) -> DiffusionModel:
    """A new model: a diffusion, or one that generates by transport, whose F, F and noise, or
    neither but T is a network.
    """
    if kind == "ddpm":
        return NDM(
            LinearBetaSchedule(),
            Identity(),
            Predictor(MLP(1, hidden=64, blocks=2)),
            GaussianDecoder(),
        )
    if kind == "lines":  # little noise, and hardly any on the way
        return TransportNDM(
            LinearLogSNRSchedule(-11.2, -11.19),
            InterpolationTransform(),
            MonotoneMap(24, scale=1.5),
            GaussianDecoder(),
            InterpolationScale(),
        )
    scale = SeparableScale(MLP(1, hidden=64, blocks=1, outputs=8)) if kind == "nfdm" else None
    transform = SeparableTransform(MLP(1, hidden=64, blocks=1, outputs=8))
    return TransportNDM(
        LinearLogSNRSchedule(-9.2, -2.0),
        transform,
        MonotoneMap(24, scale=1.5),
        GaussianDecoder(),
        scale,
    )


def trained(report: Report, kind: str, seed: int) -> DiffusionModel:
    """A model, trained on fresh samples of the data; as :func:`kept` gives it."""
    steps, batch = (20, 64) if report.smoke else (STEPS, BATCH)
    label = f"{NAMES[kind]}, {seed + 1} of {seeds(report)}"
    return kept(
        report, f"{kind}-{seed}", seed, lambda: fit(make(kind), kind, DATA, steps, batch, label)
    )


def kept(
    report: Report, name: str, seed: int, train: Callable[[], DiffusionModel]
) -> DiffusionModel:
    """The model of a run in evaluation mode, float64: trained, or read where an earlier call wrote
    it.
    """
    folder = report.run(name).folder
    if not (folder / "config.json").exists():
        torch.manual_seed(part_seed(report.seed, seed))
        train().save_pretrained(folder)
    return DiffusionModel.from_pretrained(folder).double()


def seeds(report: Report) -> int:
    """How many times each model is trained."""
    return 1 if report.smoke else SEEDS


def loss(model: DiffusionModel, kind: str, x: Tensor) -> Tensor:
    """The bound; for the map that is to show what the bound costs, -log p(z_0 = x) by the change of
    variables. ``(B,)``, nats.
    """
    if kind == "exact":
        assert isinstance(model, TransportNDM)
        return -model.transport.interpolant(x, torch.zeros_like(x[:, 0])).log_p
    return model.bound(x).loss


def fit(
    model: DiffusionModel,
    kind: str,
    data: Mixture,
    steps: int,
    batch: int,
    label: str,
    map_rate: float = 4 * RATE,
) -> DiffusionModel:
    """Minimize the loss on fresh samples by AdamW, T and eta at a rate of their own; the moving
    average of the weights.
    """
    own = [
        p
        for name, p in model.named_parameters()
        if name.startswith(("transport.", "log_eta")) and isinstance(model, TransportNDM)
    ]
    networks = [p for p in model.parameters() if not any(p is other for other in own)]
    groups: list[dict[str, Any]] = [
        {"params": networks, "lr": RATE},
        {"params": own, "lr": map_rate},
    ]  # a handful of scalars are faster
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.1
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    for _ in tqdm(range(steps), desc=label, unit="step", delay=1, leave=False):
        optimizer.zero_grad()
        loss(model, kind, data.sample(batch)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        average.update_parameters(model)
    assert isinstance(average.module, DiffusionModel)
    return average.module


# The experiment


def run(report: Report) -> None:
    """Train, measure, draw."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, name in NAMES.items():
        for seed in range(seeds(report)):
            print(f"{report.name}: {name}, training {seed + 1} of {seeds(report)}", flush=True)
            model = trained(report, kind, seed)
            found.setdefault(kind, []).append(
                report.cache(f"{kind}-{seed}", partial(measure, model, kind, report.smoke, seed))
            )
    models = {kind: trained(report, kind, 0) for kind in NAMES}
    report.number("entropy", DATA.entropy())
    report.number("models", found)
    report.say(
        "Data: two Gaussians on the line, at ±1.5 with standard deviation 0.5 and weights 0.4 and"
        f" 0.6; entropy {DATA.entropy():.4f} nats. {seeds(report)} trainings of each model on fresh"
        f" samples, {STEPS} steps of {BATCH}. Everything below is measured by quadrature over the"
        " data, the prior, times and noise, so ± is the standard error over trainings alone."
        " NDM-OT learns F, NFDM-OT the noise of the forward process as well; both generate by"
        " displacement interpolation alone. The last row is the same map without a forward"
        " process, trained on log p(T⁻¹(x)): what it does better is what training by the bound"
        " costs."
    )
    report.figure(
        "trajectories",
        draw_trajectories(models),
        "Trajectories of the generative ODE from the same points of the prior (t = 1) to the data"
        " (t = 0), the densities at both ends beside them: of the model filled, of the data and the"
        " prior dashed. Paths that end in the left component are dashed.",
    )
    report.figure(
        "map",
        draw_map(models, found),
        "Left: the learned map beside the optimal one. Right: W2 to the data against steps.",
    )
    tables(report, found)
    expectations(report, found)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over trainings; no error for a single one."""
    return float(np.mean(values)), (
        float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    )


def tables(report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    """The numbers, mean ± standard error over trainings."""

    def cell(values: list[float]) -> str:
        mean, error = mean_and_error(values) if values else (math.nan, math.nan)
        digits = ".4f" if abs(mean) >= 1e-3 else ".1e"
        return (
            f"{mean:{digits}} ± {error:{digits}}"
            if math.isfinite(error)
            else f"{mean:{digits}}"
            if values
            else "—"
        )

    columns = {
        "NELBO, nats": "nelbo",
        "NLL, nats": "nll",
        "cost over optimal": "cost",
        "bend": "bend",
        "W2": "w2",
    }
    rows = [
        [NAMES[kind], *(cell([one[key] for one in runs if key in one]) for key in columns.values())]
        for kind, runs in found.items()
    ]
    report.table(["model", *columns], rows)
    report.say(
        "NLL is that of the ODE's own samples, without the decoder's noise; W2 that of the ODE,"
        " solved finely for the diffusion. On a line every flow keeps the order of its points, so"
        " the diffusion's map is optimal for what it makes, too; its paths are not straight."
    )
    rows = [
        [
            f"{NAMES[kind]}, {method}",
            *(cell([one["w2_steps"][method][i] for one in runs]) for i in range(len(FEW_STEPS))),
        ]
        for kind, runs in found.items()
        for method in runs[0]["w2_steps"]
    ]
    report.table(["W2 by steps", *map(str, FEW_STEPS)], rows)


def expectations(report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    """What the experiment should show."""
    diffusion = {
        method: np.mean([one["w2_steps"][method][0] for one in found["ddpm"]])
        for method in found["ddpm"][0]["w2_steps"]
    }
    for kind in ("ddpm", "ndm", "nfdm", "lines"):
        least = min(one["nelbo"] for one in found[kind])
        report.expect(
            f"{NAMES[kind]}: entropy of the data less the NELBO, nats", DATA.entropy() - least, 0.0
        )
    for kind in ("ndm", "nfdm", "lines"):
        runs, name = found[kind], NAMES[kind]
        report.expect(
            f"{name}: cost off the optimal one, relative",
            abs(mean_and_error([one["cost"] for one in runs])[0] - 1),
            0.02,
        )
        report.expect(f"{name}: bend of its trajectories", max(one["bend"] for one in runs), 0.01)
        for method, other in diffusion.items():
            ratio = np.mean([one["w2_steps"]["Euler"][0] for one in runs]) / other
            report.expect(
                f"{name}: W2 of one step over that of one step of DDPM by {method}",
                float(ratio),
                0.1,
            )
