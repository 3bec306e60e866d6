"""Figures of the experiment ``steps``, legible in grayscale."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ndm.viz import image_grid, is_image, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS: Mapping[str, str] = {"DDPM": "#1b2a5c", "NDM": "#e0822f"}
WAYS: Mapping[str, tuple[str, str]] = {
    "ancestral": ("o", "-"),
    "DDIM": ("s", "--"),
    "ODE, Heun": ("^", "-."),
}
"""Marker and line style of each sampler."""
CONTINUOUS = "continuous"
_LINEAR = 0.02  # the KID axis is linear within ± this value


def bound_figure(
    records: Mapping[str, Mapping[str, Any]], models: Sequence[str], horizons: Sequence[int | None]
) -> "Figure":
    """Plot the NELBO against T, with continuous time at the end of the axis, and the NLL as lines.

    The left panel shows all T, the right one T >= 10.
    """
    figure = new_figure(9.6, 4.2)
    many = [horizon for horizon in horizons if horizon is None or horizon >= 10]
    for axis, chosen in zip(figure.subplots(1, 2), (horizons, many), strict=True):
        _draw_bounds(axis, records, models, chosen)
    figure.axes[0].set_yscale("log")
    _plain_ticks(figure.axes[0])
    figure.axes[0].set_title("all numbers of steps", fontsize=10)
    figure.axes[1].set_title("10 steps or more", fontsize=10)
    figure.axes[0].legend(fontsize=8)
    return figure


def _draw_bounds(
    axis: Any,
    records: Mapping[str, Mapping[str, Any]],
    models: Sequence[str],
    horizons: Sequence[int | None],
) -> None:
    finite = [horizon for horizon in horizons if horizon]
    end = 4 * max(finite, default=1)
    where = [horizon or end for horizon in horizons]
    for name in models:
        key, color = name.lower(), COLORS[name]
        plain = [records[f"{key}-{horizon or CONTINUOUS}"] for horizon in horizons]
        fits = {
            horizon: records[f"{key}-{horizon}-fitted"]
            for horizon in finite
            if f"{key}-{horizon}-fitted" in records
        }
        lines = {
            f"{name}, variance v": (where, plain, "o", "-"),
            f"{name}, fitted variance": ([*fits], [*fits.values()], "s", "--"),
        }
        for label, (x, points, mark, line) in lines.items():
            values = [point["bpd"] for point in points]
            errors = [point["bpd_stderr"] or 0.0 for point in points]
            axis.errorbar(
                x,
                values,
                errors,
                color=color,
                marker=mark,
                linestyle=line,
                markersize=5,
                linewidth=1.6,
                capsize=2,
                label=label,
            )
        axis.axhline(
            records[f"{key}-nll"]["bpd"],
            color=color,
            linestyle=":",
            linewidth=1.4,
            label=f"{name}, NLL by the ODE",
        )
    axis.set(xscale="log", xlabel="number of steps $T$", ylabel="bits/dim, test split")
    axis.set_xticks(where, [str(horizon or "cont.") for horizon in horizons])
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def _plot_sets(axis: "Axes", name: str, points: Sequence[Mapping[str, Any]], field: str) -> None:
    """Plot one measure of one sampler: means over its sets of samples, and their range."""
    model, way = name.split(", ", 1)
    mark, line = WAYS[way]
    values = [[one[field] for one in point["sets"]] for point in points]
    means = [statistics.fmean(several) for several in values]
    axis.errorbar(
        [point["evaluations"] for point in points],
        means,
        [
            [mean - min(several) for mean, several in zip(means, values, strict=True)],
            [max(several) - mean for mean, several in zip(means, values, strict=True)],
        ],
        color=COLORS[model],
        marker=mark,
        linestyle=line,
        markersize=5,
        linewidth=1.5,
        capsize=2,
        label=name,
    )


def quality_figure(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], reference: Mapping[str, Any] | None
) -> "Figure":
    """Plot FID, KID, precision and recall against evaluations of the predictor.

    Markers are means over the sets of samples, bars their range.

    Args:
        curves: points of each sampler.
        reference: measures of as many real images, drawn as lines; None draws none.
    """
    figure = new_figure(9.6, 7.2)
    panels = (
        ("fid", "FID", "log"),
        ("kid", "KID", "symlog"),
        ("precision", "precision", "linear"),
        ("recall", "recall", "linear"),
    )
    for axis, (field, label, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for name, points in curves.items():
            _plot_sets(axis, name, points, field)
        if reference is not None:
            axis.axhline(
                reference[field],
                color="0.45",
                linestyle=":",
                linewidth=1.4,
                label="real test images",
            )
        budgets = sorted({point["evaluations"] for points in curves.values() for point in points})
        axis.set(xscale="log", xlabel="evaluations of the predictor per image", ylabel=label)
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
        axis.minorticks_off()
        if scale == "log":
            axis.set_yscale("log")
            _plain_ticks(axis)
        elif scale == "symlog":  # KID is unbiased, so it can be negative
            axis.set_yscale("symlog", linthresh=_LINEAR)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.axhspan(-_LINEAR, _LINEAR, color="0.93", zorder=0, label="linear scale")
        else:
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.25)
    figure.axes[1].legend(fontsize=8)
    return figure


def sample_figure(pictures: Mapping[str, Mapping[int, Tensor]]) -> "Figure":
    """Plot a grid of samples for each sampler (rows) and number of evaluations (columns)."""
    budgets = sorted({budget for row in pictures.values() for budget in row})
    first = next(iter(next(iter(pictures.values())).values()))
    if not is_image(first.shape[1:]):
        raise ValueError(f"samples of shape {tuple(first.shape[1:])} are not images")
    figure = new_figure(
        2.6 * len(budgets) + 0.8, (2.6 / 8 * (len(first) // 8) + 0.22) * len(pictures) + 0.3
    )
    axes = figure.subplots(len(pictures), len(budgets), squeeze=False)
    for row, (name, samples) in enumerate(pictures.items()):
        for column, budget in enumerate(budgets):
            axis = axes[row][column]
            axis.set_xticks([])
            axis.set_yticks([])
            if budget in samples:
                axis.imshow(image_grid(samples[budget], columns=8), interpolation="nearest")
            else:
                axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(f"{budget} evaluation{'s' if budget > 1 else ''}", fontsize=10)
            if column == 0:
                axis.set_ylabel(name.replace(", ", "\n", 1), fontsize=9)
    return figure


def _plain_ticks(axis: Any) -> None:
    """Label the ticks of a logarithmic vertical axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
