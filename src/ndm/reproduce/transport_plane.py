r"""Dynamic optimal transport in the plane, compared with a diffusion.

:mod:`ndm.reproduce.transport` is the same on the line. The data are four Gaussians at the corners
of a rotated rectangle, independent along its two axes. Since the prior is isotropic, the optimal
map acts on each axis separately. With the rotation R, the quantile functions Q_a along the axes and
the prior's distribution function Phi,

.. math::
    T^*(z) = R\, \bigl(Q_1(\Phi(u_1)),\, Q_2(\Phi(u_2))\bigr), \qquad u = R^\top z .

Let g be a model's map. Its Wasserstein distance to the data lies between the distance of the
marginals along the axes and the distance of the maps,

.. math::
    \sum_a W_2^2\bigl(u_a^{g}, u_a^{\text{data}}\bigr) \le W_2^2 \le E\, \|g(z_1) - T^*(z_1)\|^2 .

In the plane, unlike on the line, the flow of a diffusion need not follow the optimal map, even with
many steps.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ndm.data import Mixture
from ndm.decoder import GaussianDecoder
from ndm.evaluation.measurement import standard_error
from ndm.evaluation.tables import plus_minus
from ndm.model import NDM, DiffusionModel
from ndm.nn import MLP
from ndm.predictor import Predictor
from ndm.random import part_seed
from ndm.reproduce.report import Report
from ndm.reproduce.transport import fit, load_or_train
from ndm.reproduce.transport_figures import LOOKS, NAMES
from ndm.reproduce.transport_measures import (
    STD,
    bend,
    few_steps,
    integrated_bound,
    quantiles,
    trajectories,
)
from ndm.schedule import LinearBetaSchedule, LinearLogSNRSchedule
from ndm.transform import Identity
from ndm.variants.interpolation import InterpolationScale, InterpolationTransform
from ndm.variants.monotone import ConvexMap
from ndm.variants.transport import TransportNDM
from ndm.viz import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = (((-1.5, 1.5), (0.4, 0.6)), ((-1.25, 1.25), (0.7, 0.3)))
"""Means and weights of the Gaussians along each axis."""
ANGLE = math.radians(30)
ROTATION = torch.tensor(
    [[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]], dtype=torch.float64
)
KINDS = ("ddpm", "lines", "exact")
STEPS, BATCH, MAP_RATE, POINTS, FINE_STEPS, NODES = 6000, 512, 0.05, 4096, 64, 256


def corners() -> Mixture:
    """Return the data."""
    (first, shares), (second, others) = AXES
    means = [
        (ROTATION @ torch.tensor([x, y], dtype=torch.float64)).tolist()
        for x in first
        for y in second
    ]
    return Mixture(means, STD, [one * other for one in shares for other in others])


DATA = corners()


def make(kind: str) -> DiffusionModel:
    """Return a new model: a diffusion for ``ddpm``, else one that generates by transport."""
    if kind == "ddpm":
        return NDM(
            LinearBetaSchedule(),
            Identity(),
            Predictor(MLP(2, hidden=128, blocks=2)),
            GaussianDecoder(),
        )
    return TransportNDM(
        LinearLogSNRSchedule(-11.2, -11.19),
        InterpolationTransform(),
        ConvexMap(2, 32, 3, scale=1.5),
        GaussianDecoder(),
        InterpolationScale(),
    )


def train(report: Report, kind: str) -> DiffusionModel:
    """Train a model on fresh samples of the data, or load it if an earlier call trained it."""
    steps, batch = (20, 64) if report.smoke else (STEPS, BATCH)
    return load_or_train(
        report, kind, 0, lambda: fit(make(kind), kind, DATA, steps, batch, NAMES[kind], MAP_RATE)
    )


def optimal(z: Tensor) -> Tensor:
    """Return the images ``(B, 2)`` of points under the optimal map T*."""
    along = z @ ROTATION
    ends = [quantiles(torch.special.ndtr(along[:, axis]), *AXES[axis]) for axis in (0, 1)]
    return torch.stack(ends, 1) @ ROTATION.T


def prior_points(count: int, seed: int = 0) -> Tensor:
    """Return low-discrepancy points of the prior, ``(count, 2)``, float64: scrambled Sobol."""
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
    unit = sobol.draw(count, dtype=torch.float64)
    return torch.special.ndtri(unit.clamp(1e-9, 1 - 1e-9))


@torch.no_grad()
def flow(model: DiffusionModel, z: Tensor, steps: int) -> Tensor:
    """Map points of the prior by the generative ODE, ``(B, 2)``; a transport takes one step."""
    if isinstance(model, TransportNDM):
        return few_steps(model, z, 1)["Euler"]
    return trajectories(model, z, steps)[0]


def distances(image: Tensor, best: Tensor) -> dict[str, float]:
    """Return a lower and an upper bound on W2 between a model's distribution and the data.

    Args:
        image: images of points of the prior under the model's map.
        best: images of the same points under the optimal map.
    """
    ours, others = (points @ ROTATION for points in (image, best))
    along = (ours.sort(0).values - others.sort(0).values).square().sum(1).mean().sqrt()
    return {
        "w2_least": float(along),
        "w2_most": float((image - best).square().sum(1).mean().sqrt()),
    }


def measure(model: DiffusionModel, kind: str, fine: int, smoke: bool, seed: int) -> dict[str, Any]:
    """Measure one trained model; JSON-ready."""
    z = prior_points(256 if smoke else POINTS)
    best = optimal(z)
    image, path, one_step = (
        flow(model, z, fine),
        trajectories(model, z[:512], fine),
        few_steps(model, z, 1),
    )
    x = DATA.sample(len(z), torch.Generator().manual_seed(part_seed(seed, 1))).double()
    found: dict[str, Any] = {"points": len(z)}
    if kind != "exact":
        generator = torch.Generator().manual_seed(part_seed(seed, 2))

        def noise() -> Tensor:
            return torch.randn(x.shape, dtype=x.dtype, generator=generator)

        nelbo = integrated_bound(model, x, noise, 16 if smoke else NODES)["nelbo"]
        found["nelbo_over_log_p"] = mean_and_error(nelbo + DATA.log_prob(x))
    if isinstance(model, TransportNDM):
        log_p = model.log_likelihood(x, dequantization="none").log_p
        found["nll_over_log_p"] = mean_and_error(DATA.log_prob(x) - log_p)
    found["cost"] = float((image - z).square().sum(1).mean() / (best - z).square().sum(1).mean())
    found["bend"] = bend(path)
    return {
        **found,
        **distances(image, best),
        "one_step": {name: distances(ends, best) for name, ends in one_step.items()},
    }


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error over examples."""
    return float(values.mean()), standard_error(values)


def run(report: Report) -> None:
    """Train the models, measure them and plot the figures."""
    models, found = dict[str, DiffusionModel](), dict[str, dict[str, Any]]()
    fine = 8 if report.smoke else FINE_STEPS
    for kind in KINDS:
        print(f"{report.name}: {NAMES[kind]}", flush=True)
        models[kind] = train(report, kind)
        found[kind] = report.cache(
            kind, partial(measure, models[kind], kind, fine, report.smoke, report.seed)
        )
    report.add_number("entropy", DATA.entropy())
    report.add_number("models", found)
    report.text(
        f"Data: four Gaussians with standard deviation {STD} at the corners of a rectangle of 3 by"
        f" 2.5, rotated by 30 degrees; entropy {DATA.entropy():.4f} nats. One training run of each"
        f" model on fresh samples, {STEPS:,} steps of {BATCH}. {NAMES['lines']} generates by"
        " displacement interpolation along the gradient of a convex function. The last model is"
        " the same map trained on its exact likelihood, a reference without a forward process."
    )
    report.figure(
        "trajectories",
        draw_trajectories(models, fine),
        "Trajectories of the generative ODE from the same points of the prior (hollow) to the data"
        " (filled)",
    )
    report.figure(
        "map",
        draw_map(models, fine),
        "Images of circles and rays of the prior under the optimal map, the learned map and the"
        " flow of the diffusion",
    )
    table(report, found)
    diffusion, lines = found["ddpm"]["one_step"], found["lines"]
    report.expect("relative error of the cost", abs(lines["cost"] - 1), 0.02)
    report.expect("bend of the trajectories", lines["bend"], 0.01)
    for name, least in diffusion.items():
        ratio = lines["one_step"]["Euler"]["w2_most"] / least["w2_least"]
        text = f"upper bound on W2 of one step over the lower bound for DDPM by {name}"
        report.expect(text, ratio, 0.1)


def table(report: Report, found: dict[str, dict[str, Any]]) -> None:
    """Add a table of the numbers, for the whole ODE and for one step."""
    rows = []
    for kind, one in found.items():
        excess = [
            plus_minus(one[key][0], one[key][1], 4) if key in one else "—"
            for key in ("nelbo_over_log_p", "nll_over_log_p")
        ]
        geometry = [f"{one['cost']:.4f}", f"{one['bend']:.1e}"]
        rows.append([f"{NAMES[kind]}, ODE", *excess, *geometry, *_w2_cells(one)])
        for name, step in one["one_step"].items():
            rows.append([f"{NAMES[kind]}, one step of {name}", "", "", "", "", *_w2_cells(step)])
    head = ["model", "NELBO minus -log p of the data, nats", "NLL, likewise", "cost over optimal"]
    report.table([*head, "bend", "W2 at least", "W2 at most"], rows)
    report.text(
        f"{found['ddpm']['points']:,} points of the prior (Sobol) and as many fresh examples, with"
        f" fresh noise at each of {NODES} times; ± over examples. W2 lies between the distance"
        " along the two axes and that of the maps. NLL is that of the ODE's samples, without the"
        " decoder's noise."
    )


def _w2_cells(record: dict[str, Any]) -> list[str]:
    return [f"{record['w2_least']:.4f}", f"{record['w2_most']:.4f}"]


def draw_trajectories(models: dict[str, DiffusionModel], steps: int) -> "Figure":
    """Plot trajectories of DDPM and transport side by side."""
    figure = new_figure(8.4, 4.2)
    z = prior_points(160, seed=1)
    grid = torch.linspace(-3.6, 3.6, 160, dtype=torch.float64)
    plane = torch.cartesian_prod(grid, grid)
    density = DATA.log_prob(plane).exp().reshape(160, 160).T.numpy()
    for axis, kind in zip(figure.subplots(1, 2, sharey=True), ("ddpm", "lines"), strict=True):
        axis.contour(grid, grid, density, levels=6, colors="#9a9a9a", linewidths=0.6)
        with torch.no_grad():
            path = trajectories(models[kind], z, steps).numpy()
        color = "#c9a06b" if kind == "ddpm" else "#7fa37f"
        axis.plot(path[..., 0], path[..., 1], color=color, linewidth=0.7)
        hollow = {"facecolors": "none", "edgecolors": "#444444", "linewidths": 0.6}
        axis.scatter(*path[-1].T, s=9, label="prior, z₁", **hollow)
        axis.scatter(*path[0].T, s=7, color=LOOKS[kind]["color"], label="data, x", zorder=3)
        axis.set(
            title=NAMES[kind],
            xlabel="first coordinate",
            xlim=(-3.6, 3.6),
            ylim=(-3.6, 3.6),
            aspect="equal",
        )
        axis.legend(frameon=False, fontsize="small", loc="upper right")
        if kind == "ddpm":
            axis.set_ylabel("second coordinate")
    return figure


def draw_map(models: dict[str, DiffusionModel], steps: int) -> "Figure":
    """Plot circles and rays of the prior under the optimal, the learned and the diffusion's map."""
    figure = new_figure(11.4, 4.0)
    turn = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)
    circles = [radius * torch.stack([turn.cos(), turn.sin()], 1) for radius in (0.5, 1.0, 1.5, 2.0)]
    reach = torch.linspace(0, 2.0, 121, dtype=torch.float64)[:, None]
    rays = [
        reach * torch.tensor([[math.cos(a), math.sin(a)]], dtype=torch.float64)
        for a in np.arange(0, 2 * math.pi, math.pi / 8)
    ]
    curves = [(circles, {"color": "#1b3a6b"}), (rays, {"color": "#b06000", "linestyle": "--"})]
    points = torch.cat([line for lines, _ in curves for line in lines])
    images = {
        "optimal": optimal(points),
        **{NAMES[kind]: flow(models[kind], points, steps) for kind in ("lines", "ddpm")},
    }
    for axis, (name, image) in zip(
        figure.subplots(1, 3, sharex=True, sharey=True), images.items(), strict=True
    ):
        rest = image
        for lines, look in curves:
            for line in lines:
                axis.plot(*rest[: len(line)].T.numpy(), linewidth=0.8, **look)
                rest = rest[len(line) :]
        axis.set(title=name, xlabel="first coordinate", aspect="equal")
    figure.axes[0].set_ylabel("second coordinate")
    return figure
