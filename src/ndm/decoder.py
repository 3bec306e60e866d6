r"""Decoders p(x|z_0): from the first latent to the data.

.. math::
    m = z_0 / \alpha_0, \qquad
    \text{discretized: } p(x = l_i | z_0) = \operatorname{softmax}_i \bigl(-(m - l_i)^2 / (2 e^{\gamma_0})\bigr) \text{ per dimension}, \qquad
    \text{Gaussian: } p(x|z_0) = N(m, e^{\gamma_0} I) .

A network in between gives the mean of either, with a learned scale s: m = network(z_0/alpha_0) and
s² in place of exp(gamma_0).

The discretized decoder gives probabilities of values on a grid, so its bound is on the scale of the
original integers whatever range the grid is stored in: nats/(D ln 2) are bits per dimension with no
further constant. The Gaussian decoder gives densities, and they change with the scale of x. Source:
VDM (Kingma et al. 2021), equation 8 and appendix; NDM section 3.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ndm.device import full_precision
from ndm.errors import UserError
from ndm.parts import Part, check_network
from ndm.random import standard_normal
from ndm.schedule import NoiseLevel
from ndm.shapes import event_size, sum_event

MOST_LOGITS = 2**26
"""Sampling looks at so many probabilities at once."""


def bin_centers(
    num_values: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> Tensor:
    """The centers of ``num_values`` equal bins of [-1, 1]: where integer data 0 ... num_values-1
    lie.
    """
    return (2 * torch.arange(num_values, dtype=dtype, device=device) + 1) / num_values - 1


def to_grid(index: Tensor, num_values: int) -> Tensor:
    """Integers 0 ... num_values-1 to their bin centers in [-1, 1], float32."""
    return bin_centers(num_values).float()[index.long()]


def from_grid(x: Tensor, num_values: int) -> Tensor:
    """Nearest integer level of each value, int64: the inverse of :func:`to_grid`."""
    return (((x.double() + 1) * num_values - 1) / 2).round().clamp(0, num_values - 1).long()


class Decoder(Part, ABC):
    """p(x|z_0), an interface of two methods."""

    discrete: bool
    """Whether ``log_prob`` is a probability (discrete data) rather than a density."""
    values: Tensor | None = None
    """The grid of values of discrete data, ``(L,)``, float64."""

    def check(self, x: Tensor) -> None:
        """Check that p(x|z_0) is defined for every value of ``x``; ``log_prob`` takes it for
        granted, and a GPU need not be waited for.

        Raises:
            UserError: it is not.
        """

    @abstractmethod
    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """log p(x|z_0), nats, ``(B,)``, for ``x`` ``(B, *event)``, ``z`` in the shape of the
        latents and the level at t = 0.
        """

    @abstractmethod
    def sample(
        self, z: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw x from p(x|z_0), ``(B, *event)``."""


class GaussianDecoder(Decoder):
    """p(x|z_0) = N(z_0/alpha_0, exp(gamma_0) I), for continuous data."""

    discrete = False

    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        at = level.expand(z)
        log_scale = torch.log(at.sigma) - torch.log(at.alpha)
        standardized = (x - z / at.alpha) * torch.exp(-log_scale)
        return sum_event(-0.5 * standardized**2 - log_scale - 0.5 * math.log(2 * math.pi))

    def sample(
        self, z: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        at = level.expand(z)
        return z / at.alpha + at.sigma / at.alpha * standard_normal(z, generator)


class DiscretizedGaussian(Decoder):
    """A softmax over a grid of values in every dimension, for integer data of any bit depth.

    Args:
        num_values: an integer n for the centers of n equal bins of [-1, 1] (256 for 8-bit images),
            or the grid of values itself, increasing, at least two. Data handed to the model must
            lie on the grid.
    """

    discrete = True
    values: Tensor
    _near: Tensor

    def __init__(self, num_values: int | Sequence[float] = 256):
        super().__init__()
        values = (
            bin_centers(num_values)
            if isinstance(num_values, int)
            else torch.tensor(list(num_values), dtype=torch.float64)
        )
        if len(values) < 2 or bool((values.diff() <= 0).any()) or not bool(values.isfinite().all()):
            raise UserError(
                f"num_values={num_values!r}: give an integer of at least 2, or at least two finite"
                " values in increasing order"
            )
        self.num_values = (
            num_values if isinstance(num_values, int) else [float(value) for value in num_values]
        )
        # Not a buffer: it stays in double precision on the CPU, whatever the model is moved to.
        self.values = values
        self.register_buffer("_near", values.float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._near = self.values.to(self._near.dtype).to(
            self._near.device
        )  # not what rounding twice makes of it
        return self

    def grid(self, like: Tensor) -> Tensor:
        """The grid of values in the dtype and on the device of ``like``; ``(L,)``."""
        at_hand = self._near.dtype == like.dtype and self._near.device == like.device
        return self._near if at_hand else self.values.to(like.dtype).to(like.device)

    def index(self, x: Tensor) -> Tensor:
        """Index on the grid of the value nearest to each of ``x``, int64, in the shape of x."""
        grid = self.grid(x)
        return torch.bucketize(x.contiguous(), (grid[1:] + grid[:-1]) / 2)

    def check(self, x: Tensor) -> None:
        """Check that every value lies on the grid.

        Raises:
            UserError: one lies off it by more than a hundredth of the gap to its neighbor.
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
        """Lower edge and width of the bin of each value of ``x``, each in the shape of x.

        A bin reaches half-way to the neighboring values; the first and the last are symmetric about
        their values.
        """
        middle = (self.values[1:] + self.values[:-1]) / 2
        edges = torch.cat(
            [2 * self.values[:1] - middle[:1], middle, 2 * self.values[-1:] - middle[-1:]]
        )
        index = self.index(x)
        return edges[:-1].to(x)[index], edges.diff().to(x)[index]

    def logits(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Log-probabilities of every level; ``(B, *event, L)``, nats."""
        at = level.expand(z)
        return torch.log_softmax(
            self._likely(z / at.alpha, at.alpha / at.sigma, len(self.values))[1], dim=-1
        )

    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        at = level.expand(z)
        place, scale, value = z / at.alpha, at.alpha / at.sigma, self.grid(z)[self.index(x)]
        _, exponent = self._likely(place, scale, self._reach(level))
        peak = exponent.detach().amax(
            -1
        )  # taken off first: far from the grid the exponents are large, and their differences small
        return sum_event(
            -0.5 * ((place - value) * scale) ** 2
            - peak
            - torch.logsumexp(exponent - peak[..., None], dim=-1)
        )

    def _likely(self, place: Tensor, scale: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """The nearest level of each place and so many on either side, and their log-probabilities
        up to a constant; each ``(*place, 2 reach + 1)``.

        Where the grid has no more, the values are ``(L,)``. The far ones would take most of the
        time and memory of a training step.
        """
        grid = self.grid(place)
        if 2 * reach + 1 < len(grid):
            nearest = torch.bucketize(place.detach().contiguous(), (grid[1:] + grid[:-1]) / 2)
            first = (nearest - reach).clamp(0, len(grid) - 2 * reach - 1)
            grid = grid[first[..., None] + torch.arange(2 * reach + 1, device=place.device)]
        return grid, -0.5 * ((place[..., None] - grid) * scale[..., None]) ** 2

    def _reach(self, level: NoiseLevel, wait: bool = False) -> int:
        """So many values on either side of the nearest one hold all of the probability, up to
        rounding.

        Where values are at least g apart, the m-th neighbor of the nearest has at most exp(-((m -
        1) g alpha/sigma)²/2) of its weight: the first to be left out, m = reach + 1, at most the
        rounding of a sum over all values.
        """
        if torch.compiler.is_compiling() or (level.alpha.device.type != "cpu" and not wait):
            return len(
                self.values
            )  # a compiler fuses all values into one pass; elsewhere, the device would have to be waited for
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
        at_once = max(
            1, MOST_LOGITS // max(1, event_size(z) * min(len(self.values), 2 * reach + 1))
        )
        for start in range(
            0, len(z), at_once
        ):  # 64 images of 256 x 256 at once would take tens of gigabytes
            at = level.rows(slice(start, start + at_once)).expand(z)
            values, exponent = self._likely(
                z[start : start + at_once] / at.alpha, at.alpha / at.sigma, reach
            )
            probabilities = torch.softmax(exponent, dim=-1)
            chosen = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
            parts.append(
                values.expand_as(exponent).gather(-1, chosen.view(*exponent.shape[:-1], 1))[..., 0]
            )
        return torch.cat(parts).to(z.dtype) if parts else z


class NetworkDecoder(Decoder):
    """p(x|z_0) = base(x; mean = network(z_0/alpha_0), standard deviation = s), for latents in a
    space of their own: a VAE's decoder.

    Args:
        network: any ``nn.Module`` called as ``network(m)`` with ``(B, *latent)``; it returns the
            mean ``(B, *event)``.
        base: what stands around the mean: :class:`DiscretizedGaussian` for data on a grid,
            :class:`GaussianDecoder` for continuous data.
        std: where s starts; one number for all dimensions, learned.
    """

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

    def mean(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """The network at z_0/alpha_0, ``(B, *event)``; in the precision of z, never under autocast,
        since it decides on single values.
        """
        with full_precision(z):
            return self.network(z / level.expand(z).alpha)

    def _around(self, level: NoiseLevel) -> NoiseLevel:
        """alpha = 1 and sigma = s: the base decoder then takes the mean itself for z_0/alpha_0."""
        one, log_std = torch.ones_like(level.t), self.log_std.to(level.t).expand_as(level.t)
        return NoiseLevel(
            t=level.t,
            gamma=2 * log_std,
            alpha=one,
            sigma=log_std.exp(),
            dalpha=0 * one,
            dsigma=0 * one,
        )

    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        mean = self.mean(z, level)
        if mean.shape != x.shape:
            raise UserError(
                f"the decoder's network maps {tuple(z.shape)} to {tuple(mean.shape)}; it must"
                f" return the mean of x {tuple(x.shape)}"
            )
        return self.base.log_prob(x, mean, self._around(level))

    def sample(
        self, z: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        mean = self.mean(z, level)
        return self.base.sample(mean, self._around(level), generator)
