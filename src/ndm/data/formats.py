"""Image files as they are: bit depth, transparency and size by the file's header, before decoding.

Pillow opens some images of 16 bits per value as 8 bits, and drops the low byte without a word.
"""

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ndm.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image

LARGEST = 89_478_485
"""Most pixels of an image, a quarter of a GiB in color."""
_EIGHT_BITS = ("JPEG", "MPO", "BMP", "DIB", "GIF", "WEBP", "TGA", "PCX")


# Pillow logs what it also raises.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class ImageError(Exception):
    """An image cannot be read exactly; the message is the reason, without the name of the file."""


@contextmanager
def open_image(data: bytes) -> "Iterator[Image.Image]":
    """Open an encoded image, and check its header.

    Args:
        data: the bytes of the file.

    Raises:
        ImageError: the image is damaged, has more than 8 bits per value, or is too large. The body
            of the ``with`` statement raises it, too, if the pixels are damaged.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                _check_header(image, data)
                yield image
    except (ImageError, UserError, MemoryError):
        raise
    # The decoders raise errors of any kind for damaged files.
    except Exception as error:
        reason = one_line(error).replace(" <_io.BytesIO object at", "")
        raise ImageError(f"it cannot be read as an image: {_shorten(reason)}") from error


def _shorten(reason: str) -> str:
    reason = reason.split(" file 0x")[0]
    return reason if len(reason) <= 60 else f"{reason[:57]}..."


def _check_header(image: "Image.Image", data: bytes) -> None:
    width, height = image.size
    if width * height > LARGEST:
        raise ImageError(f"it has {width} x {height} pixels, more than {LARGEST:,}")
    bits = _bits(image, data)
    if bits is None:
        raise ImageError(f"its format {image.format} does not show its bit depth; use PNG")
    if bits > 8:
        raise ImageError(f"it has more than 8 bits per value (mode {image.mode})")


def _bits(image: "Image.Image", data: bytes) -> int | None:
    """Return the bits per value of an image that was just opened, or None if unknown."""
    kind = image.format
    if image.mode.startswith("I") or image.mode == "F":
        return 16
    if kind in _EIGHT_BITS:
        return 8
    if kind == "PNG":
        return data[24] if data[12:16] == b"IHDR" else None
    if kind == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, (1,))
        return max(bits) if isinstance(bits, tuple) else int(bits)
    if kind == "PPM":
        return _bits_of_ppm(image)
    if kind == "SGI":
        return 8 * data[3]
    if kind == "JPEG2000":
        start = data.index(b"\xff\x51")  # Csiz, then the depth of each component less one
        (count,) = struct.unpack_from(">H", data, start + 38)
        return max((data[start + 40 + 3 * index] & 0x7F) + 1 for index in range(count))
    if kind == "AVIF":
        return 10 if data[data.index(b"av1C") + 6] & 0x40 else 8
    return None


def _bits_of_ppm(image: "Image.Image") -> int:
    """Return the bits of the greatest value that the header declares."""
    arguments: Any = getattr(image, "tile")[0][3]  # noqa: B009
    if isinstance(arguments, tuple) and len(arguments) > 1 and isinstance(arguments[1], int):
        return arguments[1].bit_length()
    return 8  # the plain decoder: one bit, or the greatest value 255


def drops_transparency(image: "Image.Image") -> bool:
    """Return whether a pixel of an image is not opaque."""
    if not image.has_transparency_data:
        return False
    least, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(least != 255)


def check_png(data: bytes) -> None:
    """Compare the checksums in a PNG, which decoding does not.

    Raises:
        ImageError: one is wrong, or the end is missing.
    """
    place, kind = 8, b""
    while kind != b"IEND":
        if place + 12 > len(data):
            raise ImageError("it cannot be read as an image: its end is missing")
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 8 + length
        if data[end : end + 4] != struct.pack(">I", zlib.crc32(data[place + 4 : end])):
            raise ImageError("it cannot be read as an image: a checksum is wrong")
        place = end + 4


def has_hidden_channels(image: "Image.Image") -> bool:
    """Return whether the file of an image has more channels than Pillow shows."""
    stored = getattr(image, "tag_v2", {}).get(277, 1)
    return isinstance(stored, int) and stored > len(image.getbands())


def different_sizes(
    first: tuple[str, tuple[int, int]], misfits: Sequence[tuple[str, tuple[int, int]]]
) -> UserError:
    """Name the first image of another size than (place, (height, width)); a model has no place."""
    (place, (height, width)), (other, (other_height, other_width)) = first, misfits[0]
    more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
    other = ending(other, 90 if place else 140)
    if not place:
        return UserError(
            f"{other} is {other_width} x {other_height}{more}, but the model was trained on images"
            f" of {width} x {height} (width x height); crop or scale them to that size"
        )
    return UserError(
        f"images differ in size: {ending(place, 90)} is {width} x {height}, {other} is"
        f" {other_width} x {other_height}{more} (width x height); give size= to crop and scale all"
        " to one square"
    )


def unusable_images(
    images: Sequence[tuple[str, str]], total: int, can_skip: bool = False
) -> UserError:
    """Name the images (place, reason) that cannot be used, as many as fit in one line."""
    advice = ", or give on_error=skip" if can_skip else ""
    if len(images) == 1:
        ((place, reason),) = images
        return UserError(f"{ending(place, 110)}: {reason}; convert, replace or remove it{advice}")
    places = [place for place, _ in images]
    prefix = _common_folder(places)
    start = f"{len(images)} of {total} images"
    if prefix:
        start += f" in {ending(prefix.rstrip('/') or '/', 60)}"
    start += f" cannot be used: {ending(places[0].removeprefix(prefix), 40)} ({images[0][1]})"
    end = f"; convert, replace or remove them{advice}"
    room = 300 - len(start) - len(end) - len(" and 9999999 more")
    for number, place in enumerate(places[1:], 1):
        name = f", {ending(place.removeprefix(prefix), 40)}"
        room -= len(name)
        if room < 0:
            return UserError(f"{start} and {len(places) - number} more{end}")
        start += name
    return UserError(start + end)


def ending(text: str, length: int) -> str:
    """Return a text, shortened at its beginning."""
    return text if len(text) <= length else f"...{text[3 - length :]}"


def _common_folder(places: Sequence[str]) -> str:
    """Return the part up to a slash with which all places begin."""
    first, last = min(places), max(places)
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))  # noqa: B905
    return first[: first.rfind("/", 0, same) + 1]
