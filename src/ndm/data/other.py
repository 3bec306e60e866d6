r"""New data for a trained model, preprocessed as its training data were.

.. math::
    x_i = (v_i - b_i)/a_i \quad \text{or} \quad
    x_i = (2(v_i - v_{\min}) + 1)/L - 1,

with the b and a, or the least value and number of levels L, of the training data. The data are the
rows of a file in order, or the images of a folder sorted by name.
"""

import contextlib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ndm.data.arrays import ArraySplit, describe_reals, discrete, too_large
from ndm.data.columns import column_label, number_text
from ndm.data.conditioned import joined, split_off
from ndm.data.crops import described_cropping
from ndm.data.delimited import is_text_file
from ndm.data.folder import FileImages, some_image_files
from ndm.data.images import NUM_VALUES, described_size, encoded
from ndm.data.source import DataDescription, DataSource, Loaded
from ndm.data.table import Rows, Table
from ndm.errors import UserError

ALL = "all"
"""Name of the only split of new data."""


class NewRows(ArraySplit):
    """New real rows.

    Args:
        values: float32 examples ``(N, *event)``.
        unusable: the number of each row that is too far from the training data to compute with, and
            a description of its value. These examples are 0 in ``values``.
    """

    def __init__(self, values: torch.Tensor, unusable: Mapping[int, str]):
        super().__init__(values)
        self.unusable = dict(unusable)


def read_like(source: DataSource | None, path: str, trained: DataDescription) -> Loaded:
    """Read new data in the same way as the training data of a model.

    Args:
        source: the source of the training data, if available. A :class:`ndm.data.Table` defines how
            to read a file; the ``size`` of a source of images defines how to crop and scale them.
            The training data themselves are not read.
        path: a file that :class:`ndm.data.Table` reads, or a folder of images with 256 values. If
            the training data had named columns, the columns of text and Parquet files are found by
            name; NumPy's files have no names.
        trained: description of the training data.

    Returns:
        The description, and the only split ``"all"``; real rows are :class:`NewRows`.

    Raises:
        UserError: the file or folder is missing, cannot be read, or does not fit the model.
    """
    if Path(path).is_dir():
        loaded = _images(source, Path(path), trained)
    else:
        loaded = _rows(source, path, trained)
    if loaded.description.event_shape != trained.event_shape:
        raise UserError(
            f"{path}: an example has the shape {loaded.description.event_shape}, but the model was"
            f" trained on {trained.event_shape}; give data of that shape"
        )
    return loaded


def _images(source: DataSource | None, folder: Path, trained: DataDescription) -> Loaded:
    if (
        trained.kind != "image"
        or trained.num_values != NUM_VALUES
        or trained.event_shape[0] not in (1, 3)
    ):
        raise UserError(
            f"{folder} is a folder, for images with 256 values, but the model was trained on"
            f" {trained.name}; give a file of rows"
        )
    channels, height, width = trained.event_shape
    cropping, size = described_cropping(trained.version), None
    files = some_image_files(folder)
    if cropping is not None and _have_size(files, channels, (height, width)):
        cropping = None  # such as samples of the model
    elif cropping is None:
        size = getattr(source, "size", None) or described_size(trained.version)
    images = FileImages(files, channels, size, None, folder, cropping)
    version = "image folder" + ("" if cropping is None else cropping.describe())
    name = folder.resolve().name
    return encoded(name, version, {ALL: images}, expected=(height, width))


def _have_size(files: Sequence[Path], channels: int, size: tuple[int, int]) -> bool:
    """Whether the first image has (height, width) ``size``; False if it is damaged."""
    try:
        return FileImages(files, channels, None, None).size_of(0) == size
    except UserError:
        return False


def _rows(source: DataSource | None, path: str, trained: DataDescription) -> Loaded:
    if trained.known_columns:
        if trained.columns and Path(path).suffix.lower() in (".npy", ".npz"):
            raise UserError(
                f"{path} has no names of columns, which tell those that are known from the others:"
                " give a text or Parquet file with names"
            )
        whole = joined(trained)
        if isinstance(source, Table):
            source = copy(source)
            source.condition = None
            source.columns = list(whole.columns) or source.columns
        loaded = _rows(source, path, whole)
        return split_off(loaded, trained.known_columns, bool(trained.columns))
    if isinstance(source, Table):
        table = copy(source)
    else:
        low = None if trained.num_values is None else trained.low
        table = Table(path, num_values=trained.num_values, low=low, event_shape=trained.event_shape)
    if trained.columns:
        has_names = Path(path).suffix.lower() not in (".npy", ".npz")
        table.columns = list(trained.columns) if has_names else None
        table.header = table.header or "auto"
    rows = _read(table, path, trained)
    name, version = Path(path).stem, Path(path).name + (rows.version and f" ({rows.version})")
    if trained.num_values is not None:
        least = int(trained.low or 0)
        levels = rows.take(None, least)
        return discrete(name, version, {ALL: levels}, trained.num_values, float(least))
    array = np.asarray(rows.values)
    offset, scale = np.zeros(rows.event), np.ones(rows.event)
    standardized = bool(trained.scale) and rows.event == trained.event_shape
    if standardized:
        offset, scale = (
            np.array(values).reshape(trained.event_shape)
            for values in (trained.offset, trained.scale)
        )
    with np.errstate(over="ignore"):
        x = (array - offset) / scale
    unusable = _take_out(array, x, standardized, rows.names, path)
    description = describe_reals(name, version, {ALL: array}, trained.low, trained.high)
    if standardized:
        description = replace(description, offset=trained.offset, scale=trained.scale)
    return Loaded(description, {ALL: NewRows(torch.from_numpy(x.astype(np.float32)), unusable)})


def _read(table: Table, path: str, trained: DataDescription) -> Rows:
    """Read a file as the training data were, or else as ``ndm sample`` writes one.

    Without names, a file of as many columns as the model has all of them in the model's order.
    """
    if not trained.columns and table.columns is not None:
        whole = copy(table)
        whole.columns = None
        with contextlib.suppress(UserError):
            rows = _read(whole, path, trained)
            if rows.event == trained.event_shape:
                return rows
    try:
        rows = table.read(path, trained.columns)
        if rows.event == trained.event_shape or not is_text_file(path):
            return rows
        problem = None
    except UserError as error:
        problem = error
    if is_text_file(path) and (table.separator, table.decimal) != ("auto", "."):
        other = copy(table)
        other.separator, other.decimal = "auto", "."
        with contextlib.suppress(UserError):
            return other.read(path, trained.columns)
    if problem is not None:
        raise problem
    return rows


def _take_out(
    values: np.ndarray,
    x: np.ndarray,
    standardized: bool,
    names: Sequence[str] | None,
    path: str,
) -> dict[int, str]:
    """Set examples x ``(N, *event)`` to 0 if they are too large to compute with.

    Returns:
        The number of each such row, and a description of its largest value.

    Raises:
        UserError: all are.
    """
    beyond = too_large(x, standardized).reshape(len(x), -1)
    unusable = {}
    for row in np.flatnonzero(beyond.any(axis=1)).tolist():
        column = int(np.abs(x[row]).argmax())
        label = column_label(names[column] if names else column)
        value = number_text(values[row].reshape(-1)[column])
        unusable[row] = f"row {row} (the first is 0), column {label} holds {value}"
    if len(unusable) == len(x):
        raise UserError(
            f"{path}: {unusable[0]}, and every row holds such a value, too far from the training"
            " data to compute with; check the units"
        )
    x[list(unusable)] = 0.0
    return unusable
