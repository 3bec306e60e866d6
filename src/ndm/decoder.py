r"""Decoders p(x|z_0): from the first latent to the data.

.. math::
    m = z_0 / \alpha_0, \qquad
    \text{discretized, per dimension: } p(x = l_i | z_0)
    = \operatorname{softmax}_i \bigl(-(m - l_i)^2 / (2 e^{\gamma_0})\bigr), \qquad
    \text{Gaussian: } p(x|z_0) = N(m, e^{\gamma_0} I) .

A network can give the mean of either, with a learned scale s: m = network(z_0/alpha_0), and s²
instead of exp(gamma_0).

The discretized decoder gives probabilities of values on a grid. Its bound is therefore on the scale
of the original integers, whatever range the grid is stored in: nats/(D ln 2) are bits per dimension
with no further constant. The Gaussian decoder gives densities, which change with the scale of x.
Source: VDM (Kingma et al. 2021), equation 8 and appendix; NDM section 3.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ndm.device import full_precision
from ndm.errors import UserError
from ndm.parts import Conditional, check_network, masked
from ndm.random import standard_normal
from ndm.schedule import NoiseLevel
from ndm.shapes import event_size, sum_event

MOST_LOGITS = 2**26
"""The largest number of probabilities that sampling computes in one pass."""


def bin_centers(
    num_values: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> Tensor:
    """Return the centers of ``num_values`` equal bins of [-1, 1], the grid of integer data."""
    return (2 * torch.arange(num_values, dtype=dtype, device=device) + 1) / num_values - 1


def to_grid(index: Tensor, num_values: int) -> Tensor:
    """Map integers 0 ... num_values-1 to their bin centers in [-1, 1], float32."""
    return bin_centers(num_values).float()[index.long()]


def from_grid(x: Tensor, num_values: int) -> Tensor:
    """Return the nearest integer level of each value, int64: the inverse of :func:`to_grid`."""
    return (((x.double() + 1) * num_values - 1) / 2).round().clamp(0, num_values - 1).long()


class Decoder(Conditional, ABC):
    """A decoder p(x|z_0); subclasses define :meth:`log_prob` and :meth:`sample`."""

    discrete: bool
    """Whether ``log_prob`` is a probability (discrete data) rather than a density."""
    values: Tensor | None = None
    """The grid of values of discrete data, ``(L,)``, float64."""

    def check(self, x: Tensor) -> None:
        """Check that p(x|z_0) is defined for every value of ``x``.

        ``log_prob`` assumes this, so that it need not wait for a GPU.

        Raises:
            UserError: some value is not possible.
        """

    @abstractmethod
    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """Return log p(x|z_0) in nats, ``(B,)``.

        Args:
            x: the data, ``(B, *event)``.
            z: z_0, in the shape of the latents.
            level: the level at t = 0.
        """

    def mean(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Return E[x|z_0], ``(B, *event)``; it can be differentiated.

        Raises:
            UserError: the decoder does not define it.
        """
        raise UserError(f"{type(self).__name__} has no mean: define mean(z, level) for it")

    @abstractmethod
    def sample(
        self, z: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw x from p(x|z_0), ``(B, *event)``."""


class GaussianDecoder(Decoder):
    """The decoder p(x|z_0) = N(z_0/alpha_0, exp(gamma_0) I), for continuous data."""

    discrete = False

    def check(self, x: Tensor) -> None:
        """Check that every value is finite.

        Raises:
            UserError: one is not.
        """
        bad = int((~x.isfinite()).sum())
        if bad:
            raise UserError(f"x has {bad} values that are not finite; replace or remove them")

    def mean(self, z: Tensor, level: NoiseLevel) -> Tensor:
        return z / level.expand(z).alpha

    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        at = level.expand(z)
        log_scale = torch.log(at.sigma) - torch.log(at.alpha)
        standardized = (x - z / at.alpha) * torch.exp(-log_scale)
        each = -0.5 * standardized**2 - log_scale - 0.5 * math.log(2 * math.pi)
        return sum_event(masked(each, self.missing))

    def sample(
        self, z: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        at = level.expand(z)
        return z / at.alpha + at.sigma / at.alpha * standard_normal(z, generator)


class DiscretizedGaussian(Decoder):
    """A softmax over a grid of values in every dimension, for integer data of any bit depth.

    Args:
        num_values: an integer n for the centers of n equal bins of [-1, 1] (256 for 8-bit images),
            or the values of the grid, at least two, increasing. The data must lie on the grid.
    """

    discrete = True
    values: Tensor
    _rounded: Tensor

    def __init__(self, num_values: int | Sequence[float] = 256):
        super().__init__()
        if isinstance(num_values, int):
            values = bin_centers(num_values)
        else:
            values = torch.tensor(list(num_values), dtype=torch.float64)
        if len(values) < 2 or bool((values.diff() <= 0).any()) or not bool(values.isfinite().all()):
            raise UserError(
                f"num_values={num_values!r}: give an integer of at least 2, or at least two finite"
                " values in increasing order"
            )
        self.num_values = (
            num_values if isinstance(num_values, int) else [float(value) for value in num_values]
        )
        # Not a buffer: it stays in double precision on the CPU when the model is moved or cast.
        self.values = values
        self.register_buffer("_rounded", values.float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # Cast from double precision, since a cast of a cast would be rounded twice.
        rounded = self._rounded
        self._rounded = self.values.to(rounded.dtype).to(rounded.device)
        return self

    def grid(self, like: Tensor) -> Tensor:
        """Return the grid of values in the dtype and on the device of ``like``; ``(L,)``."""
        cached = self._rounded.dtype == like.dtype and self._rounded.device == like.device
        return self._rounded if cached else self.values.to(like.dtype).to(like.device)

    def index(self, x: Tensor) -> Tensor:
        """Return the index of the grid value nearest to each of ``x``, int64, in the shape of x."""
        grid = self.grid(x)
        return torch.bucketize(x.contiguous(), (grid[1:] + grid[:-1]) / 2)

    def check(self, x: Tensor) -> None:
        """Check that every value lies on the grid.

        Raises:
            UserError: one is off the grid by more than a hundredth of the gap to its neighbor.
        """
        grid = self.grid(x)
        away = (x - grid[self.index(x)]).abs()
        if not bool((away <= 0.01 * grid.diff().min()).all()):
            worst = int(away.nan_to_num(nan=math.inf).argmax())
            raise UserError(
                f"a data value {float(x.flatten()[worst]):g} is not on the decoder's grid of"
                f" {len(grid)} values from {float(grid[0]):g} to {float(grid[-1]):g}; scale the"
                " data to the grid, or give the decoder the values of the data"
            )

    def bins(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower edge and the width of the bin of each value, each in the shape of ``x``.

        A bin reaches half-way to the neighboring values; the first and the last are symmetric about
        their values.
        """
        values = self.values
        middle = (values[1:] + values[:-1]) / 2
        first, last = 2 * values[:1] - middle[:1], 2 * values[-1:] - middle[-1:]
        edges = torch.cat([first, middle, last])
        index = self.index(x)
        return edges[:-1].to(x)[index], edges.diff().to(x)[index]

    def logits(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Return the log-probabilities of every value, ``(B, *event, L)``, in nats."""
        at = level.expand(z)
        _, exponent = self._likely(z / at.alpha, at.alpha / at.sigma, len(self.values))
        return torch.log_softmax(exponent, dim=-1)

    def mean(self, z: Tensor, level: NoiseLevel) -> Tensor:
        at, reach, parts = level.expand(z), self._reach(level, wait=True), []
        for rows in self._chunks(z, reach):
            values, exponent = self._likely(
                (z / at.alpha)[rows], (at.alpha / at.sigma)[rows], reach
            )
            parts.append((torch.softmax(exponent, dim=-1) * values).sum(-1))
        return torch.cat(parts) if parts else z

    def _chunks(self, z: Tensor, reach: int) -> Iterator[slice]:
        """Yield the rows of a batch whose probabilities are computed at once.

        In one pass, 64 images of 256 x 256 would take tens of gigabytes.
        """
        each = event_size(z) * min(len(self.values), 2 * reach + 1)
        rows = max(1, MOST_LOGITS // max(1, each))
        for start in range(0, len(z), rows):
            yield slice(start, start + rows)

    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        at = level.expand(z)
        mean, scale, value = z / at.alpha, at.alpha / at.sigma, self.grid(z)[self.index(x)]
        _, exponent = self._likely(mean, scale, self._reach(level))
        # Far from the grid the exponents are large and their differences small: subtract the peak
        # first.
        peak = exponent.detach().amax(-1)
        log_total = torch.logsumexp(exponent - peak[..., None], dim=-1)
        each = -0.5 * ((mean - value) * scale) ** 2 - peak - log_total
        return sum_event(masked(each, self.missing))

    def _likely(self, mean: Tensor, scale: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Return the grid values near each mean, and their log-probabilities up to a constant.

        These are the nearest value and ``reach`` values on either side, ``(*mean, 2 reach + 1)``,
        or the whole grid ``(L,)`` if it has no more than that. The other values would take most of
        the time and memory of a training step.
        """
        grid = self.grid(mean)
        if 2 * reach + 1 < len(grid):
            nearest = torch.bucketize(mean.detach().contiguous(), (grid[1:] + grid[:-1]) / 2)
            first = (nearest - reach).clamp(0, len(grid) - 2 * reach - 1)
            grid = grid[first[..., None] + torch.arange(2 * reach + 1, device=mean.device)]
        return grid, -0.5 * ((mean[..., None] - grid) * scale[..., None]) ** 2

    def _reach(self, level: NoiseLevel, wait: bool = False) -> int:
        """Return how many values on either side of the nearest one hold all of the probability.

        "All" is up to rounding. If values are at least g apart, the m-th neighbor of the nearest
        has at most exp(-((m - 1) g alpha/sigma)²/2) of its weight. For the first value left out,
        m = reach + 1, that is at most the rounding error of a sum over all values.
        """
        # A compiler fuses all values into one pass; elsewhere this would wait for the device.
        if torch.compiler.is_compiling() or (level.alpha.device.type != "cpu" and not wait):
            return len(self.values)
        signal = (level.alpha / level.sigma).detach()
        gap = float(self.values.diff().min()) * float(signal.min()) if len(signal) else 0.0
        if not gap > 0:
            return len(self.values)
        negligible = torch.finfo(level.alpha.dtype).eps / len(self.values)
        return min(len(self.values), math.ceil(math.sqrt(-2 * math.log(negligible)) / gap))

    def sample(
        self, z: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        reach, parts = self._reach(level, wait=True), []
        for chunk in self._chunks(z, reach):
            at = level.rows(chunk).expand(z)
            values, exponent = self._likely(z[chunk] / at.alpha, at.alpha / at.sigma, reach)
            probabilities = torch.softmax(exponent, dim=-1).flatten(0, -2)
            chosen = torch.multinomial(probabilities, 1, generator=generator)
            chosen = chosen.view(*exponent.shape[:-1], 1)
            parts.append(values.expand_as(exponent).gather(-1, chosen)[..., 0])
        return torch.cat(parts).to(z.dtype) if parts else z


class NetworkDecoder(Decoder):
    """A decoder with a network, for latents in another space than the data: a VAE's decoder.

    p(x|z_0) = base(x; mean = network(z_0/alpha_0), standard deviation = s).

    Args:
        network: any ``nn.Module`` called as ``network(m)`` with ``(B, *latent)``; it returns the
            mean ``(B, *event)``.
        base: the distribution around the mean: :class:`DiscretizedGaussian` for data on a grid,
            :class:`GaussianDecoder` for continuous data.
        std: the starting value of s, one learned number for all dimensions.
    """

    arity = 1

    def __init__(self, network: nn.Module, base: Decoder, std: float = 0.3):
        super().__init__()
        check_network(network, "a decoder", "network(m)")
        if not isinstance(base, (DiscretizedGaussian, GaussianDecoder)):
            raise UserError(
                f"base is a {type(base).__name__}: give DiscretizedGaussian(num_values) for data on"
                " a grid, or GaussianDecoder()"
            )
        if not (std > 0 and math.isfinite(std)):
            raise UserError(f"std={std}: give a positive standard deviation to start from")
        self.network, self.base, self.std = network, base, std
        self.log_std = nn.Parameter(torch.tensor(math.log(std)))
        self.discrete, self.values = base.discrete, base.values

    def check(self, x: Tensor) -> None:
        self.base.check(x)

    def location(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Return the network at z_0/alpha_0, ``(B, *event)``.

        It runs in the precision of z, never under autocast, since single values depend on it.
        """
        with full_precision(z):
            return self.call(z / level.expand(z).alpha)

    def _around_mean(self, level: NoiseLevel) -> NoiseLevel:
        """Return a level with alpha = 1 and sigma = s, so that the base uses the mean as z_0."""
        one, log_std = torch.ones_like(level.t), self.log_std.to(level.t).expand_as(level.t)
        return NoiseLevel(
            t=level.t,
            gamma=2 * log_std,
            alpha=one,
            sigma=log_std.exp(),
            dalpha=0 * one,
            dsigma=0 * one,
        )

    def mean(self, z: Tensor, level: NoiseLevel) -> Tensor:
        return self.base.mean(self.location(z, level), self._around_mean(level))

    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        mean = self.location(z, level)
        if mean.shape != x.shape:
            raise UserError(
                f"the decoder's network maps {tuple(z.shape)} to {tuple(mean.shape)}; it must"
                f" return the mean of x {tuple(x.shape)}"
            )
        return self.base.log_prob(x, mean, self._around_mean(level))

    def sample(
        self, z: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        mean = self.location(z, level)
        return self.base.sample(mean, self._around_mean(level), generator)
