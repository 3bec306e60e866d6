"""Speed and error of the likelihood by the ODE, compared with flow_matching and SciPy.

pip install -c constraints.txt -e '.[bench]'
python bench/likelihood.py [RUN] [--images 32] [--repeats 3] [--json FILE]

RUN is a trained run of ndm train, by default runs/digits (from make demo). All methods compute
log p(z_0) of the same latents with the same network. The error is the root mean square over images
in bits/dim; the reference is the exact trace with fine steps. A probe's error averages out over
repeated runs, so a method with error e needs (e/a)² runs to reach the error a; the last column
divides the speed by that number for a = 0.03 bits/dim. (It favors methods with a systematic error,
which repeats do not reduce.) Methods take turns, round after round; medians are compared.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flow_matching.solver import ODESolver
from scipy.integrate import solve_ivp
from torch import Tensor

from ndm.likelihood import latent
from ndm.model import NDM
from ndm.ode import OdeSettings, ode_log_prob
from ndm.random import ExampleGenerators
from ndm.shapes import sum_event
from ndm.train.run import Run

TARGET = 0.03
Method = Callable[[int], tuple[Tensor, float]]
"""Maps the number of the round to log p(z_0), ``(B,)``, and the number of network evaluations."""


def log_normal(z: Tensor) -> Tensor:
    return sum_event(-0.5 * z**2 - 0.5 * math.log(2 * math.pi))


def ours(model: NDM, z: Tensor, **settings: object) -> Method:
    ode = OdeSettings(**settings)  # type: ignore[arg-type]

    def run(seed: int) -> tuple[Tensor, float]:
        generators = ExampleGenerators(seed, range(len(z)))
        result = ode_log_prob(model.reverse_process, z, ode, generators)
        return result.log_p, result.nfe

    return run


def flow_matching(
    model: NDM,
    z: Tensor,
    method: str,
    steps: int | None = None,
    tolerance: float = 1e-5,
    exact: bool = False,
) -> Method:
    """Return a method of flow_matching.

    Its time runs from noise at 0 to data at 1, and its exact divergence only takes flat events.
    """

    def run(seed: int) -> tuple[Tensor, float]:
        count = 0

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            nonlocal count
            count += 1
            state = x.reshape(z.shape)
            level = model.process.level((1 - t).clamp(0, 1).to(z), state)
            return -model.reverse_process.drift(state, level, 0.0).reshape(x.shape)

        torch.manual_seed(seed)
        options = {
            "step_size": None if steps is None else 1 / steps,
            "method": method,
            "rtol": tolerance,
            "atol": tolerance,
        }
        solver = ODESolver(velocity_model=velocity)
        _, log_p = solver.compute_likelihood(
            z.flatten(1), log_normal, exact_divergence=exact, **options
        )
        return log_p.double(), count

    return run


def scipy_rk45(model: NDM, z: Tensor, tolerance: float) -> Method:
    """Return a method by solve_ivp on the flat state and log-density, with one probe per path."""

    def run(seed: int) -> tuple[Tensor, float]:
        count, size = 0, z.numel()
        generator = torch.Generator().manual_seed(seed)
        probe = (2 * torch.randint(2, z.shape, generator=generator) - 1).to(z)

        def field(t: float, y: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            state = torch.from_numpy(y[:size].reshape(z.shape)).to(z).requires_grad_()
            with torch.enable_grad():
                f = model.reverse_process.drift(state, model.process.level(t, state), 0.0)
                product = torch.autograd.grad(f, state, probe)[0]
            divergence = sum_event(product * probe).double()
            return np.concatenate([f.detach().flatten().double().numpy(), divergence.numpy()])

        start = np.concatenate([z.flatten().double().numpy(), np.zeros(len(z))])
        path = solve_ivp(field, (0.0, 1.0), start, method="RK45", rtol=tolerance, atol=tolerance)
        end = torch.from_numpy(path.y[:, -1])
        return log_normal(end[:size].reshape(z.shape)) + end[size:], count

    return run


def methods(model: NDM, z: Tensor) -> dict[str, Method]:
    return {
        "ndm, the default settings": ours(model, z),
        "ndm, dopri5 1e-4, 32 nodes, exact": ours(model, z, nodes=32, probes="exact"),
        "ndm, dopri5 1e-4, 32 nodes, 1 probe": ours(model, z, nodes=32, probes=1),
        "ndm, dopri5 1e-4, 32 nodes, 4 probes": ours(model, z, nodes=32, probes=4),
        "ndm, rk4 16 steps, exact": ours(model, z, solver="rk4", nodes=16, probes="exact"),
        "ndm, rk4 16 steps, 1 probe": ours(model, z, solver="rk4", nodes=16, probes=1),
        "ndm, rk4 16 steps, 4 probes": ours(model, z, solver="rk4", nodes=16, probes=4),
        "ndm, rk4 32 steps, 4 probes": ours(model, z, solver="rk4", nodes=32, probes=4),
        "ndm, midpoint 32 steps, 4 probes": ours(model, z, solver="midpoint", nodes=32, probes=4),
        "flow_matching, rk4 20 steps, exact": flow_matching(model, z, "rk4", 20, exact=True),
        "flow_matching, dopri5 1e-5, 1 probe": flow_matching(model, z, "dopri5", tolerance=1e-5),
        "flow_matching, dopri5 1e-4, 1 probe": flow_matching(model, z, "dopri5", tolerance=1e-4),
        "flow_matching, rk4 20 steps, 1 probe": flow_matching(model, z, "rk4", 20),
        "flow_matching, midpoint 20 steps, 1 probe": flow_matching(model, z, "midpoint", 20),
        "scipy RK45 1e-5, 1 probe": scipy_rk45(model, z, 1e-5),
        "scipy RK45 1e-4, 1 probe": scipy_rk45(model, z, 1e-4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", nargs="?", type=Path, default=Path("runs/digits"), help="folder of a trained run"
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds; methods with exact traces run once"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model = Run(arguments.run).model()
    x = Run(arguments.run).data().split("test").__getitems__(range(arguments.images))
    with torch.no_grad():
        z, _ = latent(
            model.process, model.decoder, x, "variational", ExampleGenerators(0, range(len(x)))
        )
    bits = x[0].numel() * math.log(2)
    print(
        f"{len(x)} latents of {tuple(x.shape[1:])}, {torch.get_num_threads()} threads, median of"
        f" {arguments.repeats}; reference ...",
        flush=True,
    )
    reference, _ = ours(model, z, solver="rk4", nodes=96, probes="exact")(0)

    rows: dict[str, dict[str, list[float]]] = {}
    for round_number in range(arguments.repeats):
        for name, method in methods(model, z).items():
            if round_number and "exact" in name:
                continue  # deterministic and slow: once is enough
            started = time.perf_counter()
            log_p, evaluations = method(round_number)
            row = rows.setdefault(name, {"seconds": [], "nfe": [], "square": []})
            row["seconds"].append(time.perf_counter() - started)
            row["nfe"].append(evaluations)
            row["square"].append(float(((log_p - reference) / bits).square().mean()))
    table = {}
    print(f"{'':<44}{'NFE':>5}{'images/s':>10}{'error':>8}{f'images/s at {TARGET}':>18}")
    for name, row in rows.items():
        rate = len(x) / statistics.median(row["seconds"])
        error = math.sqrt(statistics.mean(row["square"]))
        equal = rate * min(1.0, (TARGET / error) ** 2)
        table[name] = {
            "nfe": statistics.mean(row["nfe"]),
            "images_per_second": rate,
            "error_bpd": error,
            "images_per_second_at_equal_error": equal,
        }
        print(f"{name:<44}{table[name]['nfe']:5.0f}{rate:10.2f}{error:8.4f}{equal:18.2f}")

    def best(start: str, exact: bool) -> float:
        return max(
            row["images_per_second_at_equal_error"]
            for name, row in table.items()
            if name.startswith(start) and ("exact" in name) == exact
        )

    ratios = {
        "probes_ndm_over_flow_matching": best("ndm", False) / best("flow_matching", False),
        "probes_ndm_over_scipy": best("ndm", False) / best("scipy", False),
        "exact_ndm_over_flow_matching": best("ndm", True) / best("flow_matching", True),
    }
    text = ", ".join(f"{name} {value:.1f}" for name, value in ratios.items())
    print(f"best at equal error: {text}")
    if arguments.json:
        content = {
            **ratios,
            "target_bpd": TARGET,
            "methods": table,
            "threads": torch.get_num_threads(),
            "repeats": arguments.repeats,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
