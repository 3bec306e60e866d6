"""The base classes of all parts of a model, whose arguments can be shown and saved, and checks.

A :class:`Conditional` part may be bound to a condition c, which its network then takes too:
``network(x, t)`` becomes ``network(x, t, c)``. Binding copies the part and shares its weights.
"""

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

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


class Conditional(Part):
    """A part whose network may take a condition c, see :mod:`ndm.condition`."""

    c: Tensor | None = None
    """The condition as the network sees it, ``(B, ...)``, or ``(1, ...)`` for every example."""
    masked: bool = False
    """Whether c is the known part of the example itself, see :class:`ndm.MaskCondition`."""
    arity: int = 2
    """The number of arguments of the network without c."""

    @property
    def missing(self) -> Tensor | None:
        """1 where a dimension is not known and 0 where it is; broadcasts against ``(B, *event)``.

        None without masks.
        """
        if not self.masked or self.c is None:
            return None
        return 1 - self.c[:, self.c.shape[1] // 2 :]

    @property
    def known(self) -> Tensor:
        """The values of the known dimensions, and 0 elsewhere."""
        assert self.c is not None
        return self.c[:, : self.c.shape[1] // 2]

    def with_known(self, x: Tensor) -> Tensor:
        """Return x ``(B, *event)`` with known values in their places; unchanged without masks."""
        missing = self.missing
        return x if missing is None else masked(x, missing) + self.known.to(x)

    @property
    def conditional(self) -> bool:
        """Whether this part takes a condition, by its network or by a part inside."""
        own = getattr(self, "network", None)
        takes = isinstance(own, nn.Module) and takes_condition(own, self.arity)
        return takes or any(part.conditional for part in _inside(self))

    def networks(self) -> Iterator[nn.Module]:
        """Yield the networks in this part that take a condition."""
        own = getattr(self, "network", None)
        if isinstance(own, nn.Module) and takes_condition(own, self.arity):
            yield own
        for part in _inside(self):
            yield from part.networks()

    def bind(self, c: Tensor, masked: bool | None = None) -> Self:
        """Return a copy with the condition c in every part, which shares all weights.

        Args:
            c: the condition as networks see it.
            masked: see :attr:`masked`; None leaves it as it is.
        """
        other = copy.copy(self)
        other.masked = self.masked if masked is None else masked
        inside = {name: _bound(part, c, other.masked) for name, part in self._modules.items()}
        other._modules, other.c = inside, c
        return other

    def repeated(self, count: int) -> Self:
        """Return the part for a batch that is ``count`` copies of this one, one after another."""
        if self.c is None or len(self.c) == 1:
            return self
        return self.bind(self.c.repeat(count, *([1] * (self.c.dim() - 1))))

    def call(self, *inputs: Tensor) -> Tensor:
        """Return the output of the network, which takes c if it can.

        Raises:
            UserError: the condition is of another number of examples.
        """
        network = self.network
        assert isinstance(network, nn.Module)
        if self.c is None or not takes_condition(network, self.arity):
            output: Tensor = network(*inputs)
            return output
        c, x = self.c, inputs[0]
        if len(c) not in (1, len(x)):
            raise UserError(
                f"the condition is of {len(c)} examples, and the batch has {len(x)}: give one of"
                " each example, or one for all"
            )
        c = c.to(x) if c.is_floating_point() else c.to(x.device)
        if c.dim() == x.dim() == 4:  # images, or the null of images of any size
            if c.shape[2:] not in ((1, 1), x.shape[2:]):
                raise UserError(
                    f"the condition is images of {' x '.join(map(str, c.shape[2:]))}, and x is of"
                    f" {' x '.join(map(str, x.shape[2:]))}: give images of the same size"
                )
            c = c.expand(-1, -1, *x.shape[2:])
        conditioned: Tensor = network(*inputs, c.expand(len(x), *c.shape[1:]))
        return conditioned


def masked(value: Tensor, missing: Tensor | None) -> Tensor:
    """Return the value with 0 in known dimensions; unchanged without masks."""
    return value if missing is None else value * missing.to(value)


def takes_condition(network: nn.Module, arity: int) -> bool:
    """Return whether a network can be called with a condition after ``arity`` arguments.

    Networks of this library say so by ``conditional``; others by their signature.
    """
    says = getattr(network, "conditional", None)
    if isinstance(says, bool):
        return says
    for name in ("_orig_mod", "module"):  # of torch.compile and DataParallel
        inner = getattr(network, name, None)
        if isinstance(inner, nn.Module):
            return takes_condition(inner, arity)
    return _most_arguments(type(network).forward) > arity


def needs_condition(network: nn.Module) -> bool:
    """Return whether a network of this library was built for conditions."""
    return getattr(network, "conditional", None) is True


@functools.cache
def _most_arguments(forward: Callable[..., Any]) -> float:
    """Return the largest number of positional arguments of a method, without self."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):  # not a Python function, such as that of a TorchScript module
        return 0
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return math.inf
    return sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)


def _inside(part: nn.Module) -> Iterator[Conditional]:
    """Yield the conditional parts directly inside a part, or in its lists."""
    for child in part.children():
        if isinstance(child, Conditional):
            yield child
        elif isinstance(child, nn.ModuleList):
            yield from _inside(child)


def _bound(module: nn.Module | None, c: Tensor, masked: bool) -> nn.Module | None:
    if isinstance(module, Conditional):
        return module.bind(c, masked)
    if isinstance(module, nn.ModuleList) and any(_inside(module)):
        return nn.ModuleList(_bound(child, c, masked) or child for child in module)
    return module


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
    arguments = [None] * (call.count(",") + 1)
    try:
        signature.bind(network, *arguments)
    except TypeError as error:
        with contextlib.suppress(TypeError):  # it needs a condition
            signature.bind(network, *arguments, None)
            return
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


def check_data(x: object, model: nn.Module, name: str = "x") -> None:
    """Check that ``x``, with this name, is a batch of floats in the dtype of the model.

    Raises:
        UserError: it is not, or the model has half precision.
    """
    if not isinstance(x, Tensor):
        raise UserError(
            f"{name} is a {type(x).__name__}: give a tensor, such as torch.as_tensor({name})"
        )
    if not x.is_floating_point():
        raise UserError(
            f"{name} has dtype {x.dtype}, and the model takes floats: convert real numbers by"
            f" {name}.float(),"
            " integers k of n values by ndm.decoder.to_grid(k, n)"
        )
    if x.dim() < 2:
        raise UserError(
            f"{name} has shape {tuple(x.shape)}: give a batch (B, *event), {name}[None] for one"
            " example"
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
        raise UserError(
            f"{name} has dtype {x.dtype} and the model {first.dtype}: use {name}.to(model.like)"
        )


@contextlib.contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and restore the mode of each of their modules at the end."""
    modules = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modules:
            module.training = training


@contextlib.contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Keep the parameters of models out of the graph: gradients in other tensors only."""
    parameters = [p for model in models for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
