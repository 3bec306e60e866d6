"""The file format of ``ndm compress``, described in docs/format.md.

Every size is checked before it is used.

=========  ===================================================================================
bytes      content
=========  ===================================================================================
8          magic ``89 4E 44 4D 0D 0A 1A 0A``
4          version, little-endian like all numbers
5 x 4      sizes: bytes of header, steps T, images, exceptions, words
...        header: JSON in UTF-8, compressed by zlib
12 T + 22  plan (:meth:`ndm.apps.compress.chain.Plan.pack`)
8          checksum of the levels of all images
8 each     exceptions: call and position of a rounding, 4 bytes each
4 each     words of the stack
32         SHA-256 of everything before it
=========  ===================================================================================
"""

import hashlib
import itertools
import json
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ndm.apps.compress.chain import Plan
from ndm.apps.compress.coder import Coded
from ndm.apps.compress.items import MOST_AXES, Item
from ndm.errors import UserError
from ndm.readers import parse_json, read_bytes
from ndm.writing import shortened

MAGIC, VERSION = b"\x89NDM\r\n\x1a\n", 2
_START = struct.Struct("<8sIIIIII")
_CHECKSUM = 8  # bytes
_LARGEST_HEADER, _LARGEST_ITEM = 2**26, 2**15
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Archive:
    """The content of an archive."""

    fingerprint: str
    """SHA-256 of the description and the weights of the model."""
    event_shape: tuple[int, ...]
    """Shape of an image."""
    num_values: int
    """Number of values of a pixel."""
    low: int
    """Least value of a pixel."""
    plan: Plan
    """The settings shared by encoder and decoder."""
    items: tuple[Item, ...]
    """Files and arrays, without their values."""
    checksum: bytes
    """Checksum of the levels of all images (:func:`levels_checksum`)."""
    coded: Coded
    """The bits."""
    lead: int = 0
    """Number of images that are coded without the model, the first ones."""

    @property
    def count(self) -> int:
        """Number of images of the model's size."""
        return sum(item.count for item in self.items)

    @property
    def pictures(self) -> int:
        """Number of images as they were given."""
        return sum(1 if item.is_tiled else item.count for item in self.items)


def levels_checksum(index: np.ndarray) -> bytes:
    """Return the first 8 bytes of the SHA-256 of levels ``(N, D)`` as 2-byte numbers."""
    digest = hashlib.sha256()
    for row in index:
        digest.update(row.astype("<u2").tobytes())
    return digest.digest()[:_CHECKSUM]


def pack(archive: Archive) -> bytes:
    """Return the bytes of an archive."""
    header = {
        "model": archive.fingerprint,
        "event_shape": list(archive.event_shape),
        "num_values": archive.num_values,
        "low": archive.low,
        "initial": archive.coded.initial,
        "lead": archive.lead,
        "lead_words": archive.coded.lead_words,
        "items": [item.to_dict() for item in archive.items],
    }
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    exceptions, words = archive.coded.exceptions.astype("<u4"), archive.coded.words.astype("<u4")
    start = _START.pack(
        MAGIC, VERSION, len(text), archive.plan.steps, archive.count, len(exceptions), len(words)
    )
    parts = [
        start,
        text,
        archive.plan.pack(),
        archive.checksum,
        exceptions.tobytes(),
        words.tobytes(),
    ]
    body = b"".join(parts)
    return body + hashlib.sha256(body).digest()


def read_archive(path: Path) -> Archive:
    """Read an archive, using at most a few times the memory of its size.

    Raises:
        UserError: the file is missing, damaged, not an archive, or from another version.
    """
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shortened(path)} cannot be read: {reason}; check the path") from error
    try:
        return unpack(data)
    except _OtherVersionError as error:
        raise UserError(
            f"{path} has version {error}, but this version of ndm reads version {VERSION}; use the"
            " version of ndm that wrote it, or a later one"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise UserError(
            f"{path} is truncated, damaged, or not an archive of ndm compress"
            f" ({' '.join(str(error).split())[:80]})"
        ) from error


class _OtherVersionError(Exception):
    pass


def unpack(data: bytes) -> Archive:
    """Restore the archive that :func:`pack` returned.

    Raises:
        ValueError: the bytes are not an archive; KeyError, TypeError likewise.
    """
    if len(data) < _START.size + 32 or not data.startswith(MAGIC):
        raise ValueError("it does not start with the magic bytes")
    _, version, header_size, steps, images, exceptions, words = _START.unpack_from(data)
    if version != VERSION:
        raise _OtherVersionError(version)
    sizes = (header_size, Plan.size(steps), _CHECKSUM, 8 * exceptions, 4 * words)
    if _START.size + sum(sizes) + 32 != len(data):
        raise ValueError("its size does not match its header")
    if hashlib.sha256(memoryview(data)[:-32]).digest() != data[-32:]:
        raise ValueError("its checksum is wrong")
    edges = np.cumsum([_START.size, *sizes]).tolist()
    text, plan, checksum, places, bits = (data[a:b] for a, b in itertools.pairwise(edges))
    header = _read_header(text, min(images, len(data)))
    shape = tuple(_whole(size, 1, 2**24) for size in header["event_shape"])
    num_values = _whole(header["num_values"], 2, 2**16)
    items = tuple(Item.from_dict(item) for item in header["items"])
    if sum(item.count for item in items) != images or not items or not images:
        raise ValueError("its items do not add up")
    for item in items:
        item.check_shape(shape, num_values)
    _check_places(items)
    if not isinstance(header["model"], str) or not _FINGERPRINT.fullmatch(header["model"]):
        raise ValueError("its model fingerprint is missing")
    initial = _whole(header["initial"], 0, 2**32)
    coded = Coded(
        words=np.frombuffer(bits, dtype="<u4").astype(np.uint32),
        initial=initial,
        lead_words=_whole(header["lead_words"], 0, initial),
        exceptions=np.frombuffer(places, dtype="<u4").astype(np.int64).reshape(-1, 2),
    )
    return Archive(
        fingerprint=header["model"],
        event_shape=shape,
        num_values=num_values,
        low=_whole(header["low"], -(2**31), 2**31),
        plan=Plan.unpack(plan),
        items=items,
        checksum=checksum,
        coded=coded,
        lead=_whole(header["lead"], 0, images),
    )


def _read_header(text: bytes, images: int) -> dict[str, Any]:
    """Read a header, in time and memory that follow the number of images and of bytes.

    Each item has at least one image, two brackets and at most 14 commas outside of its names.
    """
    stream = zlib.decompressobj()
    most = min(_LARGEST_HEADER, _LARGEST_ITEM * (images + 1))
    content = stream.decompress(text, most)
    if not stream.eof or stream.unused_data:
        raise ValueError("its header is too long")
    plain = _STRING.sub(b"", content)
    if plain.count(b",") > 14 * images + 32:
        raise ValueError("its header is too long")
    header = parse_json(content.decode(), most_containers=2 * images + 3)
    if not isinstance(header, dict) or len(header["event_shape"]) > MOST_AXES:
        raise ValueError("its header is damaged")
    return header


def _check_places(items: Sequence[Item]) -> None:
    """Check that no two items are written to one place, or one into the file of another.

    Raises:
        ValueError: they are.
    """
    if len({item.name for item in items}) != len(items):
        raise ValueError("a name occurs twice")
    arrays = {item.place for item in items if item.kind == "npz"}
    files = [item.place for item in items if item.kind != "npz"]
    places = arrays.union(files)
    folders = {parent.as_posix() for place in places for parent in PurePosixPath(place).parents}
    if len(places) != len(arrays) + len(files) or places & folders:
        raise ValueError("two items have one place")


def _whole(value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError("a number is out of range")
    return value
