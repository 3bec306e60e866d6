r"""Tables of numbers: NumPy arrays, CSV and Parquet.

.. math::
    \text{with num_values: } x = (2(v - v_{\min}) + 1)/L - 1, \qquad
    \text{otherwise: } x_i = (v_i - b_i)/a_i .

A table is continuous unless ``num_values`` is given. Columns stored as integers then raise an
error: a density can be arbitrarily large at whole numbers, so its likelihood would be meaningless.
Store them as floating-point numbers to treat them as continuous anyway. A column of a CSV file that
holds only whole numbers causes a warning. Files that contain pickles or objects raise an error.
"""

import csv
import math
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ndm.data.arrays import check_values, continuous, discrete
from ndm.data.source import DataSource, Loaded
from ndm.data.splits import check_split_arguments, describe_split, draw_split
from ndm.errors import UserError, check_whole, describe_value, require

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".npy", ".npz", ".csv", ".parquet")
"""Suffixes of the files that can be read."""


class Table(DataSource):
    """Rows of a file, ``(D,)``, or examples of an array of any rank, ``(N, *event)``.

    Args:
        path: a ``.npy``, ``.npz``, ``.csv`` or ``.parquet`` file. The first row of a CSV file
            contains the column names if any of its cells is not a number.
        columns: names (or numbers, from 0) of the columns to use, in this order; all by default.
        test_path: file of the test split; by default a split is drawn.
        test_fraction: fraction of the rows in the drawn test split.
        seed: seed of the drawn split.
        num_values: number of integer values, for discrete data with values low ... low + num_values
            - 1.
        low: least allowed value; 0 by default for discrete data.
        high: greatest allowed value.
        standardize: whether to scale each column of continuous data to mean 0 and standard
            deviation 1 over the train split. A column that is constant there raises an error.
        key: name of the array in a ``.npz`` file with several.
        event_shape: shape of one example if it differs from that in the file, for example (1, 28,
            28) for rows of 784 values.
    """

    def __init__(
        self,
        path: str,
        columns: Sequence[str | int] | None = None,
        test_path: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        num_values: int | None = None,
        low: float | None = None,
        high: float | None = None,
        standardize: bool = True,
        key: str | None = None,
        event_shape: Sequence[int] | None = None,
    ):
        check_split_arguments(test_fraction, seed)
        if num_values is not None:
            check_whole("num_values", num_values, 2)
            least = 0 if low is None else low
            if least != math.floor(least) or (high is not None and high != least + num_values - 1):
                raise UserError(
                    f"num_values={num_values} with low={low} and high={high}: discrete values are"
                    " whole numbers low ... low + num_values - 1; give"
                    f" high={math.floor(least) + num_values - 1} or leave it out"
                )
        elif low is not None and high is not None and not low < high:
            raise UserError(f"low={low} and high={high}: low must be less than high")
        if columns is not None and (
            isinstance(columns, str) or not columns or len(set(columns)) < len(columns)
        ):
            raise UserError(
                f"columns={describe_value(columns)}: give a list of at least one column, each once,"
                " or leave it out for all"
            )
        self.path = path
        self.columns = columns
        self.test_path = test_path
        self.test_fraction = test_fraction
        self.seed = seed
        self.num_values = num_values
        self.low = low
        self.high = high
        self.standardize = standardize
        self.key = key
        self.event_shape = event_shape

    def load(self) -> Loaded:
        array, names = self.read(self.path)
        if self.test_path is None:
            labels = np.zeros(len(array), dtype=int)
            parts = draw_split(labels, (), self.path, self.test_fraction, self.seed)
            arrays = {split: array[part] for split, part in parts.items()}
            version = f"{Path(self.path).name}, {describe_split(self.test_fraction, self.seed)}"
        else:
            test, test_names = self.read(self.test_path)
            if test.shape[1:] != array.shape[1:] or test_names != names:
                train_columns = describe_value(names or array.shape[1:])
                test_columns = describe_value(test_names or test.shape[1:])
                raise UserError(
                    f"{self.test_path} has the columns {test_columns} but {self.path} has"
                    f" {train_columns}; both must have the same"
                )
            arrays = {"train": array, "test": test}
            version = f"{Path(self.path).name} and {Path(self.test_path).name}"
        if self.columns is not None:
            version += ", columns " + " ".join(str(column) for column in self.columns)
        name = Path(self.path).stem
        if self.num_values is None:
            version += ", standardized" if self.standardize else ""
            return continuous(name, version, arrays, self.standardize, self.low, self.high, names)
        least = self.low or 0
        levels = {split: part - least for split, part in arrays.items()}
        return discrete(name, version, levels, self.num_values, float(least), columns=names)

    def read(self, path: str) -> tuple[np.ndarray, list[str] | None]:
        """Read and check the values of a file, in its units.

        Returns:
            The values, ``(N, *event)``, and the names of the columns if the file has them.

        Raises:
            UserError: the file is missing, damaged or not as declared.
        """
        file = Path(path)
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} ends in {file.suffix!r}; tables end in {', '.join(SUFFIXES)}")
        if not file.is_file():
            raise UserError(f"{path} does not exist or is not a file; check the path")
        if file.suffix.lower() == ".csv":
            array, names = _read_csv(file, self.columns)
            if self.num_values is None:
                _warn_of_whole_numbers(array, names, path)
        elif file.suffix.lower() == ".parquet":
            array, names = _read_parquet(file, self.columns, integers=self.num_values is not None)
        else:
            array, names = self._read_numpy(file), None
        if not array.size:
            raise UserError(
                f"{path} is empty (shape {array.shape}); give a table with at least one row and"
                " column"
            )
        if self.num_values is None:
            check_values(array, path, names, self.low, self.high)
        else:
            least = self.low or 0
            check_values(array, path, names, least, least + self.num_values - 1)
            if array.dtype.kind == "f" and (array != np.round(array)).any():
                index = int((array != np.round(array)).argmax())
                position = np.unravel_index(index, array.shape)
                raise UserError(
                    f"{path}: row {position[0]} (the first is 0) holds {array[position]:g}, but"
                    f" with num_values={self.num_values} values must be whole numbers; leave out"
                    " num_values= for continuous data"
                )
        if self.event_shape is not None:
            have, shape = math.prod(array.shape[1:]), tuple(self.event_shape)
            if math.prod(shape) != have:
                raise UserError(
                    f"event_shape={shape} is {math.prod(shape)} values, but an example of {path}"
                    f" has {have}; make them equal"
                )
            array = array.reshape(len(array), *self.event_shape)
        return array, names

    def _read_numpy(self, file: Path) -> np.ndarray:
        try:
            with file.open("rb") as stream:
                data = np.load(stream, allow_pickle=False)
                if isinstance(data, np.lib.npyio.NpzFile):
                    keys = list(data.files)
                    if self.key not in keys and (self.key is not None or len(keys) != 1):
                        raise UserError(
                            f"key={self.key!r}: {file} holds the arrays {', '.join(keys)}; choose"
                            " one of them with key="
                        )
                    data = data[self.key or keys[0]]
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{file} cannot be read ({_one_line(error)}); write it again with plain numbers, no"
                " objects or pickles"
            ) from error
        if data.dtype.kind not in "biuf" or data.ndim == 0:
            raise UserError(
                f"{file} holds {data.dtype} of shape {data.shape}; give an array of numbers whose"
                " first axis counts examples"
            )
        data = data[:, None] if data.ndim == 1 else data
        if self.num_values is None and data.dtype.kind in "biu":
            raise UserError(
                f"{file} holds integers ({data.dtype}), which have no density; give num_values="
                " (256 for bytes), or store floating-point numbers to treat them as continuous"
            )
        data = data.astype(np.float64) if data.dtype.kind == "f" else data.astype(np.int64)
        if self.columns is not None:
            if data.ndim != 2:
                raise UserError(
                    f"columns={describe_value(self.columns)}: {file} holds an array of shape"
                    f" {data.shape}, not rows and columns; leave columns= out"
                )
            data = data[:, _positions(self.columns, None, data.shape[1], str(file))]
        return data


def _warn_of_whole_numbers(array: np.ndarray, names: Sequence[str] | None, path: str) -> None:
    found = np.flatnonzero((array == np.round(array)).all(axis=0) & (array != array[0]).any(axis=0))
    whole = [names[i] if names else i for i in found.tolist()]
    if whole:
        warnings.warn(
            f"{path}: in the columns {describe_value(whole)} all values are whole numbers, where a"
            " density can be arbitrarily large; give num_values= if all columns are like this, or"
            " leave these out with columns=",
            stacklevel=2,
        )


def arrow_columns(
    table: "pyarrow.Table", columns: Sequence[str | int] | None, where: str, integers: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Convert columns of an Arrow table to numbers; missing values become NaN.

    Args:
        table: the table.
        columns: names or numbers of the columns; all if None.
        where: name of the table, for messages.
        integers: whether columns may hold integers or booleans.

    Returns:
        The values, ``(N, D)``, float64, and the names of the columns.

    Raises:
        UserError: a column is missing, or does not hold such numbers.
    """
    import pyarrow

    positions = _positions(columns, table.column_names, table.num_columns, where)
    names = [table.column_names[position] for position in positions]
    values = []
    for name in names:
        kind, types = table.schema.field(name).type, pyarrow.types
        if not (
            types.is_integer(kind)
            or types.is_floating(kind)
            or types.is_boolean(kind)
            or types.is_decimal(kind)
        ):
            raise UserError(
                f"{where}: column {name!r} holds {kind}, not numbers; choose the columns to use"
                " with columns="
            )
        if not integers and (types.is_integer(kind) or types.is_boolean(kind)):
            raise UserError(
                f"{where}: column {name!r} holds integers ({kind}), which have no density; leave it"
                " out with columns=, store floating-point numbers to treat it as continuous, or use"
                " a Table of only such columns with num_values="
            )
        values.append(table[name].cast(pyarrow.float64(), safe=False).to_numpy())
    return np.stack(values, axis=1) if values else np.empty((table.num_rows, 0)), names


def _read_parquet(
    file: Path, columns: Sequence[str | int] | None, integers: bool
) -> tuple[np.ndarray, list[str]]:
    require("pyarrow", "pyarrow", "data")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file} cannot be read as Parquet ({_one_line(error)}); write it again"
        ) from error
    return arrow_columns(table, columns, str(file), integers)


def _read_csv(
    file: Path, columns: Sequence[str | int] | None
) -> tuple[np.ndarray, list[str] | None]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(
            f"{file} cannot be read as CSV in UTF-8 ({_one_line(error)}); write it again"
        ) from error
    names = None
    if rows and not all(_is_number(cell) for cell in rows[0]):
        names, rows = [cell.strip() for cell in rows[0]], rows[1:]
    if not rows:
        raise UserError(f"{file} has no rows of numbers; give a table with at least two")
    width = len(names or rows[0])
    for index, row in enumerate(rows):
        if len(row) != width:
            raise UserError(
                f"{file}: row {index} (the first is 0) has {len(row)} cells instead of {width};"
                " fix or drop it"
            )
    positions = _positions(columns, names, width, str(file))
    if columns is not None:
        rows = [[row[position] for position in positions] for row in rows]
    try:
        array = np.array(rows, dtype=np.float64)
    except ValueError as error:
        index, position, cell = next(
            (index, position, cell)
            for index, row in enumerate(rows)
            for position, cell in zip(positions, row, strict=True)
            if not _is_number(cell)
        )
        column = repr(names[position]) if names else position
        raise UserError(
            f"{file}: row {index} (the first is 0), column {column} holds"
            f" {describe_value(cell)}, not a number; fix it, or choose the columns to use with"
            " columns="
        ) from error
    return array, [names[position] for position in positions] if names else None


def _positions(
    columns: Sequence[str | int] | None, names: Sequence[str] | None, width: int, where: str
) -> list[int]:
    """Return the numbers of the chosen columns."""
    available = list(names or [])
    positions = []
    for column in range(width) if columns is None else columns:
        if isinstance(column, int) and 0 <= column < width:
            positions.append(column)
        elif column in available:
            positions.append(available.index(str(column)))
        else:
            have = describe_value(available) if available else f"0 to {width - 1} (it has no names)"
            raise UserError(f"{where} has no column {column!r}; its columns are: {have}")
    return positions


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
