"""The base class of all parts of a model, whose arguments can be shown and saved, and checks."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ndm.errors import UserError


class Part(nn.Module):
    """Base class of the parts of a model.

    Subclasses store every argument of their constructor as an attribute of the same name, so that
    the part can be shown and saved.
    """

    def arguments(self) -> dict[str, object]:
        """Return the arguments of the constructor by name."""
        names = [
            name
            for name in inspect.signature(type(self).__init__).parameters
            if name not in ("self", "args", "kwargs")
        ]
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Return the arguments that are not modules, for ``repr``."""
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self.arguments().items()
            if not isinstance(value, nn.Module)
        )


def check_network(network: object, owner: str, call: str) -> None:
    """Check that an argument is an ``nn.Module``.

    Args:
        network: the argument.
        owner: the part that needs it, such as "a predictor".
        call: how the part calls it, such as "network(z, t)".

    Raises:
        UserError: it is not.
    """
    if not isinstance(network, nn.Module):
        raise UserError(
            f"network is a {type(network).__name__}: {owner} needs an nn.Module called as {call}"
        )
    try:
        signature = inspect.signature(type(network).forward)
    except (TypeError, ValueError):  # not a Python function, such as that of a TorchScript module
        return
    try:
        signature.bind(network, *[None] * (call.count(",") + 1))
    except TypeError as error:
        raise UserError(
            f"network is a {type(network).__name__}, which cannot be called as {call}: its forward"
            f" takes {signature}; wrap it in a module that can be called so"
        ) from error


def describe_output(output: object) -> str:
    """Describe the output of a network in a message: its shape, or its type if it is no tensor."""
    return str(tuple(output.shape)) if isinstance(output, Tensor) else f"a {type(output).__name__}"


def check_part(name: str, value: object, kind: type, example: str) -> None:
    """Check the type of a part of a model.

    Raises:
        UserError: it has another type, such as a network that is not wrapped.
    """
    if not isinstance(value, kind):
        found = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise UserError(f"{name} must be a {kind.__name__}, such as {example}, got {found}")


def check_data(x: object, model: nn.Module) -> None:
    """Check that ``x`` is a batch of floats in the dtype of the model.

    Raises:
        UserError: it is not, or the model has half precision.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"x is a {type(x).__name__}: give a tensor, such as torch.as_tensor(x)")
    if not x.is_floating_point():
        raise UserError(
            f"x has dtype {x.dtype}, and the model takes floats: convert real numbers by x.float(),"
            " integers k of n values by ndm.decoder.to_grid(k, n)"
        )
    if x.dim() < 2:
        raise UserError(
            f"x has shape {tuple(x.shape)}: give a batch (B, *event), x[None] for one example"
        )
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return
    if first.dtype in (torch.float16, torch.bfloat16):
        raise UserError(
            f"the model has dtype {first.dtype}, which is too coarse for its bound: use float32 or"
            " float64, and mixed precision (train.precision, torch.autocast) for speed"
        )
    if first.dtype != x.dtype:
        raise UserError(f"x has dtype {x.dtype} and the model {first.dtype}: use x.to(model.like)")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore its mode at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
