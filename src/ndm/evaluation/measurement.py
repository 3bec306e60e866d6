"""A measured number: its value for each example, its standard error, and the protocol by which
anyone can measure it again.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from ndm.elbo import bits_per_dim


@dataclass(frozen=True)
class Protocol:
    """How a number was measured. Every field goes into its record."""

    about: Mapping[str, Any]
    """What was measured: the data, their split and checksum, and the run if there is one."""
    num_examples: int
    split_size: int
    limit: int | None
    scale: str
    """Whether the number is a density or a probability of integers."""
    seed: int
    batch_size: int
    processes: int
    parameters: int
    dtype: str
    device: str
    seconds: float
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready; those of ``about`` among the others."""
        fields = asdict(self)
        return {**fields.pop("about"), **fields}


@dataclass(frozen=True)
class BoundProtocol(Protocol):
    """How a bound was measured."""

    eta: float | str
    """The number, or how it was fitted."""
    reverse_variance: str
    """``v``, the posterior's, or how it was fitted."""
    time_samples_per_example: int | None = None
    """Times drawn for each example; None for whole paths."""
    nfe_mean: float | None = None
    """Evaluations of the predictor for an example, of whole paths."""


@dataclass(frozen=True)
class LikelihoodProtocol(Protocol):
    """How a likelihood was measured by the generative ODE."""

    dequantization: str
    solver: str
    rtol: float | None
    """Relative tolerance of an adaptive solver."""
    atol: float | None
    nodes: int
    """Nodes of the quadrature of the divergence."""
    probes: int | Literal["exact"]
    """Probes of the trace estimate, or ``exact`` for the exact trace."""
    probe: str | None
    """Distribution of the probes."""
    nfe_mean: float
    """Evaluations of the drift for an example."""
    one_sample_bpd: float
    """The number with a single importance sample."""
    one_sample_bpd_stderr: float | None
    half_the_nodes_shift_bpd: float
    """How far half of the nodes would shift the number."""
    half_the_nodes_shift_bpd_stderr: float
    reversibility: Mapping[str, Any] | None
    """Errors of solving there and back."""

    @property
    def trace(self) -> str:
        """How the trace was computed."""
        return "exact trace" if self.probes == "exact" else f"{self.probes} probes"


@dataclass(frozen=True)
class Measurement:
    """A number measured on N examples."""

    quantity: Literal["nelbo", "nll"]
    """A bound, or a likelihood."""
    values: Tensor = field(repr=False)
    """The estimate of each example, ``(N,)``, nats, float64, in the order of the data."""
    stderr: float
    """Standard error of the mean of the values, nats."""
    dims: int
    """D."""
    protocol: Protocol
    """How it was measured."""
    steps: int | None = None
    """T of a bound, or None for continuous time."""
    importance_samples: int | None = None
    """K, where examples are weighted by importance."""
    as_trained: bool = False
    """Whether it is the bound in the time, discrete or continuous, that the model was trained in."""
    fitted: bool = False
    """Whether the reverse variance, or eta, was fitted on training data."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Means of the terms that add up to the number, nats."""

    @property
    def weighted(self) -> bool:
        """Whether it is an importance-weighted bound."""
        return self.quantity == "nelbo" and self.importance_samples is not None

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
    def name(self) -> str:
        """Its name in records: ``nll``, ``nelbo`` as trained, ``nelbo_continuous``,
        ``nelbo_discrete`` or ``nelbo_iw``; with ``_calibrated`` if fitted.
        """
        if self.quantity == "nll":
            return "nll"
        kind = "_continuous" if self.steps is None else "_discrete"
        kind = "_iw" if self.weighted else "" if self.as_trained else kind
        return f"nelbo{kind}{'_calibrated' if self.fitted else ''}"

    @property
    def label(self) -> str:
        """What the number is, for people."""
        if isinstance(self.protocol, LikelihoodProtocol):
            one = self.protocol
            text = f"NLL, ODE, {one.solver}, {one.trace}, {one.dequantization}"
        else:
            text = f"NELBO, {f'T = {self.steps}' if self.steps else 'continuous time'}"
        text += f", K = {self.importance_samples}" if (self.importance_samples or 1) > 1 else ""
        return text + (", fitted reverse process" if self.fitted else "")

    def numbers(self) -> dict[str, float | None]:
        """The number and its error in both units; the error of a single example is None."""
        error = math.isfinite(self.stderr)
        return {
            "bpd": self.bpd,
            "bpd_stderr": self.bpd_stderr if error else None,
            "nats": self.nats,
            "nats_stderr": self.stderr if error else None,
        }

    def terms_bpd(self) -> dict[str, float]:
        """The terms, bits/dim."""
        return {f"{name}_bpd": float(bits_per_dim(v, self.dims)) for name, v in self.terms.items()}

    def to_dict(self) -> dict[str, Any]:
        """The number with its protocol, JSON-ready."""
        record = {"name": self.name, "label": self.label, **self.numbers(), "dims": self.dims}
        record |= {"steps": self.steps} if self.quantity == "nelbo" else {}
        samples = self.importance_samples
        record |= {} if samples is None else {"importance_samples": samples}
        return {**record, **self.terms_bpd(), **self.protocol.to_dict()}


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values ``(N,)``; NaN for a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def neighbor_error(values: Tensor) -> float:
    """Standard error of the mean of values ``(N,)`` that are stratified in their order.

    It comes from the differences of neighbors; NaN for a single value.
    """
    if len(values) < 2:
        return math.nan
    return float((values.diff().square().mean() / (2 * len(values))).sqrt())
