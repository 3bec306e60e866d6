"""Arrays of ``.npy`` and ``.npz`` files as levels: sizes are checked before anything is decoded."""

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ndm.data.npy import read_header
from ndm.errors import UserError, describe_value

PART = 2**24
"""Bytes read at a time."""
_RATIO = 1032  # no deflated byte holds more


@dataclass(frozen=True)
class Grid:
    """The arrays that a model takes."""

    event_shape: tuple[int, ...]
    """Shape of one image."""
    num_values: int
    """Number of values of a pixel."""
    low: int
    """Least value of a pixel."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest dtype of levels."""
        return np.dtype(np.min_scalar_type(self.num_values - 1))

    def check_header(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Check shape and dtype of an array.

        Raises:
            UserError: the model does not take such arrays.
        """
        if dtype.kind not in "biu":
            raise UserError(
                f"{path}: the array has dtype {dtype}; give whole numbers from {self.low} to"
                f" {self.low + self.num_values - 1}"
            )
        event = self.event_shape
        plain = event[1:] if len(event) == 3 and event[0] == 1 else event
        if not any(one in (shape, shape[1:]) for one in (event, plain)) or not math.prod(shape):
            raise UserError(
                f"{path}: the array has shape {describe_value(shape)}; the model requires (N,"
                f" {', '.join(map(str, event))})"
            )

    def levels(self, path: Path, values: np.ndarray) -> np.ndarray:
        """Return the levels 0 ... L-1 of an array, in its shape.

        Raises:
            UserError: a value is not among those of the model.
        """
        high = self.low + self.num_values - 1
        outside = values[(values < self.low) | (values > high)]
        if outside.size:
            raise UserError(
                f"{path}: the value {describe_value(outside.flat[0].item())} is not among the"
                f" model's {self.low} to {high}"
            )
        return (values.astype(np.int64) - self.low).astype(self.dtype)


@dataclass(frozen=True)
class StoredLevels:
    """An array that has been read."""

    key: str
    """Its name in an ``.npz`` file."""
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    levels: np.ndarray
    """``(N, D)``."""


def read_arrays(path: Path, grid: Grid, reserve: Callable[[int], None]) -> Iterator[StoredLevels]:
    """Read an ``.npy`` or ``.npz`` file.

    Args:
        path: the file.
        grid: the arrays that the model takes.
        reserve: called with the number of values before they are read.

    Raises:
        UserError: an array does not fit the model.
        ValueError: the file is damaged; OSError, BadZipFile and the like likewise.
    """
    if path.suffix.lower() == ".npy":
        with path.open("rb") as stream:
            yield _read(stream, path.stat().st_size, "", path, grid, reserve)
        return
    with closing(zipfile.ZipFile(path)) as archive:
        names = archive.namelist()
        keys = [name.removesuffix(".npy") for name in names]
        if not keys or {"file", "allow_pickle"} & set(keys):
            raise UserError(
                f"{path} holds no arrays, or one with a name that NumPy cannot write (file,"
                " allow_pickle); rename it"
            )
        if len(set(keys)) < len(keys):
            raise UserError(f"{path} holds two arrays of the same name; rename one")
        for name, key in zip(names, keys, strict=True):
            member = archive.getinfo(name)
            is_packed = member.compress_type == zipfile.ZIP_DEFLATED
            most = member.compress_size * (_RATIO if is_packed else 1) + PART
            is_known = is_packed or member.compress_type == zipfile.ZIP_STORED
            if is_known and member.file_size > most:
                raise ValueError(f"the size of {describe_value(key)} is false")
            with archive.open(member) as stream:
                yield _read(stream, member.file_size, key, path, grid, reserve)


def _read(
    stream: IO[bytes],
    size: int,
    key: str,
    path: Path,
    grid: Grid,
    reserve: Callable[[int], None],
) -> StoredLevels:
    """Read one array from a stream of ``size`` bytes."""
    shape, fortran, dtype = read_header(stream)
    grid.check_header(path, shape, dtype)
    count = math.prod(shape)
    if count * dtype.itemsize > size - stream.tell():
        raise ValueError(f"it is truncated: its header declares the shape {shape}")
    reserve(count)
    levels = np.empty(count, dtype=grid.dtype)
    step = max(1, PART // dtype.itemsize)
    for start in range(0, count, step):
        part = levels[start : start + step]
        data = _exactly(stream, part.size * dtype.itemsize)
        part[:] = grid.levels(path, np.frombuffer(data, dtype))
    while stream.read(PART):  # an archive compares its checksum at the end of a member
        pass
    if fortran:
        levels = levels.reshape(shape[::-1]).transpose()
    levels = levels.reshape(-1, math.prod(grid.event_shape))
    return StoredLevels(key, dtype, shape, levels)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            raise ValueError("it is truncated")
        data += more
    return data
