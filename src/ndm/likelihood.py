r"""The log-likelihood of data under the generative ODE: of densities, and of values on a grid.

**Density of z_0.** Along a solution of the generative ODE :math:`\dot z = f(z, t, \hat x(z, t))` (g = 0) the density changes by the
divergence of f (Chen et al. 2018; Song et al. 2021, appendix D; NDM section 3.3), so with the prior at t = 1

.. math::
    \log p(z_0) = \log N(z_1; 0, I) + \int_0^1 \mathrm{tr}\, \frac{\partial f}{\partial z}(z_t, t)\, dt .

The trajectory does not depend on the trace. So it is solved first, by itself, and the trace is then taken at N + 1 fixed times on it and
integrated by Clenshaw-Curtis quadrature, which is exact for polynomials of degree N, in a time y that runs evenly in t and in the noise level,

.. math::
    y(t) = \tfrac12 t + \tfrac12 \frac{\ell(t) - \ell(0)}{\ell(1) - \ell(0)}, \quad \ell = \log \frac{\sigma}{\alpha + 0.01}, \qquad
    y_j = \tfrac12 (1 - \cos(\pi j / N)), \qquad \int_0^1 \mathrm{tr}\, dt \approx \sum_j \frac{w_j}{y'(t_j)}\, \mathrm{tr}_j .

In t itself a schedule whose noise rises steeply from t = 0 (cosine, flow matching) would need hundreds of times.

The step of an adaptive solver is thus chosen by z alone, the trace costs N + 1 evaluations however many steps the solver takes, and
the times of the half N, which are among those of N, show the error of the quadrature. The trace is exact (one vector-Jacobian product a
dimension) or estimated by K probes v at each time (Hutchinson 1989),

.. math::
    \mathrm{tr}\, J = E\, v^\top J v, \qquad E v v^\top = I .

All probes are fixed before the trajectory is solved, so no solver ever sees noise. They differ from time to time: one probe kept for the
whole path is unbiased, too, but its errors add up along the path instead of averaging out (4 to 6 times the error on the digits, at the
same cost, see docs/performance.md).

**From z_0 to x.** Let :math:`\alpha_0, \sigma_0` be the noise level at t = 0. Every way below gives an unbiased
:math:`w = p(x, z_0) / q(z_0|x)`, so that :math:`\log P(x) \ge E \log w`, and with K of them :math:`\log P(x) \ge E \log \frac1K \sum_k w_k`,
which increases to log P(x) with K.

=================  ==========================================  ======================================================================
``variational``    z_0 ~ q(z_0|x), the forward process         w = p(z_0) p(x|z_0) / q(z_0|x): the model with its own decoder, as in
                                                               the bound
``uniform``        z_0 = alpha_0 (x + U), U uniform on the     w = p(z_0) alpha_0^D prod(width): x is z_0/alpha_0, rounded to the
                   bin of x; discrete data only                grid (Theis et al. 2016)
``none``           z_0 = alpha_0 x; continuous data only       w = p(z_0) alpha_0^D: x is z_0/alpha_0 itself; no bound but equality
=================  ==========================================  ======================================================================

**Change of scale.** The factor :math:`\alpha_0^D` is the Jacobian of x -> z_0; the widths of the bins turn the density of x into the
probability of an integer, log P(k) = log p(x) + sum log width, which is where the "7 bits" of 8-bit images in [-1, 1] come from
(width 2/256). For discrete data all results are log-probabilities of the original integers, on any grid. For continuous data they are
densities of x as the model sees it; :attr:`ndm.data.DataDescription.log_scale` moves them to the units of the source.
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ndm.decoder import Decoder, DiscretizedGaussian, NetworkDecoder
from ndm.errors import UserError, check_choice, check_whole
from ndm.forward import ForwardProcess, Gaussian
from ndm.noise import ExampleNoise, Noise, standard_normal
from ndm.noise import uniform as uniform_noise
from ndm.ops import event_size, expand, sum_event
from ndm.reverse import ReverseProcess
from ndm.sample import ADAPTIVE_SOLVERS, FIXED_STEP_SOLVERS, check_tolerances, solve_ode

Dequantization = Literal["variational", "uniform", "none"]
Solver = Literal["dopri5", "bosh3", "dopri8", "adaptive_heun", "rk4", "heun3", "heun2", "midpoint", "euler"]
EXACT_UP_TO = 16
"""``probes="auto"`` takes the exact trace for events of at most this many dimensions."""
_ROWS_AT_ONCE, _VALUES_AT_ONCE = 256, 2**15  # small events are taken together at several times, large ones fill a graph by themselves
_ALPHA = 0.01  # keeps the noise level finite where no signal is left
_PROBES, _LATENTS = 1, 2  # streams of noise


@dataclass(frozen=True)
class OdeSettings:
    """How the generative ODE and its trace are computed."""

    solver: Solver = "dopri5"
    """Solver of torchdiffeq: adaptive (dopri5, bosh3, dopri8, adaptive_heun) or with fixed steps (rk4, heun3, heun2, midpoint, euler)."""
    rtol: float = 1e-4
    """Relative tolerance of an adaptive solver, kept for each example by itself."""
    atol: float = 1e-4
    """Absolute tolerance of the same."""
    nodes: int = 64
    """N: the trace is taken at N + 1 times; a solver with fixed steps makes N steps between them. Even."""
    probes: int | Literal["exact", "auto"] = "auto"
    """Hutchinson probes at each of those times, or exact; auto is exact up to 16 dimensions and otherwise 2."""
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    """Distribution of the probes. Rademacher has the smaller variance."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UserError: a value is out of range.
        """
        check_choice("solver", self.solver, ADAPTIVE_SOLVERS + FIXED_STEP_SOLVERS)
        check_tolerances(self.rtol, self.atol)
        check_whole("nodes", self.nodes, 2)
        if self.nodes % 2:
            raise UserError(f"nodes={self.nodes}: give an even number, so that half of the nodes can check the rest")
        if not isinstance(self.probes, str):
            check_whole("probes", self.probes, 1)
        elif self.probes not in ("exact", "auto"):
            raise UserError(f"probes={self.probes!r}: give a whole number of at least 1, exact or auto")
        if self.probe not in ("rademacher", "gaussian"):
            raise UserError(f"probe={self.probe!r} is not known: choose rademacher or gaussian")

    def probes_for(self, dims: int) -> int | None:
        """Number of probes for events of D dimensions; None is the exact trace."""
        if isinstance(self.probes, int):
            return self.probes
        return None if self.probes == "exact" or dims <= EXACT_UP_TO else 2


@dataclass(frozen=True)
class OdeLogProb:
    """log p(z_0) by the generative ODE."""

    log_p: Tensor
    """log p(z_0), ``(B,)``, nats, float64 on the CPU."""
    coarse: Tensor
    """The same with half of the nodes: its distance from ``log_p`` bounds the error of the quadrature where the trace is exact."""
    z_1: Tensor
    """Where the trajectory ends, ``(B, *event)``."""
    nfe: int
    """Evaluations of f: those of the solver, and one for each time at which the trace was taken."""


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of data under the ODE model, with K samples of z_0 for each example."""

    log_weights: Tensor
    """log w_k = log p(x, z_0)/q(z_0|x), ``(B, K)``, nats, float64 on the CPU."""
    coarse_log_weights: Tensor
    """The same with half of the nodes of the quadrature."""
    nfe: float
    """Evaluations of f for one sample of one example."""

    @property
    def log_p(self) -> Tensor:
        """log (1/K) sum_k w_k: the importance-weighted bound on log p(x), ``(B,)``, nats."""
        return torch.logsumexp(self.log_weights, dim=1) - math.log(self.log_weights.shape[1])

    @property
    def single(self) -> Tensor:
        """The mean of log w_k: the bound for one sample, ``(B,)``, nats."""
        return self.log_weights.mean(1)


def quadrature(nodes: int) -> tuple[Tensor, Tensor]:
    """Clenshaw-Curtis times ``(N + 1,)`` in [0, 1], both ends included, and their weights, float64."""
    cosines = -np.cos(np.pi * np.arange(nodes + 1) / nodes)
    order = np.arange(nodes + 1)
    moments = np.where(order % 2 == 0, 2 / (1.0 - np.where(order % 2 == 0, order, 0.0) ** 2), 0.0)  # of T_n over [-1, 1]
    weights = np.linalg.solve(np.polynomial.chebyshev.chebvander(cosines, nodes).T, moments)
    return torch.from_numpy((cosines + 1) / 2), torch.from_numpy(weights / 2)


def trace_times(process: ForwardProcess, nodes: int) -> tuple[Tensor, Tensor]:
    """The times ``(N + 1,)`` at which the trace is taken, from 0 to 1, and their weights, float64 on the CPU."""
    schedule = copy.deepcopy(process.schedule).double().cpu()
    even, weights = quadrature(nodes)

    def noise(t: Tensor) -> tuple[Tensor, Tensor]:
        level = schedule(t)
        return torch.log(level.sigma / (level.alpha + _ALPHA)), level.dsigma / level.sigma - level.dalpha / (level.alpha + _ALPHA)

    ends, _ = noise(torch.tensor([0.0, 1.0], dtype=torch.float64))
    low, high = torch.zeros_like(even), torch.ones_like(even)
    for _ in range(60):  # y increases with t: halve the interval around each y_j
        middle = (low + high) / 2
        below = 0.5 * middle + 0.5 * (noise(middle)[0] - ends[0]) / (ends[1] - ends[0]) < even
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    times = ((low + high) / 2).where(even > 0, 0.0).where(even < 1, 1.0)
    return times, weights / (0.5 + 0.5 * noise(times)[1] / (ends[1] - ends[0]))


def trace(reverse: ReverseProcess, z: Tensor, t: Tensor, probes: Sequence[Tensor] | None) -> Tensor:
    """Trace of the Jacobian of f(z, t, x̂(z, t)) in z, ``(B,)``, by one evaluation of f and a vector-Jacobian product for each probe.

    Args:
        reverse: the reverse process.
        z: ``(B, *event)``.
        t: ``(B,)``.
        probes: random vectors in the shape of z, over which v·Jv is averaged; None takes the exact trace, D products.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        f = reverse.drift(z, reverse.process.schedule(t), 0.0)
        if probes is not None:
            return torch.stack([sum_event(torch.autograd.grad(f, z, v, retain_graph=True)[0] * v) for v in probes]).mean(0)
        total = torch.zeros_like(t)
        for index in range(event_size(z)):
            unit = torch.zeros_like(z).flatten(1)
            unit[:, index] = 1
            total = total + torch.autograd.grad(f, z, unit.reshape(z.shape), retain_graph=True)[0].flatten(1)[:, index]
    return total


@torch.no_grad()
def ode_log_prob(
    reverse: ReverseProcess, z: Tensor, settings: OdeSettings | None = None, source: Noise = None, progress: bool = False
) -> OdeLogProb:
    """log p(z_0) by the generative ODE.

    Args:
        reverse: the reverse process.
        z: z_0, ``(B, *event)``; its dtype is that of the whole computation.
        settings: solver, tolerance, probes.
        source: where the probes come from.
        progress: show progress bars.

    Raises:
        UserError: the tolerances cannot be reached.
    """
    settings = settings or OdeSettings()
    times, weights = trace_times(reverse.process, settings.nodes)
    probes = settings.probes_for(event_size(z))
    with _frozen(reverse):
        path, evaluations = solve_ode(reverse, z, times, settings.solver, settings.rtol, settings.atol, progress)
        rows = min(_ROWS_AT_ONCE, _VALUES_AT_ONCE // event_size(z))
        traces, together = [], max(1, rows // max(1, len(z)))
        bar = tqdm(total=len(times), desc="traces", unit="node", disable=not progress, delay=1, leave=False)
        for states, at in zip(path.split(together), times.to(z).split(together), strict=True):
            # Drawn time by time: how many times are taken together depends on the batch, the probes must not.
            drawn = None if probes is None else [[_probe(settings, z, source) for _ in range(probes)] for _ in at]
            vectors = None if drawn is None else [torch.cat(of_times) for of_times in zip(*drawn, strict=True)]
            values = trace(reverse, states.flatten(0, 1), at.repeat_interleave(len(z)), vectors)
            traces.append(values.reshape(len(at), len(z)).cpu().double())
            bar.update(len(at))
        bar.close()
    end, along = path[-1].cpu().double(), torch.cat(traces)
    prior = Gaussian(torch.zeros_like(end), torch.ones_like(end)).log_prob(end)
    half = trace_times(reverse.process, settings.nodes // 2)[1] @ along[::2]
    return OdeLogProb(log_p=prior + weights @ along, coarse=prior + half, z_1=path[-1], nfe=evaluations + len(times))


def _probe(settings: OdeSettings, z: Tensor, source: Noise) -> Tensor:
    """A random vector for each example, ``(B, *event)``."""
    if settings.probe == "gaussian":
        return standard_normal(z, source)
    return 2 * (uniform_noise(z, source) < 0.5).to(z) - 1


@contextlib.contextmanager
def _frozen(reverse: ReverseProcess) -> Iterator[None]:
    """Keep the parameters out of the graph: only derivatives in z are wanted."""
    parameters = [p for part in (reverse.process, reverse.predictor) for p in part.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@torch.no_grad()
def round_trip_error(reverse: ReverseProcess, z: Tensor, settings: OdeSettings | None = None) -> Tensor:
    """Root mean square of z_0 less what comes back from z_0 -> z_1 -> z_0, ``(B,)``: how reversible the solved ODE is."""
    settings = settings or OdeSettings()
    times, _ = trace_times(reverse.process, settings.nodes)
    there, _ = solve_ode(reverse, z, times, settings.solver, settings.rtol, settings.atol)
    back, _ = solve_ode(reverse, there[-1], times.flip(0), settings.solver, settings.rtol, settings.atol)
    return (back[-1] - z).flatten(1).square().mean(1).sqrt()


def latent(process: ForwardProcess, decoder: Decoder, x: Tensor, how: Dequantization, source: Noise = None) -> tuple[Tensor, Tensor]:
    """z_0 for data ``x`` ``(B, *event)``, and log w - log p(z_0), ``(B,)``, nats; see the table of this module.

    Raises:
        UserError: the way does not fit the data, or a value of x is off the decoder's grid.
    """
    decoder.check(x)
    level = process.level(0.0, x)
    if how == "variational":
        q = process.first_marginal(x, level)
        z = q.sample(standard_normal(q.mean, source))
        return z, decoder.log_prob(x, z, level) - q.log_prob(z)
    if not process.transform.keeps_shape or isinstance(decoder, NetworkDecoder):
        raise UserError(f"dequantization={how} takes z_0/alpha_0 for data, but here a network leads from z_0 to x; use variational")
    scale = event_size(x) * torch.log(level.alpha)
    if how == "none":
        if decoder.discrete:
            raise UserError("dequantization=none is for continuous data; the probability of a value on a grid needs variational or uniform")
        return expand(level.alpha, x) * x, scale
    check_choice("dequantization", how, get_args(Dequantization))
    if not isinstance(decoder, DiscretizedGaussian):
        raise UserError("dequantization=uniform is for values on a grid (decoder DiscretizedGaussian); use variational or none")
    low, width = decoder.bins(x)
    return expand(level.alpha, x) * (low + width * uniform_noise(x, source)), scale + sum_event(torch.log(width))


@torch.no_grad()
def log_likelihood(
    reverse: ReverseProcess,
    decoder: Decoder,
    x: Tensor,
    *,
    samples: int = 1,
    dequantization: Dequantization = "variational",
    settings: OdeSettings | None = None,
    seed: int = 0,
    examples: Sequence[int] | None = None,
    progress: bool = False,
) -> LogLikelihood:
    """Log-likelihood of data under the ODE model.

    The K samples of an example share its probes: what Hutchinson's estimate gets wrong then shifts all of its log-weights alike, up to
    the distance of the samples, instead of raising the mean of the weights. Take the exact trace where that difference matters.

    Args:
        reverse: the reverse process.
        decoder: p(x|z_0).
        x: data ``(B, *event)``.
        samples: K.
        dequantization: from z_0 to x: ``variational``, ``uniform`` or ``none``.
        settings: solver, tolerance, probes.
        seed: seed of latents and probes.
        examples: numbers of the examples in their data set, which decide on their random numbers; 0 ... B-1 by default.
        progress: show progress bars.

    Raises:
        UserError: the tolerances cannot be reached, or an argument does not fit the data.
    """
    check_whole("samples", samples, 1)
    if samples > 1 and dequantization == "none":
        raise UserError(f"samples={samples} does not go with dequantization=none, which draws nothing: give one sample")
    examples = range(len(x)) if examples is None else examples
    weights, coarse, evaluations = [], [], 0
    for sample in range(samples):
        z, log_ratio = latent(reverse.process, decoder, x, dequantization, ExampleNoise(seed, examples, _LATENTS, sample))
        solved = ode_log_prob(reverse, z, settings, ExampleNoise(seed, examples, _PROBES), progress)
        evaluations += solved.nfe
        weights.append(solved.log_p + log_ratio.cpu().double())
        coarse.append(solved.coarse + log_ratio.cpu().double())
    return LogLikelihood(torch.stack(weights, 1), torch.stack(coarse, 1), evaluations / samples)
