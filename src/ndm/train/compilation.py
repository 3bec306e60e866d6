"""torch.compile for the networks of a model, in place: names of weights, checkpoints and saved models stay the same.

The predictor's network is compiled, and that of a time-separable transformation. The network of any other transformation is not: in
continuous time a forward-mode derivative passes through it, which the compiler does not take.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ndm.model import NDM
from ndm.transform import SeparableTransform


def compiled_parts(model: NDM) -> list[nn.Module]:
    """The networks of a model that may be compiled."""
    parts = [model.predictor.network]
    if isinstance(model.transform, SeparableTransform):
        parts.append(model.transform.network)
    return parts


def uncompile_networks(model: NDM) -> None:
    """Undo :func:`compile_networks`."""
    for network in compiled_parts(model):
        network._compiled_call_impl = None  # what nn.Module.compile sets


def compile_networks(model: NDM, trial: Callable[[], Tensor] | None, speak: bool = True) -> bool:
    """Compile the networks of a model, or leave them as they are, with one line on stderr, if that fails.

    Args:
        model: the model.
        trial: a loss such as that of a training step. It is computed with its gradients, because compilation happens, and fails, at the
            first call, forward or backward; weights and buffers are left as they were, gradients are cleared (None). None: no trial.
        speak: whether this process prints.

    Returns:
        Whether the networks are compiled.

    Raises:
        Exception: the trial fails without compilation, too.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        for network in compiled_parts(model):
            network.compile()
        if trial is not None:
            trial().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        uncompile_networks(model)
        model.zero_grad()
        if trial is not None:
            trial().backward()  # an error that is not the compiler's is raised here as it is
        if speak:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"train.compile: this machine or network cannot be compiled ({reason}); training goes on uncompiled", file=sys.stderr)
        return False
    finally:
        model.zero_grad()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    return True
