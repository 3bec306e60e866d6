r"""Event-shape helpers: a batch is ``(B, *event)``, a time is ``(B,)``, and nothing here knows how long the event is.

.. math::
    \text{expand}: (B,) \to (B, 1, \dots, 1), \qquad
    \text{sum\_event}: (B, *event) \to (B,), \qquad
    \text{time\_derivative}: (x, t) \mapsto \bigl(f(x, t),\; \partial_t f(x, t)\bigr)

The time derivative is forward-mode automatic differentiation (one Jacobian-vector product with tangent 1 in t), so value and
derivative come from one pass, and both can be differentiated backward in the parameters, in x and in t.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ndm.errors import ForwardModeError

Network = Callable[[Tensor, Tensor], Tensor]
"""Anything that maps ``(x, t)`` of shapes ``(B, *event)`` and ``(B,)`` to ``(B, *event)``."""


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a per-example ``(B,)`` tensor to ``(B, 1, ..., 1)``, so that it broadcasts against ``like`` ``(B, *event)``."""
    return value.reshape(value.shape[0], *([1] * (like.dim() - 1)))


def sum_event(value: Tensor) -> Tensor:
    """Sum over all event dimensions: ``(B, *event)`` to ``(B,)``."""
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def event_size(x: Tensor) -> int:
    """Number of dimensions D of one event of the batch ``x`` ``(B, *event)``."""
    return x[0].numel() if x.shape[0] else x.flatten(1).shape[1]


def time_derivative(network: Network, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`f(x, t)` and :math:`\partial_t f(x, t)` at fixed x, from one forward-mode pass.

    Fused attention has no forward-mode rule, so attention runs through its plain formula here.

    Args:
        network: maps ``(B, *event)`` and ``(B,)`` to ``(B, *event)``; each example may depend on its own time only.
        x: ``(B, *event)``.
        t: ``(B,)``.

    Returns:
        Value and derivative, each ``(B, *event)``.

    Raises:
        ForwardModeError: the network holds an operation that forward mode cannot pass; the message names the mend.
    """
    t = t.contiguous()  # forward mode writes tangents in place, which an expanded tensor cannot take
    try:
        with _forward_mode(), sdpa_kernel(SDPBackend.MATH):
            value, derivative = torch.func.jvp(lambda time: network(x, time), (t,), (torch.ones_like(t),))  # type: ignore[misc]
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not _is_forward_mode(error):
            raise
        reason = str(error).split("\n")[0].strip()[:160]
        raise ForwardModeError(
            f"the network {type(network).__name__} cannot be differentiated in t by forward-mode AD ({reason}); train in discrete "
            "time (steps=T), which needs no time derivative, or replace the operation: ndm.nn.GroupNorm for torch's group norm "
            "on channels_last input, F.scaled_dot_product_attention or an explicit softmax for nn.MultiheadAttention and fused "
            "attention, and no torch.utils.checkpoint inside"
        ) from error
    return value, derivative


_forward_mode_depth = 0


@contextmanager
def _forward_mode() -> Iterator[None]:
    global _forward_mode_depth  # a plain integer, which torch.compile can guard on
    _forward_mode_depth += 1
    try:
        yield
    finally:
        _forward_mode_depth -= 1


def in_forward_mode() -> bool:
    """Whether :func:`time_derivative` is running, so that a layer must avoid operations without a forward-mode rule."""
    return _forward_mode_depth > 0


_FORWARD_MODE_SIGNS = (
    "forward ad",
    "forward-mode",
    "forward mode",
    "jvp",
    "view size is not compatible",
    "zerotensor",
    "functorch",
    "vmap",
)


def _is_forward_mode(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(sign in text for sign in _FORWARD_MODE_SIGNS)
