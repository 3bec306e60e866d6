"""Time of a sampling step of NDM variants, relative to a plain diffusion with the same predictor.

python bench/sample.py [--size 28] [--batch 64] [--channels 32] [--steps 4] [--repeats 9] [--bf16]
    [--json FILE]

``variants.py`` describes the variants; ``direct_score`` is a direct reverse process with a second
output, which has an ODE. Every variant takes a few steps of each method, and all methods and
variants take turns. Ratios are medians over rounds of the ratio within a round. Nothing is drawn
from the decoder.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from measure import in_turn, median_ratio
from ndm.sample import Method, make_sampler
from variants import Setting, ours

VARIANTS = ("ddpm", "direct_separable", "tied_separable", "tied", "direct_score_separable")
METHODS: dict[str, tuple[Method, str | None]] = {
    "ancestral": ("ancestral", None),
    "ode_heun": ("ode", "heun"),
    "ode_euler": ("ode", "euler"),
}
KEYS = {
    "direct_over_ddpm": "direct_separable ancestral",
    "tied_separable_over_ddpm": "tied_separable ancestral",
    "tied_over_ddpm": "tied ancestral",
    "tied_separable_ode_over_ddpm": "tied_separable ode_heun",
    "tied_separable_ode_euler_over_ddpm": "tied_separable ode_euler",
    "tied_ode_over_ddpm": "tied ode_heun",
    "direct_score_over_ddpm": "direct_score_separable ancestral",
    "direct_score_ode_over_ddpm": "direct_score_separable ode_heun",
    "direct_score_ode_euler_over_ddpm": "direct_score_separable ode_euler",
}


def make_steps(setting: Setting, steps: int) -> dict[str, Callable[[], object]]:
    """Return functions that take a few steps of each variant with each of its methods, by name."""
    z = torch.randn(setting.batch, 1, setting.size, setting.size, device=setting.device)
    runs: dict[str, Callable[[], object]] = {}
    for variant in VARIANTS:
        reverse = ours(variant, setting).eval().reverse_process
        for name, (method, solver) in METHODS.items():
            if method == "ode" and not reverse.serves_every_eta:
                continue
            sampler = make_sampler(method, steps, solver=solver)

            def run(sampler=sampler, reverse=reverse) -> None:  # type: ignore[no-untyped-def]
                with torch.no_grad(), setting.autocast():
                    sampler(reverse, z)

            runs[f"{variant} {name}"] = run
    return runs


def main() -> None:
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
    parser.add_argument("--steps", type=int, default=4, help="sampling steps timed together")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--bf16", action="store_true", help="run networks under bf16 autocast; for GPUs"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(arguments.size, arguments.batch, arguments.channels, device, arguments.bf16)
    times = in_turn(make_steps(setting, arguments.steps), arguments.repeats)
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} CPU threads"
    print(
        f"{setting.size}x{setting.size}, batch {setting.batch}, width {setting.channels}, {where},"
        f" median of {arguments.repeats}"
    )

    def over_ddpm(name: str) -> float:
        return median_ratio(times, name, f"ddpm {name.split()[1]}")

    print(f"{'variant, method':<36}{'ms per step':>11}{'over ddpm':>11}")
    for name, durations in times.items():
        milliseconds = 1e3 * statistics.median(durations) / arguments.steps
        print(f"{name:<36}{milliseconds:11.1f}{over_ddpm(name):11.3f}")
    if arguments.json:
        ratios = {key: over_ddpm(name) for key, name in KEYS.items()}
        context = {
            "device": where,
            "threads": threads,
            "repeats": arguments.repeats,
            "size": setting.size,
            "batch": setting.batch,
        }
        arguments.json.write_text(json.dumps({**ratios, **context}, indent=2) + "\n")


if __name__ == "__main__":
    main()
