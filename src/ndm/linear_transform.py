r"""Linear transformations of the data: fixed ones of images, and a learned one of any data.

The fixed ones are F(x, t) = C_t x with C_0 = I:

.. math::
    q(z_t|x) = N(\alpha_t C_t x, \sigma_t^2 I)

====================  ===================================  ========================================
class                 C_t                                  model
====================  ===================================  ========================================
:class:`Blur`         diagonal in the basis of the DCT:    heat dissipation (Rissanen et al. 2023),
                      (1 - d_min) exp(-lambda_i tau(t))    blurring diffusion (Hoogeboom & Salimans
                      + d_min                              2023)
:class:`FadingMask`   diagonal over the pixels:            Soft Diffusion (Daras et al. 2023)
                      exp(-lambda_p tau(t)), or 1 - m_t
:class:`Downsample`   linear in t in stage k, from x^k     f-DM (Gu et al. 2023)
                      to upsample(downsample(x^k))
====================  ===================================  ========================================

They act on the last two axes. The first two decay along the columns of a fixed orthonormal matrix
V. Since they are computed with expm1 of the exponent, F(x, 0) is exactly x:

.. math::
    F(x, t) = x + (1 - d_{\min})\, V\, \mathrm{diag}(e^{-\lambda\tau} - 1)\, V^\top x, \qquad
    \partial_t F
    = -(1 - d_{\min})\, \tau'\, V\, \mathrm{diag}(\lambda e^{-\lambda\tau})\, V^\top x .

The learned one, :class:`AffineTransform`, has gains and offsets along fixed axes and no network:

.. math::
    F(x, t) = x
    + \sigma_t^2 \sum_{k=0}^{K-1} \cos(\pi k t)\, (V\, \mathrm{diag}(a_k)\, V^\top x + b_k) .

A gain for each dimension and time gives each dimension a noise schedule of its own (as in MuLAN,
Sahoo et al. 2024, whose schedules also depend on x).

For other axes or rates, subclass :class:`Decay`; for any other linear operator, subclass
:class:`ndm.transform.Transform`. The generative ODE is the published one, dz/dt = d(alpha C)/dt x̂
+ (sigma'/sigma)(z - alpha C x̂). The stochastic processes differ: those of the papers are Markov,
and the size of their noise depends on the axis of V, whereas the posterior variance v here is the
same along every axis.
"""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ndm.curve import Curve, Displaced, SeparableCurve, SumCurve
from ndm.device import full_precision
from ndm.errors import UserError, check_choice
from ndm.schedule import NoiseLevel
from ndm.shapes import expand
from ndm.transform import Transform


class Decay(Transform, ABC):
    """The decay F = V diag(d(t)) Vᵀ x with d = (1 - d_min) exp(-lambda tau(t)) + d_min.

    It acts on the last two axes of images ``(B, ..., H, W)``.

    Args:
        d_min: the value that every d decays to, in [0, 1).
    """

    def __init__(self, d_min: float):
        super().__init__()
        if not 0 <= d_min < 1:
            raise UserError(f"d_min={d_min}: give the value that d decays to, in [0, 1)")
        self.d_min = d_min

    @abstractmethod
    def rates(self, x: Tensor) -> Tensor:
        """Return the nonnegative rates lambda, ``(H, W)``."""

    @abstractmethod
    def clock(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return tau, increasing from 0 at t = 0, and d tau/dt, each in the shape of ``t``."""

    @abstractmethod
    def analysis(self, x: Tensor) -> Tensor:
        """Return Vᵀ x, in the shape of x."""

    @abstractmethod
    def synthesis(self, coefficients: Tensor) -> Tensor:
        """Return V c, in the shape of c."""

    def curve(self, x: Tensor) -> Curve:
        _check_image(x, type(self).__name__)
        return _DecayCurve(self, x)


class _DecayCurve(Curve):
    """The curve of a :class:`Decay`; it computes Vᵀ x once and multiplies by V at each time."""

    def __init__(self, operator: Decay, x: Tensor):
        self._operator, self._x = operator, x
        self._rates = operator.rates(x)
        self._coefficients = (1 - operator.d_min) * operator.analysis(x)

    @property
    def like(self) -> Tensor:
        return self._x

    def _exponent(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return -lambda tau and its derivative in t, each ``(B, 1, ..., H, W)``."""
        tau, dtau = self._operator.clock(expand(level.t, self._x))
        return -self._rates * tau, -self._rates * dtau

    def at(self, level: NoiseLevel) -> Tensor:
        exponent, _ = self._exponent(level)
        return self._x + self._operator.synthesis(torch.expm1(exponent) * self._coefficients)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        exponent, slope = self._exponent(level)
        value = self._x + self._operator.synthesis(torch.expm1(exponent) * self._coefficients)
        return value, self._operator.synthesis(slope * torch.exp(exponent) * self._coefficients)


class Blur(Decay):
    r"""A blur: heat spreads over the image and none leaves it.

    The cosine (i, j) decays at the rate of its frequency:

    .. math::
        \lambda_{ij} = \pi^2 (i^2/H^2 + j^2/W^2), \qquad \tau = \sigma_B(t)^2/2, \qquad
        \sigma_B = \sigma_{\max} \sin^2(\pi t/2) .

    Far from the edges, this is a convolution with a Gaussian of standard deviation sigma_B pixels.

    Args:
        sigma_max: sigma_B at t = 1, in pixels.
        d_min: the value that the factor of every frequency but 0 decays to (the mean of the image
            does not change).
    """

    def __init__(self, sigma_max: float = 20.0, d_min: float = 0.001):
        super().__init__(d_min)
        if not (sigma_max > 0 and math.isfinite(sigma_max)):
            raise UserError(
                f"sigma_max={sigma_max}: give the width of the blur at t = 1, in pixels, above 0"
            )
        self.sigma_max = sigma_max

    def rates(self, x: Tensor) -> Tensor:
        height, width = (
            math.pi * torch.arange(size, dtype=x.dtype, device=x.device) / size
            for size in x.shape[-2:]
        )
        return height[:, None] ** 2 + width**2

    def clock(self, t: Tensor) -> tuple[Tensor, Tensor]:
        width = self.sigma_max * torch.sin(0.5 * math.pi * t) ** 2
        slope = self.sigma_max * 0.5 * math.pi * torch.sin(math.pi * t)
        return 0.5 * width**2, width * slope

    def analysis(self, x: Tensor) -> Tensor:
        rows, columns = (cosines(size, x.dtype, x.device) for size in x.shape[-2:])
        return _both_sides(rows, x, columns.mT)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        dtype, device = coefficients.dtype, coefficients.device
        rows, columns = (cosines(size, dtype, device) for size in coefficients.shape[-2:])
        return _both_sides(rows.mT, coefficients, columns)


class FadingMask(Decay):
    r"""A mask that fades the image to zero from its middle outward.

    F = (1 - m_t) x with m_t = 1 - exp(-strength t² g) and a Gaussian g over the image. For small t
    the mask m_t is close to a Gaussian of height strength t²; later it saturates and its edge moves
    outward.

    Args:
        strength: lambda tau in the middle at t = 1, where a factor exp(-strength) remains.
        width: standard deviation of g, as a fraction of the height and of the width.
    """

    def __init__(self, strength: float = 20.0, width: float = 0.3):
        super().__init__(0.0)
        if not (strength > 0 and width > 0 and math.isfinite(strength)):
            raise UserError(f"strength={strength}, width={width}: both must be positive")
        self.strength, self.width = strength, width

    def rates(self, x: Tensor) -> Tensor:
        height, width = (
            (torch.arange(size, dtype=x.dtype, device=x.device) + 0.5) / size - 0.5
            for size in x.shape[-2:]
        )
        return torch.exp(-0.5 * (height[:, None] ** 2 + width**2) / self.width**2)

    def clock(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.strength * t**2, 2 * self.strength * t

    def analysis(self, x: Tensor) -> Tensor:
        return x

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return coefficients


class Downsample(Transform):
    r"""Stages that each halve the resolution, represented at full resolution.

    .. math::
        F(x, t) = x^k + \frac{t - \tau_k}{\tau_{k+1} - \tau_k} (x^{k+1} - x^k), \qquad
        \tau_k \le t \le \tau_{k+1}, \qquad
        x^{k+1} = \mathrm{upsample}(\mathrm{downsample}(x^k)), \quad \tau_0 = 0 ,

    where downsample averages blocks of 2 x 2, so that x^k holds the means of blocks of 2^k x 2^k.
    After the last stage F stays at x^K. F has kinks where stages end, and dF there is that of the
    later stage. Integrals over time, such as the trace of the ODE, need many nodes there.

    Args:
        ends: tau_1 < ... < tau_K, the times at which the stages end, in (0, 1].
    """

    def __init__(self, ends: Sequence[float] = (1 / 3, 2 / 3)):
        super().__init__()
        self.ends = [float(end) for end in ends]
        increasing = all(a < b for a, b in itertools.pairwise([0.0, *self.ends]))
        if not self.ends or not increasing or self.ends[-1] > 1:
            raise UserError(
                f"ends={self.ends}: give the times at which stages end, increasing, in (0, 1]"
            )

    def curve(self, x: Tensor) -> Curve:
        _check_image(x, "Downsample")
        size, (height, width) = 2 ** len(self.ends), x.shape[-2:]
        if height % size or width % size:
            raise UserError(
                f"Downsample with {len(self.ends)} stages averages blocks of {size} x {size}, which"
                f" do not divide images of {height} x {width}; give fewer ends, or pad the images"
            )
        return Displaced(x, _DownsampleCurve(x, self.ends))


class _DownsampleCurve(SumCurve):
    """The curve sum_k a_k(t) (x^{k+1} - x^k), where a_k grows from 0 to 1 over stage k."""

    def __init__(self, x: Tensor, ends: Sequence[float]):
        states = [x, *(block_means(x, 2**k) for k in range(1, len(ends) + 1))]
        steps = [after - before for before, after in itertools.pairwise(states)]
        super().__init__(torch.stack(steps, 1))
        self._ends = list(ends)

    def weights(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        t = level.t[:, None]
        end = torch.cat([t.new_full((1,), end) for end in self._ends])
        start = torch.cat([torch.zeros_like(end[:1]), end[:-1]])
        inside = (t >= start) & ((t < end) | (end >= 1))
        return ((t - start) / (end - start)).clamp(0, 1), inside / (end - start)


def block_means(x: Tensor, size: int) -> Tensor:
    """Replace each block of ``size`` x ``size`` pixels of ``x`` ``(B, ..., H, W)`` by its mean."""
    *lead, height, width = x.shape
    means = x.reshape(*lead, height // size, size, width // size, size).mean((-3, -1))
    return means.repeat_interleave(size, -2).repeat_interleave(size, -1)


class AffineTransform(Transform):
    """Learned gains and offsets over time, F = x + sigma_t² sum_k cos(pi k t) (V a_k Vᵀ x + b_k).

    It has 2 K D parameters and starts at the identity.

    Args:
        shape: shape of an event, such as (1, 8, 8).
        basis: V: ``dimensions`` (the identity), a gain for each dimension; or ``cosines``, a gain
            for each frequency of the orthonormal DCT over all axes. Over three channels that turns
            the colors into lightness and two contrasts.
        terms: K.
    """

    data_at_zero = False
    no_weight_decay = ("gains", "offsets")

    def __init__(
        self,
        shape: Sequence[int],
        basis: Literal["dimensions", "cosines"] = "dimensions",
        terms: int = 4,
    ):
        super().__init__()
        check_choice("basis", basis, ("dimensions", "cosines"))
        if not shape or min(shape) < 1 or terms < 1:
            raise UserError(
                f"shape={list(shape)}, terms={terms}: give the shape of an event, such as"
                " [1, 8, 8], and a number of terms of at least 1"
            )
        self.shape, self.basis, self.terms = list(shape), basis, terms
        self.gains = nn.Parameter(torch.zeros(terms, *shape))
        self.offsets = nn.Parameter(torch.zeros(terms, *shape))

    def curve(self, x: Tensor) -> Curve:
        if list(x.shape[1:]) != self.shape:
            raise UserError(
                f"x has events of shape {list(x.shape[1:])}, and AffineTransform was built with"
                f" shape={self.shape}; give the shape of the data"
            )
        with full_precision(x):  # autocast would multiply in half precision
            channels = self._synthesis(self.gains * self._analysis(x)[:, None])
            return Displaced(x, SeparableCurve("noise", channels + self.offsets))

    def _analysis(self, x: Tensor) -> Tensor:
        """Return Vᵀ x, in the shape of x."""
        for axis, matrix in self._axes(x):
            x = (x.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
        return x

    def _synthesis(self, coefficients: Tensor) -> Tensor:
        """Return V c, in the shape of c."""
        for axis, matrix in self._axes(coefficients):
            coefficients = (coefficients.movedim(axis, -1) @ matrix).movedim(-1, axis)
        return coefficients

    def _axes(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """Return the axes of an event with their cosines; none for gains by dimension."""
        axes = range(-len(self.shape), 0) if self.basis == "cosines" else ()
        return [(axis, cosines(x.shape[axis], x.dtype, x.device)) for axis in axes]


@functools.lru_cache(maxsize=32)
def cosines(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II as a matrix ``(n, n)``, which is the transpose of V.

    Row i is c_i (2/n)^½ cos(pi i (j + ½)/n), with c_0 = 2^-½ and c_i = 1 for other i.
    """
    # The cached matrix may be part of a later call that needs gradients.
    with torch.inference_mode(False), torch.no_grad():
        index = torch.arange(size, dtype=torch.float64)
        matrix = math.sqrt(2 / size) * torch.cos(math.pi / size * index[:, None] * (index + 0.5))
        matrix[0] *= math.sqrt(0.5)
        return matrix.to(dtype).to(device)  # in this order: not every device has double precision


def _both_sides(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    with full_precision(x):  # autocast would multiply in half precision
        return left @ x @ right


def _check_image(x: Tensor, name: str) -> None:
    if x.dim() < 3:
        raise UserError(
            f"{name} acts on images (B, ..., H, W), got a batch of shape {tuple(x.shape)}; use"
            " another transformation for vectors"
        )
