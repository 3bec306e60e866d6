"""Figures of models of 2-D densities: points over time, densities, paths.

Colors show where points start, on a scale of even lightness that survives a grayscale print.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ndm.viz import common_limit, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = "viridis"
TIMES = (0.0, 0.3, 0.45, 0.6, 0.8, 1.0)
PREDICTION = r"$\hat{x}(z_t, t)$"


def limit_of(batches: Sequence[Tensor], share: float = 0.995) -> float:
    """Return :func:`ndm.viz.common_limit` of batches ``(..., 2)``, with a margin of 10%."""
    return common_limit([batch.reshape(-1, 2) for batch in batches], share, 1.1)


def over_time(
    rows: Mapping[str, Tensor], colors: Tensor, times: Sequence[float] = TIMES
) -> "Figure":
    """Plot point clouds: one row per name, one column per time, all with the same limits.

    Args:
        rows: ``(len(times), N, 2)`` by row label.
        colors: one number per point, ``(N,)`` for all rows or ``(len(rows), N)``.
        times: times of the columns.
    """
    figure = new_figure(1.32 * len(times) + 0.7, 1.32 * len(rows) + 0.5)
    limit = limit_of(list(rows.values()))
    axes = figure.subplots(len(rows), len(times), squeeze=False, sharex=True, sharey=True)
    hues = colors.expand(len(rows), -1) if colors.dim() == 1 else colors
    for row, (name, states) in enumerate(rows.items()):
        for column, time in enumerate(times):
            axis = axes[row][column]
            scatter(axis, states[column], limit, hues[row])
            axis.label_outer()
            if row == 0:
                axis.set_title(f"$t = {time:g}$", fontsize=10)
            if row == len(rows) - 1:
                axis.set_xlabel("$x_1$", fontsize=8)
        axes[row][0].set_ylabel(name, fontsize=9)
    return figure


def scatter(axis: Any, points: Tensor, limit: float, colors: Tensor) -> None:
    """Plot points ``(N, 2)`` in the square [-limit, limit]²."""
    # In random order, so that no color is always on top.
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    x = points[order].numpy()
    axis.scatter(
        x[:, 0],
        x[:, 1],
        c=colors[order].numpy(),
        cmap=COLORS,
        s=1.6,
        linewidths=0,
        alpha=0.8,
        rasterized=True,
    )
    square(axis, limit)


def square(axis: Any, limit: float) -> None:
    """Make an axis square around 0, with ticks at three integers."""
    tick = max(1, int(limit))
    axis.set(
        xlim=(-limit, limit),
        ylim=(-limit, limit),
        aspect="equal",
        xticks=(-tick, 0, tick),
        yticks=(-tick, 0, tick),
    )
    axis.tick_params(labelsize=7, length=2)


def sample_panels(rows: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Plot histograms of samples ``(N, 2)``: one row per data set, one column per model.

    Each row has its own color scale.
    """
    names = list(next(iter(rows.values())))
    figure = new_figure(2.3 * len(names) + 1.2, 2.3 * len(rows) + 0.5)
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for row, (data, clouds) in enumerate(rows.items()):
        limit = limit_of(list(clouds.values()))
        heights = {name: histogram(points, limit) for name, points in clouds.items()}
        most = float(np.quantile(np.stack(list(heights.values())), 0.995))
        image: Any = None
        for axis, name in zip(axes[row], names, strict=True):
            image = axis.imshow(
                heights[name].T,
                origin="lower",
                extent=(-limit, limit, -limit, limit),
                vmin=0,
                vmax=most,
                cmap=COLORS,
            )
            square(axis, limit)
            if row == 0:
                axis.set_title(name, fontsize=10)
            if row == len(rows) - 1:
                axis.set_xlabel("$x_1$")
        axes[row][0].set_ylabel(f"{data}\n$x_2$")
        figure.colorbar(
            image, ax=list(axes[row]), label="density, 1/unit²", extend="max"
        ).ax.tick_params(labelsize=7)
    return figure


def histogram(points: Tensor, limit: float) -> np.ndarray:
    """Return the density of points ``(N, 2)`` in equal cells of the square [-limit, limit]².

    The first index is the first coordinate.
    """
    bins, x = max(10, min(64, round(len(points) ** 0.5 / 1.6))), points.numpy()
    counts, _, _ = np.histogram2d(
        x[:, 0], x[:, 1], bins=bins, range=((-limit, limit), (-limit, limit))
    )
    return counts / (len(points) * (2 * limit / bins) ** 2)


def densities(columns: Mapping[str, tuple[Tensor, Tensor]], limit: float) -> "Figure":
    """Plot densities in the top row and samples below, with one color scale.

    Args:
        columns: by name, the density at the centers of cells ``(size, size)``, as returned by
            :func:`ndm.reproduce.plane.density`, and samples ``(N, 2)``.
        limit: half the side of the square.
    """
    figure = new_figure(2.6 * len(columns) + 0.9, 5.4)
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey=True)
    most = 1.25 * max(float(np.quantile(cells.numpy(), 0.95)) for cells, _ in columns.values())
    image: Any = None
    for column, (name, (cells, points)) in enumerate(columns.items()):
        above, below = axes[0][column], axes[1][column]
        extent = (-limit, limit, -limit, limit)
        image = above.imshow(
            cells.numpy(), origin="lower", extent=extent, vmin=0, vmax=most, cmap=COLORS
        )
        below.imshow(
            histogram(points, limit).T,
            origin="lower",
            extent=extent,
            vmin=0,
            vmax=most,
            cmap=COLORS,
        )
        above.set_title(name, fontsize=11)
        for axis in (above, below):
            square(axis, limit)
            axis.label_outer()
        below.set_xlabel("$x_1$")
    axes[0][0].set_ylabel("density\n$x_2$")
    axes[1][0].set_ylabel("samples, histogram\n$x_2$")
    figure.colorbar(image, ax=axes, label="density, 1/unit²", shrink=0.7, extend="max")
    return figure


def paths(rows: Mapping[str, Mapping[str, Tensor]], moving: str = "the ODE") -> "Figure":
    """Plot paths from t = 1 to 0, in the plane and as first coordinate over time.

    Args:
        rows: paths ``(T + 1, B, 2)`` on a uniform grid, by row label and model name.
        moving: the sampler, for the legend.
    """
    names = list(next(iter(rows.values())))
    figure = new_figure(2.55 * 2 * len(names), 2.5 * len(rows) + 0.9)
    axes = figure.subplots(len(rows), 2 * len(names), squeeze=False)
    for row, (data, models) in enumerate(rows.items()):
        limit = limit_of(list(models.values()), 1.0)
        for column, name in enumerate(names):
            plane, time = axes[row][column], axes[row][len(names) + column]
            draw_paths(plane, time, models[name], limit)
            if row == 0:
                plane.set_title(f"{name}: in the plane", fontsize=10)
                time.set_title(f"{name}: over time", fontsize=10)
            last = row == len(rows) - 1
            plane.set(
                xlabel="$z_{t,1}$" if last else "",
                ylabel=f"{data}\n$z_{{t,2}}$" if column == 0 else "",
            )
            time.set(xlabel="$t$" if last else "", ylabel="$z_{t,1}$" if column == 0 else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        title=f"Paths by {moving}",
        title_fontsize=9,
    )
    return figure


def draw_paths(plane: Any, time: Any, path: Tensor, limit: float) -> None:
    """Plot paths ``(T + 1, B, 2)`` in the plane, and their first coordinate over time."""
    from matplotlib import colormaps

    z, grid = path.numpy(), np.linspace(1, 0, len(path))
    rank = np.argsort(np.argsort(z[0, :, 0])) / max(1, z.shape[1] - 1)
    for index, hue in enumerate(colormaps[COLORS](0.9 * rank)):
        label = "path $z_t$; color: order of $z_{1,1}$" if index == z.shape[1] // 2 else None
        plane.plot(z[:, index, 0], z[:, index, 1], color=hue, linewidth=0.8, label=label)
        time.plot(grid, z[:, index, 0], color=hue, linewidth=0.8)
    plane.scatter(
        *z[0].T,
        s=10,
        marker="o",
        facecolors="white",
        edgecolors="0.35",
        linewidths=0.6,
        zorder=3,
        label="start $z_1$",
    )
    plane.scatter(
        *z[-1].T, s=9, marker="s", color="black", linewidths=0, zorder=3, label="end $z_0$"
    )
    square(plane, limit)
    time.set(xlim=(1, 0), ylim=(-limit, limit), box_aspect=1)
    time.tick_params(labelsize=7, length=2)
