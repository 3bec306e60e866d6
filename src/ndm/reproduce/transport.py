"""Dynamic optimal transport in one dimension, compared with a diffusion.

NDM, the section on dynamic optimal transport. This module trains the models.
:mod:`ndm.reproduce.transport_measures` measures them by quadrature, so training is the only source
of randomness in the numbers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

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
from ndm.reproduce.transport_measures import DATA, FEW_STEPS, measure
from ndm.schedule import LinearBetaSchedule, LinearLogSNRSchedule
from ndm.transform import Identity, SeparableTransform
from ndm.variants.interpolation import InterpolationScale, InterpolationTransform
from ndm.variants.monotone import MonotoneMap
from ndm.variants.nfdm import SeparableScale
from ndm.variants.transport import TransportNDM

SEEDS, STEPS, BATCH, RATE, AVERAGE = 3, 3000, 1024, 4e-3, 0.998


def make(kind: str) -> DiffusionModel:
    """Return a new model of a kind of :data:`NAMES`.

    ``ddpm`` is a diffusion; the others generate by transport. ``ndm`` and ``exact`` learn F,
    ``nfdm`` learns F and the noise, and ``lines`` learns only T.
    """
    if kind == "ddpm":
        return NDM(
            LinearBetaSchedule(),
            Identity(),
            Predictor(MLP(1, hidden=64, blocks=2)),
            GaussianDecoder(),
        )
    if kind == "lines":  # almost no noise at any time
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


def train(report: Report, kind: str, seed: int) -> DiffusionModel:
    """Train a model on fresh samples of the data, or load it (:func:`load_or_train`)."""
    steps, batch = (20, 64) if report.smoke else (STEPS, BATCH)
    label = f"{NAMES[kind]}, {seed + 1} of {seeds(report)}"
    return load_or_train(
        report, f"{kind}-{seed}", seed, lambda: fit(make(kind), kind, DATA, steps, batch, label)
    )


def load_or_train(
    report: Report, name: str, seed: int, train: Callable[[], DiffusionModel]
) -> DiffusionModel:
    """Load the model of a run, or train and save it if an earlier call did not.

    The model is in evaluation mode and float64.
    """
    folder = report.run(name).folder
    if not (folder / "config.json").exists():
        torch.manual_seed(part_seed(report.seed, seed))
        train().save_pretrained(folder)
    return DiffusionModel.from_pretrained(folder).double()


def seeds(report: Report) -> int:
    """Return the number of training runs per model."""
    return 1 if report.smoke else SEEDS


def loss(model: DiffusionModel, kind: str, x: Tensor) -> Tensor:
    """Return the loss ``(B,)`` in nats: the bound, or for ``exact`` -log p(z_0 = x).

    The latter follows from the change of variables by T, without a forward process.
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
    """Minimize the loss on fresh samples with AdamW; T and eta have the learning rate ``map_rate``.

    Returns:
        The model with the moving average of the weights.
    """
    scalars = [
        p
        for name, p in model.named_parameters()
        if name.startswith(("transport.", "log_eta")) and isinstance(model, TransportNDM)
    ]
    networks = [p for p in model.parameters() if not any(p is other for other in scalars)]
    # The few scalars of T and eta train faster at a higher rate.
    groups: list[dict[str, Any]] = [
        {"params": networks, "lr": RATE},
        {"params": scalars, "lr": map_rate},
    ]
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


def run(report: Report) -> None:
    """Train the models, measure them and plot the figures."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, name in NAMES.items():
        for seed in range(seeds(report)):
            print(f"{report.name}: {name}, training run {seed + 1} of {seeds(report)}", flush=True)
            model = train(report, kind, seed)
            found.setdefault(kind, []).append(
                report.cache(f"{kind}-{seed}", partial(measure, model, kind, report.smoke, seed))
            )
    models = {kind: train(report, kind, 0) for kind in NAMES}
    report.add_number("entropy", DATA.entropy())
    report.add_number("models", found)
    report.text(
        "Data: two Gaussians on the line, at ±1.5 with standard deviation 0.5 and weights 0.4 and"
        f" 0.6; entropy {DATA.entropy():.4f} nats. {seeds(report)} training runs of each model on"
        f" fresh samples, {STEPS} steps of {BATCH}. All numbers are computed by quadrature over the"
        " data, the prior, times and noise, so ± is the standard error over training runs only."
        " NDM-OT learns F; NFDM-OT also learns the noise of the forward process. Both generate by"
        " displacement interpolation. The last row is the same map without a forward process,"
        " trained on log p(T⁻¹(x)); its advantage is the cost of training by the bound."
    )
    report.figure(
        "trajectories",
        draw_trajectories(models),
        "Trajectories of the generative ODE from the same points of the prior (t = 1) to the data"
        " (t = 0), with the densities at both ends: the model's filled, those of the data and the"
        " prior dashed. Paths that end in the left component are dashed.",
    )
    report.figure(
        "map",
        draw_map(models, found),
        "Left: the learned and the optimal map. Right: W2 to the data against steps.",
    )
    tables(report, found)
    expectations(report, found)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error over training runs; nan is the error of a single run."""
    count = len(values)
    error = float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return float(np.mean(values)), error


def tables(report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    """Add tables of the numbers, mean ± standard error over training runs."""

    def cell(values: list[float]) -> str:
        if not values:
            return "—"
        mean, error = mean_and_error(values)
        digits = ".4f" if abs(mean) >= 1e-3 else ".1e"
        return f"{mean:{digits}}" + (f" ± {error:{digits}}" if math.isfinite(error) else "")

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
    report.text(
        "NLL is that of the ODE's samples, without the decoder's noise. W2 is that of the ODE,"
        " solved with many steps for the diffusion. On a line every flow preserves the order of"
        " its points, so the diffusion's map is also optimal for the distribution it generates;"
        " its paths are not straight."
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
    """Add the checks."""
    diffusion = {
        method: np.mean([one["w2_steps"][method][0] for one in found["ddpm"]])
        for method in found["ddpm"][0]["w2_steps"]
    }
    for kind in ("ddpm", "ndm", "nfdm", "lines"):
        least = min(one["nelbo"] for one in found[kind])
        text = f"{NAMES[kind]}: entropy of the data minus the NELBO, nats"
        report.expect(text, DATA.entropy() - least, 0.0)
    for kind in ("ndm", "nfdm", "lines"):
        runs, name = found[kind], NAMES[kind]
        excess = mean_and_error([one["cost"] for one in runs])[0] - 1
        report.expect(f"{name}: relative error of the cost", abs(excess), 0.02)
        report.expect(f"{name}: bend of its trajectories", max(one["bend"] for one in runs), 0.01)
        for method, other in diffusion.items():
            ratio = np.mean([one["w2_steps"]["Euler"][0] for one in runs]) / other
            text = f"{name}: W2 of one step over that of one step of DDPM by {method}"
            report.expect(text, float(ratio), 0.1)
