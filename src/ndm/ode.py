r"""The generative ODE: its solution, the divergence along it, and the density that follows.

Along a solution of :math:`\dot z = f(z, t)` the density changes by the divergence of f (Chen et al.
2018; Song et al. 2021, appendix D; NDM section 3.3), so with the prior at t = 1

.. math::
    \log p(z_0) = \log N(z_1; 0, I) + \int_0^1 \mathrm{tr}\, \frac{\partial f}{\partial z}(z_t, t)\, dt .

The trajectory does not depend on the trace. So it is solved first, by itself, and the trace is then
taken at N + 1 fixed times on it and integrated by Clenshaw-Curtis quadrature, which is exact for
polynomials of degree N, in a time y that runs evenly in t and in the noise level,

.. math::
    y(t) = \tfrac12 t + \tfrac12 \frac{\ell(t) - \ell(0)}{\ell(1) - \ell(0)}, \quad \ell = \log \frac{\sigma}{\alpha + 0.01}, \qquad
    y_j = \tfrac12 (1 - \cos(\pi j / N)), \qquad \int_0^1 \mathrm{tr}\, dt \approx \sum_j \frac{w_j}{y'(t_j)}\, \mathrm{tr}_j .

In t itself a schedule whose noise rises steeply from t = 0 (cosine, flow matching) would need
hundreds of times.

The step of an adaptive solver is thus chosen by z alone, the trace costs N + 1 evaluations however
many steps the solver takes, and the times of the half N, which are among those of N, show the error
of the quadrature. The trace is exact (one vector-Jacobian product a dimension) or estimated by K
probes v at each time (Hutchinson 1989),

.. math::
    \mathrm{tr}\, J = E\, v^\top J v, \qquad E v v^\top = I .

All probes are fixed before the trajectory is solved, so no solver ever sees noise. They differ from
time to time: one probe kept for the whole path is unbiased, too, but its errors add up along the
path instead of averaging out (4 to 6 times the error on the digits, at the same cost, see
docs/performance.md).
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torchdiffeq
from torch import Tensor, nn
from tqdm import tqdm

from ndm.errors import UserError, check_choice, check_whole
from ndm.forward import Gaussian, NoisingProcess
from ndm.random import RandomSource, standard_normal
from ndm.random import uniform as uniform_noise
from ndm.schedule import NoiseLevel
from ndm.shapes import event_size, sum_event

FIXED_STEP_SOLVERS = ("euler", "midpoint", "heun2", "heun3", "rk4")
"""Solvers of torchdiffeq that take the steps they are given, of order 1, 2, 2, 3 and 4."""
ADAPTIVE_SOLVERS = ("dopri5", "bosh3", "dopri8", "adaptive_heun")
"""Solvers of torchdiffeq that choose their steps by a tolerance."""
_MOST_STEPS = (
    20_000  # between two of the times asked for; a solver that needs more would seem to hang
)
Solver = Literal[
    "dopri5", "bosh3", "dopri8", "adaptive_heun", "rk4", "heun3", "heun2", "midpoint", "euler"
]
EXACT_UP_TO = 16
"""``probes="auto"`` takes the exact trace for events of at most this many dimensions."""
_ROWS_AT_ONCE, _VALUES_AT_ONCE = (
    256,
    2**15,
)  # small events are taken together at several times, large ones fill a graph by themselves
_ALPHA = 0.01  # keeps the noise level finite where no signal is left


@dataclass(frozen=True)
class OdeSettings:
    """How the generative ODE and its trace are computed."""

    solver: Solver = "dopri5"
    """Solver of torchdiffeq: adaptive (dopri5, bosh3, dopri8, adaptive_heun) or with fixed steps
    (rk4, heun3, heun2, midpoint, euler).
    """
    rtol: float = 1e-4
    """Relative tolerance of an adaptive solver, kept for each example by itself."""
    atol: float = 1e-4
    """Absolute tolerance of the same."""
    nodes: int = 64
    """N: the trace is taken at N + 1 times; a solver with fixed steps makes N steps between them.
    Even.
    """
    probes: int | Literal["exact", "auto"] = "auto"
    """Hutchinson probes at each of those times, or exact; auto is exact up to 16 dimensions and
    otherwise 2.
    """
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
            raise UserError(
                f"nodes={self.nodes}: give an even number, so that half of the nodes can check the"
                " rest"
            )
        if not isinstance(self.probes, str):
            check_whole("probes", self.probes, 1)
        elif self.probes not in ("exact", "auto"):
            raise UserError(
                f"probes={self.probes!r}: give a whole number of at least 1, exact or auto"
            )
        if self.probe not in ("rademacher", "gaussian"):
            raise UserError(f"probe={self.probe!r} is not known: choose rademacher or gaussian")

    def probes_for(self, dims: int) -> int | None:
        """Number of probes for events of D dimensions; None is the exact trace."""
        if isinstance(self.probes, int):
            return self.probes
        return None if self.probes == "exact" or dims <= EXACT_UP_TO else 2


@dataclass(frozen=True)
class LogDensity:
    """log p(z_0) by the generative ODE."""

    log_p: Tensor
    """log p(z_0), ``(B,)``, nats, float64 on the CPU."""
    coarse: Tensor
    """The same with half of the nodes: its distance from ``log_p`` bounds the error of the
    quadrature where the trace is exact.
    """
    z_1: Tensor
    """Where the trajectory ends, ``(B, *event)``."""
    nfe: int
    """Evaluations of f: those of the solver, and one for each time at which the trace was taken."""


class Flow(Protocol):
    """What an ODE is solved of: a reverse process with a drift at eta = 0."""

    @property
    def process(self) -> NoisingProcess:
        """The forward process, whose clock it is."""

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that the drift depends on."""

    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        """f(z, t), ``(B, *event)``."""


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise :class:`UserError` unless both tolerances are positive."""
    if not (rtol > 0 and atol > 0):
        raise UserError(f"rtol={rtol}, atol={atol}: tolerances must be positive")


def solve_ode(
    reverse: Flow,
    z: Tensor,
    times: Tensor,
    solver: str = "dopri5",
    rtol: float = 1e-4,
    atol: float = 1e-4,
    progress: bool = False,
) -> tuple[Tensor, int]:
    """Solve the generative ODE dz = f(z, t, x̂) dt with torchdiffeq.

    A batch shares its steps. The error of a step is the root mean square over the event of one
    example, and the example with the largest error decides, so that the tolerance holds for every
    example by itself, whatever is solved beside it. Its values depend on its neighbors only within
    the tolerance.

    Args:
        reverse: the reverse process.
        z: where to start, ``(B, *event)``.
        times: ``(N,)``, from the time of z to the last, in either direction; a solver with fixed
            steps takes one from each to the next.
        solver: a method of ``torchdiffeq.odeint``.
        rtol: relative tolerance of a solver with adaptive steps.
        atol: absolute tolerance of the same.
        progress: show a progress bar.

    Returns:
        z at each of the times, ``(N, B, *event)``, and the number of evaluations of f.

    Raises:
        UserError: the tolerances cannot be reached.
    """
    evaluations, shown = 0, 0
    first, span = float(times[0]), float(times[-1] - times[0])
    grid = times.to(torch.float32 if z.device.type == "mps" else torch.float64).to(
        z.device
    )  # MPS has no double precision
    adaptive, finest = solver not in FIXED_STEP_SOLVERS, torch.finfo(z.dtype).eps / 8
    if adaptive and max(rtol, atol) < finest:
        name = str(z.dtype).removeprefix("torch.")
        raise UserError(
            f"rtol={rtol:g}, atol={atol:g} are beyond the precision of {name}; give at least"
            f" {finest:.0e}, or use float64"
        )
    options = (
        {"norm": _worst_example, "max_num_steps": _MOST_STEPS, "dtype": grid.dtype}
        if adaptive
        else None
    )
    with tqdm(
        total=100, desc="solving the ODE", unit="%", disable=not progress, delay=1, leave=False
    ) as bar:

        def field(t: Tensor, state: Tensor) -> Tensor:
            nonlocal evaluations, shown
            evaluations += 1
            assert math.isfinite(float(t)), "the state is not finite"
            done = min(
                100, int(100 * (float(t) - first) / span)
            )  # the last step may look beyond the end
            if done > shown:
                bar.update(done - shown)
                shown = done
            return reverse.drift(
                state, reverse.process.level(t.clamp(0, 1).to(state.dtype), state), 0.0
            )

        try:
            path = torchdiffeq.odeint(
                field, z, grid, method=solver, rtol=rtol, atol=atol, options=options
            )
        except (
            AssertionError
        ) as error:  # how torchdiffeq says that its step became too small, or the state infinite
            reason = " ".join(str(error).split())[:80]
            raise UserError(
                f"the ODE cannot be solved by {solver} with rtol={rtol:g}, atol={atol:g} in"
                f" {str(z.dtype).removeprefix('torch.')} ({reason}); raise the tolerances, use"
                " float64, or a solver with fixed steps"
            ) from error
    return path, evaluations


def _worst_example(error: Tensor) -> Tensor:
    return error.flatten(1).square().mean(1).amax().sqrt()


def quadrature(nodes: int) -> tuple[Tensor, Tensor]:
    """Clenshaw-Curtis times ``(N + 1,)`` in [0, 1], both ends included, and their weights, float64."""
    cosines = -np.cos(np.pi * np.arange(nodes + 1) / nodes)
    order = np.arange(nodes + 1)
    moments = np.where(
        order % 2 == 0, 2 / (1.0 - np.where(order % 2 == 0, order, 0.0) ** 2), 0.0
    )  # of T_n over [-1, 1]
    weights = np.linalg.solve(np.polynomial.chebyshev.chebvander(cosines, nodes).T, moments)
    return torch.from_numpy((cosines + 1) / 2), torch.from_numpy(weights / 2)


def trace_times(process: NoisingProcess, nodes: int) -> tuple[Tensor, Tensor]:
    """The times ``(N + 1,)`` at which the trace is taken, from 0 to 1, and their weights, float64
    on the CPU.
    """
    schedule = copy.deepcopy(process.schedule).double().cpu()
    even, weights = quadrature(nodes)

    def noise(t: Tensor) -> tuple[Tensor, Tensor]:
        level = schedule(t)
        return torch.log(
            level.sigma / (level.alpha + _ALPHA)
        ), level.dsigma / level.sigma - level.dalpha / (level.alpha + _ALPHA)

    ends, _ = noise(torch.tensor([0.0, 1.0], dtype=torch.float64))
    low, high = torch.zeros_like(even), torch.ones_like(even)
    for _ in range(60):  # y increases with t: halve the interval around each y_j
        middle = (low + high) / 2
        below = 0.5 * middle + 0.5 * (noise(middle)[0] - ends[0]) / (ends[1] - ends[0]) < even
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    times = ((low + high) / 2).where(even > 0, 0.0).where(even < 1, 1.0)
    return times, weights / (0.5 + 0.5 * noise(times)[1] / (ends[1] - ends[0]))


def trace(reverse: Flow, z: Tensor, t: Tensor, probes: Sequence[Tensor] | None) -> Tensor:
    """Trace of the Jacobian of f(z, t, x̂(z, t)) in z, ``(B,)``, by one evaluation of f and a
    vector-Jacobian product for each probe.

    Args:
        reverse: the reverse process.
        z: ``(B, *event)``.
        t: ``(B,)``.
        probes: random vectors in the shape of z, over which v·Jv is averaged; None takes the exact
            trace, D products.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        f = reverse.drift(z, reverse.process.schedule(t), 0.0)
        if probes is not None:
            return torch.stack(
                [sum_event(torch.autograd.grad(f, z, v, retain_graph=True)[0] * v) for v in probes]
            ).mean(0)
        total = torch.zeros_like(t)
        for index in range(event_size(z)):
            unit = torch.zeros_like(z).flatten(1)
            unit[:, index] = 1
            total = (
                total
                + torch.autograd.grad(f, z, unit.reshape(z.shape), retain_graph=True)[0].flatten(1)[
                    :, index
                ]
            )
    return total


@torch.no_grad()
def ode_log_prob(
    reverse: Flow,
    z: Tensor,
    settings: OdeSettings | None = None,
    source: RandomSource = None,
    progress: bool = False,
) -> LogDensity:
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
        path, evaluations = solve_ode(
            reverse, z, times, settings.solver, settings.rtol, settings.atol, progress
        )
        rows = min(_ROWS_AT_ONCE, _VALUES_AT_ONCE // event_size(z))
        traces, together = [], max(1, rows // max(1, len(z)))
        bar = tqdm(
            total=len(times), desc="traces", unit="node", disable=not progress, delay=1, leave=False
        )
        for states, at in zip(path.split(together), times.to(z).split(together), strict=True):
            # Drawn time by time: how many times are taken together depends on the batch, the probes
            # must not.
            drawn = (
                None
                if probes is None
                else [[_probe(settings, z, source) for _ in range(probes)] for _ in at]
            )
            vectors = (
                None
                if drawn is None
                else [torch.cat(of_times) for of_times in zip(*drawn, strict=True)]
            )
            values = trace(reverse, states.flatten(0, 1), at.repeat_interleave(len(z)), vectors)
            traces.append(values.reshape(len(at), len(z)).cpu().double())
            bar.update(len(at))
        bar.close()
    end, along = path[-1].cpu().double(), torch.cat(traces)
    prior = Gaussian(torch.zeros_like(end), torch.ones_like(end)).log_prob(end)
    half = trace_times(reverse.process, settings.nodes // 2)[1] @ along[::2]
    return LogDensity(
        log_p=prior + weights @ along,
        coarse=prior + half,
        z_1=path[-1],
        nfe=evaluations + len(times),
    )


def _probe(settings: OdeSettings, z: Tensor, source: RandomSource) -> Tensor:
    """A random vector for each example, ``(B, *event)``."""
    if settings.probe == "gaussian":
        return standard_normal(z, source)
    return 2 * (uniform_noise(z, source) < 0.5).to(z) - 1


@contextlib.contextmanager
def _frozen(reverse: Flow) -> Iterator[None]:
    """Keep the parameters out of the graph: only derivatives in z are wanted."""
    parameters = [
        parameter
        for part in reverse.parts
        for parameter in part.parameters()
        if parameter.requires_grad
    ]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@torch.no_grad()
def round_trip_error(reverse: Flow, z: Tensor, settings: OdeSettings | None = None) -> Tensor:
    """Root mean square of z_0 less what comes back from z_0 -> z_1 -> z_0, ``(B,)``: how reversible
    the solved ODE is.
    """
    settings = settings or OdeSettings()
    times, _ = trace_times(reverse.process, settings.nodes)
    there, _ = solve_ode(reverse, z, times, settings.solver, settings.rtol, settings.atol)
    back, _ = solve_ode(
        reverse, there[-1], times.flip(0), settings.solver, settings.rtol, settings.atol
    )
    return (back[-1] - z).flatten(1).square().mean(1).sqrt()
