"""Measurements as records, and as tables for the terminal and Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ndm.elbo import bits_per_dim
from ndm.evaluation.measurement import BoundProtocol, LikelihoodProtocol, Measurement


def flat_record(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return results by name: ``nelbo_bpd``, ``nll_bpd``, ``nelbo_discrete_bpd: {T: value}``.

    The bound of a model trained with T steps appears under both names.
    """
    record: dict[str, Any] = {}
    for one in measurements:
        by_steps = one.quantity == "nelbo" and one.steps is not None
        for key, value in one.numbers().items():
            if one.as_trained or one.steps is None:
                record[f"{one.name}_{key}"] = value
            if by_steps:
                name = one.name.replace("nelbo", "nelbo_discrete") if one.as_trained else one.name
                record.setdefault(f"{name}_{key}", {})[str(one.steps)] = value
        if one.name == "nelbo" and isinstance(one.protocol, BoundProtocol):
            times = one.protocol.time_samples_per_example
            record |= {**one.terms_bpd(), "time_samples_per_example": times}
            record |= {"steps": one.steps, "eta": one.protocol.eta}
        if isinstance(one.protocol, LikelihoodProtocol):
            record["nfe_mean"] = one.protocol.nfe_mean
    shared = (
        "condition",
        "num_examples",
        "split_size",
        "limit",
        "seed",
        "batch_size",
        "parameters",
        "dtype",
    )
    first = measurements[0]
    return {**record, "dims": first.dims, **{key: getattr(first.protocol, key) for key in shared}}


def text_table(measurements: Sequence[Measurement]) -> str:
    """Return a plain-text table for the terminal, with the terms of each bound below their sum."""
    lines, width = [], max(len(one.label) for one in measurements)
    for one in measurements:
        evaluations = one.protocol.to_dict().get("nfe_mean")
        nfe = " " * 8 if evaluations is None else f"{evaluations:8.0f}"
        error = f"± {one.bpd_stderr:.4f}" if math.isfinite(one.bpd_stderr) else " " * 8
        lines.append(
            f"{one.label:<{width}}  {one.bpd:9.4f} {error} "
            f" {one.nats:11.3f}{nfe}{one.protocol.seconds:9.1f}"
        )
        lines += [
            f"    {name:<{width - 4}}  {bits_per_dim(value, one.dims):9.4f}"
            for name, value in one.terms.items()
        ]
    head = f"{'':<{width}}  {'bits/dim':>9} {'':8}  {'nats':>11}{'NFE':>8}{'seconds':>9}"
    return "\n".join([head, "-" * len(head), *lines])


def bound_table(record: Mapping[str, Any]) -> str:
    """Return a plain-text table of a bound and its terms, from a record of :func:`flat_record`."""
    rows = [
        (name, f"{record[f'{name}_bpd']:9.4f}") for name in ("prior", "diffusion", "reconstruction")
    ]
    for name, label in (("nelbo", "bound (sum)"), ("nelbo_unconditional", "unconditional")):
        if f"{name}_bpd" in record:
            error = record[f"{name}_bpd_stderr"]
            margin = "" if error is None else f"  ± {error:.4f}"
            rows.append((label, f"{record[f'{name}_bpd']:9.4f}{margin}"))
    lines = [f"{name:<16}{value}" for name, value in rows]
    return "\n".join([f"{'term':<16}bits/dim", "-" * 36, *lines])


COLUMNS: Mapping[str, str] = {
    "data": "data",
    "split": "split",
    "condition": "given",
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
"""Fields of the protocol in the Markdown table, and their headings."""


def markdown_table(measurements: Sequence[Measurement]) -> str:
    """Return a Markdown table with one row for each measurement and its protocol."""
    rows = [["number", "bits/dim", "nats", *COLUMNS.values()]]
    rows.append(["---"] * len(rows[0]))
    for one in measurements:
        row = [one.label, plus_minus(one.bpd, one.bpd_stderr, 4), plus_minus(one.nats, one.stderr)]
        record = one.to_dict()
        rows.append(row + [_cell(record.get(key)) for key in COLUMNS])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plus_minus(value: float, error: float | None, digits: int = 3, sign: bool = False) -> str:
    """Return a number and its error for a table; only the number if the error is unknown."""
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
