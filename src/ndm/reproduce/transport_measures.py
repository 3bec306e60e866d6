r"""Measures of a learned optimal transport in one dimension, by quadrature.

Let Q be the quantile function of the data and Phi the distribution function of the prior, so that
Q(Phi(z)) is the optimal map. With T the learned map,

.. math::
    \text{cost} = \frac{E |z_1 - T(z_1)|^2}{E |z_1 - Q(\Phi(z_1))|^2}, \qquad
    W_2^2 = \int_0^1 |Q_{\text{model}} - Q|^2 dp, \qquad
    \text{bend} = \frac{E_{t, z_1} |z_t - (1-t) z_0 - t z_1|}{\sqrt{E |z_1 - z_0|^2}} .

Trajectories are solutions of the generative ODE from z_1. On a line they keep their order, so the
endpoints of a diffusion also follow the optimal map; only the paths differ. The bend is zero for
motion of constant velocity, which one step solves exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm.data import Mixture
from ndm.elbo import diffusion_integrand, prior_term, reconstruction_term
from ndm.model import DiffusionModel
from ndm.quadrature import trace_times
from ndm.random import part_seed
from ndm.sample import Ancestral, Euler, GridSampler
from ndm.time_sampling import Draw
from ndm.variants.transport import TransportNDM

MEANS, STD, WEIGHTS = (-1.5, 1.5), 0.5, (0.4, 0.6)
DATA = Mixture([[mean] for mean in MEANS], STD, WEIGHTS)
GRID, FINE_STEPS, FRESH = 10_000, 64, 2048
FEW_STEPS = (1, 2, 4, 8, 16, 32)


def quantiles(
    p: Tensor, means: Sequence[float] = MEANS, weights: Sequence[float] = WEIGHTS
) -> Tensor:
    """Return the quantiles Q(p) of a mixture, by default of the data, in float64.

    They are interpolated in the distribution function and accurate to seven digits.
    """
    x = torch.linspace(min(means) - 9 * STD, max(means) + 9 * STD, 400_001, dtype=torch.float64)
    components = torch.special.ndtr((x[:, None] - torch.tensor(means, dtype=x.dtype)) / STD)
    below = components @ torch.tensor(weights, dtype=x.dtype)
    return torch.from_numpy(np.interp(p.numpy(), below.numpy(), x.numpy()))


def prior_grid(count: int) -> tuple[Tensor, Tensor]:
    """Return increasing points z_1 of equal prior mass and their images under the optimal map.

    Both are ``(count, 1)``.
    """
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(p)[:, None], quantiles(p)[:, None]


@torch.no_grad()
def trajectories(model: DiffusionModel, z: Tensor, steps: int) -> Tensor:
    """Solve the generative ODE from z_1 by Heun's method.

    Time is that of a diffusion's schedule; for transport it is the remaining fraction of the line.

    Returns:
        ``(steps + 1, B, D)`` at even times from t = 0 to t = 1, in the units of the data.
    """
    field = velocity(model)
    path, span = [z], 1 / steps
    for index in range(steps, 0, -1):
        first = field(path[-1], index * span)
        second = field(path[-1] - span * first, (index - 1) * span)
        path.append(path[-1] - span / 2 * (first + second))
    path[-1] = path[-1] / model.process.level(0.0, z[:1]).alpha
    return torch.stack(path[::-1])


def velocity(model: DiffusionModel) -> Callable[[Tensor, float], Tensor]:
    """Return dz/dt of the generative ODE as a function ``field(z, t)``."""
    if isinstance(model, TransportNDM):
        transport = model.transport
        return lambda z, r: transport.interpolant(z, torch.full_like(z[:, 0], r)).velocity
    return lambda z, t: model.reverse_process.drift(z, model.process.level(t, z), 0.0)


@torch.no_grad()
def few_steps(model: DiffusionModel, z: Tensor, steps: int) -> dict[str, Tensor]:
    """Sample in few steps from z_1 with each method of the model."""
    alpha = model.process.level(0.0, z[:1]).alpha
    if not isinstance(model, TransportNDM):
        methods = {"Euler": Euler(0.0), "DDIM": Ancestral(0.0)}
        return {
            name: GridSampler(step, steps)(model.reverse_process, z) / alpha
            for name, step in methods.items()
        }
    field, span = velocity(model), 1 / steps
    for index in range(steps, 0, -1):
        z = z - span * field(z, index * span)
    return {"Euler": z / alpha}


def bend(path: Tensor) -> float:
    """Return the bend of trajectories ``(steps + 1, B, D)``.

    This is their mean distance from motion of constant velocity, over the root mean square distance
    of their endpoints.
    """
    t = torch.linspace(0, 1, len(path), dtype=path.dtype)[:, None, None]
    away = (path - (1 - t) * path[0] - t * path[-1]).norm(dim=-1).mean()
    return float(away / (path[-1] - path[0]).square().sum(-1).mean().sqrt())


def data_nodes() -> tuple[Tensor, Tensor]:
    """Return points ``(N, 1)`` and weights ``(N,)`` of a quadrature for means over the data.

    It is Gauss-Hermite quadrature in each component.
    """
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    x = np.array(MEANS)[:, None] + STD * node
    share = np.array(WEIGHTS)[:, None] * weight / weight.sum()
    return torch.from_numpy(x.reshape(-1, 1)), torch.from_numpy(share.ravel())


@torch.no_grad()
def integrated_bound(
    model: DiffusionModel, x: Tensor, noise: Callable[[], Tensor], nodes: int
) -> dict[str, Tensor]:
    """Integrate the terms of the bound over time by Clenshaw-Curtis quadrature.

    The times are those of the likelihood (:func:`ndm.quadrature.trace_times`), even in t and in the
    noise level. For a schedule that starts steeply, as DDPM's does, times that are even only in t
    lose a tenth of a nat, and random times have a large variance.

    Args:
        model: the model.
        x: examples ``(B, D)``.
        noise: returns noise ``(B, D)`` for one time.
        nodes: number of times.

    Returns:
        The terms by name, ``(B,)`` each, in nats.
    """
    curve, eta = model.process.curve(x), model.bound_eta
    diffusion = torch.zeros_like(x[:, 0])
    for time, span in zip(*trace_times(model.process, nodes), strict=True):
        draw = Draw(torch.full_like(x[:, 0], float(time)), noise())
        integrand = diffusion_integrand(model.reverse_process, curve, draw, None, eta).bound
        diffusion += float(span) * integrand
    prior = prior_term(model.process, x, curve)
    reconstruction = reconstruction_term(model.process, model.decoder, x, noise(), curve)
    return {
        "prior": prior,
        "diffusion": diffusion,
        "reconstruction": reconstruction,
        "nelbo": prior + diffusion + reconstruction,
    }


def expected_bound(model: DiffusionModel, nodes: int) -> dict[str, float]:
    """Return the terms of the bound, averaged over data, times and noise, in nats.

    Quadrature is Gauss-Hermite in x and the noise, Clenshaw-Curtis in time.
    """
    points, shares = data_nodes()
    node, weight = np.polynomial.hermite_e.hermegauss(20)
    noise = torch.from_numpy(node).repeat(len(points))[:, None]
    noise_shares = torch.from_numpy(weight / weight.sum()).repeat(len(points))
    x = points.repeat_interleave(len(node), 0)
    share = shares.repeat_interleave(len(node)) * noise_shares
    terms = integrated_bound(model, x, lambda: noise, nodes)
    return {name: float(share @ term) for name, term in terms.items()}


def measure(model: DiffusionModel, kind: str, smoke: bool, seed: int) -> dict[str, Any]:
    """Measure one trained model; JSON-ready."""
    z, best = prior_grid(500 if smoke else GRID)
    fine = 20 if smoke else FINE_STEPS
    image = trajectories(model, z, fine)[0]
    count, generator = FRESH // (16 if smoke else 1), torch.Generator()
    generator.manual_seed(part_seed(seed, 1))
    fresh = torch.randn(count, 1, dtype=torch.float64, generator=generator)
    x, share = data_nodes()
    found: dict[str, Any] = {} if kind == "exact" else expected_bound(model, 32 if smoke else 256)
    found["nll"] = -float(share @ model.log_likelihood(x, dequantization="none").log_p)
    found["cost"] = float((image - z).square().mean() / (best - z).square().mean())
    found["w2"] = w2(image, best)
    found["bend"] = bend(trajectories(model, fresh, fine))
    steps = {n: few_steps(model, z, n) for n in FEW_STEPS}
    return {
        **found,
        "w2_steps": {name: [w2(steps[n][name], best) for n in FEW_STEPS] for name in steps[1]},
    }


def w2(points: Tensor, best: Tensor) -> float:
    """Return the Wasserstein-2 distance to the data of images of points of equal prior mass.

    The points can be in any order; ``best`` are their sorted images under the optimal map.
    """
    return float((points.sort(0).values - best).square().mean().sqrt())
