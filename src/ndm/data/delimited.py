r"""Text tables: the grammar of ``.csv`` and ``.tsv`` files, also compressed by gzip.

============== ==================================================================================
text           UTF-8, with or without a byte-order mark; cells in double quotes may contain
               separators and line breaks
separator      in ``.tsv`` a tab; otherwise the one of ``,``, ``;`` and tab that divides the first
               two rows into the same number of cells, more than one; without any, a comma
first row      names, if it has text above numbers, only text, or consecutive whole numbers from 0
               or 1; data, if it has only numbers and missing values; otherwise an error
number         as in C and Python, with ``.`` or, on request, ``,`` as the decimal mark
missing value  an empty cell, or one of the words in ``MISSING``; in a table of one column also an
               empty line. It is an error.
category       any other cell. It is an error: a column of text has no density.
empty line     with several columns, ignored
============== ==================================================================================

Consecutive whole numbers above whole numbers in only one or two columns are an error, too: they are
as likely to be data. Column names are stripped.
"""

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ndm.data.columns import Column, choose_columns, clean, column_label, listed, or_choose, short
from ndm.errors import UserError, describe_value, one_line, require

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
"""Suffixes of text tables."""
MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null", "None", "-", "?", ".")
"""Cells that are missing values."""
_NUMBER = r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:inf|infinity|nan))"
_SEPARATORS = (",", ";", "\t")
_FIRST = 101  # rows that determine the separator and the meaning of the first row
_BLOCK = 2**26  # bytes; no row may be longer


@dataclass(frozen=True)
class Dialect:
    """How a text table is read.

    Raises:
        UserError: a field has a wrong value.
    """

    header: Literal["auto"] | bool = "auto"
    """Whether the first row contains the names of the columns."""
    separator: str = "auto"
    """The character between cells, or ``tab``."""
    decimal: str = "."
    """The decimal mark, a point or a comma."""

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.header not in ("auto", True, False) or isinstance(self.header, int) != isinstance(
            self.header, bool
        ):
            raise UserError(f"header={describe_value(self.header)}: give auto, true or false")
        if self.separator not in ("auto", "tab") and (
            len(self.separator) != 1 or re.match(r'[\w."\r\n+-]', self.separator)
        ):
            raise UserError(
                f"separator={describe_value(self.separator)}: give auto, tab, or one character such"
                " as ',' or ';'"
            )
        if self.decimal not in (".", ",") or self.decimal == self.separator:
            raise UserError(
                f"decimal={describe_value(self.decimal)} with"
                f" separator={describe_value(self.separator)}: give '.' or ',', and another"
                " separator"
            )


@dataclass(frozen=True)
class TextTable:
    """A text table that has been read."""

    values: np.ndarray
    """``(N, D)``, float64."""
    names: list[str] | None
    """Names of the columns, if it has them."""
    version: str
    """How it was read, for the version of a description."""


def is_text_file(path: str) -> bool:
    """Return whether a file is a text table, by its suffix."""
    return path.lower().endswith(SUFFIXES)


def read_text_table(
    file: Path,
    columns: Sequence[Column] | None,
    dialect: Dialect,
    expected: Sequence[str] = (),
) -> TextTable:
    """Read columns of numbers.

    Args:
        file: the file.
        columns: names or numbers of the columns; all if None.
        dialect: how to read it.
        expected: column names; a first row that contains them all has the names.

    Raises:
        UserError: the file is damaged, a column is missing, or a value is missing or no number.
    """
    require("pyarrow", "pyarrow", "data")
    separator = _separator(file, dialect)
    rows = _first_rows(file, separator)
    if not rows:
        raise _no_rows(file)
    first = [clean(cell) for cell in rows[0]]
    if dialect.header == "auto":
        has_names = bool(expected) and {clean(name) for name in expected} <= set(first)
        found = True if has_names else _has_names(rows, dialect.decimal)
        _check_widths(rows, found is True, str(file))
        if found is None:
            raise UserError(
                f"{file}: the first row, {describe_value(rows[0])}, may be names or data; give"
                " header=true if it has the names (--data.header true), header=false if it is data"
            )
        has_names = found
    else:
        has_names = dialect.header
    names = first if has_names else None
    positions = choose_columns(columns, names, len(first), str(file))
    cells = _cells(file, separator, len(first), positions, has_names)
    if not cells.num_rows:
        raise _no_rows(file)
    chosen = [names[position] for position in positions] if names else None
    values = _numbers(cells, chosen or positions, dialect.decimal, str(file))
    version = "first row: names" if has_names else "first row: data"
    if separator != ",":
        version += f", separator {'tab' if separator == chr(9) else separator}"
    if dialect.decimal != ".":
        version += f", decimal mark {dialect.decimal}"
    return TextTable(values, chosen, version)


def _separator(file: Path, dialect: Dialect) -> str:
    if dialect.separator == "tab":
        return "\t"
    if dialect.separator != "auto":
        return dialect.separator
    if file.name.lower().endswith((".tsv", ".tsv.gz")):
        return "\t"
    possible = []
    for separator in _SEPARATORS:
        if separator != dialect.decimal:
            first, *more = [len(row) for row in _first_rows(file, separator, 2)] or [0]
            if first > 1 and more in ([], [first]):
                possible.append(separator)
    if len(possible) > 1:
        raise UserError(
            f"{file}: the cells of its rows may be divided by any of {describe_value(possible)};"
            " give separator= (--data.separator), and decimal=, if numbers are written as in 1,5"
        )
    return possible[0] if possible else ","


def _first_rows(file: Path, separator: str, count: int = _FIRST) -> list[list[str]]:
    """Return the cells of the first rows that are not empty."""
    with _reading(file):
        compressed = file.name.lower().endswith(".gz")
        opener: Any = gzip.open if compressed else open
        with opener(file, "rt", newline="", encoding="utf-8-sig") as lines:
            rows = (row for row in csv.reader(lines, delimiter=separator) if row)
            return list(islice(rows, count))


def _check_widths(rows: Sequence[Sequence[str]], has_names: bool, where: str) -> None:
    """Check that rows have as many cells as the first.

    Raises:
        UserError: one has more or fewer.
    """
    for index, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise _ragged(where, index - has_names, len(row), len(rows[0]))


def _no_rows(file: Path) -> UserError:
    return UserError(f"{file} has no rows of numbers; give a table with at least two")


def _ragged(where: str, index: int, count: int, width: int) -> UserError:
    return UserError(
        f"{where}: row {index} (the first is 0) has {count} cells instead of {width}; fix or drop"
        " it"
    )


def _has_names(rows: Sequence[Sequence[str]], decimal: str) -> bool | None:
    """Return whether the first of some rows has the names of the columns; None if it is unclear."""
    first, body = rows[0], rows[1:]
    kinds = [_kind(cell, decimal) for cell in first]
    below = [_kinds_below(body, index, decimal) for index in range(len(first))]
    if looks_like_names(first):
        real = all("real" in kinds_below for kinds_below in below)
        return True if len(first) > 2 or real or not body else None
    if "text" not in kinds:
        return False
    numeric = [bool({"whole", "real"} & kinds_below) for kinds_below in below]
    above = {kind for kind, number in zip(kinds, numeric, strict=True) if number}
    if "text" not in above:
        # Text above text only: categories, or the names of columns of categories.
        if "real" in above:
            return False
        return None if "whole" in above else True
    return None if "real" in above else True


def _kinds_below(body: Sequence[Sequence[str]], index: int, decimal: str) -> set[str]:
    return {_kind(row[index], decimal) for row in body if index < len(row)}


def _kind(cell: str, decimal: str) -> str:
    """Return the kind of a cell: missing, whole, real or text."""
    cell = cell.strip()
    if cell in MISSING:
        return "missing"
    if not is_number(cell, decimal):
        return "text"
    return "whole" if re.fullmatch(r"[+-]?[0-9]+", cell) else "real"


def is_number(cell: str, decimal: str = ".") -> bool:
    """Return whether a stripped cell is a number."""
    if decimal == ",":
        cell = "text" if "." in cell else cell.replace(",", ".")
    return re.fullmatch(_NUMBER, cell) is not None


def looks_like_names(cells: Sequence[str]) -> bool:
    """Return whether cells are whole numbers 0, 1, ... or 1, 2, ..., after an empty one or not.

    In a first row they may be taken for names. pandas writes an empty cell as the name of the
    index.
    """
    cells = [cell.strip() for cell in cells]
    cells = cells[1:] if len(cells) > 1 and not cells[0] else cells
    return any(
        all(cell == str(start + index) for index, cell in enumerate(cells)) for start in (0, 1)
    )


def _cells(
    file: Path, separator: str, width: int, positions: Sequence[int], has_names: bool
) -> "pyarrow.Table":
    """Return the cells of the chosen columns as text, without the first row if it has names.

    Raises:
        UserError: the file is damaged, or a row has too many or too few cells.
    """
    import pyarrow
    from pyarrow import csv as arrow_csv

    columns = [f"f{position}" for position in range(width)]
    ragged: list[tuple[int, int]] = []

    def note(row: Any) -> str:
        ragged.append((row.number - 1 - has_names, row.actual_columns))
        return "skip"

    with _reading(file):
        compression = "gzip" if file.name.lower().endswith(".gz") else None
        with pyarrow.input_stream(str(file), compression=compression) as stream:
            table = arrow_csv.read_csv(
                stream,
                arrow_csv.ReadOptions(use_threads=False, block_size=_BLOCK, column_names=columns),
                arrow_csv.ParseOptions(
                    delimiter=separator,
                    newlines_in_values=True,
                    ignore_empty_lines=width > 1,
                    invalid_row_handler=note,
                ),
                arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pyarrow.string()),
                    strings_can_be_null=False,
                    include_columns=[f"f{position}" for position in positions],
                ),
            )
    if ragged:
        raise _ragged(str(file), *ragged[0], width)
    return table.slice(1) if has_names else table


def _numbers(
    cells: "pyarrow.Table", labels: Sequence[str | int], decimal: str, where: str
) -> np.ndarray:
    """Return the cells as numbers, ``(N, D)``, float64.

    Raises:
        UserError: a cell is not a number; the message lists all such columns.
    """
    import pyarrow
    import pyarrow.compute as compute

    values = np.empty((cells.num_rows, cells.num_columns))
    wrong: dict[str | int, tuple[int, str]] = {}
    for index, (label, column) in enumerate(zip(labels, cells.columns, strict=True)):
        text = compute.utf8_trim_whitespace(column)
        plain = text
        if decimal == ",":
            point = compute.match_substring(text, ".")
            plain = compute.if_else(point, "text", compute.replace_substring(text, ",", "."))
        valid = compute.match_substring_regex(plain, f"^(?:{_NUMBER})$")
        row = compute.index(valid, False).as_py()
        if row >= 0:
            wrong[label] = (row, text[row].as_py())
            continue
        unsigned = compute.replace_substring_regex(plain, r"^\+", "")
        values[:, index] = compute.cast(unsigned, pyarrow.float64()).to_numpy()
    if wrong:
        raise _unusable(wrong, labels, decimal, where)
    return values


def _unusable(
    wrong: dict[str | int, tuple[int, str]],
    labels: Sequence[str | int],
    decimal: str,
    where: str,
) -> UserError:
    """Describe all columns that hold cells that are not numbers, and how to choose the others."""
    label, (row, cell) = next(iter(wrong.items()))
    what = "a missing value" if cell in MISSING else "not a number"
    fix = "drop or fill the row" if cell in MISSING else "fix it"
    other = "," if decimal == "." else "."
    if is_number(cell, other) and not is_number(cell, decimal):
        fix = f"give decimal='{other}' if that is its decimal mark (--data.decimal '{other}')"
    place = f"{where}: row {row} (the first is 0), column {column_label(label)}"
    text = f"{place} holds {short(cell)}, {what}"
    if len(wrong) > 1:
        more = [f"{column_label(one)} ({short(wrong[one][1])})" for one in list(wrong)[1:]]
        text += f"; {len(more)} more columns hold such values: {listed(more)}"
    rest = [one for one in labels if one not in wrong]
    return UserError(f"{text}; {fix}{or_choose(rest)}")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn the errors of the libraries that read a file into one line.

    Raises:
        UserError: the file cannot be read.
    """
    import pyarrow

    try:
        yield
    except (
        UnicodeDecodeError,
        csv.Error,
        OSError,
        EOFError,
        zlib.error,
        pyarrow.ArrowException,
        KeyError,
    ) as error:
        if isinstance(error, UserError):
            raise
        if "Empty CSV" in str(error):
            raise _no_rows(file) from error
        reason = one_line(error, 120)
        raise UserError(
            f"{file} cannot be read as CSV in UTF-8 ({reason}); write it again"
        ) from error
