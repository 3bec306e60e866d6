r"""Time samplers for the Monte Carlo estimate of the bound.

.. math::
    \int_0^1 l(u)\,du = E_{u \sim p}\bigl[l(u) / p(u)\bigr] .

Every sampler returns u in [0, 1) and the weight 1/p(u), so the estimate is unbiased for any p.
Discrete time uses the same u, with i = floor(uT) + 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ndm.errors import UserError
from ndm.parts import Part
from ndm.shapes import expand
from ndm.time_grid import TimeGrid


@dataclass(frozen=True)
class TimeSamples:
    """Times u in [0, 1) and weights 1/p(u), each ``(B,)``."""

    u: Tensor
    weight: Tensor


class PiecewiseConstant:
    """A function of time that is constant on each of n parts of [0, 1].

    For example an eta or a reverse variance, fitted in each part.

    Args:
        values: the n values from t = 0 to t = 1, ``(n,)``, or ``(n, *event)`` for a value of each
            dimension.
        grid: the ends of the parts; by default the parts are equal.

    Raises:
        UserError: values is empty, not positive and finite, or does not fit the grid.
    """

    def __init__(self, values: Tensor, grid: TimeGrid | None = None):
        if not (values.dim() and values.numel()) or not (
            values.requires_grad or bool((values.isfinite() & (values > 0)).all())
        ):
            raise UserError("values: give positive, finite values, at least one")
        if grid is not None and grid.steps != len(values):
            raise UserError(
                f"values: give one for each of the {grid.steps} parts, not {len(values)}"
            )
        self.values, self.grid = values, grid

    def __call__(self, t: Tensor) -> Tensor:
        """Return the values at times ``t`` ``(B,)`` in [0, 1], with the dtype and device of t.

        The result is ``(B,)``, or ``(B, *event)`` with a value of each dimension.
        """
        if self.grid is None or self.grid.times is None:
            part = (t * len(self.values)).long()
        else:
            ends = self.grid.times.to(t.dtype).to(t.device)
            part = torch.bucketize(t, ends, right=True) - 1
        part = part.clamp(0, len(self.values) - 1)
        return self.values.to(t)[part]

    def broadcast(self, t: Tensor, like: Tensor) -> Tensor:
        """Return the values at times ``t`` ``(B,)`` in a shape that broadcasts against ``like``."""
        values = self(t)
        return expand(values, like) if values.dim() == 1 else values


Eta = float | PiecewiseConstant
"""Stochasticity of the reverse process: a number or a function of time."""


def eta_at(eta: Eta, t: Tensor, like: Tensor) -> float | Tensor:
    """Return eta at times ``t`` ``(B,)``, in a shape that broadcasts against ``like``."""
    return eta.broadcast(t, like).to(like.dtype) if isinstance(eta, PiecewiseConstant) else eta


def check_eta(eta: Eta) -> None:
    """Check the eta of a bound.

    Raises:
        UserError: it is not positive.
    """
    if not isinstance(eta, PiecewiseConstant) and not eta > 0:
        raise UserError(
            f"eta={eta}: the bound is infinite for a deterministic reverse process; use eta > 0,"
            " eta=1 for DDPM"
        )


def as_double(u: Tensor) -> Tensor:
    """Return ``u`` in double precision, which Apple's GPUs do not have."""
    return u if u.device.type == "mps" else u.double()


@dataclass(frozen=True)
class Draw:
    """The time and the noise drawn for each example."""

    u: Tensor
    """Uniform numbers in [0, 1), ``(B,)``.

    In continuous time u is the time t, in discrete time it selects the step floor(uT) + 1.
    """
    noise: Tensor
    """Standard normal, in the shape of F(x, t)."""
    coin: Tensor | None = None
    """A uniform number ``(1,)`` for a direct reverse process with two heads.

    See :meth:`ndm.reverse.MarkovReverse.training_guess`.
    """


class TimeSampler(Part, ABC):
    """Base class of samplers that draw times and their importance weights."""

    @abstractmethod
    def forward(
        self, count: int, like: Tensor, generator: torch.Generator | None = None
    ) -> TimeSamples:
        """Draw ``count`` times with the dtype and device of ``like``."""

    def update(self, draw: TimeSamples, loss: Tensor) -> None:
        """Update the density from the unweighted losses l(u) ``(B,)`` of a draw.

        The base class does nothing.
        """
        del draw, loss


class UniformTimeSampler(TimeSampler):
    """Independent uniform times."""

    def forward(
        self, count: int, like: Tensor, generator: torch.Generator | None = None
    ) -> TimeSamples:
        u = torch.rand(count, generator=generator, dtype=like.dtype, device=like.device)
        return TimeSamples(u, torch.ones_like(u))


class LowDiscrepancyTimeSampler(TimeSampler):
    """Equally spaced times modulo 1 with one random offset, in random order (VDM, appendix I.1).

    Each time is uniform, so the estimate is unbiased. The times of a batch fill [0, 1] evenly, so
    its variance is lower. They make the examples of a batch dependent: for a standard error over
    examples, draw times per example.
    """

    def forward(
        self, count: int, like: Tensor, generator: torch.Generator | None = None
    ) -> TimeSamples:
        offset = torch.rand((), generator=generator, dtype=like.dtype, device=like.device)
        order = torch.randperm(count, generator=generator, device=like.device)
        u = (offset + order.to(like.dtype)) / max(count, 1)
        u = u.clamp(max=1 - torch.finfo(like.dtype).eps)
        return TimeSamples(u, torch.ones_like(u))


class ImportanceTimeSampler(TimeSampler):
    r"""Loss-aware times: more of them in bins of [0, 1] where recent losses are large.

    .. math::
        p(u) = (1 - \epsilon)\, \frac{r_{b(u)}}{\tfrac1n \sum_j r_j} + \epsilon, \qquad
        r_b^2 = \text{moving average of } l(u)^2 \text{ in bin } b

    The root mean square gives the density of least variance (Nichol & Dhariwal 2021, section 3.3;
    here in continuous time). The density is uniform until every bin has been visited.

    Args:
        bins: number n of equal bins of [0, 1].
        uniform: share epsilon of uniform times, in (0, 1]; bounds every weight by 1/epsilon.
        decay: decay rate of the moving average, in [0, 1).
    """

    square: Tensor
    seen: Tensor

    def __init__(self, bins: int = 64, uniform: float = 0.1, decay: float = 0.95):
        super().__init__()
        if not (bins >= 1 and 0 < uniform <= 1 and 0 <= decay < 1):
            raise UserError(
                f"bins={bins}, uniform={uniform}, decay={decay}: need bins >= 1, 0 < uniform <= 1"
                " and 0 <= decay < 1"
            )
        self.bins, self.uniform, self.decay = bins, uniform, decay
        self.register_buffer("square", torch.zeros(bins))
        self.register_buffer("seen", torch.zeros(bins))

    def density(self) -> Tensor:
        """Return the density p in each bin, ``(bins,)``; its mean is 1."""
        ready = (self.seen > 0).all() & (self.square.sum() > 0)
        root = (self.square / (1 - self.decay ** self.seen.clamp(min=1))).sqrt()
        density = (1 - self.uniform) * root / torch.where(ready, root.mean(), 1) + self.uniform
        return torch.where(ready, density, 1.0)

    def forward(
        self, count: int, like: Tensor, generator: torch.Generator | None = None
    ) -> TimeSamples:
        density = self.density().to(device=like.device, dtype=like.dtype)
        even = LowDiscrepancyTimeSampler()(count, like, generator).u
        edges = torch.cat([density.new_zeros(1), density.cumsum(0) / density.sum()])
        index = (torch.bucketize(even, edges, right=True) - 1).clamp(0, self.bins - 1)
        within = ((even - edges[index]) / (edges[index + 1] - edges[index])).clamp(0, 1)
        u = ((index + within) / self.bins).clamp(max=1 - torch.finfo(like.dtype).eps)
        return TimeSamples(u, 1 / density[self._bin(u)])

    def _bin(self, u: Tensor) -> Tensor:
        return (u * self.bins).long().clamp(0, self.bins - 1)

    @torch.no_grad()
    def update(self, draw: TimeSamples, loss: Tensor) -> None:
        index = self._bin(draw.u)
        zeros = self.square.new_zeros(self.bins)
        square = loss.detach().to(self.square.dtype) ** 2
        total = zeros.index_add(0, index, square)
        count = zeros.index_add(0, index, torch.ones_like(square))
        mean = total / count.clamp(min=1)
        # Skip a batch that overflows: an infinite average would never recover.
        visited = (count > 0) & mean.isfinite().all()
        average = self.decay * self.square + (1 - self.decay) * mean
        self.square.copy_(torch.where(visited, average, self.square))
        self.seen.add_(visited.to(self.seen.dtype))
