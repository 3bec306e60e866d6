"""Measurements: the value of each example, the standard error, and the protocol to repeat it."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

import ndm
from ndm.elbo import bits_per_dim
from ndm.model import DiffusionModel


@dataclass(frozen=True)
class Protocol:
    """How a quantity was measured. Its record contains every field."""

    about: Mapping[str, Any]
    """The data, their split and checksum, and the run, if any."""
    num_examples: int
    split_size: int
    limit: int | None
    scale: str
    """Whether the quantity is a density or a probability of integers."""
    seed: int
    batch_size: int
    processes: int
    parameters: int
    dtype: str
    device: str
    seconds: float
    versions: Mapping[str, str]
    condition: str
    """What the model was given of each example: ``none``, ``labels``, ``vector``, ``image``, or
    ``fixed`` if it had been bound before.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return all fields for JSON, with those of ``about`` at the same level."""
        fields = asdict(self)
        return {**fields.pop("about"), **fields}


def model_fields(model: DiffusionModel) -> dict[str, Any]:
    """Return the fields of a :class:`Protocol` that depend only on the model and the software."""
    like, values = model.like, model.decoder.values
    packages = ("torch", "torchdiffeq", "numpy")
    return {
        "scale": (
            "density of x in the units of the model"
            if values is None
            else f"probability of integers, {len(values)} values"
        ),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(like.dtype).removeprefix("torch."),
        "device": str(like.device),
        "versions": {
            "ndm": ndm.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


@dataclass(frozen=True)
class BoundProtocol(Protocol):
    """How a bound was measured."""

    eta: float | str
    """A number, or a description of the fit."""
    reverse_variance: str
    """``v``, the variance of the posterior, or a description of the fit."""
    times: Sequence[float] | None = None
    """The fitted times of a process in discrete time; None for equal steps."""
    time_samples_per_example: int | None = None
    """Times drawn for each example; None for whole paths."""
    nfe_mean: float | None = None
    """Evaluations of the predictor per example, for whole paths."""


@dataclass(frozen=True)
class LikelihoodProtocol(Protocol):
    """How a likelihood was measured by the generative ODE."""

    dequantization: str
    nfe_mean: float
    """Evaluations of the drift per example."""
    one_sample_bpd: float
    """The result with one importance sample."""
    one_sample_bpd_stderr: float | None
    half_the_nodes_shift_bpd: float
    """Change of the result with half of the nodes."""
    half_the_nodes_shift_bpd_stderr: float
    reversibility: Mapping[str, Any] | None
    """Errors after solving forward and back."""
    solver: str | None = None
    """None for a density in closed form, which needs no ODE; then all below are None, too."""
    rtol: float | None = None
    """Relative tolerance of an adaptive solver."""
    atol: float | None = None
    nodes: int | None = None
    """Nodes of the quadrature of the divergence."""
    probes: int | Literal["exact"] | None = None
    """Probes of the trace estimate, or ``exact`` for the exact trace."""
    probe: str | None = None
    """Distribution of the probes."""

    @property
    def trace(self) -> str:
        """Description of the trace."""
        return "exact trace" if self.probes == "exact" else f"{self.probes} probes"


@dataclass(frozen=True)
class Measurement:
    """A quantity measured on N examples."""

    quantity: Literal["nelbo", "nll"]
    """The kind: a bound or a likelihood."""
    values: Tensor = field(repr=False)
    """The estimate of each example, ``(N,)``, nats, float64, in the order of the data."""
    stderr: float
    """Standard error of the mean of the values, nats."""
    dims: int
    """D."""
    protocol: Protocol
    """How it was measured."""
    steps: int | None = None
    """T of a bound; None for continuous time."""
    importance_samples: int | None = None
    """K, the number of importance samples; None for a plain bound."""
    as_trained: bool = False
    """Whether it is a bound in the discrete or continuous time of training."""
    fitted: bool = False
    """Whether the reverse variance, or eta, was fitted on training data."""
    null: bool = False
    """Whether it is that of p(x) in a model that takes a condition."""
    errors: Tensor | None = field(default=None, repr=False)
    """Standard error of each example's estimate, ``(N,)``, nats; None if it cannot be estimated."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Means of the terms of the bound, nats; they add up to the result."""

    @property
    def weighted(self) -> bool:
        """Whether it is an importance-weighted bound."""
        return self.quantity == "nelbo" and self.importance_samples is not None

    @property
    def nats(self) -> float:
        """The mean, nats per example."""
        return float(self.values.mean())

    @property
    def bpd(self) -> float:
        """The mean, bits/dim."""
        return float(bits_per_dim(self.nats, self.dims))

    @property
    def bpd_stderr(self) -> float:
        """Standard error of the mean, bits/dim."""
        return float(bits_per_dim(self.stderr, self.dims))

    @property
    def name(self) -> str:
        """The name in records.

        One of ``nll``, ``nelbo`` (as trained), ``nelbo_continuous``, ``nelbo_discrete`` and
        ``nelbo_iw``, with the suffix ``_calibrated`` if fitted. For p(x) of a model that takes a
        condition, ``_unconditional`` comes before the suffix.
        """
        null = "_unconditional" if self.null else ""
        if self.quantity == "nll":
            return f"nll{null}"
        kind = "_continuous" if self.steps is None else "_discrete"
        kind = "_iw" if self.weighted else "" if self.as_trained else kind
        return f"nelbo{kind}{null}{'_calibrated' if self.fitted else ''}"

    @property
    def label(self) -> str:
        """The name in tables."""
        if isinstance(self.protocol, LikelihoodProtocol):
            one = self.protocol
            how = f"ODE, {one.solver}, {one.trace}" if one.solver else "exact density"
            text = f"NLL, {how}, {one.dequantization}"
        else:
            text = f"NELBO, {f'T = {self.steps}' if self.steps else 'continuous time'}"
        given = self.protocol.condition
        text += ", unconditional" if self.null else "" if given == "none" else f", given {given}"
        text += f", K = {self.importance_samples}" if (self.importance_samples or 1) > 1 else ""
        return text + (", fitted reverse process" if self.fitted else "")

    def numbers(self) -> dict[str, float | None]:
        """Return the mean and its error in both units; the error of a single example is None."""
        error = math.isfinite(self.stderr)
        return {
            "bpd": self.bpd,
            "bpd_stderr": self.bpd_stderr if error else None,
            "nats": self.nats,
            "nats_stderr": self.stderr if error else None,
        }

    def terms_bpd(self) -> dict[str, float]:
        """Return the terms, bits/dim."""
        return {f"{name}_bpd": float(bits_per_dim(v, self.dims)) for name, v in self.terms.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the result and its protocol for JSON."""
        record = {"name": self.name, "label": self.label, **self.numbers(), "dims": self.dims}
        record |= {"steps": self.steps} if self.quantity == "nelbo" else {}
        samples = self.importance_samples
        record |= {} if samples is None else {"importance_samples": samples}
        return {**record, **self.terms_bpd(), **self.protocol.to_dict()}


def strata_error(values: Tensor) -> Tensor:
    """Return the standard error of each example's mean over K equal strata of [0, 1], ``(N,)``.

    The time of every stratum k is (k + p)/K, with one random position p for each example. The
    differences of neighboring strata contain the noise, the ends of [0, 1] the variance of p.

    Args:
        values: ``(N, K)``; the result is NaN if K = 1.
    """
    count = values.shape[1]
    if count == 1:
        return torch.full_like(values[:, 0], math.nan)
    noise = values.diff(dim=1).square().mean(1) / (2 * count)
    position = (values[:, -1] - values[:, 0]).square() / (12 * count**2)
    return (noise + position).sqrt()


def weights_error(log_weights: Tensor) -> Tensor:
    """Return the standard error of log (1/K) sum_k w_k, to first order in its variance, ``(N,)``.

    Args:
        log_weights: log w_k, ``(N, K)``; the result is NaN if K = 1.
    """
    count = log_weights.shape[1]
    if count == 1:
        return torch.full_like(log_weights[:, 0], math.nan)
    return (torch.softmax(log_weights, 1) * count).std(1) / math.sqrt(count)


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values ``(N,)``; NaN if N = 1."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def paired_difference(values: Tensor, others: Tensor, dims: int) -> tuple[float, float]:
    """Return the mean of values - others on the same examples and its standard error, bits/dim.

    Args:
        values: ``(N,)``, nats.
        others: those of another model.
        dims: D.
    """
    difference = values.double() - others.double()
    mean, error = (
        bits_per_dim(one, dims) for one in (difference.mean(), standard_error(difference))
    )
    return float(mean), float(error)


def neighbor_error(values: Tensor) -> float:
    """Return the standard error of the mean of values ``(N,)`` that are stratified in their order.

    It is computed from the differences of neighbors; NaN if N = 1.
    """
    if len(values) < 2:
        return math.nan
    return float((values.diff().square().mean() / (2 * len(values))).sqrt())
