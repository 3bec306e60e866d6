r"""Helpers for batches ``(B, *event)`` of any event shape and times ``(B,)``.

.. math::
    \text{expand}: (B,) \to (B, 1, \dots, 1), \qquad \text{sum\_event}: (B, *event) \to (B,) .
"""

from torch import Tensor


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B,)`` to ``(B, 1, ..., 1)``, which broadcasts against ``like`` ``(B, *event)``."""
    return value.reshape(value.shape[0], *([1] * (like.dim() - 1)))


def sum_event(value: Tensor) -> Tensor:
    """Sum over all event dimensions: ``(B, *event)`` to ``(B,)``."""
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def event_size(x: Tensor) -> int:
    """Return the number of dimensions D of an event of the batch ``x`` ``(B, *event)``."""
    return x[0].numel() if x.shape[0] else x.flatten(1).shape[1]
