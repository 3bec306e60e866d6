"""Many images in one picture, and in one lossless WebP picture."""

import io
import math
from collections.abc import Sequence

import numpy as np

from ndm.data.formats import LARGEST, ImageError, open_image

LONGEST = 16_383
"""Most pixels of a side of a WebP picture."""


def fits_webp(count: int, event_shape: Sequence[int], num_values: int) -> bool:
    """Return whether one WebP picture can hold some images, gray or in color."""
    if len(event_shape) != 3 or event_shape[0] not in (1, 3) or num_values > 256:
        return False
    from PIL import features

    rows, columns = _layout(count)
    height, width = rows * event_shape[1], columns * event_shape[2]
    small = max(height, width) <= LONGEST and height * width <= LARGEST
    return small and bool(features.check("webp"))


def arrange(images: np.ndarray) -> np.ndarray:
    """Arrange images ``(N, C, H, W)``, uint8, C of 1 or 3, in one picture that is about square.

    Returns:
        Its pixels, ``(height, width, 3)`` or for gray images ``(height, width)``; the rest is 0.
    """
    count, channels, height, width = images.shape
    rows, columns = _layout(count)
    full = np.zeros((rows * columns, channels, height, width), np.uint8)
    full[:count] = images
    full = full.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    pixels = full.reshape(rows * height, columns * width, channels)
    return pixels[..., 0] if channels == 1 else pixels


def encode_webp(images: np.ndarray) -> bytes:
    """Encode images ``(N, C, H, W)``, uint8, C of 1 or 3, as one lossless picture, about square."""
    from PIL import Image

    picture = Image.fromarray(arrange(images)).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=100, method=6, exact=True)
    return buffer.getvalue()


def decode_webp(data: bytes, count: int, event_shape: Sequence[int]) -> np.ndarray:
    """Restore the images ``(N, C, H, W)`` of :func:`encode_webp`.

    Raises:
        ImageError: the picture is damaged, or has another size.
    """
    channels, height, width = event_shape
    rows, columns = _layout(count)
    with open_image(data) as picture:
        if (picture.format, picture.size) != ("WEBP", (columns * width, rows * height)):
            raise ImageError("it has another size")
        pixels = np.asarray(picture.convert("RGB"))
    sheet = pixels.reshape(rows, height, columns, width, 3)
    images = sheet.transpose(0, 2, 4, 1, 3).reshape(rows * columns, 3, height, width)
    return images[:count, :channels]


def _layout(count: int) -> tuple[int, int]:
    """Return the rows and columns of a sheet."""
    columns = max(1, math.isqrt(count))
    return -(-count // columns), columns
