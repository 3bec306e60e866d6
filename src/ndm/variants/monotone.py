r"""Monotone maps T from the prior to the data, gradients of strictly convex functions, and the
straight lines that lead along them.

.. math::
    z(r) = (1 - r)\, T(\zeta) + r\, \zeta, \qquad J = (1 - r)\, \nabla T(\zeta) + r I, \qquad
    \log p_r(z) = \log N(\zeta; 0, I) - \log\det J, \qquad \nabla_z \log p_r = J^{-1}\, \nabla_\zeta \bigl[\log N(\zeta; 0, I) - \log\det J\bigr] .

J is symmetric and positive definite, so no two lines meet before r = 0, and the line through a
point is found by Newton's method. Such a T is the optimal map between the prior and what it makes
of it (Brenier 1991; McCann 1997). :mod:`ndm.variants.transport` is the model that generates along
these lines.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ndm.device import full_precision
from ndm.errors import UserError, check_whole
from ndm.forward import Gaussian
from ndm.parts import Part

_NEWTON_STEPS = 200


@dataclass(frozen=True)
class Interpolant:
    """Where latents z lie on the straight lines, and the density there."""

    origin: Tensor
    """ζ, the end of the line in the prior, r = 1; ``(B, D)``."""
    target: Tensor
    """T(ζ), its other end, r = 0; ``(B, D)``."""
    log_p: Tensor
    """Log-density of z, nats, ``(B,)``."""
    score: Tensor
    """Gradient of the log-density in z, ``(B, D)``."""

    @property
    def velocity(self) -> Tensor:
        """dz/dr = ζ - T(ζ), the same along the whole line; ``(B, D)``."""
        return self.origin - self.target


class TransportMap(Part, ABC):
    """T, the gradient of a strictly convex function, from the prior at r = 1 to r = 0."""

    @abstractmethod
    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        """T(ζ) ``(B, D)`` and its Jacobian ``(B, D, D)``, symmetric and positive definite, for ζ
        ``(B, D)``.
        """

    def forward(self, zeta: Tensor) -> Tensor:
        """T(ζ), ``(B, D)``."""
        return self.with_jacobian(zeta)[0]

    def interpolate(self, zeta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """z(r) = (1 - r) T(ζ) + r ζ ``(B, D)`` and its Jacobian ``(B, D, D)``, for ``r`` ``(B,)``
        in [0, 1].
        """
        value, jacobian = self.with_jacobian(zeta)
        unit = torch.eye(zeta.shape[1], dtype=zeta.dtype, device=zeta.device)
        rate, square = r[:, None], r[:, None, None]
        return (1 - rate) * value + rate * zeta, (1 - square) * jacobian + square * unit

    @torch.no_grad()
    def origin(self, z: Tensor, r: Tensor) -> Tensor:
        """The ζ whose line passes through z at r, ``(B, D)``: Newton's method, each step halved
        until the residual shrinks.

        The map is the gradient of a strictly convex function, so its Jacobian is nowhere singular
        and the residual always shrinks.

        Raises:
            ArithmeticError: it does not converge.
        """
        zeta = z.clone()
        value, jacobian = self.interpolate(zeta, r)
        residual = z - value
        step, length = torch.linalg.solve(jacobian, residual), torch.ones_like(z[:, :1])
        # What rounding leaves: a residual, or a step, of a few units in the last place.
        near = 8 * torch.finfo(z.dtype).eps * (1 + z.norm(dim=1, keepdim=True))
        for _ in range(_NEWTON_STEPS):
            open_ = (residual.norm(dim=1, keepdim=True) > near) & (
                (length * step).norm(dim=1, keepdim=True) > near
            )
            if not bool(open_.any()):
                return zeta
            candidate = zeta + length * step
            value, jacobian = self.interpolate(candidate, r)
            shrunk = z - value
            better = open_ & (shrunk.norm(dim=1, keepdim=True) < residual.norm(dim=1, keepdim=True))
            zeta, residual = (
                torch.where(better, candidate, zeta),
                torch.where(better, shrunk, residual),
            )
            step = torch.where(better, torch.linalg.solve(jacobian, shrunk), step)
            length = torch.where(
                better, torch.ones_like(length), torch.where(open_, length / 2, length)
            )
        raise ArithmeticError(
            f"the transport map could not be inverted at {int(open_.sum())} point(s): it is too"
            " steep, or z is too far away"
        )

    def origin_with_gradient(self, z: Tensor, r: Tensor) -> Tensor:
        """:meth:`origin`, differentiable, once, in z, r and the parameters."""
        start = self.origin(z, r)
        value, jacobian = self.interpolate(start, r)
        # One more step of Newton's, whose gradient is that of the inverse function: dζ = J^-1 (dz -
        # dz(r)|ζ).
        return start + torch.linalg.solve(jacobian.detach(), z - value)

    def interpolant(self, z: Tensor, r: Tensor) -> Interpolant:
        """Both ends of the lines through z ``(B, D)`` at ``r`` ``(B,)``, and the density there;
        differentiable, once, in z, r and the parameters.
        """
        learning = torch.is_grad_enabled()
        with torch.enable_grad(), full_precision(z):
            zeta = self.origin_with_gradient(z, r)
            zeta = zeta if zeta.requires_grad else zeta.requires_grad_()
            target, slope = self.with_jacobian(zeta)
            unit = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            square = r[:, None, None]
            factor = torch.linalg.cholesky((1 - square) * slope + square * unit)
            normal = Gaussian(torch.zeros_like(zeta), torch.ones_like(zeta)).log_prob(zeta)
            log_p = normal - 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
            (pulled,) = torch.autograd.grad(log_p.sum(), zeta, create_graph=learning)
            score = torch.cholesky_solve(pulled[..., None], factor)[..., 0]
        found = (zeta, target, log_p, score)
        return Interpolant(*(found if learning else (part.detach() for part in found)))


class MonotoneMap(TransportMap):
    r"""A strictly increasing map of the line, T(ζ) = b + w ζ + sum_j a_j tanh(k_j (ζ - c_j)) with
    w, a_j, k_j > 0.

    Such sums are dense in the increasing functions. It starts near ``scale`` times ζ.

    Args:
        units: number of tanh's.
        scale: standard deviation of the data, about.
    """

    def __init__(self, units: int = 24, scale: float = 1.0):
        super().__init__()
        check_whole("units", units, 1)
        _check_scale(scale)
        self.units, self.scale = units, scale
        self.shift, self.log_slope = (
            nn.Parameter(torch.zeros(())),
            nn.Parameter(torch.tensor(math.log(0.2 * scale))),
        )
        self.log_height = nn.Parameter(torch.full((units,), math.log(2 * scale / units)))
        self.log_steepness = nn.Parameter(torch.full((units,), math.log(3.0)))
        self.center = nn.Parameter(torch.linspace(-2.5, 2.5, units))

    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        if zeta.shape[1] != 1:
            raise UserError(
                f"a MonotoneMap is for events of one number, got {zeta.shape[1]}: take a ConvexMap"
            )
        slope, height, steepness = (
            self.log_slope.exp(),
            self.log_height.exp(),
            self.log_steepness.exp(),
        )
        bent = torch.tanh(steepness * (zeta - self.center))
        value = self.shift + slope * zeta + (height * bent).sum(1, keepdim=True)
        return value, (slope + (height * steepness * (1 - bent**2)).sum(1, keepdim=True))[..., None]


class ConvexMap(TransportMap):
    r"""The gradient of a convex function of D numbers, a quadratic and logarithms of sums of
    exponentials:

    .. math::
        T = \nabla \phi, \qquad
        \phi(\zeta) = b \cdot \zeta + \tfrac{w}{2} \|\zeta\|^2 + \sum_h \frac{a_h}{k_h} \log \sum_j e^{k_h d_{hj} \cdot \zeta + q_{hj}}, \qquad
        T(\zeta) = b + w\, \zeta + \sum_h a_h \sum_j \pi_{hj} d_{hj}, \qquad
        \nabla T = w I + \sum_h a_h k_h \mathrm{Cov}_{\pi_h}(d_h),

    with w, a_h, k_h > 0 and weights :math:`\pi_h = \mathrm{softmax}_j`. Such functions are dense in
    the convex ones already with a single h. Two directions alone are a tanh along their difference,
    so the maps of :class:`MonotoneMap` are among them. It starts near ``scale`` times ζ, off it at
    random.

    Args:
        dims: D.
        units: number of sums h.
        terms: directions j of each.
        scale: standard deviation of the data, about.
    """

    def __init__(self, dims: int = 2, units: int = 24, terms: int = 4, scale: float = 1.0):
        super().__init__()
        check_whole("dims", dims, 1)
        check_whole("units", units, 1)
        check_whole("terms", terms, 2)
        _check_scale(scale)
        self.dims, self.units, self.terms, self.scale = dims, units, terms, scale
        self.shift, self.log_slope = (
            nn.Parameter(torch.zeros(dims)),
            nn.Parameter(torch.tensor(math.log(0.2 * scale))),
        )
        self.log_height = nn.Parameter(torch.full((units,), math.log(2 * scale / units)))
        self.log_steepness = nn.Parameter(torch.full((units,), math.log(2.0)))
        direction, center = torch.randn(terms, units, dims), 1.5 * torch.randn(units, dims)
        self.direction = nn.Parameter(direction - direction.mean(0))
        self.offset = nn.Parameter(
            -2.0 * (self.direction.detach() * center).sum(-1)
        )  # all terms of a sum alike at its center

    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        batch, dims = zeta.shape
        if dims != self.dims:
            raise UserError(
                f"this ConvexMap is for events of {self.dims} numbers, got {dims}: set its dims"
            )
        with full_precision(zeta):  # products of matrices would run in half precision
            slope, height, steepness = (
                self.log_slope.exp(),
                self.log_height.exp(),
                self.log_steepness.exp(),
            )
            logits = zeta @ (steepness[:, None] * self.direction).reshape(
                -1, dims
            ).T + self.offset.reshape(-1)
            weights = torch.softmax(
                logits.reshape(batch, self.terms, self.units), dim=1
            )  # terms before units: over a short last axis it is slow
            value = (
                self.shift
                + slope * zeta
                + weights.flatten(1) @ (height[:, None] * self.direction).reshape(-1, dims)
            )
            # Covariances as the mean of squares less the square of means: what rounding leaves of
            # them is lost beside w I.
            bend = (height * steepness)[:, None]
            squares = (
                bend[..., None] * self.direction[..., None] * self.direction[..., None, :]
            ).reshape(-1, dims * dims)
            means = torch.einsum("bjh,jhd->bhd", weights, self.direction)
            bent = (weights.flatten(1) @ squares).reshape(batch, dims, dims) - (
                bend * means
            ).mT @ means
            return value, bent + slope * torch.eye(dims, dtype=zeta.dtype, device=zeta.device)


def _check_scale(scale: float) -> None:
    if not (scale > 0 and math.isfinite(scale)):
        raise UserError(
            f"scale={scale}: give a positive number, about the standard deviation of the data"
        )
