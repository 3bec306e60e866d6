r"""Sampling: from z_1 ~ N(0, I) backward in time to z_0, then x from the decoder (NDM, Algorithm
2).

.. math::
    \text{ancestral: } z_s \sim q(z_s \,|\, z_t, x = \hat x(z_t, t)) \text{ with } v = \eta^2\sigma_s^2(1 - e^{\gamma_s - \gamma_t}), \qquad
    \text{SDE, ODE: } dz = f(z, t, \hat x)\,dt + \eta\sigma\sqrt{\gamma'}\,d\bar w .

One loop owns the time grid; a step class writes only the step from t to s < t. ``Euler`` and
``Heun`` serve the SDE and, with eta = 0, the ODE. The noise of the SDE does not depend on z, so
Heun's trapezoid is of weak order 2 there (Kloeden & Platen 1992, section 15.1) and of order 2 on
the ODE; ancestral steps and Euler are of order 1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from ndm.errors import UserError, check_choice, require
from ndm.ode import ADAPTIVE_SOLVERS, check_tolerances, solve_ode
from ndm.random import standard_normal
from ndm.reverse import Reverse, require_markov
from ndm.schedule import NoiseLevel
from ndm.shapes import expand
from ndm.time_sampling import PiecewiseConstant

Method = Literal["ancestral", "ddim", "sde", "ode"]
SDE_SOLVERS = ("euler", "heun", "torchsde-euler", "torchsde-srk")
ODE_SOLVERS = ("heun", "euler", "dopri5")


class Step(ABC):
    """One step of a sampler.

    Args:
        eta: 1 is the full noise of DDPM, 0 none.
    """

    def __init__(self, eta: float):
        if not (eta >= 0 and math.isfinite(eta)):
            raise UserError(
                f"eta={eta}: give a number of at least 0; 1 is DDPM's noise, 0 is deterministic"
            )
        self.eta = float(eta)

    @abstractmethod
    def __call__(
        self, reverse: Reverse, z: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor
    ) -> Tensor:
        """z_s from z_t, both ``(B, *event)``, with standard normal ``noise`` of the same shape
        (ignored at eta = 0).
        """


class Ancestral(Step):
    """z_s from the posterior at x̂: DDPM's step at eta = 1, DDIM's at eta = 0, and everything
    between.

    Args:
        eta: 1 is DDPM, 0 is DDIM.
        variance_ratio: r(t), for a reverse variance of r v instead of v:
            :func:`ndm.evaluation.calibrate.best_variance_ratio` of this number of steps.
    """

    def __init__(self, eta: float = 1.0, variance_ratio: PiecewiseConstant | None = None):
        super().__init__(eta)
        self.variance_ratio = variance_ratio

    def __call__(
        self, reverse: Reverse, z: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor
    ) -> Tensor:
        step = require_markov(reverse, "ancestral sampling").posterior(z, s, t, self.eta)
        if self.variance_ratio is not None:
            noise = noise * expand(self.variance_ratio((s.t + t.t) / 2), z).sqrt()
        return step.sample(noise)


class Euler(Step):
    """Euler-Maruyama on the generative SDE; Euler's method on the ODE at eta = 0."""

    def __call__(
        self, reverse: Reverse, z: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor
    ) -> Tensor:
        moved = z + expand(s.t - t.t, z) * reverse.drift(z, t, self.eta)
        return (
            moved
            if self.eta == 0
            else moved + expand(t.diffusion(self.eta) * (t.t - s.t).sqrt(), z) * noise
        )


class Heun(Step):
    """Heun's trapezoid on the generative SDE, with the mean of g² over the step; two evaluations a
    step.
    """

    def __call__(
        self, reverse: Reverse, z: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor
    ) -> Tensor:
        span = expand(s.t - t.t, z)
        first = reverse.drift(z, t, self.eta)
        if self.eta:
            mean_square = 0.5 * (t.diffusion(self.eta) ** 2 + s.diffusion(self.eta) ** 2)
            z = z + expand((mean_square * (t.t - s.t)).sqrt(), z) * noise
        return z + 0.5 * span * (first + reverse.drift(z + span * first, s, self.eta))


class Sampler(ABC):
    """Carries z_1 to z_0."""

    @abstractmethod
    def __call__(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """z_0 from ``z`` = z_1, ``(B, *event)``."""


class GridSampler(Sampler):
    """A step class on a uniform grid of times from 1 to 0.

    Args:
        step: the step.
        steps: number of steps.
    """

    def __init__(self, step: Step, steps: int):
        if steps < 1:
            raise UserError(f"steps={steps}: sampling needs at least one step")
        self.step, self.steps = step, steps

    def __call__(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        for _, state in self.path(reverse, z, generator, progress):
            z = state
        return z

    def path(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Iterator[tuple[float, Tensor]]:
        """The whole path from ``z`` = z_1: each time of the grid, from 1 to 0, with z there, ``(B,
        *event)``, as it is reached.
        """
        level = reverse.process.level(1.0, z)
        yield 1.0, z
        for index in tqdm(
            range(self.steps - 1, -1, -1),
            desc="sampling",
            unit="step",
            disable=not progress,
            delay=1,
            leave=False,
        ):
            following = reverse.process.level(index / self.steps, z)
            noise = standard_normal(z, generator) if self.step.eta else z
            z = self.step(reverse, z, level, following, noise)
            level = following
            yield index / self.steps, z


class AdaptiveODE(Sampler):
    """torchdiffeq's solvers with an adaptive step on the generative ODE, see :func:`solve_ode`.

    Args:
        solver: a method of ``torchdiffeq.odeint``.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """

    def __init__(self, solver: str = "dopri5", rtol: float = 1e-4, atol: float = 1e-4):
        check_tolerances(rtol, atol)
        if solver not in ADAPTIVE_SOLVERS:
            raise UserError(
                f"solver={solver!r} has no adaptive step: choose one of"
                f" {', '.join(ADAPTIVE_SOLVERS)}"
            )
        self.solver, self.rtol, self.atol = solver, rtol, atol

    def __call__(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        path, _ = solve_ode(
            reverse, z, torch.tensor([1.0, 0.0]), self.solver, self.rtol, self.atol, progress
        )
        return path[-1]


class TorchSDE(Sampler):
    """torchsde's solvers on the generative SDE (extra ``sde``).

    Args:
        steps: number of steps of the uniform grid.
        solver: a method of ``torchsde.sdeint`` for Itô equations with diagonal noise: ``euler``,
            ``milstein`` or ``srk``.
        eta: 1 is the full noise of DDPM.

    Raises:
        MissingExtraError: torchsde is not installed.
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
    ) -> Tensor:
        shape, eta = z.shape, self.eta

        class Equation(torch.nn.Module):
            """The SDE in the time tau = 1 - t, on flattened events, as torchsde wants it."""

            noise_type, sde_type = "diagonal", "ito"

            def f(self, tau: Tensor, y: Tensor) -> Tensor:
                state = y.reshape(shape)
                return -reverse.drift(
                    state, reverse.process.level((1 - tau).clamp(0, 1), state), eta
                ).flatten(1)

            def g(self, tau: Tensor, y: Tensor) -> Tensor:
                return (
                    reverse.process.level((1 - tau).clamp(0, 1), y)
                    .diffusion(eta)[:, None]
                    .expand_as(y)
                )

        flat = z.flatten(1)
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=z.device))
        motion = self.torchsde.BrownianInterval(
            0.0,
            1.0,
            size=flat.shape,
            dtype=z.dtype,
            device=z.device,
            entropy=seed,
            levy_area_approximation="space-time",
        )
        grid = torch.tensor([0.0, 1.0], dtype=z.dtype, device=z.device)
        path = self.torchsde.sdeint(
            Equation(), flat, grid, bm=motion, method=self.solver, dt=1 / self.steps
        )
        return path[-1].reshape(shape)


def make_sampler(
    method: str = "ancestral",
    steps: int = 100,
    eta: float | None = None,
    solver: str | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Sampler:
    """Build a sampler from its name.

    Args:
        method: ``ancestral``, ``ddim``, ``sde`` or ``ode``.
        steps: number of steps of the grid (not used by ``dopri5``).
        eta: noise of the reverse process, for ``ancestral`` and ``sde``; default 1.
        solver: for ``sde`` one of euler (default), heun, torchsde-euler, torchsde-srk; for ``ode``
            one of heun (default), euler, dopri5.
        rtol: relative tolerance of ``dopri5``.
        atol: absolute tolerance of ``dopri5``.

    Raises:
        UserError: a name is not known, or the choices contradict one another.
    """
    check_choice("method", method, get_args(Method))
    known = {"sde": SDE_SOLVERS, "ode": ODE_SOLVERS}.get(method, ())
    if solver is not None and solver not in known:
        allowed = f"choose one of {', '.join(known)}" if known else "it takes none"
        raise UserError(f"solver={solver!r} does not go with method={method!r}: {allowed}")
    if eta and method in ("ddim", "ode"):
        raise UserError(
            f"eta={eta} does not go with method={method!r}, which is deterministic; use"
            " method='ancestral' or 'sde'"
        )
    noise = 1.0 if eta is None else eta
    if method in ("ancestral", "ddim"):
        return GridSampler(Ancestral(noise if method == "ancestral" else 0.0), steps)
    if solver == "dopri5":
        return AdaptiveODE(solver, rtol, atol)
    if solver and solver.startswith("torchsde-"):
        return TorchSDE(steps, solver.removeprefix("torchsde-"), noise)
    name = solver or known[0]
    rate = noise if method == "sde" else 0.0
    return GridSampler(Heun(rate) if name == "heun" else Euler(rate), steps)
