"""Half precision for networks: what it is called, and where it is switched on. Everything that is no network stays in the precision of the data.

The words are Lightning's: ``32-true`` for none, ``bf16-mixed``, ``16-mixed``.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from ndm.errors import check_choice

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """The context in which networks on a device run in a precision.

    Raises:
        UserError: there is no such precision.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision == "32-true":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16-mixed" else torch.float16)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The half precision of the autocast around us for the device of ``x``; None where there is none."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """The context in which networks on the device of ``x`` run in the precision of their inputs, whatever autocast is around."""
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
