r"""The time grid of a process in discrete time.

.. math::
    0 = t_0 < t_1 < \dots < t_T = 1, \qquad \text{by default } t_i = i/T .

The bound and the samplers take a number of steps T or a :class:`TimeGrid`.
:func:`ndm.evaluation.fit_times.best_grid` fits a grid to a trained model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm.errors import UserError, describe_value

MOST_STEPS = 10**7
"""Largest T. Single precision draws at most 2**24 times."""


class TimeGrid:
    """Times from 0, data, to 1, noise.

    Args:
        times: T for equal steps, or the T + 1 times.

    Raises:
        UserError: T is out of range, or the times do not increase from 0 to 1.
    """

    def __init__(self, times: int | Sequence[float] | Tensor):
        self.times: Tensor | None = None
        """The times, ``(T + 1,)``, float64; None for equal steps."""
        if isinstance(times, int) and not isinstance(times, bool):
            self.steps = times
            """T."""
            if not 1 <= times <= MOST_STEPS:
                raise UserError(
                    f"steps={times}: give an integer from 1 to {MOST_STEPS} for discrete time, or"
                    " None for continuous time"
                )
            return
        try:
            self.times = torch.as_tensor(times, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"steps={describe_value(times)}: give a number of steps T, or T + 1 times"
            ) from error
        if not (
            self.times.dim() == 1
            and len(self.times) > 1
            and self.times[0] == 0
            and self.times[-1] == 1
            and bool((self.times.diff() > 0).all())
        ):
            raise UserError(
                f"times={describe_value(self.times.tolist())}: give at least two times that"
                " increase from 0 to 1"
            )
        self.steps = len(self.times) - 1

    def __repr__(self) -> str:
        if self.times is None:
            return f"TimeGrid({self.steps})"
        return f"TimeGrid([{', '.join(f'{time:.4g}' for time in self.times.tolist())}])"

    @property
    def shortest(self) -> float:
        """The length of the shortest step."""
        return 1 / self.steps if self.times is None else float(self.times.diff().min())

    def at(self, index: Tensor) -> Tensor:
        """Return the times t_i for indices i, integers in any dtype, in their shape."""
        if self.times is None:
            return index / self.steps
        dtype = torch.promote_types(index.dtype, torch.float32)
        return self.times.to(dtype).to(index.device)[index.long()]

    def middle(self, index: Tensor) -> Tensor:
        """Return the times halfway from t_i to t_{i+1}, in the shape of ``index``."""
        if self.times is None:
            return (index + 0.5) / self.steps
        return (self.at(index) + self.at(index + 1)) / 2

    def tolist(self) -> list[float]:
        """Return the T + 1 times."""
        if self.times is None:
            return [index / self.steps for index in range(self.steps + 1)]
        return list(self.times.tolist())


Steps = int | TimeGrid
"""A number of equal steps T, or the times of the steps."""


def as_grid(steps: object) -> TimeGrid:
    """Return the time grid of a number of steps, or the grid itself.

    Raises:
        UserError: T is out of range.
    """
    if isinstance(steps, TimeGrid):
        return steps
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise UserError(
            f"steps={describe_value(steps)}: give an integer from 1 to {MOST_STEPS} or a TimeGrid"
            " for discrete time, or None for continuous time"
        )
    return TimeGrid(steps)
