"""Parameters, memory and arithmetic of a training step of a configuration, and from them hours: an
ESTIMATE, made on a CPU in a minute or so.

python bench/footprint.py src/ndm/configs/cifar10.yaml [--size SIDE] [--share 0.3] [--peak 989e12]
[--peak-full 67e12] [--json FILE] [--WORD VALUE ...]

Words that are not its own go to the configuration, as for ``ndm train``: ``--train.devices 4``.

How the numbers are obtained. The step (the bound of the configuration's model, and its gradient) is
carried out on small random images, networks under bf16 autocast if the configuration says so, while
PyTorch's ``FlopCounterMode`` counts operations and another mode the bytes of all tensors that are
alive. Both numbers are polynomials in the side s of the image, with terms 1, s² (convolutions) and
s⁴ (attention), so three small sides give them exactly at any side; a batch of one and a batch of
two tell what an example adds from what is there once.

* Memory: weights, gradients, the state of the optimizer and the moving average, 4 bytes each number, and what is alive between the forward and the backward
  pass, for the examples that one device takes at once. Workspaces of operations and what the
  allocator leaves unused come on top.
* Time: operations of the predictor over the peak in bf16, the rest (F, the encoder and the decoder, which the library keeps in full precision) over the
  peak in float32, both times a share that is assumed, not measured. 989 and 67 TFLOP/s are those of
  an NVIDIA H100 (SXM) for dense bf16 and for float32 without tensor cores; with TF32 the latter is
  494, at the precision of half floats. Loading data, evaluation and communication are left out.
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
"""Of a parameter: weight, gradient, two moments, moving average. SOAP keeps two matrices for each
axis of a kernel besides.
"""
EVENTS = {"CIFAR10": (3, 32), "MNIST": (1, 28), "Digits": (1, 8)}
"""Channels and side of data whose size is not an argument."""


@dataclass
class Cost:
    """What a training step takes for a batch."""

    operations: float
    """Floating-point operations, forward and backward."""
    predictor: float
    """Those of the predictor."""
    kept: float
    """Bytes alive between the forward and the backward pass."""
    peak: float
    """Most bytes alive at any time, gradients included. No polynomial: for checks at the real side.
    """


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still alive."""

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
    """Bytes of weights, gradients, optimizer and average."""
    shapes = [p.shape for p in model.parameters() if p.dim() >= 2] if optimizer == "soap" else []
    return BYTES * sum(p.numel() for p in model.parameters()) + 4 * sum(
        2 * side**2 for shape in shapes for side in shape
    )


def random_images(model: NDM, batch: int, channels: int, side: int) -> Tensor:
    """Images of the decoder's values, ``(B, C, side, side)``."""
    num_values = 256 if model.decoder.values is None else len(model.decoder.values)
    return to_grid(torch.randint(num_values, (batch, channels, side, side)), num_values)


def step_cost(model: NDM, channels: int, side: int, batch: int, half: bool) -> Cost:
    """Cost of one step on random images."""
    x = random_images(model, batch, channels, side)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, Live() as live:
            with autocast(half):
                loss = model.bound(x).loss.mean()
            kept = live.bytes
            loss.backward()
        z = torch.zeros(model.transform.latent_shape(x)).requires_grad_()
        with FlopCounterMode(display=False) as alone:
            with autocast(half):
                value = model.predictor(z, model.process.level(torch.full((batch,), 0.5), z)).sum()
            value.backward()
    model.zero_grad(set_to_none=True)
    return Cost(counter.get_total_flops(), alone.get_total_flops(), kept, live.peak)


def grain(model: NDM) -> int:
    """The side of the smallest images whose stages all come out even."""
    networks = [part for part in model.modules() if isinstance(part, (UNet, ConvEncoder))]
    deepest = [2 ** (len(part.multiples) - 1) for part in networks if isinstance(part, UNet)]
    halved = [2**part.halvings for part in networks if isinstance(part, ConvEncoder)]
    return max(2, max(deepest, default=1) * max(halved, default=1))


def cost_at(model: NDM, channels: int, side: int, half: bool) -> tuple[Cost, Cost]:
    """What is there once, and what each example adds, at this side, from three small sides and two
    batches.
    """
    ndm.nn.fused.SMALLEST = 0  # small tensors here stand for the large ones of the run
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
        found.append(
            [
                [2 * a - b for a, b in zip(one, two, strict=True)],
                [b - a for a, b in zip(one, two, strict=True)],
            ]
        )
    once, each = np.einsum("p,ps,skv->kv", at, np.linalg.inv(powers), np.array(found))
    return Cost(*(max(0.0, float(value)) for value in once)), Cost(*map(float, each))


def image(parts: Namespace, side: int | None) -> tuple[int, int]:
    """Channels and side of the images of a configuration."""
    data = parts.data
    known = EVENTS.get(
        type(data).__name__,
        (
            getattr(data, "channels", 3),
            getattr(data, "size", None) or getattr(data, "resolution", None),
        ),
    )
    if (side or known[1]) is None:
        sys.exit("footprint: give the side of the images, --size 32")
    return known[0], side or known[1]


def examples_at_once(train: Namespace) -> tuple[int, int]:
    """Devices, and the examples that each takes at once."""
    devices = (train.devices if isinstance(train.devices, int) else 1) * train.nodes
    return devices, -(-train.batch_size // (devices * train.accumulate))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--size", type=int, help="side of the images, where the configuration does not say it"
    )
    parser.add_argument(
        "--share", type=float, default=0.3, help="share of the peak that is assumed"
    )
    parser.add_argument(
        "--peak", type=float, default=989e12, help="operations a second of a device, bf16"
    )
    parser.add_argument(
        "--peak-full", type=float, default=67e12, help="operations a second of a device, float32"
    )
    parser.add_argument(
        "--peak-tf32", type=float, default=494e12, help="operations a second of a device, TF32"
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
        seconds = (
            (each.predictor / fast + rest / full) * train.batch_size / devices / arguments.share
        )
        return seconds * train.steps / 3600

    record = {
        "image": [channels, side, side],
        "parameters": counts,
        "gigabytes_of_state": state / 1e9,
        "gigabytes_kept_an_example": each.kept / 1e9,
        "examples_at_once": at_once,
        "gigabytes": (state + once.kept + at_once * each.kept) / 1e9,
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


def words(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


def show(record: dict, train: Namespace, half: bool) -> None:
    shape = " x ".join(map(str, record["image"]))
    counts = record["parameters"]
    print(
        f"images {shape}, batch {train.batch_size} on {record['devices']} device(s) in"
        f" {train.accumulate} part(s), {train.steps:,} steps, {train.precision}"
    )
    print(
        f"parameters: {counts['all'] / 1e6:.1f} M, of which F {counts['F'] / 1e6:.1f} M, predictor"
        f" {counts['predictor'] / 1e6:.1f} M"
    )
    print(
        f"memory of a device (estimate): {record['gigabytes']:.1f} GB: weights, gradients,"
        f" optimizer and average {record['gigabytes_of_state']:.1f}, and"
        f" {record['examples_at_once']} examples of {record['gigabytes_kept_an_example']:.2f}"
    )
    part = record["tflop_of_the_predictor"] / record["tflop_an_example"]
    print(
        f"arithmetic: {record['tflop_an_example']:.2g} TFLOP an example ({part:.0%} the"
        f" predictor{', in bf16' if half else ''}), {record['pflop_a_step']:.2g} PFLOP a step"
    )
    peaks = record["peaks"]
    print(
        f"time (estimate): {words(record['hours'])} hours at {record['share']:.0%} of"
        f" {peaks['bf16'] / 1e12:.0f} (bf16) and {peaks['float32'] / 1e12:.0f} (float32) TFLOP/s a"
        f" device; {words(record['hours_with_tf32'])} with TF32 ({peaks['tf32'] / 1e12:.0f}) in"
        " place of float32"
    )


if __name__ == "__main__":
    main()
