"""How the benchmarks of speed measure: variants in turn, medians of ratios within a round, memory
in a fresh process each.
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
    """Wall time of one call, until the device has finished."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def in_turn(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; every round steps all, so that a slow spell of the
    machine hits each alike.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + WARM_UP):
        for name, step in steps.items():
            taken = seconds(step)
            if number >= WARM_UP:
                times[name].append(taken)
    return times


def over(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio of two steps of the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def matmul_peak(device: str) -> float:
    """Best rate of a float32 matrix product, floating-point operations per second.

    Several sizes, and as a 1x1 convolution as well: on a CPU that is the same product by oneDNN,
    whose kernels may use wider instructions than those of the linear algebra library. Many short
    runs, so that some of them have the core to themselves.
    """
    best = 0.0
    for size in (512, 1024) if device == "cpu" else (4096, 8192):
        a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
        image, kernel = (
            a.reshape(1, size, 32, -1).to(memory_format=torch.channels_last),
            b.reshape(size, size, 1, 1),
        )
        with torch.no_grad():
            for product in (
                lambda a=a, b=b: a @ b,
                lambda image=image, kernel=kernel: torch.conv2d(image, kernel),
            ):
                product()
                best = max(best, 2.0 * size**3 / min(seconds(product) for _ in range(30)))
    return best


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory(device: str, build: Callable[[], Callable[[], object]], steps: int = 3) -> int:
    """Peak bytes from before the model is built until a few steps are done: weights, gradients,
    optimizer and activations.

    On a CPU this is the peak of the resident set over what the process held before, and so right in
    a fresh process alone. It holds what the allocator keeps and what oneDNN packs as well.
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
    """The number that a benchmark prints when it is started anew with these arguments."""
    found = subprocess.run(
        [sys.executable, script, *arguments], check=True, capture_output=True, text=True
    )
    return int(found.stdout.split()[-1])
