r"""Tables of numbers: NumPy arrays, CSV, TSV and Parquet.

.. math::
    \text{with num_values: } x = (2(v - v_{\min}) + 1)/L - 1, \qquad
    \text{otherwise: } x_i = (v_i - b_i)/a_i .

A table is continuous unless ``num_values`` is given. Columns stored as integers then raise an
error: a density can be arbitrarily large at whole numbers, so its likelihood would be meaningless.
Store them as floating-point numbers to treat them as continuous anyway. A column of a text file
that holds only whole numbers causes a warning. Files that contain pickles or objects raise an
error. Integers of a ``.npy`` file stay in the file. :mod:`ndm.data.delimited` defines what text
files mean.
"""

import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ndm.data import npy
from ndm.data.arrays import check_values, continuous, discrete
from ndm.data.arrow import read_parquet
from ndm.data.columns import Column, choose_columns, list_line, number_text
from ndm.data.conditioned import split_off
from ndm.data.delimited import SUFFIXES as TEXT_SUFFIXES
from ndm.data.delimited import Dialect, read_text_table
from ndm.data.mapped import IntegerRows
from ndm.data.source import DataSource, Loaded
from ndm.data.splits import check_split_arguments, describe_split, draw_split
from ndm.errors import DataWarning, UserError, check_whole, describe_value, one_line

SUFFIXES = (".npy", ".npz", *TEXT_SUFFIXES, ".parquet")
"""Suffixes of the files that can be read."""
MOST_VALUES = 2**24
"""The largest number of integer values: single precision distinguishes no more."""
_DAMAGE = (
    ValueError,
    EOFError,
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    SyntaxError,
    tokenize.TokenError,
    TypeError,
    KeyError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class Rows:
    """The rows of a file, checked, in its units."""

    values: np.ndarray | IntegerRows
    """Float64 values ``(N, *event)``, or integers."""
    names: list[str] | None
    """Names of the columns, if the file has them."""
    version: str = ""
    """How a text file was read."""

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one example."""
        if isinstance(self.values, IntegerRows):
            return self.values.event
        return tuple(self.values.shape[1:])

    def take(self, rows: np.ndarray | None, low: float) -> "np.ndarray | IntegerRows":
        """Return some rows, or all; whole numbers minus ``low``."""
        if isinstance(self.values, IntegerRows):
            return self.values if rows is None else self.values.take(rows)
        return (self.values if rows is None else self.values[rows]) - low


class Table(DataSource):
    """Rows of a file, ``(D,)``, or examples of an array of any rank, ``(N, *event)``.

    Args:
        path: a ``.npy``, ``.npz``, ``.csv``, ``.tsv``, ``.csv.gz``, ``.tsv.gz`` or ``.parquet``
            file.
        columns: names (or numbers, from 0) of the columns to use, in this order; all by default.
        condition: names (or numbers) of columns that are known of each row, for a model of the
            other columns given these.
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
        header: whether the first row of a text file has the column names: true, false, or auto if
            it has text, or consecutive numbers from 0 or 1, above numbers.
        separator: character between the cells of a text file, tab, or auto.
        decimal: decimal mark of a text file, a point or a comma.
    """

    def __init__(
        self,
        path: str,
        columns: Sequence[Column] | str | None = None,
        test_path: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        num_values: int | None = None,
        low: float | None = None,
        high: float | None = None,
        standardize: bool = True,
        key: str | None = None,
        event_shape: Sequence[int] | None = None,
        header: Literal["auto"] | bool = "auto",
        separator: str = "auto",
        decimal: str = ".",
        condition: Sequence[Column] | str | None = None,
    ):
        check_split_arguments(test_fraction, seed)
        _check_range(num_values, low, high)
        Dialect(header, separator, decimal)
        _check_columns("columns", columns, "all")
        _check_columns("condition", condition, "none")
        if columns and condition and set(columns) & set(condition):
            raise UserError(
                f"condition={describe_value(condition)}: a known column is not one of columns="
            )
        self.path = path
        self.columns = columns
        self.condition = condition
        self.test_path = test_path
        self.test_fraction = test_fraction
        self.seed = seed
        self.num_values = num_values
        self.low = low
        self.high = high
        self.standardize = standardize
        self.key = key
        self.event_shape = event_shape
        self.header = header
        self.separator = separator
        self.decimal = decimal

    def load(self) -> Loaded:
        if self.condition is None:
            return self._load()
        whole, known = copy(self), list(self.condition)
        whole.condition = None
        if self.columns is None:
            rows = whole.read(self.path)
            places = choose_columns(known, rows.names, math.prod(rows.event), self.path, False)
            known = [rows.names[place] if rows.names else place for place in places]
            if rows.names:
                rest = [name for name in rows.names if name not in known]
                whole.columns = [*rest, *known]
        else:
            whole.columns = [*self.columns, *known]
        loaded = whole._load()
        description = loaded.description
        if self.columns is not None and not description.columns:
            raise UserError(
                f"condition={describe_value(self.condition)}: {self.path} has no names of columns:"
                " leave columns= out"
            )
        if len(description.event_shape) != 1 or len(known) == description.event_shape[0]:
            raise UserError(
                f"condition={describe_value(self.condition)}: known columns are some columns of a"
                f" table, and {self.path} has examples of shape {description.event_shape}"
            )
        names = description.columns[-len(known) :] or tuple(str(one) for one in known)
        return split_off(loaded, names, bool(description.columns))

    def _load(self) -> Loaded:
        rows = self.read(self.path)
        least = 0 if self.num_values is None else int(self.low or 0)
        version = f"{Path(self.path).name}{rows.version and f' ({rows.version})'}"
        if self.test_path is None:
            count = len(rows.values)
            labels = np.zeros(count, dtype=int)
            parts = draw_split(labels, (), self.path, self.test_fraction, self.seed)
            arrays = {split: rows.take(part, least) for split, part in parts.items()}
            version += f", {describe_split(self.test_fraction, self.seed)}"
        else:
            test = self.read(self.test_path, rows.names or ())
            if test.event != rows.event or test.names != rows.names:
                train_columns = describe_value(rows.names or rows.event)
                test_columns = describe_value(test.names or test.event)
                raise UserError(
                    f"{self.test_path} has the columns {test_columns} but {self.path} has"
                    f" {train_columns}; both must have the same"
                )
            arrays = {"train": rows.take(None, least), "test": test.take(None, least)}
            version += f" and {Path(self.test_path).name}{test.version and f' ({test.version})'}"
        if self.columns is not None:
            version += ", columns " + " ".join(str(column) for column in self.columns)
        name = Path(self.path).stem
        if self.num_values is None:
            if rows.version and isinstance(rows.values, np.ndarray):
                _warn_of_whole_numbers(rows.values, rows.names, self.path)
            version += ", standardized" if self.standardize else ""
            reals = {split: np.asarray(part) for split, part in arrays.items()}
            return continuous(
                name, version, reals, self.standardize, self.low, self.high, rows.names
            )
        return discrete(name, version, arrays, self.num_values, float(least), columns=rows.names)

    def read(self, path: str, expected: Sequence[str] = ()) -> Rows:
        """Read and check the values of a file, in its units.

        Args:
            path: the file.
            expected: column names; a first row of a text file that contains them has the names.

        Raises:
            UserError: the file is missing, damaged or not as declared.
        """
        file = Path(path)
        suffix = next((one for one in SUFFIXES if file.name.lower().endswith(one)), None)
        if suffix is None:
            raise UserError(f"{path} ends in {file.suffix!r}; tables end in {', '.join(SUFFIXES)}")
        if not file.is_file():
            raise UserError(f"{path} does not exist or is not a file; check the path")
        names, version = None, ""
        positions = None
        if suffix in TEXT_SUFFIXES:
            dialect = Dialect(self.header, self.separator, self.decimal)
            columns = None if isinstance(self.columns, str) else self.columns
            text = read_text_table(file, columns, dialect, expected)
            array, names, version = text.values, text.names, text.version
        elif suffix == ".parquet":
            array, names = read_parquet(file, self._list, integers=self.num_values is not None)
        else:
            array, positions = self._read_numpy(file)
        width = array.shape[1:] if positions is None else (len(positions),)
        if not array.size:
            raise UserError(
                f"{path} is empty (shape {array.shape}); give a table with at least one row and"
                " column"
            )
        event = self._event(path, width)
        if array.dtype.kind in "biu":
            assert self.num_values is not None
            least = int(self.low or 0)
            integers = IntegerRows(array, event, least, self.num_values, columns=positions)
            for first, block in integers.blocks():
                most = least + self.num_values - 1
                check_values(block.reshape(-1, *width), path, names, least, most, first)
            return Rows(integers, names, version)
        array = array if positions is None else array[:, positions]
        self._check_reals(array, path, names)
        return Rows(array.reshape(len(array), *event), names, version)

    @property
    def _list(self) -> Sequence[Column] | None:
        return None if isinstance(self.columns, str) else self.columns

    def _check_reals(self, array: np.ndarray, path: str, names: Sequence[str] | None) -> None:
        """Check the range of values stored as real numbers; discrete ones must be whole."""
        if self.num_values is None:
            check_values(array, path, names, self.low, self.high)
            return
        least = int(self.low or 0)
        check_values(array, path, names, least, least + self.num_values - 1)
        if (array != np.round(array)).any():
            index = int((array != np.round(array)).argmax())
            position = np.unravel_index(index, array.shape)
            raise UserError(
                f"{path}: row {position[0]} (the first is 0) holds {number_text(array[position])},"
                f" but with num_values={self.num_values} values must be whole numbers; leave out"
                " num_values= for continuous data"
            )

    def _event(self, path: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of an example.

        Raises:
            UserError: it has another number of values than those in the file.
        """
        if self.event_shape is None:
            return stored
        have, shape = math.prod(stored), tuple(self.event_shape)
        if math.prod(shape) != have:
            raise UserError(
                f"event_shape={shape} is {math.prod(shape)} values, but an example of {path}"
                f" has {have}; make them equal"
            )
        return shape

    def _read_numpy(self, file: Path) -> tuple[np.ndarray, list[int] | None]:
        """Return an array, integers of ``.npy`` files mapped into memory, and the chosen columns.

        Float arrays become float64.
        """
        try:
            data = npy.load_array(file, self.key)
        except UserError:
            raise
        except _DAMAGE as error:
            raise UserError(
                f"{file} cannot be read ({one_line(error, 160)}); write it again with plain"
                " numbers, no objects or pickles"
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
        data = data.astype(np.float64) if data.dtype.kind == "f" else data
        if self._list is None:
            return data, None
        if data.ndim != 2:
            raise UserError(
                f"columns={describe_value(self.columns)}: {file} holds an array of shape"
                f" {data.shape}, not rows and columns; leave columns= out"
            )
        return data, choose_columns(self._list, None, data.shape[1], str(file))


def _check_range(num_values: int | None, low: float | None, high: float | None) -> None:
    """Check the declared range of the values.

    Raises:
        UserError: the arguments contradict each other, or a double cannot count the values.
    """
    for name, value in (("low", low), ("high", high)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name}={value}: give a finite number, or leave it out")
    if num_values is None:
        if low is not None and high is not None and not low < high:
            raise UserError(f"low={low} and high={high}: low must be less than high")
        return
    check_whole("num_values", num_values, 2)
    if num_values > MOST_VALUES:
        raise UserError(f"num_values={num_values}: give at most {MOST_VALUES} (2**24)")
    least = 0 if low is None else low
    if least != math.floor(least) or (high is not None and high != least + num_values - 1):
        raise UserError(
            f"num_values={num_values} with low={low} and high={high}: discrete values are"
            " whole numbers low ... low + num_values - 1; give"
            f" high={math.floor(least) + num_values - 1} or leave it out"
        )
    if abs(least) + num_values > 2**53:
        raise UserError(
            f"low={number_text(least)}: a double counts whole numbers up to 2**53 only; subtract a"
            " constant from the data"
        )


def _check_columns(name: str, columns: object, default: str) -> None:
    """Check a list of columns.

    Raises:
        UserError: it is not a list of different columns.
    """
    if isinstance(columns, str):
        parts = [part.strip() for part in columns.strip("[]").split(",")]
        raise UserError(
            f"{name}={describe_value(columns)}: give a list, such as --data.{name}"
            f" {list_line(parts)}"
        )
    if isinstance(columns, Sequence) and (
        not columns or len({(type(one), one) for one in columns}) < len(columns)
    ):
        raise UserError(
            f"{name}={describe_value(columns)}: give a list of at least one column, each once, or"
            f" leave it out for {default}"
        )


def _warn_of_whole_numbers(array: np.ndarray, names: Sequence[str] | None, path: str) -> None:
    array = array.reshape(len(array), -1)
    whole_columns = (array == np.round(array)).all(axis=0) & (array != array[0]).any(axis=0)
    whole_columns &= np.abs(array).min(axis=0) < 2**52  # above, every double is a whole number
    whole = [names[i] if names else i for i in np.flatnonzero(whole_columns).tolist()]
    if whole:
        warnings.warn(
            f"{path}: in the columns {describe_value(whole)} all values are whole numbers, where a"
            " density can be arbitrarily large; give num_values= if all columns are like this, or"
            " leave these out with columns=",
            DataWarning,
            stacklevel=2,
        )
