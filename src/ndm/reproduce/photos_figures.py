"""The chart of the experiment ``photos``, legible in grayscale."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ndm.viz import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = (("#8a8a8a", "o"), ("#1b1b1b", "s"), ("#2b6cb0", "^"), ("#c0392b", "D"))
"""Color and marker of each row."""
Points = Mapping[str, Mapping[int | None, tuple[float, float]]]
"""By row and number of steps, a number and its standard error."""
_APART = 0.08  # between the rows at one number of steps


def time_label(horizon: int | None) -> str:
    """Describe the time that a model is trained for."""
    return "continuous time" if horizon is None else f"T = {horizon}"


def bound_figure(
    bounds: Points,
    differences: Points,
    horizons: Sequence[int | None],
    rates: Mapping[str, float],
) -> "Figure":
    """Plot bits/dim of each row against T, and their differences to the baseline.

    Args:
        bounds: bits/dim.
        differences: bits/dim minus those of the baseline, which is drawn as a line at 0.
        horizons: T; None for continuous time.
        rates: bits/dim of picture formats, of which the smallest is drawn as a line.
    """
    figure = new_figure(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    _draw_points(left, bounds, horizons)
    _draw_points(right, differences, horizons)
    if rates:
        name = min(rates, key=lambda one: rates[one])
        left.axhline(rates[name], color="0.4", linestyle=":", label=f"{name}, one sheet")
    right.axhline(0.0, color=STYLES[1][0], linewidth=1)
    left.set_ylabel("NELBO, bits/dim, test crops")
    right.set_ylabel("difference to plain, widened")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _draw_points(axis: Any, rows: Points, horizons: Sequence[int | None]) -> None:
    """Draw the numbers of each row with their errors, side by side."""
    for index, (name, points) in enumerate(rows.items()):
        color, marker = STYLES[index % len(STYLES)]
        shift = _APART * (index - (len(rows) - 1) / 2)
        axis.errorbar(
            [place + shift for place, horizon in enumerate(horizons) if horizon in points],
            [points[horizon][0] for horizon in horizons if horizon in points],
            [points[horizon][1] for horizon in horizons if horizon in points],
            color=color,
            marker=marker,
            linestyle="none",
            markersize=6,
            capsize=3,
            label=name,
        )
    axis.set_xticks(range(len(horizons)), [time_label(horizon) for horizon in horizons])
    axis.set_xlim(-0.5, len(horizons) - 0.5)
    axis.grid(alpha=0.25)
