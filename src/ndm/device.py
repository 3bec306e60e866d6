"""Devices, and the precision in which networks run.

Precisions have Lightning's names: ``32-true`` (no autocast), ``bf16-mixed``, ``16-mixed``. They
apply to networks only; everything else runs in the precision of the data.
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
    """Return the device of a name; ``auto`` is the accelerator if there is one, else the CPU.

    With several GPUs each process of torchrun uses its own.

    Raises:
        UserError: the device is not available.
    """
    try:
        if name == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = accelerator or torch.device("cpu")
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
            f"the device {name!r} is not available; choose auto, cpu or cuda"
        ) from error
    return device


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Return a context in which networks on a device run in a precision.

    Raises:
        UserError: the precision is unknown.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision == "32-true":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    return torch.autocast(device.type, dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of the active autocast on the device of ``x``, or None without autocast."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast on the device of ``x``."""
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def describe_machine() -> dict[str, Any]:
    """Return the processor, cores, threads, accelerator and versions, JSON-ready."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": str(device) if device else None,
        "torch": torch.__version__,
        "ndm": version("ndm"),
    }
