"""Which transforms of torch.func, and how many levels of forward-mode differentiation, an operation
runs within.

PyTorch says so through private names alone. This is the only place that uses them, and where a
version of PyTorch lacks them the answer is None: whoever has a faster way for one case then takes
the plain way, which is right in all.
"""

from contextvars import ContextVar
from typing import NamedTuple

import torch


class Nesting(NamedTuple):
    """What is active."""

    transforms: int
    """Transforms of torch.func: vmap, jvp, grad, vjp and what is made of them."""
    innermost: str
    """The name of the innermost of them, ``Vmap``, ``Jvp``, ``Grad`` ..., or nothing."""
    depth: int
    """Levels of forward mode."""


RULES = ContextVar("rules", default=False)
"""Whether norms are computed by rules of our own, as
:func:`ndm.autodiff.forward_mode.time_derivative` does.
"""
NOTHING = Nesting(0, "", 0)
"""Plain operations and their backward passes."""
ONE_JVP = Nesting(1, "Jvp", 1)
"""One ``torch.func.jvp`` and nothing around or within it."""


def nesting() -> Nesting | None:
    """What is active here, or None where this PyTorch does not say."""
    try:
        innermost = torch._C._functorch.peek_interpreter_stack()
        depth = torch.autograd.forward_ad._current_level + 1
        return (
            Nesting(0, "", depth)
            if innermost is None
            else Nesting(innermost.level(), innermost.key().name, depth)
        )
    except (AttributeError, TypeError):
        return None
