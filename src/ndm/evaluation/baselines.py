r"""Simple coders of discrete data: baselines for bits per dimension.

.. math::
    \text{histogram: } -\tfrac1D \textstyle\sum_i \log_2 \frac{c_i(x_i) + a}{N + a L}, \quad c_i(v)
    = \#\{\text{training examples with } x_i = v\}

With a = 0.01, unseen values keep a positive probability. ``xz`` compresses all test integers as one
stream of bytes (two bytes each for more than 256 values), ``webp`` all test images as one lossless
picture. :data:`PICTURE_FORMATS` also code images one by one.
"""

import contextlib
import functools
import importlib.util
import io
import lzma
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from ndm.data.sheet import arrange, encode_webp, fits_webp
from ndm.errors import UserError, require

PICTURE_FORMATS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "PNG": {"format": "PNG", "optimize": True},
        "WebP": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
        "JPEG XL": {"format": "JXL", "lossless": True, "effort": 9},
    }
)
"""Options of Pillow for the smallest files in lossless formats. JPEG XL needs pillow-jxl-plugin."""

_WEBP_PIXELS = 200_000  # WebP takes two or three seconds for them


def histogram_bpd(train: Tensor, test: Tensor, num_values: int, smoothing: float = 0.01) -> float:
    """Return the bits/dim of a model with independent pixels and one histogram per pixel.

    Args:
        train: integers ``(N, *event)``.
        test: integers ``(M, *event)``.
        num_values: L.
        smoothing: a.
    """
    counts = np.stack(
        [np.bincount(pixel, minlength=num_values) for pixel in train.flatten(1).T.numpy()]
    )
    bits = -np.log2((counts + smoothing) / (len(train) + smoothing * num_values))
    values = test.flatten(1).numpy()
    return float(np.mean([bits[np.arange(len(bits)), row].mean() for row in values]))


def xz_bpd(test: Tensor, num_values: int) -> float:
    """Return the bits/dim of xz at its highest setting on the test integers as one stream."""
    stream = test.numpy().astype(np.uint8 if num_values <= 256 else np.uint16).tobytes()
    return 8 * len(lzma.compress(stream, preset=9 | lzma.PRESET_EXTREME)) / test.numel()


def webp_bpd(test: Tensor, num_values: int) -> float | None:
    """Return the bits/dim of lossless WebP on the test integers as one picture.

    None for what are no images of 1 or 3 channels and up to 256 values, and without Pillow. Of many
    images every n-th is taken.
    """
    pixels = test.numel() // test.shape[1]
    images = test[:: max(1, pixels // _WEBP_PIXELS)]
    if importlib.util.find_spec("PIL") is None or not fits_webp(
        len(images), test.shape[1:], num_values
    ):
        return None
    return 8 * len(encode_webp(images.numpy().astype(np.uint8))) / images.numel()


def installed_formats() -> list[str]:
    """Return the names of the :data:`PICTURE_FORMATS` that can be written here.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    return [name for name, options in PICTURE_FORMATS.items() if options["format"] in _writable()]


@functools.cache
def _writable() -> frozenset[str]:
    """Return the formats that Pillow can write."""
    require("PIL", "pillow", "data")
    from PIL import Image

    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_jxl")  # registers JPEG XL with Pillow
    Image.init()
    return frozenset(Image.SAVE)


def picture_bytes(images: np.ndarray, name: str) -> int:
    """Return the bytes that images take as one lossless picture, about square.

    Args:
        images: uint8 ``(N, 1, H, W)`` or ``(N, 3, H, W)``.
        name: one of the :data:`PICTURE_FORMATS`.

    Raises:
        UserError: the format cannot be written here, or does not restore the images.
    """
    if PICTURE_FORMATS[name]["format"] not in _writable():
        raise UserError(f"Pillow cannot write {name} here; install one that can, or a plugin")
    from PIL import Image

    pixels, buffer = arrange(images), io.BytesIO()
    Image.fromarray(pixels).save(buffer, **PICTURE_FORMATS[name])
    with Image.open(io.BytesIO(buffer.getvalue())) as picture:
        restored = np.asarray(picture.convert("L" if pixels.ndim == 2 else "RGB"))
    if not np.array_equal(restored, pixels):
        raise UserError(f"{name} is not lossless here; install another version of Pillow")
    return len(buffer.getvalue())


def picture_bpd(images: np.ndarray, name: str) -> dict[str, float]:
    """Return the bits/dim of a format, as one ``sheet`` of all images and for ``each`` by itself.

    Args:
        images: uint8 ``(N, 1, H, W)`` or ``(N, 3, H, W)``.
        name: one of the :data:`PICTURE_FORMATS`.
    """
    sheet = picture_bytes(images, name)
    each = sum(picture_bytes(images[index : index + 1], name) for index in range(len(images)))
    return {"sheet": 8 * sheet / images.size, "each": 8 * each / images.size}
