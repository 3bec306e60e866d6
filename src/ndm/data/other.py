r"""New data for a trained model, preprocessed as its training data were.

.. math::
    x_i = (v_i - b_i)/a_i \quad \text{or} \quad
    x_i = (2(v_i - v_{\min}) + 1)/L - 1,

with the b and a, or the least value and number of levels L, of the training data. The data are the
rows of a file in order, or the images of a folder sorted by name.
"""

from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ndm.data.arrays import ArraySplit, continuous, discrete
from ndm.data.folder import FileImages, some_image_files
from ndm.data.images import NUM_VALUES, encoded
from ndm.data.source import DataDescription, DataSource, Loaded
from ndm.data.table import Table
from ndm.errors import UserError

ALL = "all"
"""Name of the only split of new data."""


def read_like(source: DataSource | None, path: str, trained: DataDescription) -> Loaded:
    """Read new data in the same way as the training data of a model.

    Args:
        source: the source of the training data, if available. A :class:`ndm.data.Table` defines how
            to read a file; the ``size`` of a source of images defines how to crop and scale them.
            The training data themselves are not read.
        path: a ``.npy``, ``.npz``, ``.csv`` or ``.parquet`` file, or a folder of images with 256
            values. If the training data had named columns, the columns of CSV and Parquet files are
            found by name; NumPy's files have no names.
        trained: description of the training data.

    Returns:
        The description, and the only split ``"all"``.

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
    size = getattr(source, "size", None)
    images = FileImages(some_image_files(folder), trained.event_shape[0], size, None)
    return encoded(folder.resolve().name, "image folder", {ALL: images})


def _rows(source: DataSource | None, path: str, trained: DataDescription) -> Loaded:
    if isinstance(source, Table):
        table = copy(source)
    else:
        low = None if trained.num_values is None else trained.low
        table = Table(path, num_values=trained.num_values, low=low, event_shape=trained.event_shape)
    if trained.columns:
        has_names = Path(path).suffix.lower() not in (".npy", ".npz")
        table.columns = list(trained.columns) if has_names else None
    array, _ = table.read(path)
    name, version = Path(path).stem, Path(path).name
    if trained.num_values is not None:
        least = trained.low or 0.0
        return discrete(name, version, {ALL: array - int(least)}, trained.num_values, least)
    plain = continuous(name, version, {ALL: array}, False, trained.low, trained.high)
    if not trained.scale or plain.description.event_shape != trained.event_shape:
        return plain
    offset, scale = (
        np.array(values).reshape(trained.event_shape) for values in (trained.offset, trained.scale)
    )
    values = torch.from_numpy(((array - offset) / scale).astype(np.float32))
    description = replace(plain.description, offset=trained.offset, scale=trained.scale)
    return Loaded(description, {ALL: ArraySplit(values)})
