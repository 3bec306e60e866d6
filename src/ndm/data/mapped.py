r"""Integer arrays that stay in their files, mapped into memory: what is read is what a batch needs,
and the operating system keeps it.

An ``.npz`` file is a zip archive of ``.npy`` files. An array that ``numpy.savez`` stored in it lies
there as it is, and is mapped in place. One that ``numpy.savez_compressed`` packed is expanded once
into an ``.npy`` file of its own. Arrays of Python objects are pickles, and refused.
"""

import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data.source import ContentHash, EventDataset
from ndm.decoder import to_grid
from ndm.errors import UserError
from ndm.serialize import write_atomically

ROWS = 4096
"""Rows that are read at once for the checksum."""


@dataclass(frozen=True)
class StoredArray:
    """Where an array lies in a file: bytes 0 ... 255, C order."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    crc: tuple[int, int] | None = None
    """CRC-32 of what precedes the array in its member of an archive, and of the whole member, where
    it is stored in one.
    """

    def map(self) -> np.ndarray:
        """The array, read when it is looked at."""
        return np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=self.shape)


class MappedSplit(EventDataset):
    """A split of integers 0 ... 255 in one or more stored arrays, one after the other.

    Args:
        parts: arrays ``(n, ...)``.
        event: shape of an example, of as many values as a row.
    """

    def __init__(self, parts: Sequence[StoredArray], event: tuple[int, ...]):
        self.parts, self.event = list(parts), event
        self._ends = np.cumsum([part.shape[0] for part in parts])
        self._maps: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        chosen = np.asarray(indices, dtype=np.int64)
        rows = np.empty((len(chosen), *self.event), dtype=np.uint8)
        for row, index, part in zip(
            rows, chosen, np.searchsorted(self._ends, chosen, side="right"), strict=True
        ):
            at = index - (self._ends[part - 1] if part else 0)
            row[...] = self.maps[part][at].reshape(self.event)
        return to_grid(torch.from_numpy(rows), 256)

    @property
    def maps(self) -> list[np.ndarray]:
        """The parts, mapped in this process."""
        if self._maps is None:
            self._maps = [part.map() for part in self.parts]
        return self._maps

    def add_to(self, content: ContentHash, name: str) -> None:
        """Add the whole split to a checksum, as an array ``(N, *event)``, and the same whatever the
        parts.

        Raises:
            UserError: an archive's own checksum does not fit.
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
                        f"{part.file} is damaged: the archive's own CRC-32 does not fit its"
                        " content; download it again"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_maps": None,
        }  # a map that is pickled would take its content along


def find_array(file: Path, key: str, cache: Path) -> StoredArray:
    """The array ``key`` of an ``.npz`` file, bytes.

    Args:
        file: the file.
        key: name of the array.
        cache: folder for an array that has to be expanded.

    Raises:
        UserError: the file is damaged, has no such array, or one that does not hold bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if f"{key}.npy" not in archive.namelist():
                have = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise UserError(f"{file} has no array {key!r}; it holds: {have or 'nothing'}")
            member = archive.getinfo(f"{key}.npy")
            if member.compress_type == zipfile.ZIP_STORED:
                start = _start(file, member)
                array = _stored(file, start, file.stat().st_size)
                with file.open("rb") as stream:
                    stream.seek(start)
                    before = zlib.crc32(stream.read(array.offset - start))
                return replace(array, crc=(before, member.CRC))
            expanded = cache / f"{file.stem}.{key}.npy"
            if not (
                expanded.is_file()
                and expanded.stat().st_size == member.file_size
                and _newer(expanded, file)
            ):
                write_atomically(expanded, lambda temporary: _expand(archive, member, temporary))
        return _stored(expanded, 0, expanded.stat().st_size)
    except (
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        ValueError,
        NotImplementedError,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} is truncated, damaged or no .npz file ({' '.join(str(error).split())});"
            " download it again"
        ) from error


def _newer(expanded: Path, file: Path) -> bool:
    return expanded.stat().st_mtime >= file.stat().st_mtime


def _start(file: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: after its local header, whose length is in itself."""
    with file.open("rb") as stream:
        stream.seek(member.header_offset)
        name, extra = struct.unpack("<4s22x2H", stream.read(30))[1:]
    return member.header_offset + 30 + name + extra


def _stored(file: Path, start: int, end: int) -> StoredArray:
    """The array of an ``.npy`` file that begins at ``start``."""
    with file.open("rb") as stream:
        stream.seek(start)
        shape, fortran, dtype = _header(stream)
        offset = stream.tell()
    if dtype.hasobject:
        raise UserError(
            f"{file} holds Python objects, which are pickles and never opened; store the array as"
            " uint8"
        )
    if dtype != np.uint8 or fortran:
        raise UserError(
            f"{file} holds {dtype} values{' in Fortran order' if fortran else ''}; uint8 in C order"
            " is needed"
        )
    if offset + int(np.prod(shape, dtype=np.int64)) > end:
        raise UserError(
            f"{file} is truncated: its header declares {' x '.join(map(str, shape))} bytes;"
            " download it again"
        )
    return StoredArray(file, offset, tuple(shape))


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return read(stream)


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
