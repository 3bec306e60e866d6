"""A training step of a configuration on this machine, MEASURED: time, memory, rate of arithmetic
and its share of the peak.

python bench/config_step.py src/ndm/configs/mnist.yaml [--batches 64 256] [--modes eager compiled
graphs] [--profile] [--steps 20] [--size SIDE] [--json FILE] [--WORD VALUE ...]

Words that are not its own go to the configuration, as for ``ndm train``. ``footprint.py`` estimates
the same numbers without the device.

* A step is random numbers, loss, gradients, their norm, and the configuration's optimizer, on random images, in its precision; the
  moving average, loading data and logs are left out. Time is the median over three runs of steps,
  each the mean until the device has finished.
* ``compiled`` is what ``train.compile`` does on a CPU, ``graphs`` what it does on a GPU, CUDA graphs included.
* Floating-point operations are counted by ``FlopCounterMode`` at a batch of two, forward and backward (convolutions, matrix products and
  attention by its matrix products), and grow in proportion to the batch.
* The peak is the best rate of a bf16 matrix product (8192, or 1024 on a CPU; float32 if the precision is, without TF32, which PyTorch's convolutions
  use by default on GPUs), measured here before the steps.
* Memory is the most that PyTorch's allocator reserved (a GPU only). ``--profile`` prints what one step's kernels take.
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
from ndm.train.compilation import TermsFunction, training_terms, try_compiling
from ndm.train.config import RunConfig
from ndm.train.module import TrainingModule

WARM_UP, PERIOD = 3, 10


def peak(device: str, half: bool) -> float:
    """Best rate of a matrix product, floating-point operations per second."""
    size = 1024 if device == "cpu" else 8192
    dtype = torch.bfloat16 if half else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    a @ b
    return 2.0 * size**3 / min(seconds(lambda: a @ b) for _ in range(20))


def operations(model: NDM, x: Tensor, autocast: Callable[[], torch.autocast]) -> float:
    """Of one example, forward and backward."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with autocast():
            loss = model.bound(x).loss.mean()
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(x)


def stepper(
    model: NDM,
    terms: TermsFunction,
    settings: Namespace,
    x: Tensor,
    autocast: Callable[[], torch.autocast],
) -> Callable[[], None]:
    """One step of the optimizer that the configuration asks for."""
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
    """A step of diffusers' ``UNet2DModel`` of the same build as the predictor's U-Net, by noise
    prediction and AdamW, and its parameters.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    ours = model.predictor.network
    attend = (
        [ours.attention] * len(ours.multiples)
        if isinstance(ours.attention, bool)
        else ours.attention
    )
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
    optimizer, forward = (
        torch.optim.AdamW(network.parameters(), 1e-4, fused=True),
        torch.compile(network) if compiled else network,
    )
    noises, alphas = torch.randn_like(x), scheduler.alphas_cumprod.to(x.device)

    def step() -> None:
        optimizer.zero_grad()
        noise, t = noises.normal_(), torch.randint(1000, (len(x),), device=x.device)
        alpha = alphas[t].reshape(-1, 1, 1, 1)
        noised = (alpha.sqrt() * x + (1 - alpha).sqrt() * noise).contiguous(
            memory_format=torch.channels_last
        )
        with autocast():
            loss = torch.nn.functional.mse_loss(
                forward(noised, t, return_dict=False)[0].float(), noise
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step, sum(parameter.numel() for parameter in network.parameters())


def show_peer(
    model: NDM, x: Tensor, autocast: Callable[[], torch.autocast], steps: int
) -> list[dict[str, float | int | str]]:
    """Time and memory of the peer's step, as it comes and compiled."""
    records: list[dict[str, float | int | str]] = []
    for compiled in (False, True):
        torch.cuda.empty_cache() if x.is_cuda else None
        step, count = peer_stepper(model, x, autocast, compiled)
        name = "diffusers' UNet2DModel" + (", compiled" if compiled else "")
        records.append(
            {"peer": name, "parameters": count, "batch": len(x), "seconds": taken(step, steps)}
        )
        print(
            f"{len(x):>6} {name}, {count:,} parameters: {1e3 * float(records[-1]['seconds']):.1f}"
            " ms a step",
            flush=True,
        )
    return records


def taken(step: Callable[[], None], count: int) -> float:
    """Seconds a step."""
    for _ in range(WARM_UP):
        step()

    def several() -> None:
        for _ in range(count):
            step()

    return statistics.median(seconds(several) for _ in range(3)) / count


def profiled(step: Callable[[], None]) -> None:
    """Print what the kernels of one step take, and how many there are."""
    activities = [
        ProfilerActivity.CPU,
        *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
    ]
    with profile(activities=activities) as found:
        step()
        synchronize()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60))
    kernels = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    if kernels:
        print(
            f"{len(kernels)} kernels,"
            f" {sum(event.self_device_time_total for event in kernels) / 1e3:.1f} ms"
        )


def measured(
    parts: Namespace, x: Tensor, mode: str, arguments: argparse.Namespace, each: float, best: float
) -> dict[str, float | int | str]:
    """The record of one batch size and one mode."""
    model, device = parts.model, x.device.type
    autocast = partial(
        torch.autocast, device, torch.bfloat16, enabled=parts.settings.precision == "bf16-mixed"
    )
    start, terms = time.perf_counter(), training_terms(model)
    if mode != "eager":
        torch.compiler.reset()  # or other batch sizes than the first are compiled for any size

        def trial(terms: TermsFunction) -> Tensor:
            with autocast():
                return terms(x, model.draw(x)).loss

        faster = try_compiling(model, terms, trial, mode == "graphs")
        mode, terms = mode if faster is not terms else "failed", faster
    step = stepper(model, terms, parts.train, x, autocast)
    step()
    synchronize()
    first = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = taken(
        step,
        (
            -(-arguments.steps // PERIOD) * PERIOD
            if parts.settings.optimizer == "soap"
            else arguments.steps
        ),
    )
    if arguments.profile:
        profiled(step)
    rate = each * len(x) / took
    record: dict[str, float | int | str] = {
        "batch": len(x),
        "mode": mode,
        "seconds": took,
        "examples_a_second": len(x) / took,
        "flop_a_second": rate,
        "share_of_peak": rate / best,
        "seconds_until_the_first_step": first,
    }
    if device == "cuda":
        record["bytes"] = torch.cuda.max_memory_reserved()  # that of CUDA graphs, too
    return record


def show(record: dict) -> None:
    memory = f"{record['bytes'] / 2**30:9.1f}" if "bytes" in record else f"{'':>9}"
    print(
        f"{record['batch']:>6}{record['mode']:>10}{1e3 * record['seconds']:10.1f}{record['examples_a_second']:12.0f}"
        f"{record['flop_a_second'] / 1e12:9.2f}{record['share_of_peak']:8.1%}{memory}{record['seconds_until_the_first_step']:9.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--size", type=int, help="side of the images, where the configuration does not say it"
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        help="batch sizes; by default what one device of the configuration takes at once",
    )
    parser.add_argument(
        "--modes", nargs="+", default=["eager"], choices=["eager", "compiled", "graphs"]
    )
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument(
        "--peer", action="store_true", help="and diffusers' network of the same build"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print what the kernels of a step take"
    )
    parser.add_argument("--json", type=Path)
    arguments, options = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as training has it
    parts = RunConfig.read(arguments.config, options).build()
    channels, side = image(parts, arguments.size)
    half = parts.settings.precision == "bf16-mixed"
    if parts.settings.precision == "16-mixed":
        sys.exit(
            "config_step: give train.precision 32-true or bf16-mixed; 16-mixed scales its"
            " gradients, which is not measured here"
        )
    model = parts.model.to(device)
    best = peak(device, half)
    each = operations(
        model,
        random_images(model, 2, channels, side).to(device),
        lambda: torch.autocast(device, torch.bfloat16, enabled=half),
    )
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(
        f"{arguments.config.name}, {channels}x{side}x{side}, {parts.settings.precision},"
        f" {parts.settings.optimizer}, {where}, PyTorch {torch.__version__}"
    )
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {each / 1e9:.1f} GFLOP an"
        f" example, matrix products {best / 1e12:.1f} TFLOP/s"
    )
    print(
        f"{'batch':>6}{'':>10}{'ms a step':>10}{'examples/s':>12}{'TFLOP/s':>9}{'of peak':>8}{'GiB':>9}{'start, s':>9}"
    )
    records = []
    for batch in arguments.batches or [examples_at_once(parts.train)[1]]:
        x = random_images(model, batch, channels, side).to(device)
        for mode in arguments.modes:
            records.append(measured(parts, x, mode, arguments, each, best))
            show(records[-1])
        if arguments.peer:
            records += show_peer(
                model,
                x,
                lambda: torch.autocast(device, torch.bfloat16, enabled=half),
                arguments.steps,
            )
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
