r"""Integer arrays that stay in their files, mapped into memory.

Only the rows of a batch are read, and the operating system caches them.

An ``.npz`` file is a zip archive of ``.npy`` files. Arrays stored by ``numpy.savez`` are mapped in
place. Arrays compressed by ``numpy.savez_compressed`` are first expanded, once, into separate
``.npy`` files. Arrays of Python objects are pickles and raise an error.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data import npy
from ndm.data.source import ContentHash, EventDataset
from ndm.decoder import to_grid
from ndm.errors import UserError
from ndm.serialize import write_atomically

_DAMAGE = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    NotImplementedError,
)
ROWS = 4096
"""Rows read at a time for the checksum."""
BLOCK = 2**20
"""Integers of a table converted at a time."""


@dataclass(frozen=True)
class StoredArray:
    """The location of an array of bytes 0 ... 255 in a file, in C order."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    crc: tuple[int, int] | None = None
    """For a member of an archive: CRC-32 of the bytes before the array, and of the whole member."""

    def map(self) -> np.ndarray:
        """Map the array into memory; its rows are read on access."""
        return np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=self.shape)


class MappedSplit(EventDataset):
    """A split of integers 0 ... 255 in one or more stored arrays, concatenated.

    Args:
        parts: arrays ``(n, ...)``.
        event: shape of an example, with as many values as a row.
    """

    def __init__(self, parts: Sequence[StoredArray], event: tuple[int, ...]):
        self.parts, self.event = list(parts), event
        self._ends = np.cumsum([part.shape[0] for part in parts])
        self._maps: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        chosen = np.asarray(indices, dtype=np.int64)
        parts = np.searchsorted(self._ends, chosen, side="right")
        rows = np.empty((len(chosen), *self.event), dtype=np.uint8)
        for row, index, part in zip(rows, chosen, parts, strict=True):
            start = self._ends[part - 1] if part else 0
            row[...] = self.maps[part][index - start].reshape(self.event)
        return to_grid(torch.from_numpy(rows), 256)

    @property
    def maps(self) -> list[np.ndarray]:
        """The parts as arrays, mapped in this process."""
        if self._maps is None:
            self._maps = [part.map() for part in self.parts]
        return self._maps

    def add_to(self, content: ContentHash, name: str) -> None:
        """Add the split to a checksum as one array ``(N, *event)``, however it is divided in parts.

        Args:
            content: the checksum.
            name: name of the split, for the progress bar.

        Raises:
            UserError: the CRC-32 in an archive does not match its content.
        """
        content.begin_array("uint8", (len(self), *self.event))
        with tqdm(
            total=len(self),
            desc=f"reading {name}",
            unit="image",
            delay=2,
            disable=None,
            leave=False,
        ) as progress:
            for part, values in zip(self.parts, self.maps, strict=True):
                running, expected = part.crc or (0, None)
                for start in range(0, len(values), ROWS):
                    rows = np.ascontiguousarray(values[start : start + ROWS])
                    content.rows(rows)
                    if expected is not None:
                        running = zlib.crc32(rows.data, running)
                    progress.update(len(rows))
                if expected is not None and running != expected:
                    raise UserError(
                        f"{part.file} is damaged: its CRC-32 does not match its content; download"
                        " it again"
                    )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map would contain the data.
        return {**self.__dict__, "_maps": None}


class IntegerRows(EventDataset):
    """Rows of an array of integers, which may stay in its file; each batch is converted when read.

    Args:
        array: integers ``(N, ...)``, in memory or a ``numpy.memmap``.
        event: shape of an example, with as many values as a row.
        low: the least integer, level 0.
        num_values: number of integer values.
        rows: numbers of the rows, in order; all by default.
        columns: numbers of the columns of a table ``(N, D)``; all by default.
    """

    def __init__(
        self,
        array: np.ndarray,
        event: tuple[int, ...],
        low: int,
        num_values: int,
        rows: np.ndarray | None = None,
        columns: Sequence[int] | None = None,
    ):
        self.array, self.event, self.low, self.num_values = array, event, low, num_values
        self.rows = rows
        self.columns = None if columns is None else list(columns)

    def __len__(self) -> int:
        return len(self.array) if self.rows is None else len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        levels = self._levels(self._values(np.asarray(indices, dtype=np.int64)))
        return to_grid(torch.from_numpy(levels), self.num_values)

    def take(self, rows: np.ndarray) -> "IntegerRows":
        """Return some of the rows."""
        chosen = rows if self.rows is None else self.rows[rows]
        return IntegerRows(self.array, self.event, self.low, self.num_values, chosen, self.columns)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of the first row of each block, and its integers, ``(n, *event)``."""
        size = max(1, BLOCK // max(1, int(np.prod(self.array.shape[1:], dtype=np.int64))))
        for start in range(0, len(self), size):
            yield start, self._values(np.arange(start, min(start + size, len(self))))

    def add_to(self, content: ContentHash) -> None:
        """Add the levels to a checksum as one array ``(N, *event)``, uint8 or int32."""
        content.begin_array(self._dtype.name, (len(self), *self.event))
        for _, values in self.blocks():
            content.rows(self._levels(values))

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype("u1" if self.num_values <= 256 else "<i4")

    def _values(self, indices: np.ndarray) -> np.ndarray:
        """Return the integers of rows, ``(n, *event)``, in the dtype of the array."""
        values = self.array[indices if self.rows is None else self.rows[indices]]
        values = values if self.columns is None else values[:, self.columns]
        return np.asarray(values).reshape(len(indices), *self.event)

    def _levels(self, values: np.ndarray) -> np.ndarray:
        """Return integers as levels 0 ... num_values-1, contiguous."""
        if self.low:
            values = values.astype(np.int64) - self.low
        return np.ascontiguousarray(values, dtype=self._dtype)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map would contain the data.
        state, array = dict(self.__dict__), self.array
        if isinstance(array, np.memmap) and array.base is not None and array.filename:
            state["array"] = _Mapped(Path(array.filename), array.ndim)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        array = state["array"]
        self.__dict__.update(state)
        if isinstance(array, _Mapped):
            mapped = npy.load(array.file, mmap_mode="r")
            self.array = mapped[:, None] if mapped.ndim < array.ndim else mapped


@dataclass(frozen=True)
class _Mapped:
    """The ``.npy`` file of a mapped array."""

    file: Path
    ndim: int


def find_array(file: Path, key: str, cache: Path) -> StoredArray:
    """Locate the array ``key`` of an ``.npz`` file, and expand it if it is compressed.

    Args:
        file: the file.
        key: name of the array.
        cache: folder for expanded arrays.

    Raises:
        UserError: the file is damaged, or has no such array of bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if f"{key}.npy" not in archive.namelist():
                have = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise UserError(f"{file} has no array {key!r}; it holds: {have or 'nothing'}")
            member = archive.getinfo(f"{key}.npy")
            if member.compress_type == zipfile.ZIP_STORED:
                return _stored_member(file, member)
            expanded = cache / f"{file.stem}.{key}.npy"
            if not _is_current(expanded, file, member.file_size):
                write_atomically(expanded, lambda temporary: _expand(archive, member, temporary))
        return _stored(expanded, 0, expanded.stat().st_size)
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(
            f"{file} is truncated, damaged or not an .npz file ({' '.join(str(error).split())});"
            " download it again"
        ) from error


def _is_current(expanded: Path, file: Path, size: int) -> bool:
    """Return whether an expanded array exists, is complete, and is no older than its archive."""
    if not expanded.is_file():
        return False
    status = expanded.stat()
    return status.st_size == size and status.st_mtime >= file.stat().st_mtime


def _stored_member(file: Path, member: zipfile.ZipInfo) -> StoredArray:
    """Locate the array of a member that is stored without compression."""
    start = _start(file, member)
    array = _stored(file, start, file.stat().st_size)
    with file.open("rb") as stream:
        stream.seek(start)
        before = zlib.crc32(stream.read(array.offset - start))
    return replace(array, crc=(before, member.CRC))


def _start(file: Path, member: zipfile.ZipInfo) -> int:
    """Return the offset of a member's bytes: the end of its local header, which has its length."""
    with file.open("rb") as stream:
        stream.seek(member.header_offset)
        name, extra = struct.unpack("<4s22x2H", stream.read(30))[1:]
    return member.header_offset + 30 + name + extra


def _stored(file: Path, start: int, end: int) -> StoredArray:
    """Locate the array of an ``.npy`` file that begins at ``start`` and ends before ``end``."""
    with file.open("rb") as stream:
        stream.seek(start)
        shape, fortran, dtype = npy.read_header(stream)
        offset = stream.tell()
    if dtype.hasobject:
        raise UserError(
            f"{file} holds Python objects, which are pickles and are never opened; store the array"
            " as uint8"
        )
    if dtype != np.uint8 or fortran:
        raise UserError(
            f"{file} holds {dtype} values{' in Fortran order' if fortran else ''}; store them as"
            " uint8 in C order"
        )
    if offset + int(np.prod(shape, dtype=np.int64)) > end:
        raise UserError(
            f"{file} is truncated: its header declares {' x '.join(map(str, shape))} bytes;"
            " download it again"
        )
    return StoredArray(file, offset, tuple(shape))


def _expand(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    with (
        archive.open(member) as packed,
        target.open("wb") as stream,
        tqdm(
            total=member.file_size,
            desc=f"expanding {Path(str(archive.filename)).name}",
            unit="B",
            unit_scale=True,
            delay=2,
            disable=None,
        ) as bar,
    ):
        while block := packed.read(2**22):
            stream.write(block)
            bar.update(len(block))
