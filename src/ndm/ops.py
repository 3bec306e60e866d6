r"""Event-shape helpers: a batch is ``(B, *event)``, a time is ``(B,)``, and nothing here knows how long the event is.

.. math::
    \text{expand}: (B,) \to (B, 1, \dots, 1), \qquad \text{sum\_event}: (B, *event) \to (B,) .
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a per-example ``(B,)`` tensor to ``(B, 1, ..., 1)``, so that it broadcasts against ``like`` ``(B, *event)``."""
    return value.reshape(value.shape[0], *([1] * (like.dim() - 1)))


def sum_event(value: Tensor) -> Tensor:
    """Sum over all event dimensions: ``(B, *event)`` to ``(B,)``."""
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def event_size(x: Tensor) -> int:
    """Number of dimensions D of one event of the batch ``x`` ``(B, *event)``."""
    return x[0].numel() if x.shape[0] else x.flatten(1).shape[1]


NEAREST = [(down, right) for down in range(-2, 3) for right in range(-2, 3) if 0 < abs(down) + abs(right) <= 2]
"""Offsets of the twelve nearest pixels."""


def at_offsets(x: Tensor, offsets: Sequence[tuple[int, int]], beyond: float) -> list[Tensor]:
    """What lies at each offset (down, right) of the pixels of ``x`` ``(..., H, W)``, at least three axes; outside of the image, ``beyond``."""
    margin, (height, width) = max(max(abs(down), abs(right)) for down, right in offsets), x.shape[-2:]
    padded = functional.pad(x, [margin] * 4, value=beyond)
    return [padded[..., margin + down : margin + down + height, margin + right : margin + right + width] for down, right in offsets]
