"""Time and memory of a training step of NDM variants, a plain diffusion and two other libraries.

pip install -c constraints.txt -e '.[bench]'
pip install -c constraints.txt --no-deps denoising-diffusion-pytorch
python bench/train_step.py [--size 28] [--batch 64] [--channels 32] [--repeats 9]
    [--only NAME ...] [--no-memory] [--bf16] [--json FILE]

``variants.py`` describes the variants. They take turns, and ratios are medians over rounds of the
ratio within a round. Memory is the peak of a fresh process for each variant (see ``measure.py``),
or that of the allocator on a GPU. ``share_of_matmul_peak`` is the floating-point operations of the
plain diffusion's step, forward and backward, over its best time, divided by the best rate of a
float32 matrix product in the same run with the same threads.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from measure import in_fresh_process, in_turn, matmul_peak, median_ratio, peak_memory
from variants import PEERS, Setting, parameters, training

OURS = (
    "ddpm",
    "direct_separable",
    "tied_separable",
    "tied",
    "direct_separable_same_width",
    "tied_separable_same_width",
    "tied_same_width",
    "direct_separable_mlp",
    "tied_separable_mlp",
    "tied_mlp",
    "tied_discrete",
    "ddpm_bf16",
)


def make_step(name: str, setting: Setting) -> Callable[[], object]:
    """Return a function that takes one training step of a variant: loss, gradients, AdamW."""
    base = name.removesuffix("_bf16")
    setting = replace(setting, bf16=setting.bf16 or base != name)
    module, loss = training(base, setting)
    x = setting.data()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with setting.autocast():
            value = loss(x)
        value.backward()
        optimizer.step()

    return step


def operations(setting: Setting) -> int:
    """Return the floating-point operations of the plain diffusion's step, forward and backward.

    Attention counts as its matrix products.
    """
    model, loss = training("ddpm", setting)
    x = setting.data()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(x).backward()
    del model
    return counter.get_total_flops()


def measure_memory(names: list[str], setting: Setting) -> dict[str, int]:
    flags = ["--size", str(setting.size), "--batch", str(setting.batch)]
    flags += ["--channels", str(setting.channels)] + ["--bf16"] * setting.bf16
    return {name: in_fresh_process(__file__, ["--memory-of", name, *flags]) for name in names}


def report(
    times: dict[str, list[float]], memory: dict[str, int], setting: Setting
) -> dict[str, float]:
    """Print the table, and return the ratios by name."""
    ratios = {}
    print(f"{'variant':<42}{'ms':>9}{'over ddpm':>11}{'MiB':>8}{'over ddpm':>11}")
    for name in times:
        ratio, peak = median_ratio(times, name, "ddpm"), memory.get(name)
        line = f"{name:<42}{1e3 * statistics.median(times[name]):9.1f}{ratio:11.2f}"
        print(line + (f"{peak / 2**20:8.0f}{peak / memory['ddpm']:11.2f}" if peak else ""))
        key = f"ddpm_over_{name}" if name in PEERS else f"{name}_over_ddpm"
        if name != "ddpm":
            ratios[key] = median_ratio(times, "ddpm", name) if name in PEERS else ratio
            if peak:
                ratios[f"{key}_memory"] = (
                    memory["ddpm"] / peak if name in PEERS else peak / memory["ddpm"]
                )
    for name in ("ddpm", *(name for name in PEERS if name in times)):
        print(f"parameters of {name}: {parameters(training(name, setting)[0]):,}")
    return ratios


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, default=28, help="height and width of the images; a multiple of 4"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--channels",
        type=int,
        default=32,
        help="width of the predictor's first level; a multiple of 16",
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--only", nargs="+", choices=[*OURS, *PEERS], help="only these variants, and ddpm"
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="run networks under bf16 autocast")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--memory-of",
        choices=[*OURS, *PEERS],
        help="only print the peak memory of one variant in bytes",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(arguments.size, arguments.batch, arguments.channels, device, arguments.bf16)
    if arguments.memory_of:
        # Initialize the device and import the peer first, so that they are not counted.
        torch.randn(8, 8, device=device).sum()
        if arguments.memory_of in PEERS:
            training(arguments.memory_of, Setting(size=8, batch=1, channels=16, device=device))
        print(peak_memory(device, lambda: make_step(arguments.memory_of, setting)))
        return
    names = [
        name
        for name in (*OURS, *PEERS)
        if name == "ddpm" or not arguments.only or name in arguments.only
    ]
    memory = {} if arguments.no_memory else measure_memory(names, setting)
    peaks = [matmul_peak(device)]
    times = in_turn({name: make_step(name, setting) for name in names}, arguments.repeats)
    peaks.append(matmul_peak(device))
    share = operations(setting) / min(times["ddpm"]) / max(peaks)
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} CPU threads"
    print(
        f"{setting.size}x{setting.size}, batch {setting.batch}, width {setting.channels}, {where},"
        f" median of {arguments.repeats}"
    )
    ratios = report(times, memory, setting)
    print(f"share of the matmul peak ({max(peaks) / 1e9:.0f} GFLOP/s): {share:.2f}")
    if arguments.json:
        context = {
            "device": where,
            "threads": threads,
            "repeats": arguments.repeats,
            "size": setting.size,
            "batch": setting.batch,
        }
        arguments.json.write_text(
            json.dumps({**ratios, "share_of_matmul_peak": share, **context}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
