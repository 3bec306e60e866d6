r"""Other data, as a model that is trained sees them: rows of a file, or images of a folder, in the
order of the file or of the names.

.. math::
    x_i = (v_i - b_i)/a_i \text{ with the } b \text{ and } a \text{ of the data that it was trained on, or the center of the bin of the level } v_i - v_{\min} .
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
"""The one split of other data."""


def read_like(source: DataSource | None, path: str, trained: DataDescription) -> Loaded:
    """Read data that are like those of a source.

    Args:
        source: the data that the model was trained on, where they are known; a
            :class:`ndm.data.Table` says how to read a file, and the ``size`` of images that they
            are to be cut and scaled. It need not be readable any more.
        path: a ``.npy``, ``.npz``, ``.csv`` or ``.parquet`` file, or for images of 256 values a
            folder. Columns are found by their names where the model was trained on columns with
            names and the file is not one of NumPy's, which have none.
        trained: what the model was trained on.

    Returns:
        Description and the one split ``"all"``.

    Raises:
        UserError: the file or folder is not there, cannot be read, or does not fit the model.
    """
    loaded = (
        _images(source, Path(path), trained)
        if Path(path).is_dir()
        else _rows(source, path, trained)
    )
    if loaded.description.event_shape != trained.event_shape:
        have, want = loaded.description.event_shape, trained.event_shape
        raise UserError(
            f"{path}: an example has the shape {have}, and the model was trained on {want}"
        )
    return loaded


def _images(source: DataSource | None, folder: Path, trained: DataDescription) -> Loaded:
    if (
        trained.kind != "image"
        or trained.num_values != NUM_VALUES
        or trained.event_shape[0] not in (1, 3)
    ):
        raise UserError(
            f"{folder} is a folder, which holds images of 256 values, and the model was trained on"
            f" {trained.name}; give a file of rows"
        )
    size = getattr(source, "size", None)
    return encoded(
        folder.resolve().name,
        "image folder",
        {ALL: FileImages(some_image_files(folder), trained.event_shape[0], size, None)},
    )


def _rows(source: DataSource | None, path: str, trained: DataDescription) -> Loaded:
    if isinstance(source, Table):
        table = copy(source)
    else:
        low = None if trained.num_values is None else trained.low
        table = Table(path, num_values=trained.num_values, low=low, event_shape=trained.event_shape)
    if trained.columns:
        table.columns = (
            None if Path(path).suffix.lower() in (".npy", ".npz") else list(trained.columns)
        )
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
    return Loaded(
        replace(plain.description, offset=trained.offset, scale=trained.scale),
        {ALL: ArraySplit(values)},
    )
