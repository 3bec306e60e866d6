"""torch.compile for the training bound, as one graph.

The graph contains the networks, the process and the terms of the bound, forward and backward. Its
random numbers are inputs; only dropout is drawn inside. A learned F that is differentiated in time
by forward mode is part of the graph if its network is one of :mod:`ndm.nn`; any other network runs
uncompiled. CUDA graphs launch a whole pass as one unit; they need a fixed batch size and no
accumulated gradients. Names of weights, checkpoints and saved models do not change.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm.elbo import BoundDraw
from ndm.errors import one_line
from ndm.model import DiffusionModel


class Terms(NamedTuple):
    """The training loss of a batch, and the terms of its bound for logging."""

    loss: Tensor
    """Mean training loss over the batch, ``()``, nats."""
    means: Tensor
    """Batch means of prior, diffusion, reconstruction and their sum, ``(4,)``, nats, detached."""
    diffusion: Tensor
    """Diffusion term of each example, ``(B,)``, nats, detached."""


Wrapper = Callable[[Callable[..., Terms]], Callable[..., Terms]]


class TrainingTerms:
    """Computes the terms of a batch for given random numbers, see :meth:`ndm.NDM.bound_at`.

    Args:
        model: the model.
        wrap: applied once to the function that computes them, such as ``torch.compile``.
    """

    def __init__(self, model: DiffusionModel, wrap: Wrapper | None = None):
        self.model, self._wrap = model, wrap
        self._c: Tensor | None = None
        self._plain = self._given = self._function(model)

    def _function(self, model: DiffusionModel) -> Callable[[Tensor, BoundDraw], Terms]:
        def terms(x: Tensor, draw: BoundDraw) -> Terms:
            bound = model.bound_at(x, draw)
            means = torch.stack([term.detach().mean() for term in bound.terms().values()])
            return Terms(bound.loss.mean(), means, bound.diffusion.detach())

        return terms if self._wrap is None else self._wrap(terms)

    def __call__(self, x: Tensor, draw: BoundDraw, c: Tensor | None = None) -> Terms:
        """Return the terms for ``x`` ``(B, *event)``, and its condition as networks see it."""
        if c is None:
            return self._plain(x, draw)
        # One tensor holds the condition of every step, so that a compiled function stays valid.
        if self._c is None or self._c.shape != c.shape or self._c.device != c.device:
            self._c = c.clone()
            self._given = self._function(self.model.bind(self._c))
        self._c.copy_(c)
        return self._given(x, draw)


def compiled(terms: TrainingTerms, cuda_graphs: bool = False, **options: Any) -> TrainingTerms:
    """Compile a training bound for the first batch size that it is called with.

    Args:
        terms: the function to compile.
        cuda_graphs: record the kernels of each pass once and launch them as one unit; ignored
            without a GPU.
        options: options of ``torch.compile``.
    """
    if options.get("backend", "inductor") == "inductor":
        # Inductor would reuse, and so write to, the read-only zero tangents of forward mode.
        options["options"] = {
            "allow_buffer_reuse": False,
            "triton.cudagraphs": cuda_graphs and torch.cuda.is_available(),
        }

    def compile_(function: Callable[..., Terms]) -> Callable[..., Terms]:
        return torch.compile(function, dynamic=False, **options)

    return TrainingTerms(terms.model, compile_)


def try_compiling(
    model: DiffusionModel,
    terms: TrainingTerms,
    trial: Callable[[TrainingTerms], Tensor],
    cuda_graphs: bool = False,
    speak: bool = True,
) -> TrainingTerms:
    """Compile the training bound; if that fails, warn in one line and return it uncompiled.

    Args:
        model: the model.
        terms: its training bound.
        trial: computes the loss of a training step by a function like ``terms``. Its forward and
            backward pass trigger the compilation. Buffers are restored afterwards and gradients
            are set to None.
        cuda_graphs: see :func:`compiled`.
        speak: print the warning in this process.

    Raises:
        Exception: the trial fails without compilation, too.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        faster = compiled(terms, cuda_graphs)
        for _ in range(3 if cuda_graphs else 1):  # CUDA graphs: warm up, record, replay
            model.zero_grad()
            trial(faster).backward()
        return faster
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise many types of errors
        model.zero_grad()
        trial(terms).backward()  # raises errors that are not the compiler's
        if speak:
            reason = one_line(f"{type(error).__name__}: {error}", 200)
            print(
                f"train.compile: compilation failed ({reason}); training continues uncompiled",
                file=sys.stderr,
            )
        return terms
    finally:
        model.zero_grad()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
