"""Figures of learned optimal transport in one dimension: trajectories, the map, few steps."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ndm.model import DiffusionModel
from ndm.reproduce.transport_measures import DATA, FEW_STEPS, prior_grid, trajectories
from ndm.viz import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NAMES = {
    "ddpm": "DDPM",
    "ndm": "NDM-OT",
    "nfdm": "NFDM-OT",
    "lines": "NFDM-OT, along its lines",
    "exact": "T, exact likelihood",
}
LOOKS: dict[str, dict[str, Any]] = {
    "ddpm": {"color": "#b06000", "linestyle": "--", "marker": "s"},
    "ndm": {"color": "#1b3a6b", "linestyle": "-", "marker": "o"},
    "nfdm": {"color": "#6fa8dc", "linestyle": "-.", "marker": "^"},
    "lines": {"color": "#2e7d32", "linestyle": (0, (5, 1)), "marker": "v"},
    "exact": {"color": "#7a7a7a", "linestyle": ":", "marker": "x"},
}


def draw_trajectories(models: dict[str, DiffusionModel]) -> "Figure":
    """Plot trajectories of DDPM and transport side by side, with the densities at their ends."""
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
            middle.plot(
                time,
                line,
                color="#c07a2c" if below else "#1b3a6b",
                linestyle="--" if below else "-",
                linewidth=0.9,
            )
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
    """Plot T and the optimal map, and W2 against steps."""
    figure = new_figure(8.8, 3.7)
    left, right = figure.subplots(1, 2)
    z, best = prior_grid(2000)
    left.plot(
        z[:, 0], best[:, 0], color="black", linewidth=2.5, alpha=0.35, label="optimal, Q(Φ(z₁))"
    )
    for kind in ("ndm", "nfdm", "lines", "exact"):
        look = {key: value for key, value in LOOKS[kind].items() if key != "marker"}
        x = trajectories(models[kind], z, 1)[0]
        left.plot(z[:, 0], x[:, 0], linewidth=1.3, label=NAMES[kind], **look)
    left.set(xlabel="z₁ (prior)", ylabel="x (data)", title="the map")
    left.legend(frameon=False, fontsize="small", loc="lower right")
    for kind, runs in found.items():
        for method in runs[0]["w2_steps"]:
            values = np.array([one["w2_steps"][method] for one in runs])
            look = LOOKS[kind] | ({"linestyle": ":", "marker": "D"} if method == "DDIM" else {})
            label = f"{NAMES[kind]}, {method}"
            right.plot(FEW_STEPS, values.mean(0), label=label, markersize=4, **look)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="steps",
        ylabel="W₂ to the data (units of the data)",
        title="few steps",
    )
    right.set_xticks(FEW_STEPS, [str(n) for n in FEW_STEPS])
    right.minorticks_off()
    right.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(0.03, 0.285))
    return figure
