r"""Simple coders of discrete data: baselines for bits per dimension.

.. math::
    \text{histogram: } -\tfrac1D \textstyle\sum_i \log_2 \frac{c_i(x_i) + a}{N + a L}, \quad c_i(v)
    = \#\{\text{training examples with } x_i = v\}

With a = 0.01, unseen values keep a positive probability. ``xz`` compresses all test integers as one
stream of bytes (two bytes each for more than 256 values), ``webp`` all test images as one lossless
picture.
"""

import importlib.util
import lzma

import numpy as np
from torch import Tensor

from ndm.data.sheet import encode_webp, fits_webp

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
