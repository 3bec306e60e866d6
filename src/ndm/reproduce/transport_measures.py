r"""What is measured of a learned optimal transport in one dimension, by quadrature.

Let Q be the quantile function of the data and Phi the distribution function of the prior, so that
Q(Phi(z)) is the optimal map. With T the learned map,

.. math::
    \text{cost} = \frac{E |z_1 - T(z_1)|^2}{E |z_1 - Q(\Phi(z_1))|^2}, \qquad
    W_2^2 = \int_0^1 |Q_{\text{model}} - Q|^2 dp, \qquad
    \text{bend} = \frac{E_{t, z_1} |z_t - (1-t) z_0 - t z_1|}{\sqrt{E |z_1 - z_0|^2}} .

Trajectories are solutions of the generative ODE from z_1. On a line they keep their order, so those
of a diffusion follow the optimal map, too; what differs is the way there. The bend is zero for
motion of constant speed, which one step follows exactly.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ndm.data import Mixture
from ndm.elbo import Draw, diffusion_integrand, prior_term, reconstruction_term
from ndm.model import DiffusionModel
from ndm.ode import trace_times
from ndm.random import part_seed
from ndm.sample import Ancestral, Euler, GridSampler
from ndm.variants.transport import TransportNDM

if TYPE_CHECKING:
    pass


MEANS, STD, WEIGHTS = (-1.5, 1.5), 0.5, (0.4, 0.6)
DATA = Mixture([[mean] for mean in MEANS], STD, WEIGHTS)


GRID, FINE_STEPS, FRESH = 10_000, 64, 2048
FEW_STEPS = (1, 2, 4, 8, 16, 32)


def quantiles(
    p: Tensor, means: Sequence[float] = MEANS, weights: Sequence[float] = WEIGHTS
) -> Tensor:
    """Q(p) of a mixture, that of the data by default, by interpolation in its distribution
    function, good to seven digits; float64.
    """
    x = torch.linspace(min(means) - 9 * STD, max(means) + 9 * STD, 400_001, dtype=torch.float64)
    below = torch.special.ndtr(
        (x[:, None] - torch.tensor(means, dtype=x.dtype)) / STD
    ) @ torch.tensor(weights, dtype=x.dtype)
    return torch.from_numpy(np.interp(p.numpy(), below.numpy(), x.numpy()))


def prior_grid(count: int) -> tuple[Tensor, Tensor]:
    """Points z_1 with equal shares of the prior, increasing, and where the optimal map takes them;
    ``(count, 1)`` each.
    """
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(p)[:, None], quantiles(p)[:, None]


@torch.no_grad()
def trajectories(model: DiffusionModel, z: Tensor, steps: int) -> Tensor:
    """Solutions of the generative ODE at steps + 1 even times from t = 0 to t = 1, ``(steps + 1, B,
    D)``, by Heun's method from z_1.

    Time is that of a diffusion's schedule, and for transport how much of the line is left. Latents
    are in the units of the data.
    """
    field = velocity(model)
    path, span = [z], 1 / steps
    for index in range(steps, 0, -1):
        first = field(path[-1], index * span)
        path.append(
            path[-1] - span / 2 * (first + field(path[-1] - span * first, (index - 1) * span))
        )
    path[-1] = path[-1] / model.process.level(0.0, z[:1]).alpha
    return torch.stack(path[::-1])


def velocity(model: DiffusionModel) -> Callable[[Tensor, float], Tensor]:
    """dz/dt of the generative ODE, called as ``field(z, t)``."""
    if isinstance(model, TransportNDM):
        transport = model.transport
        return lambda z, r: transport.interpolant(z, torch.full_like(z[:, 0], r)).velocity
    return lambda z, t: model.reverse_process.drift(z, model.process.level(t, z), 0.0)


@torch.no_grad()
def few_steps(model: DiffusionModel, z: Tensor, steps: int) -> dict[str, Tensor]:
    """Samples by few steps from z_1, by the methods that the model has."""
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
    """How far trajectories ``(steps + 1, B, D)`` are from motion of constant speed, over the root
    of the mean square of their lengths.
    """
    t = torch.linspace(0, 1, len(path), dtype=path.dtype)[:, None, None]
    away = (path - (1 - t) * path[0] - t * path[-1]).norm(dim=-1).mean()
    return float(away / (path[-1] - path[0]).square().sum(-1).mean().sqrt())


def data_nodes() -> tuple[Tensor, Tensor]:
    """Points x ``(N, 1)`` and weights ``(N,)`` whose sum is the mean over the data: Gauss-Hermite
    in each component.
    """
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    x = np.array(MEANS)[:, None] + STD * node
    share = np.array(WEIGHTS)[:, None] * weight / weight.sum()
    return torch.from_numpy(x.reshape(-1, 1)), torch.from_numpy(share.ravel())


@torch.no_grad()
def integrated_bound(
    model: DiffusionModel, x: Tensor, noise: Callable[[], Tensor], nodes: int
) -> dict[str, Tensor]:
    """The terms of the bound for examples ``x`` ``(B, D)``, integrated over time by
    Clenshaw-Curtis; ``(B,)`` each, nats.

    ``noise`` gives noise ``(B, D)`` for each time.

    The times are those of the likelihood (:func:`ndm.ode.trace_times`), even in t and in the noise
    level: where a schedule starts steeply, as that of DDPM does, even times alone would lose a
    tenth of a nat, and random ones scatter widely.
    """
    curve, eta = model.process.curve(x), model.bound_eta
    diffusion = torch.zeros_like(x[:, 0])
    for time, span in zip(*trace_times(model.process, nodes), strict=True):
        draw = Draw(torch.full_like(x[:, 0], float(time)), noise())
        diffusion += (
            float(span) * diffusion_integrand(model.reverse_process, curve, draw, None, eta).bound
        )
    prior, reconstruction = (
        prior_term(model.process, x, curve),
        reconstruction_term(model.process, model.decoder, x, noise(), curve),
    )
    return {
        "prior": prior,
        "diffusion": diffusion,
        "reconstruction": reconstruction,
        "nelbo": prior + diffusion + reconstruction,
    }


def expected_bound(model: DiffusionModel, nodes: int) -> dict[str, float]:
    """The terms of the bound in their mean over data, times and noise, nats: Gauss-Hermite in x and
    noise, Clenshaw-Curtis in time.
    """
    x, share = data_nodes()
    node, weight = np.polynomial.hermite_e.hermegauss(20)
    noise = torch.from_numpy(node).repeat(len(x))[:, None]
    x, share = (
        x.repeat_interleave(len(node), 0),
        share.repeat_interleave(len(node)) * torch.from_numpy(weight / weight.sum()).repeat(len(x)),
    )
    return {
        name: float(share @ term)
        for name, term in integrated_bound(model, x, lambda: noise, nodes).items()
    }


def measure(model: DiffusionModel, kind: str, smoke: bool, seed: int) -> dict[str, Any]:
    """Everything that is known of one trained model, JSON-ready."""
    z, best = prior_grid(500 if smoke else GRID)
    fine = 20 if smoke else FINE_STEPS
    image = trajectories(model, z, fine)[0]
    fresh = torch.randn(
        FRESH // (16 if smoke else 1),
        1,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(part_seed(seed, 1)),
    )
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
    """Wasserstein-2 distance of images of equal shares of the prior, in any order, to the data."""
    return float((points.sort(0).values - best).square().mean().sqrt())
