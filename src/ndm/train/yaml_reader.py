"""YAML from strangers: bounded in size, depth and digits, and without duplicate keys.

PyYAML keeps the last of two equal keys, follows aliases of aliases to any size, and recurses in C.
So a document is checked as a stream of events, then as a graph of nodes, before it is built.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from ndm.errors import UserError, describe_value
from ndm.readers import MOST_CONTAINERS, MOST_DEPTH, MOST_DIGITS, read_text

MODE = "bounded_yaml"
"""The mode of jsonargparse parsers that read configurations and values within the bounds."""
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# What the constructors of PyYAML raise for values such as !!int abc or 2024-02-31.
_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, yaml.YAMLError)


class BoundError(yaml.YAMLError):
    """A document exceeds a bound, or gives a key twice."""


def read_yaml(path: Path, parse: Callable[[str], Any] | None = None) -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        parse: :func:`parse_yaml` by default, or :func:`load_value`.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it cannot be read, exceeds a bound, or gives a key twice.
    """
    try:
        return (parse or parse_yaml)(read_text(path))
    except FileNotFoundError:
        raise
    except BoundError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path} cannot be read as YAML ({' '.join(reason.split())[:100]}); correct it, or"
            " restore it from a copy"
        ) from error


def parse_yaml(text: str) -> Any:
    """Parse YAML within the bounds of this module and :mod:`ndm.readers`.

    Raises:
        yaml.YAMLError: it is not YAML, exceeds a bound, or gives a key twice.
    """
    node = check_yaml(text)
    if node is None:
        return None
    loader = _SafeLoader("")
    try:
        return loader.construct_document(node)
    except _ERRORS as error:
        if isinstance(error, yaml.YAMLError):
            raise
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
    finally:
        loader.dispose()


def check_yaml(text: str) -> yaml.Node | None:
    """Return the root of a document, after checking all of it.

    Raises:
        yaml.YAMLError: it is not YAML, exceeds a bound, or gives a key twice.
    """
    _check_events(text)
    node = yaml.compose(text, Loader=_SafeLoader)
    if node is not None:
        _Checker().extent(node)
    return node


def _check_events(text: str) -> None:
    """Check the depth and the number of nodes without recursion."""
    depth = count = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        line = _line(event)
        if isinstance(event, yaml.CollectionStartEvent):
            depth, count = depth + 1, count + 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.NodeEvent):
            count += 1
        if depth > MOST_DEPTH:
            raise BoundError(f"line {line}: nested more than {MOST_DEPTH} deep; nest it less")
        if count > MOST_CONTAINERS:
            raise BoundError(f"line {line}: more than {MOST_CONTAINERS:,} values; shorten it")


def _line(part: Any) -> int:
    """Return the number of the line where an event or a node starts."""
    return int(part.start_mark.line) + 1


class _Checker:
    """Checks of a graph of nodes, in which aliases are shared nodes."""

    def __init__(self) -> None:
        self.extents: dict[int, tuple[int, int] | None] = {}
        self.loader = _SafeLoader("")

    def extent(self, node: yaml.Node) -> tuple[int, int]:
        """Return the number and the depth of the nodes, with all aliases written out."""
        line = _line(node)
        if id(node) in self.extents:
            known = self.extents[id(node)]
            if known is None:
                raise BoundError(f"line {line}: contains itself by an alias; write it out")
            return known
        self.extents[id(node)] = None
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            self.check_keys(node)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.ScalarNode):
            check_scalar(node)
        size, depth = 1, 0
        for child in children:
            more, deeper = self.extent(child)
            size, depth = size + more, max(depth, deeper + 1)
        if size > MOST_CONTAINERS or depth > MOST_DEPTH:
            raise BoundError(
                f"line {line}: aliases that expand to more than {MOST_CONTAINERS:,} values or"
                f" {MOST_DEPTH} levels; write it out"
            )
        self.extents[id(node)] = size, depth
        return size, depth

    def check_keys(self, node: yaml.MappingNode) -> None:
        """Check that no key is given twice; keys of merged mappings may be overridden."""
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            check_scalar(key)
            line = _line(key)
            try:
                name = self.loader.construct_object(key)
                first = lines.get(name)
            except _ERRORS as error:
                raise BoundError(
                    f"line {line}: the key {describe_value(key.value)} cannot be read; write it in"
                    " quotes"
                ) from error
            if first is not None:
                raise BoundError(
                    f"the key {describe_value(key.value)} is given twice, in line {first} and in"
                    f" line {line}; join the two"
                )
            lines[name] = line


def check_scalar(node: yaml.ScalarNode) -> None:
    """Check the digits of a number, and long text, which jsonargparse may parse again.

    Raises:
        BoundError: a bound is exceeded.
    """
    line = _line(node)
    if node.tag in _NUMBERS and len(node.value) > MOST_DIGITS:
        raise BoundError(
            f"line {line}: a number of {len(node.value):,} digits; give at most {MOST_DIGITS}"
        )
    if len(node.value) > MOST_DEPTH:
        check_text(node.value)


def check_text(text: str) -> None:
    """Check text that may be YAML, and need not be.

    Raises:
        BoundError: it is YAML up to a place where it exceeds a bound.
    """
    with contextlib.suppress(yaml.MarkedYAMLError, yaml.reader.ReaderError):
        _check_events(text)


def load_value(text: str) -> Any:
    """Load a value or a configuration for jsonargparse, as its YAML mode does, within the bounds.

    Raises:
        yaml.YAMLError: it is not YAML, exceeds a bound, or gives a key twice.
    """
    check_yaml(text)
    try:
        return get_loader("yaml")(text)
    except _ERRORS as error:
        if isinstance(error, yaml.YAMLError):
            raise
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


set_loader(MODE, load_value, (yaml.YAMLError,))
