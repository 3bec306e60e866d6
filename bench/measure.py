"""Timing and memory measurement for the speed benchmarks.

Variants take turns; ratios are formed within a round, and their medians reported. Memory is
measured in a fresh process for each variant.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

WARM_UP = 2


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step: Callable[[], object]) -> float:
    """Return the wall time of one call, until the device has finished."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def in_turn(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step in each round.

    Every round runs all steps, so that a slow spell of the machine affects all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + WARM_UP):
        for name, step in steps.items():
            duration = seconds(step)
            if number >= WARM_UP:
                times[name].append(duration)
    return times


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of the ratio of two steps of the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def matmul_peak(device: str) -> float:
    """Return the best rate of a float32 matrix product, floating-point operations per second.

    The product is tried at several sizes, and also as a 1x1 convolution: on a CPU, oneDNN's kernels
    may use wider instructions than those of the linear algebra library. There are many short runs,
    so that some of them have the core to themselves.
    """
    best = 0.0
    for size in (512, 1024) if device == "cpu" else (4096, 8192):
        a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
        image = a.reshape(1, size, 32, -1).to(memory_format=torch.channels_last)
        kernel = b.reshape(size, size, 1, 1)
        with torch.no_grad():
            for product in (
                lambda a=a, b=b: a @ b,
                lambda image=image, kernel=kernel: torch.conv2d(image, kernel),
            ):
                product()
                best = max(best, 2.0 * size**3 / min(seconds(product) for _ in range(30)))
    return best


def resident() -> int:
    """Return the resident set size of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory(device: str, build: Callable[[], Callable[[], object]], steps: int = 3) -> int:
    """Return the peak bytes of building a model and taking a few training steps.

    This includes weights, gradients, optimizer state and activations. On a CPU it is the peak of
    the resident set minus its size before, which is only right in a fresh process; it includes
    the allocator's cache and the weights that oneDNN packs.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident()
    step = build()
    for _ in range(steps):
        step()
    if device != "cpu":
        return torch.cuda.max_memory_allocated() - before
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def in_fresh_process(script: str, arguments: Sequence[str]) -> int:
    """Run a benchmark with these arguments in a new process; return the number it prints."""
    finished = subprocess.run(
        [sys.executable, script, *arguments], check=True, capture_output=True, text=True
    )
    return int(finished.stdout.split()[-1])
