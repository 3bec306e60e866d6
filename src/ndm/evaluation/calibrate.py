r"""The best reverse variance and the best eta of a trained model, fitted after training.

Discrete time: with :math:`u = E\|\Delta\mu\|^2 / (D v)`, the cost of a step,
:math:`\tfrac D2 [\log r + (1 + u)/r - 1]`, has its minimum at

.. math::
    r = 1 + u, \qquad \text{with the value } \tfrac D2 \log(1 + u) \le \tfrac D2 u .

A learned variance r' is multiplied by r, whose best value is then
:math:`E[(1 + \Delta\mu^2/v)/r']`. With one r and one u for each dimension the value is
:math:`\tfrac12 \sum_d \log(1 + u_d)`, which is lower, because the logarithm is concave.

Continuous time: with :math:`c = \Delta\dot F/\gamma' - \tfrac12 \Delta F`, the integrand is

.. math::
    \tfrac12 e^{-\gamma}\gamma' \bigl[\|c\|^2/\eta^2 - c \cdot \Delta F
    + \tfrac14 \eta^2 \|\Delta F\|^2\bigr],

and its minimum is at

.. math::
    \eta^2 = 2 \sqrt{E\, w \|c\|^2 / E\, w \|\Delta F\|^2}, \qquad w = e^{-\gamma}\gamma'
    \qquad (F = x \text{ gives } 1) .

Both are valid bounds of the model with the fitted reverse process, whatever data the fit used. Fit
on the training split, so that results on the test split stay fair. The fit of r is that of
Analytic-DPM (Bao et al. 2022); the fit of eta is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data import EventDataset, spread
from ndm.discrete_time import discrete_errors
from ndm.elbo import continuous_errors
from ndm.errors import UserError, check_choice, check_whole
from ndm.evaluation.fit_times import best_grid
from ndm.model import DiffusionModel
from ndm.parts import evaluation_mode
from ndm.random import ExampleGenerators, standard_normal, uniform
from ndm.reverse import require_markov
from ndm.sample import Ancestral, GridSampler
from ndm.shapes import event_size, sum_event
from ndm.time_grid import Steps, TimeGrid, as_grid
from ndm.time_sampling import Draw, PiecewiseConstant

GridKind = Literal["equal", "fitted"]
VarianceKind = Literal["step", "dimension"]
_FIT = 20  # stream of noise


@torch.no_grad()
def best_variance_ratio(
    model: DiffusionModel,
    data: EventDataset,
    steps: Steps,
    *,
    by_dimension: bool = False,
    bins: int = 64,
    examples: int = 512,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> PiecewiseConstant:
    """Fit r(t), the factor by which the reverse variance of the T-step model exceeds v.

    Args:
        model: the model.
        data: examples to fit on, different from those to evaluate on.
        steps: T, or the time grid.
        by_dimension: fit one r for each dimension of the latents instead of one for all.
        bins: number of equal parts of [0, 1] with one r each; if T is smaller, or if the grid has
            unequal steps, each step has its r.
        examples: number of examples to use, evenly spread over the data.
        batch_size: examples per batch.
        seed: seed of times and noise.
        progress: show a progress bar.

    Returns:
        r(t), for the argument ``variance_ratio`` of :meth:`ndm.NDM.bound` and of
        :class:`ndm.sample.Ancestral`.
    """
    grid = as_grid(steps)
    require_markov(model.reverse_process, "a fitted reverse variance")

    def errors(given: DiffusionModel, x: Tensor, u: Tensor, noise: Tensor) -> list[Tensor]:
        reverse = require_markov(given.reverse_process, "a fitted reverse variance")
        found = discrete_errors(reverse, given.process.curve(x), Draw(u, noise), grid, model.eta)
        square = found.error.double() ** 2
        if found.excess is not None:
            learned = found.excess.double()
            square = (square - learned) / (1 + learned)
        return [square if by_dimension else sum_event(square) / event_size(noise)]

    equal = grid.times is None
    parts = min(grid.steps, bins) if equal else grid.steps
    (excess,) = _means(model, data, errors, parts, examples, batch_size, seed, progress)
    return PiecewiseConstant(1 + excess, None if equal else grid)


@torch.no_grad()
def best_eta(
    model: DiffusionModel,
    data: EventDataset,
    *,
    bins: int = 32,
    examples: int = 512,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> PiecewiseConstant:
    """Fit eta(t) of the reverse process in continuous time.

    The arguments are those of :func:`best_variance_ratio`.

    Returns:
        eta(t), for the argument ``eta`` of :meth:`ndm.NDM.bound`.
    """

    def errors(given: DiffusionModel, x: Tensor, u: Tensor, noise: Tensor) -> list[Tensor]:
        # The error is c - ½ eta² ΔF: eta = 0 gives c, and the difference to eta = 1 is ½ ΔF.
        # One evaluation of the networks gives both.
        both = torch.tensor([0.0, 1.0]).to(x).reshape(2, *[1] * noise.dim())
        level, (rest, at_one), _ = continuous_errors(
            given.reverse_process, given.process.curve(x), Draw(u, noise), both
        )
        difference = 2 * (rest - at_one)
        weight = level.snr_decay  # varies within a part of [0, 1], so it belongs in both means
        return [weight * sum_event(rest**2), weight * sum_event(difference**2)]

    rest, square = _means(model, data, errors, bins, examples, batch_size, seed, progress)
    tiny = torch.finfo(torch.float32).tiny
    return PiecewiseConstant((2 * (rest.clamp(min=tiny) / square.clamp(min=tiny)).sqrt()).sqrt())


def _means(
    model: DiffusionModel,
    data: EventDataset,
    errors: Callable[[DiffusionModel, Tensor, Tensor, Tensor], list[Tensor]],
    bins: int,
    examples: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> list[Tensor]:
    """Return means over the data of the results of ``errors(model, x, u, noise)``.

    The model is given the conditions of the data. The results are ``(B, ...)`` and each mean
    ``(bins, ...)``, float64, one value for each part of [0, 1]. Each example has a random time u in
    each part.
    """
    if len(data) == 0:
        raise UserError("there is nothing to fit on: the split is empty")
    check_whole("bins", bins, 1)
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    chosen = spread(len(data), examples)
    sums: list[list[Tensor]] = [[] for _ in range(bins)]
    bar = tqdm(
        total=len(chosen),
        desc="fitting the reverse process",
        unit="example",
        disable=not progress,
        delay=1,
        leave=False,
    )
    with bar, evaluation_mode(model):
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            given, x = model.given_data(data, batch), data.__getitems__(batch).to(model.like)
            source = ExampleGenerators(seed, batch, _FIT)
            for part in range(bins):
                u = (part + uniform(x.reshape(len(batch), -1)[:, 0], source)) / bins
                u = u.clamp(max=1 - torch.finfo(u.dtype).eps)
                noise = standard_normal(given.process.curve(x).like, source)
                values = torch.stack(errors(given, x, u, noise))
                sums[part].append(values.cpu().double().sum(1))
            bar.update(len(batch))
    return list(torch.stack([torch.stack(part).sum(0) for part in sums], dim=1) / len(chosen))


@dataclass(frozen=True, eq=False)
class Fit:
    """How to fit a reverse process, and on which examples."""

    data: EventDataset
    """Examples to fit on, different from those to evaluate on."""
    examples: int = 512
    """Number of examples to use, evenly spread over the data."""
    grid: GridKind = "equal"
    """``fitted`` to fit the times of a process in discrete time, too."""
    variance: VarianceKind = "step"
    """``step`` for one reverse variance at each step, ``dimension`` for one at each dimension of
    the latents.
    """

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            UserError: one is unknown.
        """
        check_choice("grid", self.grid, get_args(GridKind))
        check_choice("variance", self.variance, get_args(VarianceKind))


class Calibration:
    """Fitted reverse processes of a model, each computed once.

    Args:
        model: the model.
        options: arguments of :func:`best_variance_ratio` and :func:`best_eta`.
    """

    def __init__(self, model: DiffusionModel, **options: Any):
        self.model, self.options = model, options
        self._fits: dict[tuple[int | None, Fit], dict[str, Any]] = {}

    def fit(self, steps: int | None, fit: Fit | None) -> dict[str, Any]:
        """Return arguments of :meth:`ndm.NDM.bound` by their names.

        In discrete time they are ``steps`` and ``variance_ratio``, in continuous time ``steps``,
        which is None, and ``eta``.

        Args:
            steps: T, None for continuous time.
            fit: how to fit; None fits nothing and returns only ``steps``.
        """
        if fit is None:
            return {"steps": steps}
        key = (steps, fit)
        if key not in self._fits:
            self._fits[key] = self._compute(steps, fit)
        return self._fits[key]

    def _compute(self, steps: int | None, fit: Fit) -> dict[str, Any]:
        options = {"examples": fit.examples, **self.options}
        if steps is None:
            return {"steps": None, "eta": best_eta(self.model, fit.data, **options)}
        grid = TimeGrid(steps)
        if fit.grid == "fitted":
            grid = best_grid(self.model, fit.data, steps, **self.options)
        options["by_dimension"] = fit.variance == "dimension"
        ratio = best_variance_ratio(self.model, fit.data, grid, **options)
        return {"steps": grid, "variance_ratio": ratio}

    def describe(self, steps: int | None, fit: Fit | None) -> dict[str, Any]:
        """Return the eta, the reverse variance and the times of a bound, for its protocol."""
        if fit is None:
            return {"eta": self.model.eta, "reverse_variance": "v"}
        fitted = f"fitted on {min(fit.examples, len(fit.data))} training examples"
        if steps is None:
            return {"eta": fitted, "reverse_variance": "v"}
        by = "step and dimension" if fit.variance == "dimension" else "step"
        grid = self.fit(steps, fit)["steps"]
        return {
            "eta": self.model.eta,
            "reverse_variance": f"{fitted}, by {by}",
            "times": None if grid.times is None else grid.tolist(),
        }


def fitted_sampler(model: DiffusionModel, fit: Fit, steps: int, **options: Any) -> GridSampler:
    """Return ancestral sampling in T steps with fitted times and a fitted variance.

    Args:
        model: the model.
        fit: what to fit, and on which examples.
        steps: T.
        options: arguments of :func:`best_variance_ratio`, such as ``seed`` and ``progress``.
    """
    found = Calibration(model, **options).fit(steps, fit)
    return GridSampler(Ancestral(model.eta, found["variance_ratio"]), found["steps"])
