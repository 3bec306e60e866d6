"""torch.compile for the training bound, as one graph; names of weights, checkpoints and saved
models stay the same.

The graph holds every network, the process and the terms of the bound, forward and backward, and
draws nothing but dropout: random numbers come in. A learned F that is differentiated in time by
forward mode is compiled with the rest if its network is one of :mod:`ndm.nn`; any other runs
uncompiled in the middle. With CUDA graphs, which take one batch size and no accumulated gradients,
the device starts a whole pass at once.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm.elbo import BoundDraw
from ndm.model import DiffusionModel


class Terms(NamedTuple):
    """What a training step needs of a bound."""

    loss: Tensor
    """Mean over the batch of what is minimized, ``()``, nats."""
    means: Tensor
    """Means over the batch of prior, diffusion, reconstruction and their sum, ``(4,)``, nats; no
    gradient.
    """
    diffusion: Tensor
    """The diffusion term of each example, ``(B,)``, nats; no gradient."""


TermsFunction = Callable[[Tensor, BoundDraw], Terms]


def training_terms(model: DiffusionModel) -> TermsFunction:
    """The training bound of a batch at given random numbers, see :meth:`ndm.NDM.bound_at`."""

    def terms(x: Tensor, draw: BoundDraw) -> Terms:
        bound = model.bound_at(x, draw)
        means = torch.stack([term.detach().mean() for term in bound.terms().values()])
        return Terms(bound.loss.mean(), means, bound.diffusion.detach())

    return terms


def compiled(terms: TermsFunction, cuda_graphs: bool = False, **options: Any) -> TermsFunction:
    """The same, compiled for the first batch size that it sees.

    Args:
        terms: what to compile.
        cuda_graphs: record the kernels of each pass once and start them together; ignored where
            there is no GPU.
        options: for ``torch.compile``.
    """
    if options.get("backend", "inductor") == "inductor":
        # Buffers are reused where tangents of forward mode are zeros that nothing may write to.
        options["options"] = {
            "allow_buffer_reuse": False,
            "triton.cudagraphs": cuda_graphs and torch.cuda.is_available(),
        }
    return torch.compile(terms, dynamic=False, **options)


def try_compiling(
    model: DiffusionModel,
    terms: TermsFunction,
    trial: Callable[[TermsFunction], Tensor],
    cuda_graphs: bool = False,
    speak: bool = True,
) -> TermsFunction:
    """Compile the training bound, or leave it as it is, with one line on stderr, if that fails.

    Args:
        model: the model.
        terms: its training bound.
        trial: a loss such as that of a training step, by a function like ``terms``. It is computed
            with its gradients, because compilation happens, and fails, at the first call, forward
            or backward; buffers are left as they were, gradients are cleared (None).
        cuda_graphs: see :func:`compiled`.
        speak: whether this process prints.

    Raises:
        Exception: the trial fails without compilation, too.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        faster = compiled(terms, cuda_graphs)
        for _ in range(3 if cuda_graphs else 1):  # CUDA graphs warm up, are recorded, and run
            model.zero_grad()
            trial(faster).backward()
        return faster
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        model.zero_grad()
        trial(terms).backward()  # an error that is not the compiler's is raised here as it is
        if speak:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(
                f"train.compile: this machine or network cannot be compiled ({reason}); training"
                " goes on uncompiled",
                file=sys.stderr,
            )
        return terms
    finally:
        model.zero_grad()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
