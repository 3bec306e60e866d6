r"""Helpers for batches ``(B, *event)`` of any event shape and times ``(B,)``.

.. math::
    \text{expand}: (B,) \to (B, 1, \dots, 1), \qquad \text{sum\_event}: (B, *event) \to (B,) .
"""

import operator
from collections.abc import Mapping, Sequence

from torch import Tensor

from ndm.errors import UserError


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B,)`` to ``(B, 1, ..., 1)``, which broadcasts against ``like`` ``(B, *event)``."""
    return value.reshape(value.shape[0], *([1] * (like.dim() - 1)))


def sum_event(value: Tensor) -> Tensor:
    """Sum over all event dimensions: ``(B, *event)`` to ``(B,)``."""
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def event_size(x: Tensor) -> int:
    """Return the number of dimensions D of an event of the batch ``x`` ``(B, *event)``."""
    return x[0].numel() if x.shape[0] else x.flatten(1).shape[1]


def sample_shape(shape: object, data: object = None) -> tuple[int, ...]:
    """Return the shape ``(B, *event)`` of samples.

    Args:
        shape: the whole shape, or only the number B.
        data: description of the data, with the entry ``event_shape``; needed for a number.

    Raises:
        UserError: ``shape`` is neither, or ``data`` has no such entry.
    """
    wrong = UserError(f"sample({shape!r}): give (B, *event), or only the number B")
    if isinstance(shape, Tensor) or not (
        hasattr(shape, "__index__") or isinstance(shape, Sequence)
    ):
        raise wrong
    try:
        sizes = [operator.index(n) for n in (shape if isinstance(shape, Sequence) else [shape])]
    except TypeError as error:
        raise wrong from error
    if min(sizes, default=-1) < 0 or (isinstance(shape, Sequence) and len(sizes) < 2):
        raise wrong
    if len(sizes) > 1:
        return tuple(sizes)
    event = data.get("event_shape") if isinstance(data, Mapping) else None
    if not isinstance(event, (list, tuple)):
        raise UserError(
            f"sample({shape}): the model has no description of its data: give the whole shape,"
            f" sample(({shape}, *event)), or set"
            " model.info = {'data': source.describe().to_dict()}"
        )
    return (sizes[0], *event)
