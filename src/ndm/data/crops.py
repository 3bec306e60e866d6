r"""Crops of images of any size, after averaging over blocks of pixels.

.. math::
    k'_{ij} = \Bigl\lfloor \tfrac{1}{a^2} \textstyle\sum_{u, v < a} k_{ai+u,\, aj+v} + \tfrac12
    \Bigr\rfloor

Averaging over a x a pixels removes most traces of an earlier JPEG compression, so that photographs
become images with the statistics of nature. Rows and columns that do not fill a block are left out.

A crop is a square of the averaged image:

==========  =======================================================================
``center``  one crop from the middle of each image
``grid``    side by side, as many as fit, from the middle; none overlaps another
``random``  in the split ``train`` every crop at every place is an example, so that
            training draws crops at random places; other splits are cut in a grid
==========  =======================================================================
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from ndm.data.source import EventDataset
from ndm.decoder import to_grid
from ndm.errors import UserError, check_choice, check_whole

CropKind = Literal["center", "grid", "random"]
_CACHE = 2**29  # bytes of decoded images to keep in memory


@dataclass(frozen=True)
class Cropping:
    """How examples are cropped from images."""

    kind: CropKind
    """Where crops are taken."""
    size: int
    """Side of a crop."""
    average: int = 1
    """Side of the blocks that are averaged before."""

    def check_fits(self, height: int, width: int) -> str | None:
        """Return why an image has no crop, or None if it has one."""
        if min(height, width) // self.average >= self.size:
            return None
        least = self.size * self.average
        return f"it has {height} x {width} pixels, and a crop takes {least} x {least}"

    def describe(self) -> str:
        """Describe the crops, for a description's version."""
        averaged = f", averaged over {self.average} x {self.average} pixels"
        places = {"center": "in the middle", "grid": "in a grid", "random": "at random places"}
        text = f", crops of {self.size} x {self.size} {places[self.kind]}"
        return (averaged if self.average > 1 else "") + text


def make_cropping(crop: str | None, size: int | None, average: int) -> Cropping | None:
    """Return the cropping of a source's arguments, or None without ``crop``.

    Raises:
        UserError: an argument is wrong, or they do not go together.
    """
    check_whole("average", average, 1)
    if crop is None:
        if average != 1:
            raise UserError(
                f"average={average} goes with crops: give crop={' or '.join(get_args(CropKind))}"
                " too, or leave average out"
            )
        return None
    check_choice("crop", crop, get_args(CropKind))
    if size is None:
        raise UserError(f"crop={crop} needs the side of the crops: give size, such as size=32")
    return Cropping(crop, size, average)  # type: ignore[arg-type]


def described_cropping(version: str) -> Cropping | None:
    """Return crops in a grid as :meth:`Cropping.describe` wrote them into a version, or None."""
    found = re.search(r", crops of (\d+) x \1 (?:in|at) ", version)
    averaged = re.search(r", averaged over (\d+) x \1 pixels", version)
    average = 1 if averaged is None else int(averaged[1])
    return None if found is None else Cropping("grid", int(found[1]), average)


def averaged(pixels: np.ndarray, side: int) -> np.ndarray:
    """Average blocks of ``side`` x ``side`` of ``(C, H, W)``, uint8; halves are rounded up."""
    if side == 1:
        return pixels
    channels, height, width = pixels.shape
    rows, columns = height // side, width // side
    sums = np.zeros((channels, rows, columns), dtype=np.uint32)
    for down in range(side):
        for right in range(side):
            sums += pixels[:, down : rows * side : side, right : columns * side : side]
    return ((2 * sums + side**2) // (2 * side**2)).astype(np.uint8)


class Pictures(Protocol):
    """Images of any size that are decoded when needed."""

    labels: Tensor | None

    def decode(self, index: int) -> np.ndarray:
        """Return the pixels of an image, uint8, ``(channels, height, width)``."""


class CroppedImages(EventDataset):
    """A split of crops.

    Args:
        images: the images.
        sizes: (height, width) of each image.
        cropping: how to crop.
        every_place: whether each place of an image gives a crop.
        num_values: number of values of a pixel.
    """

    def __init__(
        self,
        images: Pictures,
        sizes: Sequence[tuple[int, int]],
        cropping: Cropping,
        every_place: bool,
        num_values: int,
    ):
        self.images, self.cropping, self.every_place = images, cropping, every_place
        self.num_values = num_values
        places = np.array(sizes) // cropping.average
        side = cropping.size
        if every_place:
            counts = places - side + 1
        elif cropping.kind == "center":
            counts = np.ones_like(places)
        else:
            counts = places // side
        self.places, self._counts = places, counts
        self._margins = (places - counts * side) // 2
        self._ends = np.cumsum(counts.prod(1))
        self._kept: dict[int, np.ndarray] = {}
        self._bytes = 0

    @property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        """Class of each crop, made when needed: there may be millions of crops."""
        if self.images.labels is None:
            return None
        return self.images.labels.repeat_interleave(torch.from_numpy(self._counts.prod(1)))

    def conditions(self, indices: Sequence[int]) -> Tensor | None:
        if self.images.labels is None:
            return None
        return self.images.labels[np.searchsorted(self._ends, indices, side="right")]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the decoded images out of what other processes get."""
        return {**vars(self), "_kept": {}, "_bytes": 0}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        crops = np.stack([self._crop(int(index)) for index in indices])
        return to_grid(torch.from_numpy(crops), self.num_values)

    def _crop(self, index: int) -> np.ndarray:
        image = int(np.searchsorted(self._ends, index, side="right"))
        local = index - (int(self._ends[image - 1]) if image else 0)
        row, column = divmod(local, int(self._counts[image, 1]))
        side = self.cropping.size
        if not self.every_place:
            row, column = np.array([row, column]) * side + self._margins[image]
        return self._pixels(image)[:, row : row + side, column : column + side]

    def _pixels(self, image: int) -> np.ndarray:
        """Return an averaged image; decoded images are kept while there is room."""
        if image in self._kept:
            return self._kept[image]
        pixels = averaged(self.images.decode(image), self.cropping.average)
        if self._bytes + pixels.nbytes <= _CACHE:
            self._kept[image] = pixels
            self._bytes += pixels.nbytes
        return pixels


def crop_splits(
    splits: Mapping[str, Pictures],
    sizes: Mapping[str, Sequence[tuple[int, int]]],
    cropping: Cropping,
    num_values: int,
) -> dict[str, CroppedImages]:
    """Return the crops of splits of images with these (height, width)."""
    return {
        split: CroppedImages(
            images,
            sizes[split],
            cropping,
            every_place=cropping.kind == "random" and split == "train",
            num_values=num_values,
        )
        for split, images in splits.items()
    }
