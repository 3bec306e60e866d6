r"""Tables and a plot of a comparison: means over seeds with standard errors.

.. math::
    \bar m = \frac1S \sum_s m_s, \qquad
    \text{stderr}^2 = \frac{1}{S (S - 1)} \sum_s (m_s - \bar m)^2, \qquad
    \bar d = \frac1S \sum_s (m_s - m^{\text{baseline}}_s) .

m_s is the mean over the same examples for every row and seed, so the standard error over seeds
measures how much another training run would differ. Runs with the same seed share the order of the
data, the times and, unless a network draws random numbers (dropout), the noise. d is paired by
seed, over the seeds that both rows have.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ndm.evaluation.measurement import standard_error
from ndm.evaluation.tables import plus_minus
from ndm.viz import new_figure, write_figure

MARKERS = "osD^vPX*<>hp"


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over seeds, its standard error (None for one seed), and the values."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    return {
        "mean": float(tensor.mean()),
        "stderr": standard_error(tensor) if len(values) > 1 else None,
        "values": list(values),
    }


def summarize(
    rows: Sequence[Mapping[str, Any]], baseline: str | None = None
) -> list[dict[str, Any]]:
    """Compute statistics over seeds for each row.

    Args:
        rows: each with ``name``, ``parameters``, ``steps``, ``seconds_per_step`` and ``runs``,
            measures by seed: ``{seed: {measure: value}}``.
        baseline: name of the row to subtract in differences.

    Returns:
        The rows with ``measures``, ``{measure: {mean, stderr, values}}``, and ``differences`` in
        the same form.
    """
    reference: Mapping[Any, Any] = next(
        (row["runs"] for row in rows if row["name"] == baseline), {}
    )
    summary = []
    for row in rows:
        runs = row["runs"]
        shared = [seed for seed in runs if seed in reference] if row["name"] != baseline else []
        names = list(next(iter(runs.values()))) if runs else []
        measures = {name: mean_and_error([run[name] for run in runs.values()]) for name in names}
        differences = {
            name: mean_and_error([runs[seed][name] - reference[seed][name] for seed in shared])
            for name in names
            if shared and name in reference[shared[0]]
        }
        summary.append({**row, "measures": measures, "differences": differences})
    return summary


def cell(entry: Mapping[str, Any] | None, sign: bool = False) -> str:
    """Return a mean and its error for a table; a dash for a missing value."""
    if entry is None:
        return "—"
    return plus_minus(entry["mean"], entry["stderr"], sign=sign)


def markdown(
    summary: Sequence[Mapping[str, Any]], unit: str, baseline: str | None, protocol: Sequence[str]
) -> str:
    """Return the table of a comparison as Markdown, followed by its protocol.

    The best value of each column is bold.
    """
    names = list(dict.fromkeys(name for row in summary for name in row["measures"]))
    best = {
        name: min(row["measures"][name]["mean"] for row in summary if name in row["measures"])
        for name in names
    }
    main = _main_measure(summary)
    head = ["model", "parameters", "seeds", "steps", "ms/step", "minutes", *names]
    if baseline:
        head.append(f"{main}, difference to {baseline}")
    lines = [head, ["---"] * len(head)]
    for row in summary:
        step = row["seconds_per_step"]
        cells = [row["name"], f"{row['parameters']:,}", str(len(row["runs"])), f"{row['steps']:,}"]
        cells += [f"{1e3 * step:.1f}", f"{row['steps'] * step / 60:.1f}"]
        for name in names:
            entry = row["measures"].get(name)
            bold = entry is not None and entry["mean"] == best[name]
            cells.append(f"**{cell(entry)}**" if bold else cell(entry))
        if baseline:
            cells.append(cell(row["differences"].get(main), sign=True))
        lines.append(cells)
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{unit}. " + " ".join(protocol) + "\n"


def _main_measure(summary: Sequence[Mapping[str, Any]]) -> str:
    """Return the first measure that all measured rows have, or else the first."""
    measured = [row["measures"] for row in summary if row["measures"]]
    names = list(dict.fromkeys(name for row in measured for name in row))
    shared = [name for name in names if all(name in row for row in measured)]
    return next(iter([*shared, *names]), "")


def plot(path: Path, summary: Sequence[Mapping[str, Any]], unit: str) -> None:
    """Plot the main measure against training time and number of parameters, as PNG or PDF."""
    shown = [row for row in summary if row["measures"]]
    if not shown:
        return
    name = _main_measure(shown)
    shown = [row for row in shown if name in row["measures"]]
    figure = new_figure(8.6, 3.8)
    axes = figure.subplots(1, 2, sharey=True)
    for index, row in enumerate(shown):
        entry = row["measures"][name]
        sizes = (row["steps"] * row["seconds_per_step"], row["parameters"])
        for axis, at in zip(axes, sizes, strict=True):
            axis.errorbar(
                at,
                entry["mean"],
                yerr=entry["stderr"],
                marker=MARKERS[index % len(MARKERS)],
                color=f"C{index % 10}",
                markersize=6,
                capsize=3,
                linestyle="none",
                label=row["name"],
            )
    axes[0].set(xlabel="training time (s)", ylabel=f"{name} ({unit})")
    axes[1].set(xlabel="parameters")
    axes[1].ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    for axis in axes:
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    write_figure(path, figure)
