"""Columns of a table: their names, how a configuration chooses them, and values in messages."""

import contextlib
import importlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ndm.errors import UserError, describe_value

Column = str | int | float | bool | None
"""A chosen column: its name, or its number from 0. YAML reads names such as ``no``, ``2020`` and
``1.5`` as values of other types; they are matched to the name that YAML reads as this value.
"""
_EDGES = re.compile(r"^[\s\ufeff]+|[\s\ufeff]+$")
_SCALAR = re.compile(r"[\w.+~:-]{1,40}")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z_ 0-9]*")


def clean(name: str) -> str:
    """Return a column name without surrounding white space and byte-order marks."""
    return _EDGES.sub("", name)


def choose_columns(
    columns: Sequence[Column] | None,
    names: Sequence[str] | None,
    width: int,
    where: str,
    ordered: bool = True,
) -> list[int]:
    """Return the numbers of the chosen columns.

    Args:
        columns: names or numbers of columns; all if None.
        names: names of all columns, or None.
        width: number of columns.
        where: name of the table, for messages.
        ordered: whether a table without names may not be reordered.

    Raises:
        UserError: a column is missing, ambiguous or chosen twice, or its name is empty or not
            unique.
    """
    names = None if names is None else [clean(name) for name in names]
    if columns is None:
        positions = list(range(width))
    else:
        positions = [_find(column, names, width, where) for column in columns]
    if ordered and names is None and positions != list(range(width)) == sorted(positions):
        raise UserError(
            f"columns={describe_value(columns)} only reorders the columns of {where}, which have no"
            " names, so the order of other files would be unclear; leave it out"
        )
    counts = Counter(names or ())
    for position in positions:
        name = names[position] if names else None
        if name == "":
            rest = [other for other in names or () if counts[other] == 1 and other]
            raise UserError(f"{where}: column {position} has no name; name it{or_choose(rest)}")
        if name is not None and counts[name] > 1:
            same = [index for index, other in enumerate(names or ()) if other == name]
            raise UserError(
                f"{where}: the columns {describe_value(same)} have the same name"
                f" {describe_value(name)}; rename them, or leave them out with columns="
            )
        if positions.count(position) > 1 and columns is not None:
            raise UserError(
                f"columns={describe_value(list(columns))} has column {position} of {where} twice;"
                " give each column once"
            )
    return positions


def _find(column: Column, names: list[str] | None, width: int, where: str) -> int:
    """Return the number of a column."""
    available = names or []
    if isinstance(column, str):
        found = [i for i, name in enumerate(available) if name == clean(column)]
        if found:
            return found[0]
    else:
        matching = {i for i, name in enumerate(available) if _reads_as(name, column)}
        number = isinstance(column, int) and not isinstance(column, bool) and 0 <= column < width
        candidates = sorted(matching | ({int(column or 0)} if number else set()))
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            labels = ", ".join(f"{i} (named {describe_value(available[i])})" for i in candidates)
            quoted = json.dumps(available[min(matching)], ensure_ascii=False)
            raise UserError(
                f"columns: {column!r} may be any of the columns {labels} of {where}; write names in"
                f" quotes, such as --data.columns {shlex.quote(f'[{quoted}]')}"
            )
    have = describe_value(available) if available else f"0 to {width - 1} (it has no names)"
    raise UserError(f"{where} has no column {describe_value(column)}; its columns are: {have}")


def _reads_as(name: str, value: Column) -> bool:
    """Return whether YAML reads a name as this value, which is not text."""
    if not _SCALAR.fullmatch(name):
        return False
    readings: list[object] = [int(name)] if name.isascii() and name.isdigit() else []
    with contextlib.suppress(ValueError):
        readings.append(float(name))
    try:
        yaml = importlib.import_module("yaml")
        readings.append(yaml.safe_load(name))
    except (ImportError, ValueError):
        pass
    except Exception:  # yaml.YAMLError: the name is not a scalar
        return False
    return any(type(one) is type(value) and repr(one) == repr(value) for one in readings)


def column_label(column: str | int) -> str:
    """Return the number or the quoted name of a column, shortened, for messages."""
    return str(column) if isinstance(column, int) else short(column, 40)


def short(text: str, limit: int = 20) -> str:
    """Return a quoted text of at most ``limit`` characters, for messages."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def listed(items: Sequence[str], limit: int = 80) -> str:
    """Return items separated by commas, as many as fit into ``limit`` characters."""
    text = ""
    for number, item in enumerate(items):
        if number and len(text) + len(item) > limit:
            return f"{text}, ..."
        text += f", {item}" if number else item
    return text


def list_line(columns: Sequence[str | int]) -> str:
    """Return a list of columns as an argument to paste into a shell."""
    items = [one if isinstance(one, int) else _yaml_text(one) for one in columns]
    return shlex.quote(f"[{', '.join(map(str, items))}]")


def or_choose(columns: Sequence[str | int]) -> str:
    """Return the end of a message: how to choose the other columns, as an option to paste."""
    line = list_line(columns)
    if not columns or len(line) > 90:
        return ", or choose the columns to use with columns="
    return f", or choose the others with columns=: --data.columns {line}"


def _yaml_text(name: str) -> str:
    """Return a name as YAML reads it in a list."""
    words = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
    plain = _PLAIN.fullmatch(name) and name.lower() not in words
    return name if plain else json.dumps(name, ensure_ascii=False)


def number_text(value: Any) -> str:
    """Return a number as the shortest text that restores it, for messages."""
    plain = value.item() if hasattr(value, "item") else value
    return repr(plain).removesuffix(".0") if isinstance(plain, (int, float)) else str(plain)
