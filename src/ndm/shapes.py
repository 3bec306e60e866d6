r"""Event-shape helpers: a batch is ``(B, *event)``, a time is ``(B,)``, and nothing here knows how
long the event is.

.. math::
    \text{expand}: (B,) \to (B, 1, \dots, 1), \qquad \text{sum\_event}: (B, *event) \to (B,) .
"""

from torch import Tensor


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a per-example ``(B,)`` tensor to ``(B, 1, ..., 1)``, so that it broadcasts against
    ``like`` ``(B, *event)``.
    """
    return value.reshape(value.shape[0], *([1] * (like.dim() - 1)))


def sum_event(value: Tensor) -> Tensor:
    """Sum over all event dimensions: ``(B, *event)`` to ``(B,)``."""
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def event_size(x: Tensor) -> int:
    """Number of dimensions D of one event of the batch ``x`` ``(B, *event)``."""
    return x[0].numel() if x.shape[0] else x.flatten(1).shape[1]
