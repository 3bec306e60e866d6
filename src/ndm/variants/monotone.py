r"""Monotone maps T from the prior to the data, and the straight lines along which they move it.

T is the gradient of a strictly convex function:

.. math::
    z(r) = (1 - r)\, T(\zeta) + r\, \zeta, \qquad J = (1 - r)\, \nabla T(\zeta) + r I, \qquad
    \log p_r(z) = \log N(\zeta; 0, I) - \log\det J, \qquad
    \nabla_z \log p_r = J^{-1}\, \nabla_\zeta \bigl[\log N(\zeta; 0, I) - \log\det J\bigr] .

J is symmetric and positive definite, so no two lines meet before r = 0, and Newton's method finds
the line through a point. Such a T is the optimal map from the prior to its image (Brenier 1991;
McCann 1997). The model that generates along these lines is in :mod:`ndm.variants.transport`.
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
    """The lines through latents z, and the density of z."""

    origin: Tensor
    """ζ, the end of the line in the prior, at r = 1; ``(B, D)``."""
    target: Tensor
    """T(ζ), the other end, at r = 0; ``(B, D)``."""
    log_p: Tensor
    """Log-density of z in nats, ``(B,)``."""
    score: Tensor
    """Gradient of the log-density in z, ``(B, D)``."""

    @property
    def velocity(self) -> Tensor:
        """dz/dr = ζ - T(ζ), constant along the line; ``(B, D)``."""
        return self.origin - self.target


class TransportMap(Part, ABC):
    """A map T from the prior at r = 1 to r = 0, the gradient of a strictly convex function."""

    @abstractmethod
    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        """Return T(ζ) ``(B, D)`` and its Jacobian ``(B, D, D)`` for ζ ``(B, D)``.

        The Jacobian is symmetric and positive definite.
        """

    def forward(self, zeta: Tensor) -> Tensor:
        """Return T(ζ), ``(B, D)``."""
        return self.with_jacobian(zeta)[0]

    def interpolate(self, zeta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return z(r) = (1 - r) T(ζ) + r ζ ``(B, D)`` and its Jacobian ``(B, D, D)``.

        ``r`` is ``(B,)``, in [0, 1].
        """
        value, jacobian = self.with_jacobian(zeta)
        unit = torch.eye(zeta.shape[1], dtype=zeta.dtype, device=zeta.device)
        rate, square = r[:, None], r[:, None, None]
        return (1 - rate) * value + rate * zeta, (1 - square) * jacobian + square * unit

    @torch.no_grad()
    def origin(self, z: Tensor, r: Tensor) -> Tensor:
        """Return the ζ whose line passes through z at r, ``(B, D)``.

        This is Newton's method with each step halved until the residual shrinks. The map is the
        gradient of a strictly convex function, so the Jacobian is never singular and the residual
        always shrinks.

        Raises:
            ArithmeticError: it does not converge.
        """
        zeta = z.clone()
        value, jacobian = self.interpolate(zeta, r)
        residual = z - value
        step, length = torch.linalg.solve(jacobian, residual), torch.ones_like(z[:, :1])
        # Rounding leaves a residual, or a step, of a few units in the last place.
        near = 8 * torch.finfo(z.dtype).eps * (1 + z.norm(dim=1, keepdim=True))
        for _ in range(_NEWTON_STEPS):
            distance = residual.norm(dim=1, keepdim=True)
            moving = (length * step).norm(dim=1, keepdim=True) > near
            unsolved = (distance > near) & moving
            if not bool(unsolved.any()):
                return zeta
            candidate = zeta + length * step
            value, jacobian = self.interpolate(candidate, r)
            new_residual = z - value
            better = unsolved & (new_residual.norm(dim=1, keepdim=True) < distance)
            zeta = torch.where(better, candidate, zeta)
            residual = torch.where(better, new_residual, residual)
            step = torch.where(better, torch.linalg.solve(jacobian, new_residual), step)
            shorter = torch.where(unsolved, length / 2, length)
            length = torch.where(better, torch.ones_like(length), shorter)
        raise ArithmeticError(
            f"the transport map could not be inverted at {int(unsolved.sum())} point(s): it is too"
            " steep, or z is too far away"
        )

    def origin_with_gradient(self, z: Tensor, r: Tensor) -> Tensor:
        """Return :meth:`origin`, differentiable once in z, r and the parameters."""
        start = self.origin(z, r)
        value, jacobian = self.interpolate(start, r)
        # One more Newton step has the gradient of the inverse function: dζ = J^-1 (dz - dz(r)|ζ).
        return start + torch.linalg.solve(jacobian.detach(), z - value)

    def interpolant(self, z: Tensor, r: Tensor) -> Interpolant:
        """Return the ends of the lines through z ``(B, D)`` at ``r`` ``(B,)``, and z's density.

        The result is differentiable once in z, r and the parameters.
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
    r"""A strictly increasing map of the line.

    T(ζ) = b + w ζ + sum_j a_j tanh(k_j (ζ - c_j)) with w, a_j, k_j > 0. Such sums are dense in the
    increasing functions. It starts near ``scale`` times ζ.

    Args:
        units: number of tanh terms.
        scale: approximate standard deviation of the data.
    """

    def __init__(self, units: int = 24, scale: float = 1.0):
        super().__init__()
        check_whole("units", units, 1)
        _check_scale(scale)
        self.units, self.scale = units, scale
        self.shift = nn.Parameter(torch.zeros(()))
        self.log_slope = nn.Parameter(torch.tensor(math.log(0.2 * scale)))
        self.log_height = nn.Parameter(torch.full((units,), math.log(2 * scale / units)))
        self.log_steepness = nn.Parameter(torch.full((units,), math.log(3.0)))
        self.center = nn.Parameter(torch.linspace(-2.5, 2.5, units))

    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        if zeta.shape[1] != 1:
            raise UserError(
                f"a MonotoneMap is for events of one number, got {zeta.shape[1]}: use a ConvexMap"
            )
        slope, height = self.log_slope.exp(), self.log_height.exp()
        steepness = self.log_steepness.exp()
        bent = torch.tanh(steepness * (zeta - self.center))
        value = self.shift + slope * zeta + (height * bent).sum(1, keepdim=True)
        return value, (slope + (height * steepness * (1 - bent**2)).sum(1, keepdim=True))[..., None]


class ConvexMap(TransportMap):
    r"""The gradient of a convex function of D numbers.

    The function is a quadratic plus logarithms of sums of exponentials:

    .. math::
        T = \nabla \phi, \qquad
        \phi(\zeta) = b \cdot \zeta + \tfrac{w}{2} \|\zeta\|^2
        + \sum_h \frac{a_h}{k_h} \log \sum_j e^{k_h d_{hj} \cdot \zeta + q_{hj}}, \qquad
        T(\zeta) = b + w\, \zeta + \sum_h a_h \sum_j \pi_{hj} d_{hj}, \qquad
        \nabla T = w I + \sum_h a_h k_h \mathrm{Cov}_{\pi_h}(d_h),

    with w, a_h, k_h > 0 and weights :math:`\pi_h = \mathrm{softmax}_j`. Such functions are dense in
    the convex ones even with a single h. Two directions give a tanh along their difference, so
    :class:`MonotoneMap` is a special case. It starts near ``scale`` times ζ, with a random offset.

    Args:
        dims: D.
        units: number of sums h.
        terms: number of directions j in each sum.
        scale: approximate standard deviation of the data.
    """

    def __init__(self, dims: int = 2, units: int = 24, terms: int = 4, scale: float = 1.0):
        super().__init__()
        check_whole("dims", dims, 1)
        check_whole("units", units, 1)
        check_whole("terms", terms, 2)
        _check_scale(scale)
        self.dims, self.units, self.terms, self.scale = dims, units, terms, scale
        self.shift = nn.Parameter(torch.zeros(dims))
        self.log_slope = nn.Parameter(torch.tensor(math.log(0.2 * scale)))
        self.log_height = nn.Parameter(torch.full((units,), math.log(2 * scale / units)))
        self.log_steepness = nn.Parameter(torch.full((units,), math.log(2.0)))
        direction, center = torch.randn(terms, units, dims), 1.5 * torch.randn(units, dims)
        self.direction = nn.Parameter(direction - direction.mean(0))
        # At its center, all terms of a sum are equal.
        self.offset = nn.Parameter(-2.0 * (self.direction.detach() * center).sum(-1))

    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        batch, dims = zeta.shape
        if dims != self.dims:
            raise UserError(
                f"this ConvexMap is for events of {self.dims} numbers, got {dims}: set its dims"
            )
        with full_precision(zeta):  # autocast would multiply in half precision
            slope, height = self.log_slope.exp(), self.log_height.exp()
            steepness = self.log_steepness.exp()
            slanted = (steepness[:, None] * self.direction).reshape(-1, dims)
            logits = zeta @ slanted.T + self.offset.reshape(-1)
            # Terms come before units, since a softmax over a short last axis is slow.
            weights = torch.softmax(logits.reshape(batch, self.terms, self.units), dim=1)
            flat = weights.flatten(1)
            raised = (height[:, None] * self.direction).reshape(-1, dims)
            value = self.shift + slope * zeta + flat @ raised
            # The covariance is the mean of squares minus the square of means; the rounding error is
            # negligible next to w I.
            bend = (height * steepness)[:, None]
            weighted = bend[..., None] * self.direction[..., None]
            squares = (weighted * self.direction[..., None, :]).reshape(-1, dims * dims)
            means = torch.einsum("bjh,jhd->bhd", weights, self.direction)
            covariance = (flat @ squares).reshape(batch, dims, dims) - (bend * means).mT @ means
            unit = torch.eye(dims, dtype=zeta.dtype, device=zeta.device)
            return value, covariance + slope * unit


def _check_scale(scale: float) -> None:
    if not (scale > 0 and math.isfinite(scale)):
        raise UserError(
            f"scale={scale}: give a positive number, about the standard deviation of the data"
        )
