r"""The best time grid of a trained model, found after training.

With the fitted reverse variance (:mod:`ndm.evaluation.calibrate`) a step from t to s < t costs

.. math::
    c(s, t) = \tfrac D2 \log(1 + u(s, t)), \qquad u(s, t) = E\|\Delta\mu\|^2 / (D v) ,

whatever the other steps are, plus :math:`\tfrac D2 E \log r` with a learned variance r, which
divides 1 + u. Among all grids of T steps whose times are among M + 1 candidates, the
best one is a shortest path (Watson et al. 2021):

.. math::
    C_0(0) = 0, \qquad C_k(t) = \min_{s < t}\, [C_{k-1}(s) + c(s, t)] , \qquad C_T(1) \to \min .

All costs take one evaluation of the predictor at each candidate, and one of F at each pair of
candidates if F depends on t. An example has the same noise at all candidates, so that the costs are
smooth in time, and the shortest path does not follow their noise. The bound of the model on a
fitted grid is valid, whatever data the fit used. Fit on the training split, so that results on the
test split stay fair.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ndm.curve import Curve
from ndm.data import EventDataset, spread
from ndm.errors import UserError, check_whole
from ndm.forward import gaussian, posterior_coefficients
from ndm.model import DiffusionModel
from ndm.parts import evaluation_mode
from ndm.random import ExampleGenerators, standard_normal
from ndm.reverse import MarkovReverse, require_markov
from ndm.shapes import event_size
from ndm.time_grid import TimeGrid
from ndm.time_sampling import PiecewiseConstant

CANDIDATES = 64
"""M, the default number of candidate steps, at least."""
MOST_FITTED = 64
"""The largest T to fit a grid for; more steps are close enough to continuous time."""
_VALUES = 2**14  # numbers to average a cost over
_GRID = 21  # stream of noise
_NUMBERS = 2**24  # most numbers at once: F at all candidates


@dataclass(frozen=True)
class StepCosts:
    """The cost of every step between two candidate times."""

    candidates: TimeGrid
    """The candidates t_0 ... t_M."""
    ratios: Tensor
    """The best reverse variance of each step over v, 1 + u, in the shape of ``costs``."""
    costs: Tensor
    """c(t_i, t_j), ``(M + 1, M + 1)``, nats, float64; infinite unless i < j and eta allows it."""

    def best_grid(self, steps: int) -> TimeGrid:
        """Return the grid of T steps with the least total cost.

        Raises:
            UserError: T is larger than the number of candidate steps, or no such grid has a finite
                cost.
        """
        check_whole("steps", steps, 1)
        most = self.candidates.steps
        if steps > most:
            raise UserError(f"steps={steps}: give at most {most}, the number of candidate steps")
        total = torch.full((most + 1,), torch.inf, dtype=torch.float64)
        total[0] = 0.0
        origins = []
        for _ in range(steps):
            total, origin = (total[:, None] + self.costs).min(0)
            origins.append(origin)
        if not total[most].isfinite():
            raise UserError(
                f"no times of {steps} steps have a finite bound: the model's output is not finite,"
                " or its eta is too large for so few steps"
            )
        path = [most]
        for origin in reversed(origins):
            path.append(int(origin[path[-1]]))
        times = self.candidates.tolist()
        return TimeGrid([times[index] for index in reversed(path)])

    def variance_ratio(self, grid: TimeGrid) -> PiecewiseConstant:
        """Return the best reverse variance of a grid of candidate times."""
        places = [round(time * self.candidates.steps) for time in grid.tolist()]
        return PiecewiseConstant(self.ratios[places[:-1], places[1:]], grid)


def best_grid(
    model: DiffusionModel,
    data: EventDataset,
    steps: int,
    *,
    candidates: int = CANDIDATES,
    examples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> TimeGrid:
    """Fit the times of the T-step model, for the reverse variance fitted to them.

    Args:
        model: the model.
        data: examples to fit on, different from those to evaluate on.
        steps: T; above :data:`MOST_FITTED` the grid has equal steps.
        candidates: least number of candidate steps; raised to a multiple of T, so that the fit is
            at least as good as equal steps.
        examples: number of examples to use, evenly spread over the data; by default 16 to 128,
            fewer if they have more dimensions, over which costs are averaged.
        batch_size: examples per batch, at most.
        seed: seed of the noise.
        progress: show a progress bar.

    Returns:
        The grid, for the argument ``steps`` of :meth:`ndm.NDM.bound`, :meth:`ndm.NDM.sample` and
        :func:`ndm.evaluation.best_variance_ratio`.

    Raises:
        UserError: an argument is out of range, or the model is in continuous time only.
    """
    check_whole("steps", steps, 1)
    check_whole("candidates", candidates, 1)
    if not 1 < steps <= MOST_FITTED:
        return TimeGrid(steps)
    costs = step_costs(
        model,
        data,
        candidates_for(steps, candidates),
        examples=examples,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return costs.best_grid(steps)


def candidates_for(steps: int, least: int = CANDIDATES) -> int:
    """Return the number of candidate steps for T steps, a multiple of T."""
    return steps * max(2, -(-least // steps))


@torch.no_grad()
def step_costs(
    model: DiffusionModel,
    data: EventDataset,
    candidates: int,
    *,
    examples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> StepCosts:
    """Measure the cost of every step between two of M + 1 equally spaced times.

    The arguments are those of :func:`best_grid`; ``candidates`` is M.
    """
    if len(data) == 0:
        raise UserError("there is nothing to fit on: the split is empty")
    dims = data[0].numel()
    if examples is None:
        examples = max(16, min(128, _VALUES // dims))
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    require_markov(model.reverse_process, "a fitted time grid")
    grid, chosen = TimeGrid(candidates), spread(len(data), examples)
    size = max(1, min(batch_size, _NUMBERS // (dims * (candidates + 1))))
    sums = torch.zeros(2, candidates + 1, candidates + 1, dtype=torch.float64)
    possible = torch.zeros(candidates + 1, candidates + 1, dtype=torch.bool)
    batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    bar = tqdm(
        total=len(batches) * candidates,
        desc=f"fitting {candidates} times",
        unit="time",
        disable=not progress,
        delay=1,
        leave=False,
    )
    with bar, evaluation_mode(model):
        for batch in batches:
            x, given = data.__getitems__(batch).to(model.like), model.given_data(data, batch)
            reverse = require_markov(given.reverse_process, "a fitted time grid")
            curve = reverse.process.curve(x)
            noise = standard_normal(curve.like, ExampleGenerators(seed, batch, _GRID))
            for i, j, squares, logs in _step_errors(reverse, model.eta, curve, grid, noise):
                sums[0, i:j, j] += squares
                sums[1, i:j, j] += logs
                possible[i:j, j] = True
                bar.update()
    excess, logs = sums / len(chosen)
    costs = torch.full_like(excess, torch.inf)
    costs[possible] = 0.5 * event_size(noise) * (torch.log1p(excess) + logs)[possible]
    return StepCosts(grid, 1 + excess, costs)


def _step_errors(
    reverse: MarkovReverse, eta: float, curve: Curve, grid: TimeGrid, noise: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield i, j, and for the steps from t_j to t_i ... t_{j-1} two sums over the batch.

    t_i is the first time that eta allows to reach from t_j. Each sum is ``(j - i,)``.

    They are the means over the dimensions of (1 + Δmu²/v)/r - 1 and of log r, where r is the
    learned reverse variance, or 1.
    """
    process = reverse.process
    levels = [process.level(time, noise) for time in grid.tolist()]
    true = torch.stack([curve.at(level) for level in levels])
    dims = event_size(true[0])
    gamma = torch.stack([level.gamma[0].double() for level in levels]).cpu()
    for j in range(1, grid.steps + 1):
        allowed = -(eta**2) * torch.expm1(gamma[:j] - gamma[j]) <= 1
        if not bool(allowed[-1]):
            continue
        i = int(allowed.int().argmax())
        z = gaussian(true[j], levels[j], process.missing).sample(noise)
        guess = reverse.guess(z, levels[j], eta)
        at = [guess.curve.at(level) for level in levels[i : j + 1]]
        error = true[i : j + 1] - torch.stack(at)
        index = torch.arange(i, j, dtype=torch.float64, device=noise.device)
        s = process.level(grid.at(index), index.to(noise.dtype))
        t = process.level(grid.at(torch.full_like(index, j)), index.to(noise.dtype))
        step = posterior_coefficients(s, t, eta)
        shape = (-1, *[1] * (error.dim() - 1))
        weight, alpha = step.target_weight.view(shape), s.alpha.view(shape)
        mean_error = weight * error[-1] + alpha * (error[:-1] - error[-1])
        square = mean_error.square() / step.variance.view(shape)
        if guess.variance is None:
            yield i, j, (square.flatten(1).sum(1).double() / dims).cpu(), torch.zeros(j - i)
            continue
        learned = weight**2 / step.variance.view(shape) * guess.variance
        square = (square - learned) / (1 + learned)
        sums = [part.flatten(1).sum(1).double() / dims for part in (square, torch.log1p(learned))]
        yield i, j, sums[0].cpu(), sums[1].cpu()
