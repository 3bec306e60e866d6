"""Devices, and the precision in which networks run on them. Everything that is not a network stays
in the precision of the data.

Precisions have Lightning's names: ``32-true`` for none, ``bf16-mixed``, ``16-mixed``.
"""

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ndm.errors import UserError, check_choice

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; ``auto`` is the accelerator of this machine, or the CPU.

    Of several accelerators each process that torchrun started takes its own.

    Raises:
        UserError: there is no such device.
    """
    try:
        if name == "auto":
            device = torch.accelerator.current_accelerator(check_available=True) or torch.device(
                "cpu"
            )
        else:
            device = torch.device("cuda" if name == "gpu" else name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.empty(0, device=device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        raise UserError(
            f"the device {name!r} is not available here; choose auto, cpu or cuda"
        ) from error
    return device


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """The context in which networks on a device run in a precision.

    Raises:
        UserError: there is no such precision.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision == "32-true":
        return nullcontext()
    return torch.autocast(
        device.type, torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The half precision of the autocast around us for the device of ``x``; None where there is
    none.
    """
    device = x.device.type
    return (
        torch.get_autocast_dtype(device)
        if device != "meta" and torch.is_autocast_enabled(device)
        else None
    )


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """The context in which networks on the device of ``x`` run in the precision of their inputs,
    whatever autocast is around.
    """
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def describe_machine() -> dict[str, Any]:
    """The processor, its cores and threads, the accelerator and the versions, JSON-ready."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": str(device) if device else None,
        "torch": torch.__version__,
        "ndm": version("ndm"),
    }
