"""ESTIMATE of the parameters, memory, arithmetic and hours of training a configuration.

python bench/footprint.py src/ndm/configs/cifar10.yaml [--size SIDE] [--share 0.3] [--peak 989e12]
    [--peak-full 67e12] [--peak-tf32 494e12] [--json FILE] [--OPTION VALUE ...]

This runs on a CPU in about a minute. Other options override the configuration, as for
``ndm train``: ``--train.devices 4``.

Method. A training step (bound and gradient) runs on small random images, with networks under bf16
autocast if the configuration uses it. PyTorch's ``FlopCounterMode`` counts operations, and another
mode the bytes of all live tensors. Both are polynomials in the side s of the image, with terms 1,
s² (convolutions) and s⁴ (attention), so three small sides determine them exactly at any side.
Batches of one and two separate the cost of an example from the fixed cost.

* Memory: weights, gradients, optimizer state and moving average, at 4 bytes per number, and the
  tensors alive between the forward and the backward pass, for the examples of one device.
  Workspaces and unused memory of the allocator come on top.
* Time: operations of the predictor over the peak in bf16, and the rest (F, the encoder and the
  decoder, which the library runs in full precision) over the peak in float32; both at an assumed,
  not measured, share of the peak. 989 and 67 TFLOP/s are the peaks of an NVIDIA H100 (SXM) for
  dense bf16 and for float32 without tensor cores; with TF32 the latter is 494, at the precision of
  half floats. Data loading, evaluation and communication are left out.
"""

import argparse
import json
import sys
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

import ndm.nn.fused
from ndm.decoder import to_grid
from ndm.model import NDM
from ndm.nn import ConvEncoder, UNet
from ndm.train.config import RunConfig

BYTES = 4 * 5
"""Bytes per parameter: weight, gradient, two moments, moving average.

SOAP also stores two matrices for each axis of a kernel.
"""
EVENTS = {"CIFAR10": (3, 32), "MNIST": (1, 28), "Digits": (1, 8)}
"""Channels and side of data whose size is not an argument."""


@dataclass
class Cost:
    """Cost of a training step on a batch."""

    operations: float
    """Floating-point operations, forward and backward."""
    predictor: float
    """Operations of the predictor."""
    saved: float
    """Bytes alive between the forward and the backward pass."""
    peak: float
    """Most bytes alive at any time, gradients included.

    This is not a polynomial in the side, so it is only meaningful at the real side.
    """


class Live(TorchDispatchMode):
    """Count the bytes of all tensors created in this mode that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
        out = function(*arguments, **(named or {}))
        tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = size = storage.nbytes()
            weakref.finalize(storage, self._free, size)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        return tensor

    def _free(self, size: int) -> None:
        self.bytes -= size


def autocast(half: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


def state_bytes(model: NDM, optimizer: str) -> int:
    """Return the bytes of weights, gradients, optimizer state and moving average."""
    size = BYTES * sum(p.numel() for p in model.parameters())
    if optimizer == "soap":
        kernels = [p for p in model.parameters() if p.dim() >= 2]
        size += 4 * sum(2 * side**2 for kernel in kernels for side in kernel.shape)
    return size


def random_images(model: NDM, batch: int, channels: int, side: int) -> Tensor:
    """Return random images of the decoder's values, ``(B, C, side, side)``."""
    num_values = 256 if model.decoder.values is None else len(model.decoder.values)
    return to_grid(torch.randint(num_values, (batch, channels, side, side)), num_values)


def step_cost(model: NDM, channels: int, side: int, batch: int, half: bool) -> Cost:
    """Measure the cost of one step on random images."""
    x = random_images(model, batch, channels, side)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, Live() as live:
            with autocast(half):
                loss = model.bound(x).loss.mean()
            saved = live.bytes
            loss.backward()
        z = torch.zeros(model.transform.latent_shape(x)).requires_grad_()
        with FlopCounterMode(display=False) as predictor:
            with autocast(half):
                value = model.predictor(z, model.process.level(torch.full((batch,), 0.5), z)).sum()
            value.backward()
    model.zero_grad(set_to_none=True)
    return Cost(counter.get_total_flops(), predictor.get_total_flops(), saved, live.peak)


def grain(model: NDM) -> int:
    """Return the smallest side of images that all stages of the networks divide evenly."""
    networks = [part for part in model.modules() if isinstance(part, (UNet, ConvEncoder))]
    deepest = [2 ** (len(part.multiples) - 1) for part in networks if isinstance(part, UNet)]
    halved = [2**part.halvings for part in networks if isinstance(part, ConvEncoder)]
    return max(2, max(deepest, default=1) * max(halved, default=1))


def cost_at(model: NDM, channels: int, side: int, half: bool) -> tuple[Cost, Cost]:
    """Return the fixed cost and the cost per example, extrapolated to this side.

    They are measured at three small sides and two batch sizes.
    """
    ndm.nn.fused.SMALLEST = 0  # run the kernels for large tensors also on these small ones
    unit = grain(model)
    sides = np.array([unit, 2 * unit, 3 * unit])
    powers = np.stack([np.ones(3), sides**2.0, sides**4.0], 1)
    at = np.array([1.0, side**2.0, side**4.0])
    found: list[list[list[float]]] = []
    for small in sides:
        one, two = (
            list(asdict(step_cost(model, channels, int(small), batch, half)).values())
            for batch in (1, 2)
        )
        fixed = [2 * a - b for a, b in zip(one, two, strict=True)]
        found.append([fixed, [b - a for a, b in zip(one, two, strict=True)]])
    once, each = np.einsum("p,ps,skv->kv", at, np.linalg.inv(powers), np.array(found))
    return Cost(*(max(0.0, float(value)) for value in once)), Cost(*map(float, each))


def image(parts: Namespace, side: int | None) -> tuple[int, int]:
    """Return the channels and the side of a configuration's images."""
    data = parts.data
    size = getattr(data, "size", None) or getattr(data, "resolution", None)
    channels, known_side = EVENTS.get(type(data).__name__, (getattr(data, "channels", 3), size))
    if (side or known_side) is None:
        sys.exit("footprint: give the side of the images, --size 32")
    return channels, side or known_side


def examples_at_once(train: Namespace) -> tuple[int, int]:
    """Return the number of devices, and the examples per device in one pass."""
    devices = (train.devices if isinstance(train.devices, int) else 1) * train.nodes
    return devices, -(-train.batch_size // (devices * train.accumulate))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--size", type=int, help="side of the images, if the configuration does not set it"
    )
    parser.add_argument("--share", type=float, default=0.3, help="assumed share of the peak")
    parser.add_argument(
        "--peak", type=float, default=989e12, help="operations per second of a device, bf16"
    )
    parser.add_argument(
        "--peak-full", type=float, default=67e12, help="operations per second of a device, float32"
    )
    parser.add_argument(
        "--peak-tf32", type=float, default=494e12, help="operations per second of a device, TF32"
    )
    parser.add_argument("--json", type=Path)
    arguments, options = parser.parse_known_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    parts = RunConfig.read(arguments.config, options).build()
    model, train = parts.model, parts.settings
    channels, side = image(parts, arguments.size)
    half = train.precision == "bf16-mixed"
    once, each = cost_at(model, channels, side, half)
    devices, at_once = examples_at_once(train)
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("all", model), ("F", model.transform), ("predictor", model.predictor))
    }
    rest, state = each.operations - each.predictor, state_bytes(model, train.optimizer)
    fast = arguments.peak if half else arguments.peak_full

    def hours(full: float) -> float:
        examples = train.steps * train.batch_size / devices
        return (each.predictor / fast + rest / full) * examples / arguments.share / 3600

    record = {
        "image": [channels, side, side],
        "parameters": counts,
        "gigabytes_of_state": state / 1e9,
        "gigabytes_kept_an_example": each.saved / 1e9,
        "examples_at_once": at_once,
        "gigabytes": (state + once.saved + at_once * each.saved) / 1e9,
        "tflop_an_example": each.operations / 1e12,
        "tflop_of_the_predictor": each.predictor / 1e12,
        "pflop_a_step": each.operations * train.batch_size / 1e15,
        "steps": train.steps,
        "devices": devices,
        "hours": hours(arguments.peak_full),
        "hours_with_tf32": hours(arguments.peak_tf32),
        "share": arguments.share,
        "peaks": {
            "bf16": arguments.peak,
            "float32": arguments.peak_full,
            "tf32": arguments.peak_tf32,
        },
    }
    show(record, train, half)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def format_hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


def show(record: dict, train: Namespace, half: bool) -> None:
    shape = " x ".join(map(str, record["image"]))
    counts = record["parameters"]
    print(
        f"images {shape}, batch {train.batch_size} on {record['devices']} device(s) in"
        f" {train.accumulate} part(s), {train.steps:,} steps, {train.precision}"
    )
    print(
        f"parameters: {counts['all'] / 1e6:.1f} M; F {counts['F'] / 1e6:.1f} M, predictor"
        f" {counts['predictor'] / 1e6:.1f} M"
    )
    print(
        f"memory per device (estimate): {record['gigabytes']:.1f} GB: weights, gradients,"
        f" optimizer and average {record['gigabytes_of_state']:.1f}, and"
        f" {record['examples_at_once']} examples of {record['gigabytes_kept_an_example']:.2f} each"
    )
    part = record["tflop_of_the_predictor"] / record["tflop_an_example"]
    print(
        f"arithmetic: {record['tflop_an_example']:.2g} TFLOP per example ({part:.0%} in the"
        f" predictor{', in bf16' if half else ''}), {record['pflop_a_step']:.2g} PFLOP per step"
    )
    peaks = record["peaks"]
    print(
        f"time (estimate): {format_hours(record['hours'])} hours at {record['share']:.0%} of"
        f" {peaks['bf16'] / 1e12:.0f} (bf16) and {peaks['float32'] / 1e12:.0f} (float32) TFLOP/s"
        f" per device; {format_hours(record['hours_with_tf32'])} with TF32"
        f" ({peaks['tf32'] / 1e12:.0f}) instead of float32"
    )


if __name__ == "__main__":
    main()
