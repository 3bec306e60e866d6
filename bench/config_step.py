"""MEASUREMENT of a training step of a configuration: time, memory and share of the peak rate.

python bench/config_step.py src/ndm/configs/mnist.yaml [--batches 64 256]
    [--modes eager compiled graphs] [--profile] [--peer] [--steps 20] [--size SIDE] [--json FILE]
    [--OPTION VALUE ...]

Other options override the configuration, as for ``ndm train``. ``footprint.py`` estimates the same
numbers without the device.

* A step is random numbers, loss, gradients, their norm and the configuration's optimizer, on random
  images, in its precision. The moving average, data loading and logging are left out. The time is
  the median over three runs of the mean time per step, until the device has finished.
* ``compiled`` is ``train.compile`` on a CPU, ``graphs`` is ``train.compile`` on a GPU, with CUDA
  graphs.
* Floating-point operations are counted by ``FlopCounterMode`` at a batch of two, forward and
  backward (convolutions, matrix products, and attention as its matrix products), and are
  proportional to the batch.
* The peak is the best rate of a matrix product of size 8192 (1024 on a CPU), measured before the
  steps. It is in bf16, or in float32 if the precision is; float32 is without TF32, which PyTorch's
  convolutions use by default on GPUs.
* Memory is the most that PyTorch's allocator reserved (GPU only). ``--profile`` prints the time of
  one step's kernels.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from footprint import examples_at_once, image, random_images
from measure import seconds, synchronize
from ndm.data.arrays import ArraySplit
from ndm.model import NDM
from ndm.train.compilation import TrainingTerms, try_compiling
from ndm.train.config import RunConfig
from ndm.train.module import TrainingModule

WARM_UP, PERIOD = 3, 10


def peak(device: str, half: bool) -> float:
    """Return the best rate of a matrix product, floating-point operations per second."""
    size = 1024 if device == "cpu" else 8192
    dtype = torch.bfloat16 if half else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    a @ b
    return 2.0 * size**3 / min(seconds(lambda: a @ b) for _ in range(20))


def operations(model: NDM, x: Tensor, autocast: Callable[[], torch.autocast]) -> float:
    """Return the floating-point operations per example, forward and backward."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with autocast():
            loss = model.bound(x).loss.mean()
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(x)


def stepper(
    model: NDM,
    terms: TrainingTerms,
    settings: Namespace,
    x: Tensor,
    autocast: Callable[[], torch.autocast],
) -> Callable[[], None]:
    """Return a function that takes one step of the configuration's optimizer."""
    module = TrainingModule(model, settings, 0, ArraySplit(x))
    optimizer = module.configure_optimizers()["optimizer"]
    parameters = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            loss = terms(x, model.draw(x)).loss / x[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip or math.inf)
        optimizer.step()

    return step


def peer_stepper(
    model: NDM, x: Tensor, autocast: Callable[[], torch.autocast], compiled: bool
) -> tuple[Callable[[], None], int]:
    """Return a training step of diffusers' ``UNet2DModel``, and its number of parameters.

    The architecture is that of the predictor's U-Net; it is trained by noise prediction with AdamW.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    ours = model.predictor.network
    attend = ours.attention
    if isinstance(attend, bool):
        attend = [attend] * len(ours.multiples)
    network = UNet2DModel(
        sample_size=x.shape[-1],
        in_channels=x.shape[1],
        out_channels=x.shape[1],
        layers_per_block=ours.blocks,
        block_out_channels=tuple(ours.channels * multiple for multiple in ours.multiples),
        down_block_types=tuple("AttnDownBlock2D" if flag else "DownBlock2D" for flag in attend),
        up_block_types=tuple("AttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(attend)),
        norm_num_groups=ours.channels // 8,
        attention_head_dim=ours.attention_head_dim,
        resnet_time_scale_shift="scale_shift",
    ).to(x.device, memory_format=torch.channels_last)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    forward = torch.compile(network) if compiled else network
    noises, alphas = torch.randn_like(x), scheduler.alphas_cumprod.to(x.device)

    def step() -> None:
        optimizer.zero_grad()
        noise, t = noises.normal_(), torch.randint(1000, (len(x),), device=x.device)
        alpha = alphas[t].reshape(-1, 1, 1, 1)
        noised = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        noised = noised.contiguous(memory_format=torch.channels_last)
        with autocast():
            predicted = forward(noised, t, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step, sum(parameter.numel() for parameter in network.parameters())


def show_peer(
    model: NDM, x: Tensor, autocast: Callable[[], torch.autocast], steps: int
) -> list[dict[str, float | int | str]]:
    """Print the time of the peer's step, eager and compiled, and return the records."""
    records: list[dict[str, float | int | str]] = []
    for compiled in (False, True):
        torch.cuda.empty_cache() if x.is_cuda else None
        step, count = peer_stepper(model, x, autocast, compiled)
        name = "diffusers' UNet2DModel" + (", compiled" if compiled else "")
        duration = seconds_per_step(step, steps)
        records.append({"peer": name, "parameters": count, "batch": len(x), "seconds": duration})
        text = f"{len(x):>6} {name}, {count:,} parameters: {1e3 * duration:.1f} ms per step"
        print(text, flush=True)
    return records


def seconds_per_step(step: Callable[[], None], count: int) -> float:
    """Return the seconds per step: the median of three runs of ``count`` steps."""
    for _ in range(WARM_UP):
        step()

    def several() -> None:
        for _ in range(count):
            step()

    return statistics.median(seconds(several) for _ in range(3)) / count


def print_profile(step: Callable[[], None]) -> None:
    """Print the time and the number of the kernels of one step."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        step()
        synchronize()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60))
    kernels = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    if kernels:
        total = sum(event.self_device_time_total for event in kernels) / 1e3
        print(f"{len(kernels)} kernels, {total:.1f} ms")


def measure_mode(
    parts: Namespace, x: Tensor, mode: str, arguments: argparse.Namespace, each: float, best: float
) -> dict[str, float | int | str]:
    """Measure one batch size in one mode."""
    model, device = parts.model, x.device.type
    autocast = partial(
        torch.autocast, device, torch.bfloat16, enabled=parts.settings.precision == "bf16-mixed"
    )
    start, terms = time.perf_counter(), TrainingTerms(model)
    if mode != "eager":
        torch.compiler.reset()  # otherwise later batch sizes are compiled for dynamic shapes

        def trial(terms: TrainingTerms) -> Tensor:
            with autocast():
                return terms(x, model.draw(x)).loss

        faster = try_compiling(model, terms, trial, mode == "graphs")
        mode, terms = mode if faster is not terms else "failed", faster
    step = stepper(model, terms, parts.settings, x, autocast)
    step()
    synchronize()
    first = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = arguments.steps
    if parts.settings.optimizer == "soap":  # time whole periods of its decompositions
        steps = -(-steps // PERIOD) * PERIOD
    duration = seconds_per_step(step, steps)
    if arguments.profile:
        print_profile(step)
    rate = each * len(x) / duration
    record: dict[str, float | int | str] = {
        "batch": len(x),
        "mode": mode,
        "seconds": duration,
        "examples_a_second": len(x) / duration,
        "flop_a_second": rate,
        "share_of_peak": rate / best,
        "seconds_until_the_first_step": first,
    }
    if device == "cuda":
        record["bytes"] = torch.cuda.max_memory_reserved()  # includes that of CUDA graphs
    return record


def show(record: dict) -> None:
    memory = f"{record['bytes'] / 2**30:9.1f}" if "bytes" in record else f"{'':>9}"
    print(
        f"{record['batch']:>6}{record['mode']:>10}{1e3 * record['seconds']:12.1f}"
        f"{record['examples_a_second']:12.0f}{record['flop_a_second'] / 1e12:9.2f}"
        f"{record['share_of_peak']:8.1%}{memory}{record['seconds_until_the_first_step']:9.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--size", type=int, help="side of the images, if the configuration does not set it"
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        help="batch sizes; by default the configuration's examples per device",
    )
    parser.add_argument(
        "--modes", nargs="+", default=["eager"], choices=["eager", "compiled", "graphs"]
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps per run")
    parser.add_argument(
        "--peer", action="store_true", help="also diffusers' network of the same architecture"
    )
    parser.add_argument("--profile", action="store_true", help="print the time of a step's kernels")
    parser.add_argument("--json", type=Path)
    arguments, options = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as in training
    parts = RunConfig.read(arguments.config, options).build()
    channels, side = image(parts, arguments.size)
    half = parts.settings.precision == "bf16-mixed"
    if parts.settings.precision == "16-mixed":
        sys.exit(
            "config_step: train.precision=16-mixed: give 32-true or bf16-mixed; 16-mixed scales"
            " its gradients, which is not measured here"
        )
    model = parts.model.to(device)
    best = peak(device, half)
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=half)
    each = operations(model, random_images(model, 2, channels, side).to(device), autocast)
    where = f"{torch.get_num_threads()} CPU threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    print(
        f"{arguments.config.name}, {channels}x{side}x{side}, {parts.settings.precision},"
        f" {parts.settings.optimizer}, {where}, PyTorch {torch.__version__}"
    )
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {each / 1e9:.1f} GFLOP per"
        f" example, matrix products {best / 1e12:.1f} TFLOP/s"
    )
    print(
        f"{'batch':>6}{'':>10}{'ms per step':>12}{'examples/s':>12}{'TFLOP/s':>9}{'of peak':>8}"
        f"{'GiB':>9}{'start, s':>9}"
    )
    records = []
    for batch in arguments.batches or [examples_at_once(parts.settings)[1]]:
        x = random_images(model, batch, channels, side).to(device)
        for mode in arguments.modes:
            records.append(measure_mode(parts, x, mode, arguments, each, best))
            show(records[-1])
        if arguments.peer:
            records += show_peer(model, x, autocast, arguments.steps)
    if arguments.json:
        context = {
            "config": arguments.config.name,
            "device": where,
            "flop_an_example": each,
            "peak": best,
            "precision": parts.settings.precision,
        }
        arguments.json.write_text(json.dumps({**context, "batches": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
