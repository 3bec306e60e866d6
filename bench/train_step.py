"""Time of one training step of NDM variants over that of a plain diffusion with the same predictor; ratios within one run.

python bench/train_step.py [--size 8] [--batch 64] [--repeats 15] [--json FILE]

All variants are stepped in turn, round after round, so that a slow spell of the machine hits each alike; medians are compared.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import ndm
from ndm.transform import Transform


def predictor_network() -> nn.Module:
    return ndm.nn.UNet(channels=24, multiples=(1, 2), attention=True, fourier=(3,), dropout=0.1)


def variants(dims: int) -> dict[str, tuple[Transform, int | None]]:
    """Name -> transformation and number of steps T (None: continuous time)."""
    return {
        "ddpm": (ndm.Identity(), None),
        "tied_mlp": (ndm.NetworkTransform(ndm.nn.MLP(dims, hidden=128, blocks=2)), None),
        "tied_unet_half_width": (ndm.NetworkTransform(ndm.nn.UNet(channels=12, multiples=(1, 2))), None),
        "tied_unet_same_width": (ndm.NetworkTransform(ndm.nn.UNet(channels=24, multiples=(1, 2))), None),
        "tied_separable_mlp": (ndm.SeparableTransform(ndm.nn.MLP(dims, hidden=128, blocks=2, outputs=4)), None),
        "tied_separable_unet_half_width": (ndm.SeparableTransform(ndm.nn.UNet(channels=12, multiples=(1, 2), outputs=4)), None),
        "tied_separable_unet_same_width": (ndm.SeparableTransform(ndm.nn.UNet(channels=24, multiples=(1, 2), outputs=4)), None),
        "tied_unet_same_width_discrete": (ndm.NetworkTransform(ndm.nn.UNet(channels=24, multiples=(1, 2))), 1000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dims = arguments.size**2
    decoder = ndm.DiscretizedGaussian(17)
    x = decoder.values[torch.randint(17, (arguments.batch, 1, arguments.size, arguments.size))].float()
    steps = {}
    for name, (transform, horizon) in variants(dims).items():
        model = ndm.NDM(ndm.LinearLogSNR(-6.5, 5.0), transform, ndm.Predictor(predictor_network()), decoder, steps=horizon)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

        def step(model: ndm.NDM = model, optimizer: torch.optim.Optimizer = optimizer) -> float:
            start = time.perf_counter()
            optimizer.zero_grad()
            model.bound(x).total.mean().backward()
            optimizer.step()
            return time.perf_counter() - start

        steps[name] = step

    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(arguments.repeats + 2):
        for name, step in steps.items():
            seconds = step()
            if round_number >= 2:  # the first rounds warm up
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{arguments.size}x{arguments.size}, batch {arguments.batch}, {torch.get_num_threads()} threads, median of {arguments.repeats}")
    print(f"{'variant':<32}{'ms':>8}{'over ddpm':>11}")
    for name, value in median.items():
        print(f"{name:<32}{1e3 * value:8.1f}{value / median['ddpm']:11.2f}")
    if arguments.json:
        ratios = {f"{name}_over_ddpm": value / median["ddpm"] for name, value in median.items() if name != "ddpm"}
        arguments.json.write_text(json.dumps({**ratios, "threads": torch.get_num_threads(), "repeats": arguments.repeats}, indent=2) + "\n")


if __name__ == "__main__":
    main()
