r"""Samplers: from z_1 ~ N(0, I) backward in time to z_0 (NDM, Algorithm 2).

.. math::
    \text{ancestral: } z_s \sim q(z_s \,|\, z_t, x = \hat x(z_t, t)) \text{ with }
    v = \eta^2\sigma_s^2(1 - e^{\gamma_s - \gamma_t}), \qquad
    \text{SDE, ODE: } dz = f(z, t, \hat x)\,dt + \eta\sigma\sqrt{\gamma'}\,d\bar w .

:class:`GridSampler` loops over the time grid; a :class:`Step` computes z_s from z_t, s < t.
:class:`Euler` and :class:`Heun` solve the SDE and, with eta = 0, the ODE. Ancestral steps and Euler
have order 1. Heun's trapezoid has order 2 on the ODE and weak order 2 on the SDE, whose noise does
not depend on z (Kloeden & Platen 1992, section 15.1). The decoder then draws x from z_0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ndm.errors import UserError, check_choice, check_whole, require
from ndm.ode import ADAPTIVE_SOLVERS, check_tolerances, solve_ode
from ndm.parts import evaluation_mode
from ndm.random import standard_normal
from ndm.reverse import Reverse, require_markov
from ndm.schedule import NoiseLevel
from ndm.shapes import expand
from ndm.time_grid import Steps, TimeGrid, as_grid
from ndm.time_sampling import PiecewiseConstant

Method = Literal["ancestral", "ddim", "sde", "ode"]
SDE_SOLVERS = ("euler", "heun", "torchsde-euler", "torchsde-srk")
ODE_SOLVERS = ("heun", "euler", "dopri5")


class Step(ABC):
    """One step of a sampler.

    Args:
        eta: stochasticity; 1 is DDPM's noise, 0 is deterministic.
    """

    def __init__(self, eta: float = 1.0):
        if not (isinstance(eta, (int, float)) and eta >= 0 and math.isfinite(eta)):
            raise UserError(
                f"eta={eta}: give a number of at least 0; 1 is DDPM's noise, 0 is deterministic"
            )
        self.eta = float(eta)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(eta={self.eta:g})"

    @abstractmethod
    def __call__(
        self, reverse: Reverse, z: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor
    ) -> Tensor:
        """Return z_s, ``(B, *event)``.

        Args:
            reverse: the reverse process.
            z: z_t, ``(B, *event)``.
            t: the noise level of z.
            s: the next noise level, s < t.
            noise: standard normal in the shape of z; ignored at eta = 0.
        """


class Ancestral(Step):
    """A draw of z_s from the posterior at x̂.

    Args:
        eta: stochasticity; 1 is DDPM, 0 is DDIM.
        variance_ratio: r(t), for the reverse variance r v instead of v; see
            :func:`ndm.evaluation.calibrate.best_variance_ratio`, which fits it for one number of
            steps.
    """

    def __init__(self, eta: float = 1.0, variance_ratio: PiecewiseConstant | None = None):
        super().__init__(eta)
        self.variance_ratio = variance_ratio

    def __call__(
        self, reverse: Reverse, z: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor
    ) -> Tensor:
        posterior = require_markov(reverse, "ancestral sampling").posterior(z, s, t, self.eta)
        if self.variance_ratio is not None:
            ratio = self.variance_ratio.broadcast((s.exact_time + t.exact_time) / 2, z)
            noise = noise * ratio.to(z.dtype).sqrt()
        return posterior.sample(noise)


class Euler(Step):
    """Euler-Maruyama on the generative SDE; Euler's method on the ODE at eta = 0."""

    def __call__(
        self, reverse: Reverse, z: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor
    ) -> Tensor:
        span = t.since(s)
        z_s = z - expand(span, z) * reverse.drift(z, t, self.eta)
        if self.eta:
            z_s = z_s + expand(t.diffusion(self.eta) * span.sqrt(), z) * noise
        return z_s


class Heun(Step):
    """Heun's trapezoid on the generative SDE, or on the ODE at eta = 0.

    A step evaluates the drift twice. The noise has the mean of g² at both ends of the step.
    """

    def __call__(
        self, reverse: Reverse, z: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor
    ) -> Tensor:
        span = -expand(t.since(s), z)
        first = reverse.drift(z, t, self.eta)
        if self.eta:
            mean_square = 0.5 * (t.diffusion(self.eta) ** 2 + s.diffusion(self.eta) ** 2)
            z = z + expand((mean_square * t.since(s)).sqrt(), z) * noise
        return z + 0.5 * span * (first + reverse.drift(z + span * first, s, self.eta))


class Sampler(ABC):
    """Base class of samplers, which map z_1 to z_0."""

    @abstractmethod
    def __call__(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
        start: float = 1.0,
    ) -> Tensor:
        """Return z_0, ``(B, *event)``.

        Args:
            reverse: the reverse process.
            z: z at the time ``start``, ``(B, *event)``.
            generator: source of randomness; PyTorch's global generator by default.
            progress: show a progress bar.
            start: the time of z, in (0, 1].
        """


class GridSampler(Sampler):
    """A sampler that repeats a step on a grid of times from 1 to 0.

    From another start, the times of the grid are multiplied by it. With gradients, each step is
    computed again in the backward pass, so that memory does not grow with the steps.

    Args:
        step: the step.
        steps: number of equal steps, or the time grid.
    """

    def __init__(self, step: Step, steps: Steps):
        if not isinstance(step, Step):
            given = f"the class {step.__name__}" if isinstance(step, type) else repr(step)
            raise UserError(f"step is {given}: give a step, such as ndm.Ancestral()")
        if not isinstance(steps, TimeGrid):
            check_whole("steps", steps, 1)
        self.step, self.grid = step, as_grid(steps)

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.grid.steps

    def __repr__(self) -> str:
        grid = self.steps if self.grid.times is None else self.grid
        return f"GridSampler({self.step!r}, {grid})"

    def __call__(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
        start: float = 1.0,
    ) -> Tensor:
        for _, state in self.path(reverse, z, generator, progress, start):
            z = state
        return z

    def path(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
        start: float = 1.0,
    ) -> Iterator[tuple[float, Tensor]]:
        """Yield (t, z_t) for each time of the grid, from ``z`` at ``start`` to z_0."""
        t = reverse.process.level(start, z)
        yield start, z
        indices, hidden = range(self.steps - 1, -1, -1), not progress
        for index in tqdm(
            indices, desc="sampling", unit="step", disable=hidden, delay=1, leave=False
        ):
            time = start * float(self.grid.at(torch.tensor(index, dtype=torch.float64)))
            s = reverse.process.level(time, z)
            noise = standard_normal(z, generator) if self.step.eta else z
            z, t = self._step(reverse, z, t, s, noise), s
            yield time, z

    def _step(
        self, reverse: Reverse, z: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return self.step(reverse, z, t, s, noise)

        def step(z: Tensor) -> Tensor:
            with evaluation_mode(*reverse.parts):  # also when it is computed again
                return self.step(reverse, z, t, s, noise)

        found: Tensor = checkpoint(step, z, use_reentrant=False)
        return found


class AdaptiveODE(Sampler):
    """An adaptive solver of torchdiffeq on the generative ODE, see :func:`ndm.ode.solve_ode`.

    Args:
        solver: a method of ``torchdiffeq.odeint``.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """

    def __init__(self, solver: str = "dopri5", rtol: float = 1e-4, atol: float = 1e-4):
        check_tolerances(rtol, atol)
        if solver not in ADAPTIVE_SOLVERS:
            raise UserError(
                f"solver={solver!r} is not adaptive: choose one of {', '.join(ADAPTIVE_SOLVERS)}"
            )
        self.solver, self.rtol, self.atol = solver, rtol, atol

    def __call__(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
        start: float = 1.0,
    ) -> Tensor:
        path, _ = solve_ode(
            reverse, z, torch.tensor([start, 0.0]), self.solver, self.rtol, self.atol, progress
        )
        return path[-1]


class TorchSDE(Sampler):
    """A solver of torchsde on the generative SDE (extra ``sde``).

    Args:
        steps: number of steps of the uniform grid.
        solver: a method of ``torchsde.sdeint`` for Itô equations with diagonal noise: ``euler``,
            ``milstein`` or ``srk``.
        eta: stochasticity, positive; 1 is DDPM's noise.

    Raises:
        MissingExtraError: torchsde is not installed.
        UserError: steps or eta is out of range.
    """

    def __init__(self, steps: int, solver: str = "srk", eta: float = 1.0):
        require("torchsde", "torchsde", "sde")
        import torchsde

        if steps < 1 or not eta > 0:
            raise UserError(
                f"steps={steps}, eta={eta}: torchsde needs at least one step and eta > 0"
            )
        self.torchsde, self.steps, self.solver, self.eta = torchsde, steps, solver, eta

    def __call__(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
        start: float = 1.0,
    ) -> Tensor:
        shape, eta = z.shape, self.eta

        class Equation(torch.nn.Module):
            """The SDE in the time tau = start - t on flattened events, for torchsde."""

            noise_type, sde_type = "diagonal", "ito"

            def f(self, tau: Tensor, y: Tensor) -> Tensor:
                state = y.reshape(shape)
                level = reverse.process.level((start - tau).clamp(0, 1), state)
                return -reverse.drift(state, level, eta).flatten(1)

            def g(self, tau: Tensor, y: Tensor) -> Tensor:
                level = reverse.process.level((start - tau).clamp(0, 1), y)
                return level.diffusion(eta)[:, None].expand_as(y)

        flat = z.flatten(1)
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=z.device))
        motion = self.torchsde.BrownianInterval(
            0.0,
            start,
            size=flat.shape,
            dtype=z.dtype,
            device=z.device,
            entropy=seed,
            levy_area_approximation="space-time",
        )
        grid = torch.tensor([0.0, start], dtype=z.dtype, device=z.device)
        path = self.torchsde.sdeint(
            Equation(), flat, grid, bm=motion, method=self.solver, dt=start / self.steps
        )
        return path[-1].reshape(shape)


def make_sampler(
    method: str = "ancestral",
    steps: Steps = 100,
    eta: float | None = None,
    solver: str | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Sampler:
    """Build a sampler from its name.

    Args:
        method: ``ancestral``, ``ddim``, ``sde`` or ``ode``.
        steps: number of steps, or the time grid; ignored by ``dopri5``.
        eta: stochasticity, for ``ancestral`` and ``sde``; default 1.
        solver: for ``sde``: euler (default), heun, torchsde-euler or torchsde-srk; for ``ode``:
            heun (default), euler or dopri5.
        rtol: relative tolerance of ``dopri5``.
        atol: absolute tolerance of ``dopri5``.

    Raises:
        UserError: a name is unknown, or arguments contradict each other.
    """
    check_choice("method", method, get_args(Method))
    solvers = {"sde": SDE_SOLVERS, "ode": ODE_SOLVERS}.get(method, ())
    if solver is not None and solver not in solvers:
        allowed = f"choose one of {', '.join(solvers)}" if solvers else "leave solver out"
        raise UserError(f"solver={solver!r} does not work with method={method!r}: {allowed}")
    deterministic = method in ("ddim", "ode")
    if eta and deterministic:
        raise UserError(
            f"eta={eta} does not work with method={method!r}, which is deterministic; use"
            " method='ancestral' or 'sde'"
        )
    eta = 0.0 if deterministic else 1.0 if eta is None else eta
    if method in ("ancestral", "ddim"):
        return GridSampler(Ancestral(eta), steps)
    if solver == "dopri5":
        return AdaptiveODE(solver, rtol, atol)
    if solver and solver.startswith("torchsde-"):
        return TorchSDE(as_grid(steps).steps, solver.removeprefix("torchsde-"), eta)
    step = Heun(eta) if (solver or solvers[0]) == "heun" else Euler(eta)
    return GridSampler(step, steps)
