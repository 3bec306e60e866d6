r"""The generative ODE: its solution, the divergence along it, and the resulting density.

Along a solution of :math:`\dot z = f(z, t)` the log-density changes at the rate of the divergence
of f (Chen et al. 2018; Song et al. 2021, appendix D; NDM, section 3.3). With the prior at t = 1,

.. math::
    \log p(z_0) = \log N(z_1; 0, I)
        + \int_0^1 \mathrm{tr}\, \frac{\partial f}{\partial z}(z_t, t)\, dt .

The trajectory does not depend on the trace, so it is solved first. The trace is then computed at
N + 1 fixed times along it and integrated by Clenshaw-Curtis quadrature, which is exact for
polynomials of degree N. The nodes are those of :mod:`ndm.quadrature`.

Solving for z first has three advantages. An adaptive solver chooses its steps by z only. The trace
costs N + 1 evaluations, however many steps the solver takes. The nodes for N/2 are among those for
N, so the difference of the two results shows the error of the quadrature.

The trace is exact (one vector-Jacobian product per dimension) or estimated with K probes v at each
time (Hutchinson 1989):

.. math::
    \mathrm{tr}\, J = E\, v^\top J v, \qquad E v v^\top = I .

The solver never sees this noise. Each time has its own probes. One probe for the whole path is
also unbiased, but its errors add up along the path instead of averaging out: 4 to 6 times the error
on the digits at the same cost, see docs/performance.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torchdiffeq
from torch import Tensor, nn
from tqdm import tqdm

from ndm.errors import UserError, check_choice, check_whole, one_line
from ndm.forward import Gaussian, NoisingProcess
from ndm.parts import frozen
from ndm.quadrature import trace_times
from ndm.random import RandomSource, standard_normal
from ndm.random import uniform as uniform_noise
from ndm.schedule import NoiseLevel
from ndm.shapes import event_size, sum_event

FIXED_STEP_SOLVERS = ("euler", "midpoint", "heun2", "heun3", "rk4")
"""Solvers of torchdiffeq with fixed steps, of order 1, 2, 2, 3 and 4."""
ADAPTIVE_SOLVERS = ("dopri5", "bosh3", "dopri8", "adaptive_heun")
"""Solvers of torchdiffeq that choose their steps by a tolerance."""
# Limit between two output times: a solver that needs more steps would seem to hang.
_MOST_STEPS = 20_000
Solver = Literal[
    "dopri5", "bosh3", "dopri8", "adaptive_heun", "rk4", "heun3", "heun2", "midpoint", "euler"
]
EXACT_UP_TO = 16
"""``probes="auto"`` computes the exact trace for events of at most this many dimensions."""
# Limits on one trace evaluation: several times are batched if events are small.
_ROWS_AT_ONCE, _VALUES_AT_ONCE = 256, 2**15


@dataclass(frozen=True)
class OdeSettings:
    """How the generative ODE and its trace are computed."""

    solver: Solver = "dopri5"
    """Solver of torchdiffeq.

    Adaptive: dopri5, bosh3, dopri8, adaptive_heun. Fixed steps: rk4, heun3, heun2, midpoint, euler.
    """
    rtol: float = 1e-4
    """Relative tolerance of an adaptive solver; it holds for each example separately."""
    atol: float = 1e-4
    """Absolute tolerance of an adaptive solver; it holds for each example separately."""
    nodes: int = 64
    """N, even: the trace is computed at N + 1 times.

    A solver with fixed steps takes the N steps between them.
    """
    probes: int | Literal["exact", "auto"] = "auto"
    """Number of Hutchinson probes at each time, or ``exact`` for the exact trace.

    ``auto`` is exact up to 16 dimensions and 2 probes beyond.
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
                f"nodes={self.nodes}: give an even number, so that every second node can check the"
                " result"
            )
        if not isinstance(self.probes, str):
            check_whole("probes", self.probes, 1)
        elif self.probes not in ("exact", "auto"):
            raise UserError(f"probes={self.probes!r}: give an integer of at least 1, exact or auto")
        check_choice("probe", self.probe, ("rademacher", "gaussian"))

    def probes_for(self, dims: int) -> int | None:
        """Return the number of probes for events of D dimensions; None means the exact trace."""
        if isinstance(self.probes, int):
            return self.probes
        return None if self.probes == "exact" or dims <= EXACT_UP_TO else 2


@dataclass(frozen=True)
class LogDensity:
    """log p(z_0) under the generative ODE."""

    log_p: Tensor
    """log p(z_0), ``(B,)``, nats, float64 on the CPU."""
    coarse: Tensor
    """``log_p`` computed with half of the nodes.

    Its distance from ``log_p`` bounds the error of the quadrature if the trace is exact.
    """
    z_0: Tensor
    """The trajectory at t = 0, ``(B, *event)``."""
    z_1: Tensor
    """The trajectory at t = 1, ``(B, *event)``."""
    nfe: int
    """Evaluations of f: those of the solver, and one for each time of the trace."""


class Flow(Protocol):
    """A reverse process whose drift at eta = 0 defines the ODE."""

    @property
    def process(self) -> NoisingProcess:
        """The forward process, which maps times to noise levels."""

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that the drift depends on."""

    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        """Return f(z, t), ``(B, *event)``."""

    def repeated(self, count: int) -> "Flow":
        """Return it for a batch that is ``count`` copies of this one, one after another."""


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

    The examples of a batch share their steps. The error of a step is computed per example, as the
    root mean square over its event, and the largest one is compared with the tolerance. So the
    tolerance holds for every example, and the solution of an example depends on the rest of its
    batch only within the tolerance.

    Args:
        reverse: the reverse process.
        z: the start, ``(B, *event)``.
        times: ``(N,)``, increasing or decreasing, beginning with the time of z. A solver with fixed
            steps takes one step from each time to the next.
        solver: a method of ``torchdiffeq.odeint``.
        rtol: relative tolerance of an adaptive solver.
        atol: absolute tolerance of an adaptive solver.
        progress: show a progress bar.

    Returns:
        z at each of the times, ``(N, B, *event)``, and the number of evaluations of f.

    Raises:
        UserError: the solver cannot reach the tolerances.
    """
    evaluations, shown = 0, 0
    first, span = float(times[0]), float(times[-1] - times[0])
    grid_dtype = torch.float32 if z.device.type == "mps" else torch.float64  # MPS has no float64
    grid = times.to(grid_dtype).to(z.device)
    options = None
    if solver not in FIXED_STEP_SOLVERS:
        _check_precision(rtol, atol, z.dtype)
        options = {"norm": _worst_example, "max_num_steps": _MOST_STEPS, "dtype": grid.dtype}
    with tqdm(
        total=100, desc="solving the ODE", unit="%", disable=not progress, delay=1, leave=False
    ) as bar:

        def field(t: Tensor, state: Tensor) -> Tensor:
            nonlocal evaluations, shown
            evaluations += 1
            t = t.detach()
            assert math.isfinite(float(t)), "the state is not finite"
            # The last step may reach beyond the end.
            done = min(100, int(100 * (float(t) - first) / span))
            if done > shown:
                bar.update(done - shown)
                shown = done
            level = reverse.process.level(t.clamp(0, 1).to(state.dtype), state)
            return reverse.drift(state, level, 0.0)

        try:
            path = torchdiffeq.odeint(
                field, z, grid, method=solver, rtol=rtol, atol=atol, options=options
            )
        except AssertionError as error:
            # torchdiffeq asserts that its step is not too small and its state finite.
            reason = one_line(error, 80)
            raise UserError(
                f"the ODE cannot be solved by {solver} with rtol={rtol:g}, atol={atol:g} in"
                f" {_name(z.dtype)} ({reason}); raise the tolerances, use float64, or a solver with"
                " fixed steps"
            ) from error
    return path, evaluations


def _check_precision(rtol: float, atol: float, dtype: torch.dtype) -> None:
    """Raise :class:`UserError` if rounding in a dtype exceeds both tolerances."""
    finest = torch.finfo(dtype).eps / 8
    if max(rtol, atol) < finest:
        raise UserError(
            f"rtol={rtol:g}, atol={atol:g} are below the precision of {_name(dtype)}; give at least"
            f" {finest:.0e}, or use float64"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _worst_example(error: Tensor) -> Tensor:
    """Return the largest root mean square over an event, the norm of the step-size control."""
    return error.flatten(1).square().mean(1).amax().sqrt()


def trace(reverse: Flow, z: Tensor, t: Tensor, probes: Sequence[Tensor] | None) -> Tensor:
    """Return the trace of the Jacobian of f(z, t, x̂(z, t)) in z, ``(B,)``.

    Costs one evaluation of f and a vector-Jacobian product for each probe. If z requires a
    gradient, the trace has one, too.

    Args:
        reverse: the reverse process.
        z: ``(B, *event)``.
        t: ``(B,)``.
        probes: random vectors v in the shape of z, over which v·Jv is averaged; None computes the
            exact trace with D products.
    """
    keep = torch.is_grad_enabled() and z.requires_grad
    with torch.enable_grad():
        z = z if keep else z.detach().requires_grad_()
        f = reverse.drift(z, reverse.process.schedule(t), 0.0)

        def product(v: Tensor) -> Tensor:
            return torch.autograd.grad(f, z, v, retain_graph=True, create_graph=keep)[0]

        if probes is not None:
            return torch.stack([sum_event(product(v) * v) for v in probes]).mean(0)
        total = torch.zeros_like(t)
        for index in range(event_size(z)):
            unit = torch.zeros_like(z).flatten(1)
            unit[:, index] = 1
            row = product(unit.reshape(z.shape))
            total = total + row.flatten(1)[:, index]
    return total


def ode_log_prob(
    reverse: Flow,
    z: Tensor,
    settings: OdeSettings | None = None,
    source: RandomSource = None,
    progress: bool = False,
    *,
    from_noise: bool = False,
) -> LogDensity:
    """Return log p(z_0) under the generative ODE.

    If gradients are enabled and z requires one, so does ``log_p``: the gradient in z, not in the
    parameters.

    Args:
        reverse: the reverse process.
        z: z_0, or z_1 with ``from_noise``, ``(B, *event)``; everything is computed in its dtype.
        settings: solver, tolerances, probes.
        source: source of randomness for the probes.
        progress: show progress bars.
        from_noise: solve from z_1 to z_0: a sample and its density from one solution.

    Raises:
        UserError: the solver cannot reach the tolerances.
    """
    settings = settings or OdeSettings()
    times, weights = trace_times(reverse.process, settings.nodes)
    order = times.flip(0) if from_noise else times
    with (
        frozen(*reverse.parts),
        torch.set_grad_enabled(torch.is_grad_enabled() and z.requires_grad),
    ):
        path, evaluations = solve_ode(
            reverse, z, order, settings.solver, settings.rtol, settings.atol, progress
        )
        path = path.flip(0) if from_noise else path
        traces = _traces(reverse, path, times.to(z), settings, source, progress)
        end = path[-1].cpu().double()
        missing = reverse.process.missing
        missing = None if missing is None else missing.cpu().double()
        prior = Gaussian(torch.zeros_like(end), torch.ones_like(end), missing=missing).log_prob(end)
        _, half_weights = trace_times(reverse.process, settings.nodes // 2)
        return LogDensity(
            log_p=prior + weights @ traces,
            coarse=prior + half_weights @ traces[::2],
            z_0=path[0],
            z_1=path[-1],
            nfe=evaluations + len(times),
        )


def _traces(
    reverse: Flow,
    path: Tensor,
    times: Tensor,
    settings: OdeSettings,
    source: RandomSource,
    progress: bool,
) -> Tensor:
    """Return the traces along a path ``(N, B, *event)``: ``(N, B)``, float64 on the CPU."""
    z = path[0]
    probes = settings.probes_for(event_size(z))
    rows = min(_ROWS_AT_ONCE, _VALUES_AT_ONCE // event_size(z))
    together = max(1, rows // max(1, len(z)))
    traces = []
    with tqdm(
        total=len(times), desc="traces", unit="node", disable=not progress, delay=1, leave=False
    ) as bar:
        for states, at in zip(path.split(together), times.split(together), strict=True):
            vectors = None
            if probes is not None:
                # Draw time by time: the probes must not depend on how many times are batched.
                drawn = [[_probe(settings, z, source) for _ in range(probes)] for _ in at]
                vectors = [torch.cat(column) for column in zip(*drawn, strict=True)]
            flow, all_times = reverse.repeated(len(at)), at.repeat_interleave(len(z))
            values = trace(flow, states.flatten(0, 1), all_times, vectors)
            traces.append(values.reshape(len(at), len(z)).cpu().double())
            bar.update(len(at))
    return torch.cat(traces)


def _probe(settings: OdeSettings, z: Tensor, source: RandomSource) -> Tensor:
    """Draw one probe for each example, ``(B, *event)``."""
    if settings.probe == "gaussian":
        return standard_normal(z, source)
    return 2 * (uniform_noise(z, source) < 0.5).to(z) - 1


@torch.no_grad()
def round_trip_error(reverse: Flow, z: Tensor, settings: OdeSettings | None = None) -> Tensor:
    """Return the root mean square error of z_0 after solving z_0 -> z_1 -> z_0, ``(B,)``."""
    settings = settings or OdeSettings()
    times, _ = trace_times(reverse.process, settings.nodes)
    there, _ = solve_ode(reverse, z, times, settings.solver, settings.rtol, settings.atol)
    back, _ = solve_ode(
        reverse, there[-1], times.flip(0), settings.solver, settings.rtol, settings.atol
    )
    return (back[-1] - z).flatten(1).square().mean(1).sqrt()
