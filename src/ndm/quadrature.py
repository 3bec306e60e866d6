r"""Quadrature over time: the nodes at which the divergence along a trajectory is computed.

Clenshaw-Curtis quadrature with N + 1 nodes is exact for polynomials of degree N. The nodes are
spaced in a time y, the mean of t and a normalized noise level:

.. math::
    y(t) = \tfrac12 t + \tfrac12 \frac{\ell(t) - \ell(0)}{\ell(1) - \ell(0)}, \quad
    \ell = \log \frac{\sigma}{\alpha + 0.01}, \qquad
    y_j = \tfrac12 (1 - \cos(\pi j / N)), \qquad
    \int_0^1 \mathrm{tr}\, dt \approx \sum_j \frac{w_j}{y'(t_j)}\, \mathrm{tr}_j .

With nodes spaced in t, schedules whose noise rises steeply from t = 0 (cosine, flow matching) would
need hundreds of them.
"""

import copy

import numpy as np
import torch
from torch import Tensor

from ndm.forward import NoisingProcess

_ALPHA = 0.01  # keeps the noise level finite where alpha = 0


def quadrature(nodes: int) -> tuple[Tensor, Tensor]:
    """Return the Clenshaw-Curtis times in [0, 1] and their weights, each ``(N + 1,)``, float64."""
    order = np.arange(nodes + 1)
    cosines = -np.cos(np.pi * order / nodes)
    is_even = order % 2 == 0
    # Integrals of the Chebyshev polynomials T_n over [-1, 1].
    moments = np.where(is_even, 2 / (1.0 - np.where(is_even, order, 0.0) ** 2), 0.0)
    weights = np.linalg.solve(np.polynomial.chebyshev.chebvander(cosines, nodes).T, moments)
    return torch.from_numpy((cosines + 1) / 2), torch.from_numpy(weights / 2)


def trace_times(process: NoisingProcess, nodes: int) -> tuple[Tensor, Tensor]:
    """Return the times of the trace from 0 to 1 and their weights.

    Each is ``(N + 1,)``, float64 on the CPU.
    """
    schedule = copy.deepcopy(process.schedule).double().cpu()
    y, weights = quadrature(nodes)

    def noise(t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ell(t) of the module docstring and its derivative."""
        level = schedule(t)
        signal = level.alpha + _ALPHA
        slope = level.dsigma / level.sigma - level.dalpha / signal
        return torch.log(level.sigma / signal), slope

    ends, _ = noise(torch.tensor([0.0, 1.0], dtype=torch.float64))
    low, high = torch.zeros_like(y), torch.ones_like(y)
    for _ in range(60):  # bisection: y increases with t
        middle = (low + high) / 2
        below = 0.5 * middle + 0.5 * (noise(middle)[0] - ends[0]) / (ends[1] - ends[0]) < y
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    times = ((low + high) / 2).where(y > 0, 0.0).where(y < 1, 1.0)
    return times, weights / (0.5 + 0.5 * noise(times)[1] / (ends[1] - ends[0]))
