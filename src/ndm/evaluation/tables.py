r"""What is known of a number: the number, its error, its protocol; tables of such numbers, and the relations that must hold between them.

.. math::
    \text{NLL} \le \text{NELBO}, \qquad \text{NELBO}_T \ge \text{NELBO}_\infty, \qquad
    \text{NELBO}_T - \text{NELBO}_\infty = O(1/T), \qquad \text{NELBO}_{T, K} \le \text{NELBO}_T .

Each is checked on the differences of single examples, which vary much less than the examples do. The first holds for a perfect predictor
and an F that is affine in x; the ODE and the SDE of any other model are different models, so a violation says how far apart they are. It is
checked where both go through q(z_0|x). The next two hold where the predictor is good at the times of the grid. A violated relation is
a reason to look, not a proof of an error. The quadrature of the likelihood is checked by what half of its nodes would have given.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ndm.elbo import bits_per_dim


@dataclass(frozen=True)
class Measurement:
    """One number and how it came about."""

    name: str
    """``nelbo`` (in the time that the model was trained in), ``nelbo_continuous``, ``nelbo_discrete``, ``nelbo_iw`` or ``nll``; with the
    ending ``_calibrated`` under a fitted reverse process."""
    values: Tensor = field(repr=False)
    """The estimate of each example, ``(N,)``, nats, float64, in the order of the data."""
    stderr: float
    """Standard error of the mean of the values, nats."""
    dims: int
    """D."""
    protocol: dict[str, Any]
    """Everything else that is needed to get the same number again; JSON-ready."""
    terms: dict[str, float] = field(default_factory=dict)
    """Means of the terms that add up to the number, nats."""

    @property
    def nats(self) -> float:
        """The number, nats for an example."""
        return float(self.values.mean())

    @property
    def bpd(self) -> float:
        """The number, bits/dim."""
        return float(bits_per_dim(self.nats, self.dims))

    @property
    def bpd_stderr(self) -> float:
        """Its standard error, bits/dim."""
        return float(bits_per_dim(self.stderr, self.dims))

    @property
    def steps(self) -> int | None:
        """T, or None for continuous time."""
        return self.protocol.get("steps")

    @property
    def label(self) -> str:
        """What the number is, for people."""
        horizon = f"T = {self.steps}" if self.steps else "continuous time"
        text = {"nelbo": "NELBO", "nll": "NLL"}[self.name.split("_")[0]]
        if text == "NLL":
            trace = f"{self.protocol['probes']} probes" if self.protocol["probes"] != "exact" else "exact trace"
            text += f", ODE, {self.protocol['solver']}, {trace}, {self.protocol['dequantization']}"
        else:
            text += f", {horizon}"
        if self.protocol.get("importance_samples", 1) > 1:
            text += f", K = {self.protocol['importance_samples']}"
        return text + (", fitted reverse process" if self.name.endswith("_calibrated") else "")

    def to_dict(self) -> dict[str, Any]:
        """The number with its protocol, JSON-ready."""
        terms = {f"{name}_bpd": float(bits_per_dim(value, self.dims)) for name, value in self.terms.items()}
        return {"name": self.name, "label": self.label, **self.numbers(), "dims": self.dims, **terms, **self.protocol}

    def numbers(self) -> dict[str, float | None]:
        """The number and its error in both units; the error of a single example is not known and None."""
        error = math.isfinite(self.stderr)
        return {
            "bpd": self.bpd,
            "bpd_stderr": self.bpd_stderr if error else None,
            "nats": self.nats,
            "nats_stderr": self.stderr if error else None,
        }


@dataclass(frozen=True)
class Check:
    """A relation between two numbers."""

    text: str
    holds: bool


def flat_record(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """The numbers by short names: ``nelbo_bpd``, ``nll_bpd``, ``nelbo_discrete_bpd: {T: value}`` and so on.

    A bound of a model trained with T steps stands in both.
    """
    record: dict[str, Any] = {}
    shared = ("num_examples", "split_size", "limit", "seed", "batch_size", "parameters", "dtype")
    for one in measurements:
        by_steps = one.name.startswith(("nelbo_discrete", "nelbo_iw"))
        trained = one.name in ("nelbo", "nelbo_calibrated")
        for key, value in one.numbers().items():
            if not by_steps:
                record[f"{one.name}_{key}"] = value
            if by_steps or (trained and one.steps):
                name = one.name.replace("nelbo", "nelbo_discrete") if trained else one.name
                record.setdefault(f"{name}_{key}", {})[str(one.steps)] = value
        if one.name == "nelbo":
            record |= {f"{name}_bpd": float(bits_per_dim(value, one.dims)) for name, value in one.terms.items()}
            record |= {key: one.protocol[key] for key in ("time_samples_per_example", "steps", "eta")}
        if one.name == "nll":
            record["nfe_mean"] = one.protocol["nfe_mean"]
    return {**record, "dims": measurements[0].dims, **{key: measurements[0].protocol[key] for key in shared}}


def check_relations(measurements: Sequence[Measurement], errors: float = 3.0) -> list[Check]:
    """Check the relations of this module, with a tolerance of some standard errors of the difference; a single example checks nothing."""
    if len(measurements[0].values) < 2:
        return []
    by_name: dict[str, list[Measurement]] = {}
    for one in measurements:
        by_name.setdefault(one.name, []).append(one)
    bounds = by_name.get("nelbo", []) + by_name.get("nelbo_continuous", [])
    limit = next((one for one in bounds if one.steps is None), None)
    bound = bounds[0] if bounds else None
    discrete = sorted(by_name.get("nelbo_discrete", []), key=lambda one: one.steps or 0)
    checks = []
    for one in by_name.get("nll", []):
        if bound is not None and one.protocol["dequantization"] == "variational":
            checks.append(_at_most(one, bound, errors))
        checks.append(_quadrature(one, errors))
    if limit is not None:
        checks += [_at_most(limit, one, errors) for one in discrete]
        if len(discrete) > 1:
            checks.append(_tends_to(discrete[0], discrete[-1], limit, errors))
    for kind in ("", "_calibrated"):
        plain = [one for name in ("nelbo", "nelbo_discrete") for one in by_name.get(name + kind, [])]
        weighted = by_name.get(f"nelbo_iw{kind}", [])
        checks += [_at_most(one, other, errors) for one in weighted for other in plain if other.steps == one.steps]
    return checks


def _quadrature(one: Measurement, errors: float) -> Check:
    """Half of the nodes give the same, up to noise and a hundredth of a bit."""
    shift, error = one.protocol["half_the_nodes_shift_bpd"], one.protocol["half_the_nodes_shift_bpd_stderr"]
    holds = abs(shift) <= max(errors * error, 0.01)
    mend = "" if holds else "; raise --nodes"
    return Check(
        f"{one.label}: quadrature {'fine' if holds else 'NOT fine'} enough, half of its nodes shift it by {shift:+.4f} ± {error:.4f}{mend}",
        holds,
    )


def _difference(a: Measurement, b: Measurement) -> tuple[float, float]:
    """Mean of a - b and its standard error, bits/dim, over the same examples."""
    difference = a.values - b.values
    error = float(difference.std() / math.sqrt(len(difference)))
    return float(bits_per_dim(difference.mean(), a.dims)), float(bits_per_dim(error, a.dims))


def _at_most(low: Measurement, high: Measurement, errors: float) -> Check:
    difference, error = _difference(low, high)
    holds = difference <= errors * error
    return Check(f"{low.label} <= {high.label}: {'yes' if holds else 'NO'}, difference {difference:+.4f} ± {error:.4f} bits/dim", holds)


def _tends_to(coarse: Measurement, fine: Measurement, limit: Measurement, errors: float) -> Check:
    """The gap to the limit falls as 1/T, up to a factor of two."""
    (first, _), (last, error) = _difference(coarse, limit), _difference(fine, limit)
    expected = first * (coarse.steps or 1) / (fine.steps or 1)
    holds = abs(last) <= 2 * abs(expected) + errors * error
    return Check(
        f"NELBO tends to continuous time: {'yes' if holds else 'NO'}, {first:+.4f} at T = {coarse.steps}, {last:+.4f} ± {error:.4f} at T = {fine.steps}",
        holds,
    )


def text_table(measurements: Sequence[Measurement]) -> str:
    """A plain-text table for the terminal, the terms of the bound under their sum."""
    lines, width = [], max(len(one.label) for one in measurements)
    for one in measurements:
        nfe = f"{one.protocol['nfe_mean']:8.0f}" if "nfe_mean" in one.protocol else " " * 8
        error = f"± {one.bpd_stderr:.4f}" if math.isfinite(one.bpd_stderr) else " " * 8
        lines.append(f"{one.label:<{width}}  {one.bpd:9.4f} {error}  {one.nats:11.3f}{nfe}{one.protocol['seconds']:9.1f}")
        lines += [f"    {name:<{width - 4}}  {bits_per_dim(value, one.dims):9.4f}" for name, value in one.terms.items()]
    head = f"{'':<{width}}  {'bits/dim':>9} {'':8}  {'nats':>11}{'NFE':>8}{'seconds':>9}"
    return "\n".join([head, "-" * len(head), *lines])


def bound_table(record: Mapping[str, Any]) -> str:
    """A plain-text table of the bound alone, from a record of :func:`flat_record`."""
    rows = [(name, f"{record[f'{name}_bpd']:9.4f}") for name in ("prior", "diffusion", "reconstruction")]
    error = record["nelbo_bpd_stderr"]
    rows.append(("bound (sum)", f"{record['nelbo_bpd']:9.4f}" + (f"  ± {error:.4f}" if error is not None else "")))
    return "\n".join([f"{'term':<16}bits/dim", "-" * 36, *(f"{name:<16}{value}" for name, value in rows)])


COLUMNS: Mapping[str, str] = {
    "data": "data",
    "split": "split",
    "num_examples": "examples",
    "seed": "seed",
    "time_samples_per_example": "times",
    "importance_samples": "K",
    "dequantization": "dequantization",
    "solver": "solver",
    "rtol": "rtol",
    "atol": "atol",
    "probes": "probes",
    "nodes": "nodes",
    "nfe_mean": "NFE",
    "dtype": "dtype",
    "seconds": "seconds",
    "data_sha256": "sha256 of the data",
    "versions": "versions",
}
"""Fields of the protocol that a row of the Markdown table shows, and their headings."""


def markdown_table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table, one row for each number with its protocol."""
    rows = [["number", "bits/dim", "nats", *COLUMNS.values()]]
    rows.append(["---"] * len(rows[0]))
    for one in measurements:
        row = [one.label, plus_minus(one.bpd, one.bpd_stderr, 4), plus_minus(one.nats, one.stderr)]
        rows.append(row + [_cell(one.protocol.get(key)) for key in COLUMNS])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plus_minus(value: float, error: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number and its error for a table; the number alone where the error is not known."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if error is None or not math.isfinite(error) else f"{text} ± {error:.{digits}f}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text[:12] if len(text) == 64 else text.replace("|", "\\|")
