"""Readers of JSON from strangers, and checks of what it describes.

Every reader bounds size, depth, digits and the number of lists and objects before it builds
anything, so that a small file takes neither long nor much memory.
"""

import inspect
import json
import math
import re
import stat
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ndm.errors import UserError, describe_value

MOST_BYTES = 2**25
"""Size of the largest JSON or YAML file that is read."""
MOST_DEPTH = 64
"""Depth of nested lists and mappings in a file."""
MOST_DIGITS = 100
"""Digits of a number in a file."""
MOST_CONTAINERS = 200_000
"""Number of lists and mappings in a file."""
_MOST_FLOAT = torch.finfo(torch.float32).max
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Read a regular file of at most ``most`` bytes of UTF-8.

    Raises:
        FileNotFoundError: it does not exist; OSError: it cannot be read.
        ValueError: it is too large, not a regular file or not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Read a regular file; a pipe could wait forever, and a device has no end.

    Raises:
        FileNotFoundError: it does not exist; OSError: it cannot be read.
        ValueError: it is larger than ``most`` bytes, or not a regular file.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
        raise ValueError("it is a pipe or a device; save it to a file")
    if most is not None and about.st_size > most:
        raise ValueError(f"it has {about.st_size:,} bytes, more than {most:,}")
    return path.read_bytes()


def parse_json(text: str, most_containers: int = MOST_CONTAINERS) -> Any:
    """Parse JSON within the bounds of this module.

    Args:
        text: the text.
        most_containers: number of lists and objects allowed.

    Raises:
        ValueError: it is not JSON, exceeds a bound, or gives a key twice.
    """
    brackets = re.findall(r"[\[\]{}]", _STRING.sub("", text)) if "[" in text or "{" in text else []
    depth = count = 0
    for bracket in brackets:
        opens = bracket in "[{"
        count, depth = count + opens, depth + (1 if opens else -1)
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        if count > most_containers:
            raise ValueError(f"it has more than {most_containers:,} lists and objects")
    return json.loads(text, parse_int=_integer, object_pairs_hook=_unique)


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number has {len(text):,} digits, more than {MOST_DIGITS}")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {describe_value(twice)} is given twice")
    return found


def check_arguments(where: str, cls: type, arguments: Mapping[str, object]) -> None:
    """Check that a constructor takes arguments with these names and plain values.

    Modules are left to the constructor, which has better messages for them.

    Args:
        where: the place in the description, such as ``model.schedule``.
        cls: the class.
        arguments: the arguments by name.

    Raises:
        UserError: an argument does not exist, or its value has another type than the annotation.
    """
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    for name, value in arguments.items():
        if name in ("self", "args", "kwargs") or name not in parameters:
            raise UserError(
                f"{where}: {cls.__name__} does not take the argument {describe_value(name)}; load"
                " the file with the version of ndm that wrote it"
            )
        if name in hints and not _fits(value, hints[name]):
            raise UserError(
                f"{where}.{name}={describe_value(value)}: {cls.__name__} takes"
                f" {_describe(hints[name])}; the file is damaged: copy it or train again"
            )


def _fits(value: object, hint: Any) -> bool:
    """Whether a value from JSON fits an annotation; annotations of other objects always fit."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, (str, int, NoneType)) and value in parts
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        inner = parts[0] if parts else Any
        return isinstance(value, (list, tuple)) and all(_fits(item, inner) for item in value)
    if hint in (NoneType, None):
        return value is None
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and _is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint in (str, bool):
        return isinstance(value, hint)
    return True


def _is_finite(value: Any) -> bool:
    """Whether a number is finite in single precision."""
    return -_MOST_FLOAT <= value <= _MOST_FLOAT


def _describe(hint: Any) -> str:
    """Describe an annotation in a message."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, parts))
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is not None:
        return "a list of " + (_describe(parts[0]) if parts else "values")
    names = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}
    return names.get(hint) or ("null" if hint in (NoneType, None) else hint.__name__)


class TooLargeError(UserError):
    """A description builds a model that is far larger than its weights."""


class _BoundedFactories(TorchDispatchMode):
    """Rejects new tensors of more than ``most`` numbers before their memory is allocated."""

    def __init__(self, most: int, reject: Callable[[str], NoReturn]):
        super().__init__()
        self.most, self.reject = most, reject

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of PyTorch, unless it is a factory of too large a tensor."""
        kwargs = kwargs or {}
        if not any(isinstance(one, Tensor) for one in tree_leaves((args, kwargs))):
            if args and isinstance(args[0], (list, tuple)):
                number = math.prod(args[0])
            else:  # such as arange, whose size follows from its arguments
                number = 0
                with suppress(RuntimeError, TypeError, AttributeError):
                    number = func(*args, **{**kwargs, "device": torch.device("meta")}).numel()
            if number > self.most:
                self.reject("numbers")
        return func(*args, **kwargs)


@contextmanager
def building_bounded_by(weights: Mapping[str, Tensor], where: str) -> Iterator[None]:
    """Stop this thread from building modules that are far larger than ``weights``.

    Args:
        weights: the tensors of the model.
        where: the name of the description in messages.

    Raises:
        TooLargeError: the modules built inside have far more parts, tensors or numbers.
    """
    tensors, numbers = len(weights), sum(tensor.numel() for tensor in weights.values())
    # Room for buffers that are not saved, and for tensors that are replaced while building.
    most = {"modules": 20 * tensors + 10_000, "tensors": 2 * tensors + 1_000}
    most["numbers"] = 4 * numbers + 2**24
    count, thread = dict.fromkeys(most, 0), threading.get_ident()

    def add(kind: str, number: int) -> None:
        if threading.get_ident() != thread:
            return
        count[kind] += number
        if count[kind] > most[kind]:
            reject(kind)

    def reject(kind: str) -> NoReturn:
        raise TooLargeError(
            f"{where} describes a model with more than {most[kind]:,} {kind}, but its weights"
            f" are {tensors:,} tensors of {numbers:,} numbers; it is damaged: copy it or train"
            " again"
        )

    def add_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        add("tensors", 1)
        add("numbers", 0 if tensor is None else tensor.numel())

    def add_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        add("modules", 1)

    with ExitStack() as stack:
        for handle in (
            hooks.register_module_parameter_registration_hook(add_tensor),
            hooks.register_module_buffer_registration_hook(add_tensor),
            hooks.register_module_module_registration_hook(add_module),
        ):
            stack.callback(handle.remove)
        stack.enter_context(_BoundedFactories(most["numbers"], reject))
        yield
