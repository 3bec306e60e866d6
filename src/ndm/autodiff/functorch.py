"""Which transforms of torch.func and levels of forward mode are active.

PyTorch shows this only through private names, which no other module uses. If a version of PyTorch
lacks them, the answer is None, and callers then use plain formulas, which are always right.
"""

from contextvars import ContextVar
from typing import NamedTuple

import torch


class Nesting(NamedTuple):
    """The active transforms and levels of forward mode."""

    transforms: int
    """Number of torch.func transforms: vmap, jvp, grad, vjp and those built from them."""
    innermost: str
    """Name of the innermost of them, ``Vmap``, ``Jvp``, ``Grad`` ..., or empty."""
    depth: int
    """Number of levels of forward mode."""


RULES = ContextVar("rules", default=False)
"""Whether norms use the rules of this package, as within
:func:`ndm.autodiff.forward_mode.time_derivative`.
"""
NOTHING = Nesting(0, "", 0)
"""Plain operations and their backward passes."""
ONE_JVP = Nesting(1, "Jvp", 1)
"""One ``torch.func.jvp`` with nothing around or within it."""


def nesting() -> Nesting | None:
    """Return what is active here, or None if this version of PyTorch does not show it."""
    try:
        innermost = torch._C._functorch.peek_interpreter_stack()
        depth = torch.autograd.forward_ad._current_level + 1
        if innermost is None:
            return Nesting(0, "", depth)
        return Nesting(innermost.level(), innermost.key().name, depth)
    except (AttributeError, TypeError):
        return None
