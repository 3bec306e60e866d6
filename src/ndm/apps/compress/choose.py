r"""Choice of the number of steps and of the batch size that minimize the size of the archive.

.. math::
    \text{bits}(T, B) = \min_k\; (N - k) \cdot \text{NELBO}_T
    + \max\bigl(k W, \min(B, N - k)\, D\, (T + 1) \log_2 (\sqrt{2 \pi e} / w)\bigr)

The k first images take W bits each without the model, and serve as initial bits
(:mod:`ndm.apps.compress.lead`).
The bound decreases with T to that of continuous time. The initial bits grow with T and B, the time
with T and 1/B. The bound is estimated on a few of the images with the times of the T steps and the
reverse variance that minimize it; the archive stores both.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ndm.apps.compress.chain import Plan, make_plan
from ndm.apps.compress.lead import MOST_LEAD, LeadCost, best_lead, encode_lead
from ndm.data import EventDataset, spread
from ndm.decoder import DiscretizedGaussian
from ndm.errors import UserError
from ndm.evaluation.calibrate import best_variance_ratio
from ndm.evaluation.fit_times import MOST_FITTED, candidates_for, step_costs
from ndm.model import DiffusionModel
from ndm.random import ExampleGenerators
from ndm.time_grid import TimeGrid
from ndm.time_sampling import PiecewiseConstant

CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 128)
WIDTH = 0.5
_SLACK = 0.01  # fraction of the size to trade for fewer steps
_SHARE = 0.02  # fraction of the size to trade for a larger batch
_EXAMPLES, _BINS, _ROWS = 64, 32, 64
_MOST = 2**24  # most values to estimate the rate without the model on
_NUMBERS = 2**25  # most probabilities per batch: all levels of all its pixels, as doubles


class Rows(EventDataset):
    """Images in memory, as levels ``(N, D)``."""

    def __init__(self, index: np.ndarray, values: Tensor, event_shape: Sequence[int]):
        self.index, self.values, self.event_shape = index, values, tuple(event_shape)
        self.dims = index.shape[1]

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        values = self.values[torch.from_numpy(self.index[list(indices)].astype(np.int64))]
        return values.reshape(-1, *self.event_shape).float()


@dataclass(frozen=True)
class Forecast:
    """The predicted size of an archive with T steps."""

    grid: TimeGrid
    """The times of the T steps."""
    batch: int
    """B, number of images coded in parallel."""
    rate: float
    """Bound of the model for this T, bits/dim."""
    lead: int
    """Number of images to code without the model."""
    initial: float
    """Initial bits, including those images."""
    bits: float
    """Size in bits, including the initial bits."""
    variance_ratio: PiecewiseConstant
    """r of each step."""

    @property
    def steps(self) -> int:
        """T."""
        return self.grid.steps


def choose_plan(
    model: DiffusionModel,
    index: np.ndarray,
    event_shape: Sequence[int],
    steps: int | None = None,
    batch: int | None = None,
    width: float = WIDTH,
    tell: Callable[[Forecast], None] | None = None,
    edges: int = 0,
) -> tuple[Plan, Forecast]:
    """Choose the plan for some images.

    Args:
        model: the model.
        index: levels of the images, ``(N, D)``.
        event_shape: shape of an image.
        steps: T; by default the fewest steps whose archive is within 1% of the smallest.
        batch: number of images coded in parallel; by default the most whose archive is within 2% of
            the smallest.
        width: width of the cells, in standard deviations.
        tell: function to call with each forecast.
        edges: number of images that are coded without the model in any case, the first ones.

    Returns:
        The plan, and its forecast.

    Raises:
        UserError: the model cannot code these images.
    """
    assert isinstance(model.decoder, DiscretizedGaussian)
    if edges * index.shape[1] > MOST_LEAD:
        raise UserError(
            "the images have too many tiles over their edges for one archive; compress them in"
            " several parts"
        )
    inner, num_values = index[edges:] if edges < len(index) else index, len(model.decoder.values)
    rows, forecasts = Rows(inner, model.decoder.values, event_shape), []
    grids, sample = _grids(model, rows, steps), inner[: max(1, min(_EXAMPLES, _MOST // rows.dims))]
    lead = LeadCost(
        8 * len(encode_lead(sample, event_shape, num_values)) / len(sample),
        edges,
        8 * len(encode_lead(index[:edges], event_shape, num_values)) if edges else 0.0,
    )
    for candidate, (grid, ratio) in grids.items():
        try:
            forecasts.append(_forecast(model, rows, grid, ratio, batch, width, lead, len(index)))
        except UserError:  # eta may be too large for so few steps
            if candidate == list(grids)[-1]:
                raise
            continue
        if tell is not None:
            tell(forecasts[-1])
        best = min(range(len(forecasts)), key=lambda index: forecasts[index].bits)
        if len(forecasts) > best + 2:
            break  # from here on, more steps only add initial bits
    least = min(one.bits for one in forecasts)
    chosen = next(one for one in forecasts if one.bits <= (1 + _SLACK) * least)
    return make_plan(model, chosen.grid, chosen.batch, chosen.variance_ratio, width), chosen


def _grids(
    model: DiffusionModel, rows: Rows, steps: int | None
) -> dict[int, tuple[TimeGrid, PiecewiseConstant | None]]:
    """Return the fitted times and variances of the numbers of steps to choose from.

    Of more than 64 steps the times are equal, and the variance is None: not fitted yet.
    """
    wanted = CANDIDATES if steps is None else (steps,)
    grids: dict[int, tuple[TimeGrid, PiecewiseConstant | None]] = {
        candidate: (TimeGrid(candidate), None) for candidate in wanted
    }
    if steps is None or steps <= MOST_FITTED:
        most = MOST_FITTED if steps is None else candidates_for(steps)
        costs = step_costs(model, rows, most)
        for candidate in wanted:
            with contextlib.suppress(UserError):  # eta may be too large for so few steps
                if candidate <= MOST_FITTED:
                    grid = costs.best_grid(candidate)
                    grids[candidate] = grid, costs.variance_ratio(grid)
    return grids


def _forecast(
    model: DiffusionModel,
    rows: Rows,
    grid: TimeGrid,
    ratio: PiecewiseConstant | None,
    batch: int | None,
    width: float,
    lead: LeadCost,
    count: int,
) -> Forecast:
    dims, steps = rows.dims, grid.steps
    variance_ratio = ratio or best_variance_ratio(
        model, rows, grid, bins=_BINS, examples=_EXAMPLES, batch_size=_ROWS
    )
    numbers = spread(len(rows), _EXAMPLES)
    draws = min(4, steps)
    with torch.no_grad():
        bounds = []
        for start in range(0, len(numbers), _ROWS):
            part = numbers[start : start + _ROWS]
            bound = model.bound(
                rows.__getitems__(part).to(model.like),
                steps=grid,
                draws=draws,
                generator=ExampleGenerators(1, part),
                variance_ratio=variance_ratio,
            )
            bounds.append(bound.total.cpu())
    rate = float(torch.cat(bounds).mean()) / math.log(2) / dims
    if not math.isfinite(rate):
        raise UserError("the model's bound on these data is not finite; it cannot code them")
    each = dims * (steps + 1) * math.log2(math.sqrt(2 * math.pi * math.e) / width)
    most = min(count, max(1, _NUMBERS // (dims * len(rows.values))))
    sizes = [batch] if batch else [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= most]
    found = {size: best_lead(count, dims, rate, lead, size, each) for size in sizes}
    limit = (1 + _SHARE) * min(bits for _, _, bits in found.values())
    batch = max(size for size, (_, _, bits) in found.items() if bits <= limit)
    return Forecast(grid, batch, rate, *found[batch], variance_ratio)
