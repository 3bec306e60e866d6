r"""Tables and a plot of a comparison: means over seeds with standard errors.

.. math::
    \bar m = \frac1S \sum_s m_s, \qquad \text{stderr}^2 = \frac{1}{S (S - 1)} \sum_s (m_s - \bar m)^2, \qquad
    \bar d = \frac1S \sum_s (m_s - m^{\text{baseline}}_s) .

m_s is the mean over the same examples for every row and seed, so the error over seeds says how far
another training would come out. Runs of one seed share the order of the data and the times, and as
far as their networks draw no random numbers of their own (dropout) the noise; d is paired by seed,
over the seeds that both have.
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
    """Mean of values over seeds, its standard error (None for a single one), and the values
    themselves.
    """
    tensor = torch.tensor(list(values), dtype=torch.float64)
    return {
        "mean": float(tensor.mean()),
        "stderr": standard_error(tensor) if len(values) > 1 else None,
        "values": list(values),
    }


def summarize(
    rows: Sequence[Mapping[str, Any]], baseline: str | None = None
) -> list[dict[str, Any]]:
    """Statistics over seeds of each row.

    Args:
        rows: each with ``name``, ``parameters``, ``steps``, ``seconds_per_step`` and ``runs``,
            measures by seed: ``{seed: {measure: value}}``.
        baseline: name of the row from which differences are taken.

    Returns:
        The rows with ``measures``: ``{measure: {mean, stderr, values}}``, and ``differences``
            likewise.
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
    """A mean and its error for a table; a dash where there is none."""
    if entry is None:
        return "—"
    return plus_minus(entry["mean"], entry["stderr"], sign=sign)


def markdown(
    summary: Sequence[Mapping[str, Any]], unit: str, baseline: str | None, protocol: Sequence[str]
) -> str:
    """The table of a comparison as Markdown, the best of each column in bold, and its protocol
    below.
    """
    names = list(dict.fromkeys(name for row in summary for name in row["measures"]))
    best = {
        name: min(row["measures"][name]["mean"] for row in summary if name in row["measures"])
        for name in names
    }
    main = names[0] if names else ""
    head = ["model", "parameters", "seeds", "steps", "ms a step", "minutes", *names]
    if baseline:
        head.append(f"{main}, less {baseline}")
    lines = [head, ["---"] * len(head)]
    for row in summary:
        cells = [
            row["name"],
            f"{row['parameters']:,}",
            str(len(row["runs"])),
            f"{row['steps']:,}",
            f"{1e3 * row['seconds_per_step']:.1f}",
        ]
        cells.append(f"{row['steps'] * row['seconds_per_step'] / 60:.1f}")
        for name in names:
            entry = row["measures"].get(name)
            text = cell(entry)
            cells.append(
                f"**{text}**" if entry is not None and entry["mean"] == best[name] else text
            )
        if baseline:
            cells.append(cell(row["differences"].get(main), sign=True))
        lines.append(cells)
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{unit}. " + " ".join(protocol) + "\n"


def plot(path: Path, summary: Sequence[Mapping[str, Any]], unit: str) -> None:
    """The first measure against training time and against the number of parameters, with standard
    errors; PNG or PDF.
    """
    shown = [row for row in summary if row["measures"]]
    if not shown:
        return
    name = next(iter(shown[0]["measures"]))
    figure = new_figure(8.6, 3.8)
    axes = figure.subplots(1, 2, sharey=True)
    for index, row in enumerate(shown):
        entry = row["measures"][name]
        for axis, at in zip(
            axes, (row["steps"] * row["seconds_per_step"], row["parameters"]), strict=True
        ):
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
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False
    )
    write_figure(path, figure)
