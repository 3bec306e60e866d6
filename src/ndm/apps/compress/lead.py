r"""The first images of an archive, coded without the model; their bytes are the initial bits.

.. math::
    \text{bits} = (N - k)\, D \cdot \text{rate} + \max(k D w,\, \text{need})

The model's first batch pops bits that no push has written, about 27 bits for each dimension with 8
steps. An archive would pay for them without a use. So k images are coded before, by WebP or zlib at
w bits for each dimension, and the model pops their bytes. The decoder ends with these bytes, and
decodes the k images from them. The bytes are combined with a fixed pseudo-random stream, because
popping needs random bits.
"""

import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ndm.data.formats import ImageError
from ndm.data.sheet import decode_webp, encode_webp, fits_webp

_ZLIB, _WEBP = 0, 1
MOST_LEAD = 2**26
"""Most values of these images together, which a decoder holds in memory."""


def encode_lead(index: np.ndarray, event_shape: Sequence[int], num_values: int) -> bytes:
    """Encode images losslessly, by WebP or zlib, whichever is shorter.

    Args:
        index: levels 0 ... L-1, ``(k, D)``.
        event_shape: shape of an image.
        num_values: L.
    """
    values = index.astype("<u1" if num_values <= 256 else "<u2")
    found = bytes([_ZLIB]) + zlib.compress(values.T.tobytes(), 9)
    if fits_webp(len(index), event_shape, num_values):
        picture = encode_webp(values.reshape(-1, *event_shape))
        found = min(found, bytes([_WEBP]) + picture, key=len)
    return found


def decode_lead(data: bytes, count: int, event_shape: Sequence[int], num_values: int) -> np.ndarray:
    """Restore the levels ``(k, D)``, uint16, of :func:`encode_lead`.

    Raises:
        ValueError: the bytes do not hold such images.
    """
    dims = math.prod(event_shape)
    if count * dims > MOST_LEAD:
        raise ValueError("it has too many first images")
    if data[:1] == bytes([_WEBP]) and fits_webp(count, event_shape, num_values):
        try:
            values = decode_webp(data[1:], count, event_shape).reshape(count, dims)
        except ImageError as error:
            raise ValueError("its first images are damaged") from error
    elif data[:1] == bytes([_ZLIB]):
        kind = np.dtype("<u1" if num_values <= 256 else "<u2")
        stream, size = zlib.decompressobj(), count * dims * kind.itemsize
        try:
            content = stream.decompress(data[1:], size + 1)
        except zlib.error as error:
            raise ValueError("its first images are damaged") from error
        if len(content) != size:
            raise ValueError("its first images have the wrong size")
        values = np.frombuffer(content, kind).reshape(dims, count).T
    else:
        raise ValueError("its first images are damaged")
    if values.max(initial=0) >= num_values:
        raise ValueError("its first images are out of range")
    return values.astype(np.uint16)


def to_words(data: bytes) -> np.ndarray:
    """Return bytes as random-looking words for the stack, uint32; the last one is 1."""
    content = len(data).to_bytes(4, "little") + data
    content += bytes(-len(content) % 4)
    words = np.frombuffer(content, "<u4") ^ _stream(len(content) // 4)
    return np.append(words, 1).astype(np.uint32)


def from_words(words: np.ndarray) -> bytes:
    """Return the bytes of :func:`to_words`.

    Raises:
        ValueError: the words are no such bytes.
    """
    if len(words) < 2:
        raise ValueError("its first images are missing")
    content = (words[:-1].astype("<u4") ^ _stream(len(words) - 1)).astype("<u4").tobytes()
    size = int.from_bytes(content[:4], "little")
    if words[-1] != 1 or not 0 <= len(content) - 4 - size < 4:
        raise ValueError("its first images have the wrong size")
    return content[4 : 4 + size]


@dataclass(frozen=True)
class LeadCost:
    """The bits that images take without the model."""

    each: float
    """Bits of an image that the model could code."""
    edges: int = 0
    """Number of images that the model does not code in any case."""
    edge_bits: float = 0.0
    """Bits of these images together."""


def best_lead(
    count: int, dims: int, rate: float, lead: LeadCost, batch: int, initial_each: float
) -> tuple[int, float, float]:
    """Choose the number of images to code without the model.

    Args:
        count: number of images, N.
        dims: number of values of an image, D.
        rate: bits for each of them by the model.
        lead: bits without it.
        batch: images coded in parallel.
        initial_each: initial bits that the model needs for each of them.

    Returns:
        k, the bits at the start of the stack, and the bits of the archive.
    """
    k = np.arange(lead.edges, max(lead.edges, min(count, MOST_LEAD // dims)) + 1)
    alone = lead.edge_bits + (k - lead.edges) * lead.each
    initial = np.maximum(alone, np.minimum(batch, count - k) * initial_each)
    bits = (count - k) * dims * rate + initial
    best = int(np.argmin(bits))
    return int(k[best]), float(initial[best]), float(bits[best])


def _stream(count: int) -> np.ndarray:
    data = hashlib.shake_256(b"ndm first images").digest(4 * count)
    return np.frombuffer(data, dtype="<u4")
