"""Images of any size as tiles of the size that a model takes.

Tiles lie side by side from the upper left. Those that reach over the right or lower edge repeat the
last column or row of the image. Such tiles are coded without the model
(:mod:`ndm.apps.compress.lead`), because a picture format spends almost nothing on repetition.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Covered(Protocol):
    """What tiles, or whole images, cover: an item of an archive."""

    @property
    def count(self) -> int:
        """Number of images of the model's size."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an image that is cut into tiles."""

    @property
    def is_tiled(self) -> bool:
        """Whether it is cut into tiles."""


def layout(height: int, width: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of tiles that cover an image."""
    return -(-height // tile[0]), -(-width // tile[1])


def cut(pixels: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Return the tiles of an image ``(C, H, W)``, row by row, as ``(n, C h w)``."""
    channels, height, width = pixels.shape
    rows, columns = layout(height, width, tile)
    below, beside = rows * tile[0] - height, columns * tile[1] - width
    full = np.pad(pixels, ((0, 0), (0, below), (0, beside)), mode="edge")
    blocks = full.reshape(channels, rows, tile[0], columns, tile[1])
    return np.ascontiguousarray(blocks.transpose(1, 3, 0, 2, 4)).reshape(rows * columns, -1)


def join(tiles: np.ndarray, shape: Sequence[int], tile: tuple[int, int]) -> np.ndarray:
    """Return the image ``(C, H, W)`` of tiles that :func:`cut` returned."""
    channels, height, width = shape
    rows, columns = layout(height, width, tile)
    blocks = tiles.reshape(rows, columns, channels, *tile).transpose(2, 0, 3, 1, 4)
    full = blocks.reshape(channels, rows * tile[0], columns * tile[1])
    return full[:, :height, :width]


def over_the_edge(items: Sequence[Covered], event_shape: Sequence[int]) -> np.ndarray:
    """Return which images, ``(N,)``, are tiles that reach over an edge."""
    found = []
    for item in items:
        edge = np.zeros(item.count, dtype=bool)
        if item.is_tiled:
            tile = (event_shape[1], event_shape[2])
            rows, columns = layout(item.shape[1], item.shape[2], tile)
            grid = edge.reshape(rows, columns)
            grid[-1] |= item.shape[1] % tile[0] > 0
            grid[:, -1] |= item.shape[2] % tile[1] > 0
        found.append(edge)
    return np.concatenate(found)


def coding_order(items: Sequence[Covered], event_shape: Sequence[int]) -> np.ndarray:
    """Return the numbers of all images in the order in which they are coded: first the edges."""
    edge = over_the_edge(items, event_shape)
    return np.concatenate([np.flatnonzero(edge), np.flatnonzero(~edge)])
