"""Tables of Apache Arrow: Parquet files, and the columns of a Hugging Face data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ndm.data.columns import Column, choose_columns, clean, column_label, listed, or_choose
from ndm.errors import UserError, one_line, require

if TYPE_CHECKING:
    import pyarrow


def read_parquet(
    file: Path, columns: Sequence[Column] | None, integers: bool
) -> tuple[np.ndarray, list[str]]:
    """Read columns of numbers from a Parquet file; see :func:`arrow_columns`.

    Raises:
        UserError: the file is damaged, or a column is missing or does not hold such numbers.
    """
    require("pyarrow", "pyarrow", "data")
    import pyarrow
    import pyarrow.parquet

    try:
        # A file of its own: names such as x=1 in the path are no columns.
        table = pyarrow.parquet.ParquetFile(file).read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = one_line(error, 160)
        raise UserError(f"{file} cannot be read as Parquet ({reason}); write it again") from error
    return arrow_columns(table, columns, str(file), integers)


def arrow_columns(
    table: "pyarrow.Table", columns: Sequence[Column] | None, where: str, integers: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Convert columns of an Arrow table to numbers; missing values become NaN.

    Args:
        table: the table.
        columns: names or numbers of the columns; all if None.
        where: name of the table, for messages.
        integers: whether columns may hold integers or booleans.

    Returns:
        The values, ``(N, D)``, float64, and the names of the columns, stripped.

    Raises:
        UserError: a column is missing, or does not hold such numbers; the message lists all such
            columns.
    """
    import pyarrow

    names = [clean(name) for name in table.column_names]
    positions = choose_columns(columns, names, table.num_columns, where)
    kinds = {names[position]: table.schema.field(position).type for position in positions}
    wrong = [name for name, kind in kinds.items() if not _is_usable(kind, integers)]
    if wrong:
        raise _unusable(kinds, wrong, where)
    values = [
        table.column(position).cast(pyarrow.float64(), safe=False).to_numpy()
        for position in positions
    ]
    array = np.stack(values, axis=1) if values else np.empty((table.num_rows, 0))
    return array, list(kinds)


def _is_integer(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    return bool(pyarrow.types.is_integer(kind) or pyarrow.types.is_boolean(kind))


def _is_usable(kind: "pyarrow.DataType", integers: bool) -> bool:
    import pyarrow

    if _is_integer(kind):
        return integers
    return bool(pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind))


def _unusable(kinds: "dict[str, pyarrow.DataType]", wrong: Sequence[str], where: str) -> UserError:
    """Describe all columns that cannot be used, and how to choose the others."""
    name, *others = wrong
    what = "integers, which have no density" if _is_integer(kinds[name]) else "not numbers"
    text = f"{where}: column {column_label(name)} holds {str(kinds[name])[:40]}: {what}"
    if others:
        more = [f"{column_label(one)} ({str(kinds[one])[:20]})" for one in others]
        text += f"; {len(others)} more cannot be used: {listed(more)}"
    if _is_integer(kinds[name]):
        text += "; store floating-point numbers, give num_values= if all columns hold integers"
    else:
        text += "; convert it"
    return UserError(text + or_choose([one for one in kinds if one not in wrong]))
