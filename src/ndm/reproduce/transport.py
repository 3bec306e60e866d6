r"""Dynamic optimal transport in one dimension, a diffusion beside it (NDM, the section on dynamic optimal transport).

The reverse process of :mod:`ndm.variants.transport` can be nothing but a displacement interpolation; how well its map T is learned is measured by
quadrature, so that only the randomness of training is left. Let Q be the quantile function of the data and Phi that of the prior's
distribution, so that Q(Phi(z)) is the optimal map:

.. math::
    \text{cost} = \frac{E |z_1 - T(z_1)|^2}{E |z_1 - Q(\Phi(z_1))|^2}, \qquad
    W_2^2 = \int_0^1 |Q_{\text{model}} - Q|^2 dp, \qquad
    \text{bend} = \frac{E_{t, z_1} |z_t - (1-t) z_0 - t z_1|}{\sqrt{E |z_1 - z_0|^2}} .

Trajectories are solutions of the generative ODE from z_1. On a line all of them keep their order, so those of the diffusion lead along the
optimal map, too: what tells the two apart is how they get there. The bend is zero for motion of constant speed, which one step follows exactly.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ndm.data import Mixture
from ndm.decoder import GaussianDecoder
from ndm.elbo import Draw, diffusion_integrand, prior_term, reconstruction_term
from ndm.model import NDM, DiffusionModel
from ndm.nn import MLP
from ndm.ode import trace_times
from ndm.predictor import Predictor
from ndm.random import part_seed
from ndm.reproduce.report import Report
from ndm.sample import Ancestral, Euler, GridSampler
from ndm.schedule import LinearBetaSchedule, LinearLogSNRSchedule
from ndm.transform import Identity, SeparableTransform
from ndm.variants.interpolation import InterpolationScale, InterpolationTransform
from ndm.variants.monotone import MonotoneMap
from ndm.variants.nfdm import SeparableScale
from ndm.variants.transport import TransportNDM
from ndm.viz import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANS, STD, WEIGHTS = (-1.5, 1.5), 0.5, (0.4, 0.6)
DATA = Mixture([[mean] for mean in MEANS], STD, WEIGHTS)
SEEDS, STEPS, BATCH, RATE, AVERAGE = 3, 3000, 1024, 4e-3, 0.998
GRID, FINE_STEPS, FRESH = 10_000, 64, 2048
FEW_STEPS = (1, 2, 4, 8, 16, 32)
NAMES = {"ddpm": "DDPM", "ndm": "NDM-OT", "nfdm": "NFDM-OT", "lines": "NFDM-OT, along its lines", "exact": "T, exact likelihood"}
LOOKS: dict[str, dict[str, Any]] = {
    "ddpm": {"color": "#b06000", "linestyle": "--", "marker": "s"},
    "ndm": {"color": "#1b3a6b", "linestyle": "-", "marker": "o"},
    "nfdm": {"color": "#6fa8dc", "linestyle": "-.", "marker": "^"},
    "lines": {"color": "#2e7d32", "linestyle": (0, (5, 1)), "marker": "v"},
    "exact": {"color": "#7a7a7a", "linestyle": ":", "marker": "x"},
}


def make(kind: str) -> DiffusionModel:
    """A new model: a diffusion, or one that generates by transport, whose F, F and noise, or neither but T is a network."""
    if kind == "ddpm":
        return NDM(LinearBetaSchedule(), Identity(), Predictor(MLP(1, hidden=64, blocks=2)), GaussianDecoder())
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
    return TransportNDM(LinearLogSNRSchedule(-9.2, -2.0), transform, MonotoneMap(24, scale=1.5), GaussianDecoder(), scale)


def trained(report: Report, kind: str, seed: int) -> DiffusionModel:
    """A model, trained on fresh samples of the data; as :func:`kept` gives it."""
    steps, batch = (20, 64) if report.smoke else (STEPS, BATCH)
    label = f"{NAMES[kind]}, {seed + 1} of {seeds(report)}"
    return kept(report, f"{kind}-{seed}", seed, lambda: fit(make(kind), kind, DATA, steps, batch, label))


def kept(report: Report, name: str, seed: int, train: Callable[[], DiffusionModel]) -> DiffusionModel:
    """The model of a run in evaluation mode, float64: trained, or read where an earlier call wrote it."""
    folder = report.run(name).folder
    if not (folder / "config.json").exists():
        torch.manual_seed(part_seed(report.seed, seed))
        train().save_pretrained(folder)
    return DiffusionModel.from_pretrained(folder).double()


def seeds(report: Report) -> int:
    """How many times each model is trained."""
    return 1 if report.smoke else SEEDS


def loss(model: DiffusionModel, kind: str, x: Tensor) -> Tensor:
    """The bound; for the map that is to show what the bound costs, -log p(z_0 = x) by the change of variables. ``(B,)``, nats."""
    if kind == "exact":
        assert isinstance(model, TransportNDM)
        return -model.transport.interpolant(x, torch.zeros_like(x[:, 0])).log_p
    return model.bound(x).loss


def fit(model: DiffusionModel, kind: str, data: Mixture, steps: int, batch: int, label: str, map_rate: float = 4 * RATE) -> DiffusionModel:
    """Minimize the loss on fresh samples by AdamW, T and eta at a rate of their own; the moving average of the weights."""
    own = [p for name, p in model.named_parameters() if name.startswith(("transport.", "log_eta")) and isinstance(model, TransportNDM)]
    networks = [p for p in model.parameters() if not any(p is other for other in own)]
    groups: list[dict[str, Any]] = [{"params": networks, "lr": RATE}, {"params": own, "lr": map_rate}]  # a handful of scalars are faster
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.1)
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


# What is measured


def quantiles(p: Tensor, means: Sequence[float] = MEANS, weights: Sequence[float] = WEIGHTS) -> Tensor:
    """Q(p) of a mixture, that of the data by default, by interpolation in its distribution function, good to seven digits; float64."""
    x = torch.linspace(min(means) - 9 * STD, max(means) + 9 * STD, 400_001, dtype=torch.float64)
    below = torch.special.ndtr((x[:, None] - torch.tensor(means, dtype=x.dtype)) / STD) @ torch.tensor(weights, dtype=x.dtype)
    return torch.from_numpy(np.interp(p.numpy(), below.numpy(), x.numpy()))


def prior_grid(count: int) -> tuple[Tensor, Tensor]:
    """Points z_1 with equal shares of the prior, increasing, and where the optimal map takes them; ``(count, 1)`` each."""
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(p)[:, None], quantiles(p)[:, None]


@torch.no_grad()
def trajectories(model: DiffusionModel, z: Tensor, steps: int) -> Tensor:
    """Solutions of the generative ODE at steps + 1 even times from t = 0 to t = 1, ``(steps + 1, B, D)``, by Heun's method from z_1.

    Time is that of a diffusion's schedule, and for transport how much of the line is left. Latents are in the units of the data.
    """
    field = velocity(model)
    path, span = [z], 1 / steps
    for index in range(steps, 0, -1):
        first = field(path[-1], index * span)
        path.append(path[-1] - span / 2 * (first + field(path[-1] - span * first, (index - 1) * span)))
    path[-1] = path[-1] / model.process.level(0.0, z[:1]).alpha
    return torch.stack(path[::-1])


def velocity(model: DiffusionModel) -> Callable[[Tensor, float], Tensor]:
    """dz/dt of the generative ODE, called as ``field(z, t)``."""
    if isinstance(model, TransportNDM):
        transport = model.transport
        return lambda z, r: transport.interpolant(z, torch.full_like(z[:, 0], r)).velocity
    return lambda z, t: model.reverse_process.drift(z, model.process.level(t, z), 0.0)


@torch.no_grad()
def few_steps(model: DiffusionModel, z: Tensor, steps: int) -> dict[str, Tensor]:
    """Samples by few steps from z_1, by the methods that the model has."""
    alpha = model.process.level(0.0, z[:1]).alpha
    if not isinstance(model, TransportNDM):
        methods = {"Euler": Euler(0.0), "DDIM": Ancestral(0.0)}
        return {name: GridSampler(step, steps)(model.reverse_process, z) / alpha for name, step in methods.items()}
    field, span = velocity(model), 1 / steps
    for index in range(steps, 0, -1):
        z = z - span * field(z, index * span)
    return {"Euler": z / alpha}


def bend(path: Tensor) -> float:
    """How far trajectories ``(steps + 1, B, D)`` are from motion of constant speed, over the root of the mean square of their lengths."""
    t = torch.linspace(0, 1, len(path), dtype=path.dtype)[:, None, None]
    away = (path - (1 - t) * path[0] - t * path[-1]).norm(dim=-1).mean()
    return float(away / (path[-1] - path[0]).square().sum(-1).mean().sqrt())


def data_nodes() -> tuple[Tensor, Tensor]:
    """Points x ``(N, 1)`` and weights ``(N,)`` whose sum is the mean over the data: Gauss-Hermite in each component."""
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    x = np.array(MEANS)[:, None] + STD * node
    share = np.array(WEIGHTS)[:, None] * weight / weight.sum()
    return torch.from_numpy(x.reshape(-1, 1)), torch.from_numpy(share.ravel())


@torch.no_grad()
def integrated_bound(model: DiffusionModel, x: Tensor, noise: Callable[[], Tensor], nodes: int) -> dict[str, Tensor]:
    """The terms of the bound for examples ``x`` ``(B, D)``, integrated over time by Clenshaw-Curtis; ``(B,)`` each, nats.

    ``noise`` gives noise ``(B, D)`` for each time.

    The times are those of the likelihood (:func:`ndm.ode.trace_times`), even in t and in the noise level: where a schedule starts steeply,
    as that of DDPM does, even times alone would lose a tenth of a nat, and random ones scatter widely.
    """
    curve, eta = model.process.curve(x), model.bound_eta
    diffusion = torch.zeros_like(x[:, 0])
    for time, span in zip(*trace_times(model.process, nodes), strict=True):
        draw = Draw(torch.full_like(x[:, 0], float(time)), noise())
        diffusion += float(span) * diffusion_integrand(model.reverse_process, curve, draw, None, eta).bound
    prior, reconstruction = prior_term(model.process, x, curve), reconstruction_term(model.process, model.decoder, x, noise(), curve)
    return {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction, "nelbo": prior + diffusion + reconstruction}


def expected_bound(model: DiffusionModel, nodes: int) -> dict[str, float]:
    """The terms of the bound in their mean over data, times and noise, nats: Gauss-Hermite in x and noise, Clenshaw-Curtis in time."""
    x, share = data_nodes()
    node, weight = np.polynomial.hermite_e.hermegauss(20)
    noise = torch.from_numpy(node).repeat(len(x))[:, None]
    x, share = (
        x.repeat_interleave(len(node), 0),
        share.repeat_interleave(len(node)) * torch.from_numpy(weight / weight.sum()).repeat(len(x)),
    )
    return {name: float(share @ term) for name, term in integrated_bound(model, x, lambda: noise, nodes).items()}


def measure(model: DiffusionModel, kind: str, smoke: bool, seed: int) -> dict[str, Any]:
    """Everything that is known of one trained model, JSON-ready."""
    z, best = prior_grid(500 if smoke else GRID)
    fine = 20 if smoke else FINE_STEPS
    image = trajectories(model, z, fine)[0]
    fresh = torch.randn(FRESH // (16 if smoke else 1), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(part_seed(seed, 1)))
    x, share = data_nodes()
    found: dict[str, Any] = {} if kind == "exact" else expected_bound(model, 32 if smoke else 256)
    found["nll"] = -float(share @ model.log_likelihood(x, dequantization="none").log_p)
    found["cost"] = float((image - z).square().mean() / (best - z).square().mean())
    found["w2"] = w2(image, best)
    found["bend"] = bend(trajectories(model, fresh, fine))
    steps = {n: few_steps(model, z, n) for n in FEW_STEPS}
    return {**found, "w2_steps": {name: [w2(steps[n][name], best) for n in FEW_STEPS] for name in steps[1]}}


def w2(points: Tensor, best: Tensor) -> float:
    """Wasserstein-2 distance of images of equal shares of the prior, in any order, to the data."""
    return float((points.sort(0).values - best).square().mean().sqrt())


# The experiment


def run(report: Report) -> None:
    """Train, measure, draw."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, name in NAMES.items():
        for seed in range(seeds(report)):
            print(f"{report.name}: {name}, training {seed + 1} of {seeds(report)}", flush=True)
            model = trained(report, kind, seed)
            found.setdefault(kind, []).append(report.cache(f"{kind}-{seed}", partial(measure, model, kind, report.smoke, seed)))
    models = {kind: trained(report, kind, 0) for kind in NAMES}
    report.number("entropy", DATA.entropy())
    report.number("models", found)
    report.say(
        f"Data: two Gaussians on the line, at ±1.5 with standard deviation 0.5 and weights 0.4 and 0.6; entropy {DATA.entropy():.4f} nats. "
        f"{seeds(report)} trainings of each model on fresh samples, {STEPS} steps of {BATCH}. Everything below is measured by quadrature over the "
        "data, the prior, times and noise, so ± is the standard error over trainings alone. NDM-OT learns F, NFDM-OT the noise of the "
        "forward process as well; both generate by displacement interpolation alone. The last row is the same map without a forward process, "
        "trained on log p(T⁻¹(x)): what it does better is what training by the bound costs."
    )
    report.figure(
        "trajectories",
        draw_trajectories(models),
        "Trajectories of the generative ODE from the same points of the prior (t = 1) to the data (t = 0), the densities at both ends beside "
        "them: of the model filled, of the data and the prior dashed. Paths that end in the left component are dashed.",
    )
    report.figure("map", draw_map(models, found), "Left: the learned map beside the optimal one. Right: W2 to the data against steps.")
    tables(report, found)
    expectations(report, found)


def draw_trajectories(models: dict[str, DiffusionModel]) -> "Figure":
    """DDPM and transport side by side."""
    figure = new_figure(9.6, 3.6)
    axes = figure.subplots(1, 6, sharey=True, width_ratios=[0.5, 2.6, 0.5, 0.5, 2.6, 0.5])
    x = np.linspace(-3.6, 3.6, 600)
    target = DATA.log_prob(torch.from_numpy(x)[:, None]).exp().numpy()
    for index, kind in enumerate(("ddpm", "lines")):
        left, middle, right = axes[3 * index : 3 * index + 3]
        z, _ = prior_grid(41)
        path = trajectories(models[kind], z, 128)[..., 0].numpy()
        time = np.linspace(0, 1, len(path))
        for line in path.T:
            below = line[0] < 0
            middle.plot(time, line, color="#c07a2c" if below else "#1b3a6b", linestyle="--" if below else "-", linewidth=0.9)
        middle.set(title=NAMES[kind], xlabel="time t", xlim=(0, 1), ylim=(x[0], x[-1]))
        points = torch.from_numpy(x)[:, None]
        model = models[kind].log_likelihood(points, dequantization="none").log_p.exp().numpy()
        prior = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
        for axis, density, reference in ((left, model, target), (right, prior, prior)):
            axis.fill_betweenx(x, density, color="#b8c4d6", linewidth=0)
            axis.plot(reference, x, color="black", linewidth=1, linestyle="--")
            axis.set(xticks=[], xlim=(0, 0.56))
        left.invert_xaxis()
        left.set_xlabel("p(x)")
        right.set_xlabel("p(z₁)")
        left.set_ylabel("x, z (units of the data)" if not index else "")
    return figure


def draw_map(models: dict[str, DiffusionModel], found: dict[str, list[dict[str, Any]]]) -> "Figure":
    """T and the optimal map; W2 against steps."""
    figure = new_figure(8.8, 3.7)
    left, right = figure.subplots(1, 2)
    z, best = prior_grid(2000)
    left.plot(z[:, 0], best[:, 0], color="black", linewidth=2.5, alpha=0.35, label="optimal, Q(Φ(z₁))")
    for kind in ("ndm", "nfdm", "lines", "exact"):
        look = {key: value for key, value in LOOKS[kind].items() if key != "marker"}
        left.plot(z[:, 0], trajectories(models[kind], z, 1)[0][:, 0], linewidth=1.3, label=NAMES[kind], **look)
    left.set(xlabel="z₁ (prior)", ylabel="x (data)", title="the map")
    left.legend(frameon=False, fontsize="small", loc="lower right")
    for kind, runs in found.items():
        for method in runs[0]["w2_steps"]:
            values = np.array([one["w2_steps"][method] for one in runs])
            look = {**LOOKS[kind], **({"linestyle": ":", "marker": "D"} if method == "DDIM" else {})}
            right.plot(FEW_STEPS, values.mean(0), label=f"{NAMES[kind]}, {method}", markersize=4, **look)
    right.set(xscale="log", yscale="log", xlabel="steps", ylabel="W₂ to the data (units of the data)", title="few steps")
    right.set_xticks(FEW_STEPS, [str(n) for n in FEW_STEPS])
    right.minorticks_off()
    right.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(0.03, 0.285))
    return figure


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over trainings; no error for a single one."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def tables(report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    """The numbers, mean ± standard error over trainings."""

    def cell(values: list[float]) -> str:
        mean, error = mean_and_error(values) if values else (math.nan, math.nan)
        digits = ".4f" if abs(mean) >= 1e-3 else ".1e"
        return f"{mean:{digits}} ± {error:{digits}}" if math.isfinite(error) else f"{mean:{digits}}" if values else "—"

    columns = {"NELBO, nats": "nelbo", "NLL, nats": "nll", "cost over optimal": "cost", "bend": "bend", "W2": "w2"}
    rows = [[NAMES[kind], *(cell([one[key] for one in runs if key in one]) for key in columns.values())] for kind, runs in found.items()]
    report.table(["model", *columns], rows)
    report.say(
        "NLL is that of the ODE's own samples, without the decoder's noise; W2 that of the ODE, solved finely for the diffusion. On a line "
        "every flow keeps the order of its points, so the diffusion's map is optimal for what it makes, too; its paths are not straight."
    )
    rows = [
        [f"{NAMES[kind]}, {method}", *(cell([one["w2_steps"][method][i] for one in runs]) for i in range(len(FEW_STEPS)))]
        for kind, runs in found.items()
        for method in runs[0]["w2_steps"]
    ]
    report.table(["W2 by steps", *map(str, FEW_STEPS)], rows)


def expectations(report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    """What the experiment should show."""
    diffusion = {method: np.mean([one["w2_steps"][method][0] for one in found["ddpm"]]) for method in found["ddpm"][0]["w2_steps"]}
    for kind in ("ddpm", "ndm", "nfdm", "lines"):
        least = min(one["nelbo"] for one in found[kind])
        report.expect(f"{NAMES[kind]}: entropy of the data less the NELBO, nats", DATA.entropy() - least, 0.0)
    for kind in ("ndm", "nfdm", "lines"):
        runs, name = found[kind], NAMES[kind]
        report.expect(f"{name}: cost off the optimal one, relative", abs(mean_and_error([one["cost"] for one in runs])[0] - 1), 0.02)
        report.expect(f"{name}: bend of its trajectories", max(one["bend"] for one in runs), 0.01)
        for method, other in diffusion.items():
            ratio = np.mean([one["w2_steps"]["Euler"][0] for one in runs]) / other
            report.expect(f"{name}: W2 of one step over that of one step of DDPM by {method}", float(ratio), 0.1)
