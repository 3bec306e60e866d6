r"""The bound on a data set, with its standard error and everything that is needed to get the same number again.

Each example is looked at K times t, one in each of K equal strata of [0, 1], independently of all other examples. Its estimate averages
the K, so estimates are independent over examples and

.. math::
    \text{stderr} = \mathrm{std}_i(\text{nelbo}_i) / \sqrt{N}

covers both the spread of the data and the Monte Carlo noise. Bits per dimension are nats/(D ln 2). For data on a grid of values they
are on the scale of the original integers. For continuous data the bound is a density: nats are given too, in the units of the source.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data import EventDataset
from ndm.decoder import DiscretizedGaussian
from ndm.elbo import Bound, bits_per_dim
from ndm.errors import UserError
from ndm.model import NDM


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; ``auto`` is the accelerator of this machine, or the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device {name!r} is not available here; choose auto, cpu or cuda") from error
    return device


@torch.no_grad()
def evaluate_bound(
    model: NDM, data: EventDataset, *, draws: int = 16, batch_size: int | None = None, seed: int = 0, progress: bool = False
) -> dict[str, Any]:
    """Evaluate the bound on every example of a data set.

    Args:
        model: the model; it is evaluated in the time, discrete or continuous, that it was trained in.
        data: the examples.
        draws: K, times an example.
        batch_size: examples at once; None takes 256, or fewer where the decoder would need too much memory.
        seed: seed of times and noise; with the same batch size the same seed gives the same number.
        progress: show a progress bar.

    Returns:
        JSON-ready record: each term and the bound in bits/dim, with standard error, counts and seed; ``*_nats`` for an example.

    Raises:
        UserError: the data set is empty, or the bound is not finite.
    """
    count = len(data)
    if count == 0:
        raise UserError("there is nothing to evaluate: the split is empty")
    batch_size = default_batch_size(model, data[0].numel()) if batch_size is None else batch_size
    if draws < 1 or batch_size < 1:
        raise UserError(f"draws={draws}, batch_size={batch_size}: give integers of at least 1")
    training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    started, terms, dims = time.perf_counter(), [], 1
    for start in tqdm(range(0, count, batch_size), desc="evaluating", unit="batch", disable=not progress, delay=1, leave=False):
        batch = data.__getitems__(range(start, min(start + batch_size, count))).to(device)
        dims = batch[0].numel()
        bound = model.bound(batch, draws=draws, generator=generator)
        # In double precision before they are added up, so that the terms in the record add up to the bound.
        terms.append(Bound(bound.prior.cpu().double(), bound.diffusion.cpu().double(), bound.reconstruction.cpu().double()).terms())
    model.train(training)
    values = {name: torch.cat([part[name] for part in terms]) for name in terms[0]}
    if not bool(values["nelbo"].isfinite().all()):
        raise UserError(
            f"the bound of {int((~values['nelbo'].isfinite()).sum())} of {count} examples is not finite; the model did not train well"
        )
    record: dict[str, Any] = {}
    for name in ("nelbo", "prior", "diffusion", "reconstruction"):
        record[f"{name}_bpd"] = float(bits_per_dim(values[name].mean(), dims))
        if name == "nelbo":
            record["nelbo_bpd_stderr"] = float(bits_per_dim(standard_error(values[name]), dims))
    record |= {
        "nelbo_nats": float(values["nelbo"].mean()),
        "nelbo_nats_stderr": standard_error(values["nelbo"]),
        "dims": dims,
        "num_examples": count,
        "seed": seed,
        "time_samples_per_example": draws,
        "batch_size": batch_size,
        "steps": model.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return record


def default_batch_size(model: NDM, dims: int) -> int:
    """256, or as many examples as keep the decoder's probabilities of all levels within 2**26 numbers."""
    levels = len(model.decoder.values) if isinstance(model.decoder, DiscretizedGaussian) else 1
    return max(1, min(256, 2**26 // (dims * levels)))


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values ``(N,)``; NaN for a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def bound_table(record: Mapping[str, Any]) -> str:
    """A plain-text table of a record of :func:`evaluate_bound`."""
    rows = [(name, f"{record[f'{name}_bpd']:9.4f}") for name in ("prior", "diffusion", "reconstruction")]
    error = record["nelbo_bpd_stderr"]
    rows.append(("bound (sum)", f"{record['nelbo_bpd']:9.4f}  ± {error:.4f}"))
    lines = [f"{'term':<16}bits/dim", "-" * 36] + [f"{name:<16}{value}" for name, value in rows]
    return "\n".join(lines)
