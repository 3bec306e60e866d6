"""NumPy's files, read without pickles and without the warnings of NumPy's readers."""

import warnings
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from ndm.errors import UserError


def load(source: Path | IO[bytes], mmap_mode: Literal["r"] | None = None) -> Any:
    """Load an array, or open an ``.npz`` file; a path can be mapped into memory.

    Raises:
        ValueError: the file is damaged or holds objects.
    """
    with warnings.catch_warnings(action="ignore"):
        return np.load(source, mmap_mode=mmap_mode, allow_pickle=False)


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an ``.npy`` file: shape, whether in Fortran's order, and dtype.

    Raises:
        ValueError: it is damaged or declares a size out of range.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_2_0
        if version == (1, 0):
            read = np.lib.format.read_array_header_1_0
        with warnings.catch_warnings(action="ignore"):
            shape, fortran, dtype = read(stream)
    # The header is Python source, and NumPy's reader raises errors of any kind.
    except Exception as error:
        raise ValueError("its header is damaged") from error
    if any(size < 0 or size >= 2**40 for size in shape) or len(shape) > 64:
        raise ValueError("its header declares a size out of range")
    return shape, fortran, dtype


def load_array(file: Path, key: str | None) -> np.ndarray:
    """Return the array of a ``.npy`` file, mapped into memory, or that of a ``.npz`` file.

    Args:
        file: the file.
        key: name of the array in a ``.npz`` file with several.

    Raises:
        UserError: the file has several arrays, or none of this name.
    """
    with file.open("rb") as stream:
        magic = stream.read(6)
        stream.seek(0)
        if magic == np.lib.format.MAGIC_PREFIX:
            try:
                mapped: np.ndarray = load(file, mmap_mode="r")
            except ValueError:  # for example, an empty array cannot be mapped
                mapped = load(stream)
            return mapped
        data = load(stream)
        if not isinstance(data, np.lib.npyio.NpzFile):
            return np.asarray(data)
        keys = list(data.files)
        if key not in keys and (key is not None or len(keys) != 1):
            raise UserError(
                f"key={key!r}: {file} holds the arrays {', '.join(keys)}; choose one of them with"
                " key="
            )
        return np.asarray(data[key or keys[0]])
