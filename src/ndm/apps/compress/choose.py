r"""Which number of steps, and how many images side by side: by the size that the archive will have.

.. math::
    \text{bits}(T, B) = N \cdot \text{NELBO}_T + B\, D\, (T + 1) \log_2 (\sqrt{2 \pi e} / w)

The bound falls with T, to that of continuous time; the initial bits grow with T and B, and the time
with T and 1/B. The bound is measured on a few of the images with the reverse variance that suits
them, which the archive then carries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ndm.apps.compress.chain import Plan, make_plan
from ndm.data import EventDataset, spread
from ndm.decoder import DiscretizedGaussian
from ndm.errors import UserError
from ndm.evaluation.calibrate import best_variance_ratio
from ndm.model import DiffusionModel
from ndm.random import ExampleGenerators

CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 128)
WIDTH = 0.5
_SLACK = 0.01  # of the size, for the sake of fewer steps
_SHARE = 0.02  # of the size, which the initial bits may take for the sake of a larger batch
_EXAMPLES, _BINS, _ROWS = 64, 32, 64
_NUMBERS = 2**25  # probabilities of a batch, all values of all its pixels, in double precision


class Rows(EventDataset):
    """Images given by their values ``(N, D)``."""

    def __init__(self, index: np.ndarray, values: Tensor, event_shape: Sequence[int]):
        self.index, self.values, self.event_shape = index, values, tuple(event_shape)

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return (
            self.values[torch.from_numpy(self.index[list(indices)])]
            .reshape(-1, *self.event_shape)
            .float()
        )


@dataclass(frozen=True)
class Forecast:
    """What an archive with T steps would take."""

    steps: int
    batch: int
    rate: float
    """Bound of the model for this T, bits/dim."""
    initial: float
    """Initial bits."""
    bits: float
    """All of it."""
    variance_ratio: Tensor
    """The reverse variance of each step."""


def choose_plan(
    model: DiffusionModel,
    index: np.ndarray,
    event_shape: Sequence[int],
    steps: int | None = None,
    batch: int | None = None,
    width: float = WIDTH,
    tell: Callable[[Forecast], None] | None = None,
) -> tuple[Plan, Forecast]:
    """The plan for some images.

    Args:
        model: the model.
        index: their values, ``(N, D)``.
        event_shape: shape of one.
        steps: T; by default the fewest steps whose archive is within 1% of the smallest.
        batch: images side by side; by default as many as keep the initial bits within 2% of the
            archive, at least one.
        width: of the cells, in standard deviations.
        tell: called with each forecast.
    """
    assert isinstance(model.decoder, DiscretizedGaussian)
    rows, forecasts = Rows(index, model.decoder.values, event_shape), []
    for candidate in (steps,) if steps is not None else CANDIDATES:
        try:
            forecasts.append(_forecast(model, rows, candidate, batch, width))
        except UserError:  # eta may be too large for so few steps
            if steps is not None or candidate == CANDIDATES[-1]:
                raise
            continue
        if tell is not None:
            tell(forecasts[-1])
        if len(forecasts) > 1 and forecasts[-1].bits > 1.5 * min(one.bits for one in forecasts):
            break  # more steps only add initial bits from here on
    least = min(one.bits for one in forecasts)
    chosen = next(one for one in forecasts if one.bits <= (1 + _SLACK) * least)
    return make_plan(model, chosen.steps, chosen.batch, chosen.variance_ratio, width), chosen


def _forecast(
    model: DiffusionModel, rows: Rows, steps: int, batch: int | None, width: float
) -> Forecast:
    count, dims = rows.index.shape
    variance_ratio = best_variance_ratio(
        model, rows, steps, bins=_BINS, examples=_EXAMPLES, batch_size=_ROWS
    )
    numbers = spread(count, _EXAMPLES)
    draws = min(4, steps)
    with torch.no_grad():
        bounds = []
        for start in range(0, len(numbers), _ROWS):
            part = numbers[start : start + _ROWS]
            x = rows.__getitems__(part).to(model.like)
            bounds.append(
                model.bound(
                    x,
                    steps=steps,
                    draws=draws,
                    generator=ExampleGenerators(1, part),
                    variance_ratio=variance_ratio,
                ).total.cpu()
            )
    rate = float(torch.cat(bounds).mean()) / math.log(2) / dims
    if not math.isfinite(rate):
        raise UserError("the model's bound on these data is not finite; it cannot code them")
    each = dims * (steps + 1) * math.log2(math.sqrt(2 * math.pi * math.e) / width)
    if batch is None:
        most = min(count, max(1, _NUMBERS // (dims * len(rows.values))))
        batch = max(
            [
                size
                for size in (1, 2, 4, 8, 16, 32, 64)
                if size <= most and size * each <= _SHARE * count * dims * rate
            ],
            default=1,
        )
    initial = min(batch, count) * each
    return Forecast(
        steps, batch, rate, initial, count * dims * rate + initial, variance_ratio.values
    )
