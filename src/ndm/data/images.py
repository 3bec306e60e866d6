r"""Images that stay encoded until needed: the common part of image folders and image columns.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

Reading a source decodes every image once, reports all that are damaged together, and adds their
bytes to the checksum; later, pixels are decoded batch by batch. Images with more than 8 bits per
value raise an error, because decoding would silently drop bits. Transparency is dropped, and
counted in the description. ``channels`` converts color to gray, or gray to three equal channels.
Photographs are turned upright according to their EXIF data.
"""

import hashlib
import os
import re
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data.crops import Cropping, crop_splits
from ndm.data.formats import (
    ImageError,
    check_png,
    different_sizes,
    drops_transparency,
    open_image,
    unusable_images,
)
from ndm.data.source import ContentHash, DataDescription, EventDataset, Loaded
from ndm.data.splits import check_classes
from ndm.decoder import to_grid
from ndm.errors import UserError, check_choice, check_whole, describe_value, require

if TYPE_CHECKING:
    from PIL import Image

NUM_VALUES = 256
OnError = Literal["raise", "skip"]
"""What to do with images that cannot be used."""
CHANNELS = {"L": 1, "RGB": 3}
"""Pillow's mode -> channels of an image."""
_MODES = {channels: mode for mode, channels in CHANNELS.items()}
_LONGEST_LIST = 100  # names of skipped images in a description


@dataclass(frozen=True)
class Inspection:
    """What :meth:`EncodedImages.inspect` found."""

    shape: tuple[int, int]
    """(height, width) of the upright image."""
    sha256: bytes
    """SHA-256 of the encoded bytes."""
    transparent: bool
    """Whether a pixel is not opaque; False if the image was not decoded."""


class EncodedImages(EventDataset):
    """A split of encoded images.

    Subclasses implement ``__len__``, :meth:`where` and :meth:`read` for one kind of storage.

    Args:
        channels: 1 for gray, 3 for color.
        size: side of the center square to which images are cropped and scaled, or None to keep
            their size.
        labels: class index of each example, or None.
        cropping: how examples are cropped from the images, whose ``size`` is then None.
    """

    def __init__(
        self,
        channels: int,
        size: int | None,
        labels: np.ndarray | None,
        cropping: Cropping | None = None,
    ):
        self.channels = channels
        self.size = size
        self.cropping = cropping
        self.labels = None if labels is None else torch.from_numpy(labels).long()

    @property
    def keeps_size(self) -> bool:
        """Whether an image is an example as it is, so that all must have one size."""
        return self.size is None and self.cropping is None

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the name of an image, for messages."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image; may raise OSError."""

    def name_of(self, index: int) -> str:
        """Return the name of an image within the data, which does not depend on their place."""
        return self.where(index)

    def without(self, indices: Collection[int]) -> "EncodedImages":
        """Return the split without some images.

        Raises:
            NotImplementedError: this kind of storage does not support it.
        """
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        pixels = np.stack([self.decode(int(index)) for index in indices])
        return to_grid(torch.from_numpy(pixels), NUM_VALUES)

    def decode(self, index: int) -> np.ndarray:
        """Return the pixels of an image, uint8, ``(channels, height, width)``.

        Raises:
            UserError: the image is damaged.
        """
        from PIL import Image, ImageOps

        try:
            with open_image(self._read(index)) as image:
                pixels = upright(image).convert(_MODES[self.channels])
                if self.size is not None:
                    pixels = ImageOps.fit(pixels, (self.size, self.size), Image.Resampling.BICUBIC)
        except ImageError as error:
            raise unusable_images([(self.where(index), str(error))], len(self)) from error
        shape = (pixels.height, pixels.width, self.channels)
        return np.asarray(pixels).reshape(shape).transpose(2, 0, 1)

    def size_of(self, index: int) -> tuple[int, int]:
        """Return the (height, width) of an upright image by its header.

        Raises:
            UserError: the header is damaged.
        """
        try:
            with open_image(self._read(index)) as image:
                width, height = upright_size(image)
                return height, width
        except ImageError as error:
            raise unusable_images([(self.where(index), str(error))], len(self)) from error

    def inspect(self, index: int, expected: tuple[int, int] | None = None) -> Inspection:
        """Check an image. It is decoded unless its size shows that it does not fit.

        Args:
            index: index of the image.
            expected: the (height, width) of all images if :attr:`size` is None.

        Raises:
            ImageError: the image cannot be read, is too large, or has more than 8 bits per value.
        """
        data = self._read(index)
        digest = hashlib.sha256(data).digest()
        with open_image(data) as image:
            width, height = upright_size(image)
            shape = (height, width)
            if self.cropping is not None:
                problem = self.cropping.check_fits(height, width)
                if problem:
                    raise ImageError(problem)
            elif self.keeps_size and expected is not None and shape != expected:
                return Inspection(shape, digest, False)
            if image.format == "PNG":
                check_png(data)
            image.load()
            return Inspection(shape, digest, drops_transparency(image))

    def _read(self, index: int) -> bytes:
        try:
            return self.read(index)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ImageError(f"it cannot be read as an image: {reason}") from error


def upright_size(image: "Image.Image") -> tuple[int, int]:
    """Return the (width, height) that :func:`upright` gives, without decoding."""
    from PIL import Image

    width, height = image.size
    kind = Image.Transpose
    sideways = (kind.ROTATE_90, kind.ROTATE_270, kind.TRANSPOSE, kind.TRANSVERSE)
    return (height, width) if _turn(image) in sideways else (width, height)


def upright(image: "Image.Image") -> "Image.Image":
    """Turn an image that was just opened upright according to its EXIF data."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: "Image.Image") -> "Image.Transpose | None":
    """Return the operation that turns an image that was just opened upright, or None.

    It is read from the EXIF data in front of the pixels, and None if these are missing or damaged.
    Pillow turns TIFF images itself.
    """
    from PIL import ExifTags, Image

    if image.format == "TIFF":
        return None
    try:
        # Image.getexif, because the override for PNG decodes the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # of any kind, for damaged data
        return None
    kind = Image.Transpose
    turns = {
        2: kind.FLIP_LEFT_RIGHT,
        3: kind.ROTATE_180,
        4: kind.FLIP_TOP_BOTTOM,
        5: kind.TRANSPOSE,
        6: kind.ROTATE_270,
        7: kind.TRANSVERSE,
        8: kind.ROTATE_90,
    }
    return turns.get(orientation) if isinstance(orientation, int) else None


def check_image_arguments(channels: int, size: int | None, on_error: str = "raise") -> None:
    """Check ``channels``, ``size`` and ``on_error``.

    Raises:
        UserError: ``channels`` is neither 1 nor 3, ``size`` is not a whole number of at least 1, or
            ``on_error`` is neither raise nor skip.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    if channels not in _MODES:
        raise UserError(f"channels={describe_value(channels)}: give 1 (gray) or 3 (color)")
    if size is not None:
        check_whole("size", size, 1)


def describe_size(size: int | None) -> str:
    """Describe how images were cropped and scaled, for a description's version."""
    return "" if size is None else f", center square scaled to {size} x {size} (bicubic)"


def described_size(version: str) -> int | None:
    """Return the ``size`` that :func:`describe_size` wrote into a version, or None."""
    found = re.search(r", center square scaled to (\d+) x \1 \(bicubic\)", version)
    return None if found is None else int(found[1])


@dataclass
class _Findings:
    """What was found in the images of all splits."""

    unusable: list[tuple[str, str]] = field(default_factory=list)
    """Place and reason."""
    skipped: list[str] = field(default_factory=list)
    """Names, if unusable images are skipped."""
    first: tuple[str, tuple[int, int]] | None = None
    """Place and (height, width) of the first image, or of what the images must fit."""
    misfits: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    """Place and (height, width) of images of another size."""
    transparent: int = 0
    """Number of images with transparency."""
    shapes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) of the usable images of the current split."""


def encoded(
    name: str,
    version: str,
    splits: Mapping[str, EncodedImages],
    classes: Sequence[str] = (),
    expected: tuple[int, int] | None = None,
    on_error: OnError | None = None,
) -> Loaded:
    """Check and describe splits of encoded images.

    Args:
        name: name of the data.
        version: version of the data.
        splits: split -> images, all with the same ``channels`` and ``size``.
        classes: the declared classes.
        expected: the (height, width) that a model requires of images with ``size`` None.
        on_error: raise an error for images that cannot be used, or skip them; the description names
            those that are skipped, and they enter its checksum. None if the source has no choice.

    Returns:
        The description and the splits.

    Raises:
        UserError: there are no images, some cannot be used, or sizes differ and ``size`` is None.
    """
    require("PIL", "pillow", "data")
    content, found, bad = ContentHash(), _Findings(), dict[str, list[int]]()
    one = next(iter(splits.values()))
    channels, size, cropping = one.channels, one.size, one.cropping
    if one.keeps_size and expected is not None:
        found.first = ("", expected)
    if cropping is not None:
        content.digest(cropping.describe().encode())
    shapes: dict[str, list[tuple[int, int]]] = {}
    total = sum(len(images) for images in splits.values())
    bar: dict[str, Any] = {"unit": "image", "delay": 2, "disable": None, "leave": False}
    with tqdm(total=total, desc=f"checking {name}", **bar) as progress:
        for split, images in splits.items():
            content.split(split)
            bad[split], found.shapes = [], shapes.setdefault(split, [])
            for index in _inspected(images, content, found, on_error == "skip"):
                progress.update()
                if index is not None:
                    bad[split].append(index)
    if found.unusable and on_error != "skip":
        raise unusable_images(found.unusable, total, on_error is not None)
    if found.misfits:
        raise different_sizes(found.first or ("", (0, 0)), found.misfits)
    if found.skipped:
        splits = _without(splits, bad, classes, name)
    if found.first is None:
        raise UserError(f"{name} has no images in its splits {', '.join(splits)}")
    examples: Mapping[str, EventDataset] = splits
    if cropping is not None:
        size, examples = cropping.size, crop_splits(splits, shapes, cropping, NUM_VALUES)
    description = DataDescription(
        name,
        version + _describe_findings(found),
        "image",
        (channels, *(found.first[1] if size is None else (size, size))),
        NUM_VALUES,
        0.0,
        NUM_VALUES - 1.0,
        {split: len(part) for split, part in examples.items()},
        content.hexdigest(),
        tuple(classes),
    )
    return Loaded(description, dict(examples))


def _inspected(
    images: EncodedImages, content: ContentHash, found: _Findings, skip: bool
) -> Iterator[int | None]:
    """Inspect a split, and yield the index of each image that cannot be used, otherwise None."""
    for index in range(len(images)):
        try:
            one = images.inspect(index, None if found.first is None else found.first[1])
        except ImageError as error:
            found.unusable.append((images.where(index), str(error)))
            if skip:
                found.skipped.append(images.name_of(index))
                content.digest(b"skipped " + os.fsencode(images.name_of(index)) + b"\n")
            yield index
            continue
        content.digest(one.sha256)
        found.first = found.first or (images.where(index), one.shape)
        found.transparent += one.transparent
        found.shapes.append(one.shape)
        if images.keeps_size and one.shape != found.first[1]:
            found.misfits.append((images.where(index), one.shape))
        yield None


def _without(
    splits: Mapping[str, EncodedImages],
    bad: Mapping[str, Collection[int]],
    classes: Sequence[str],
    name: str,
) -> dict[str, EncodedImages]:
    """Return the splits without the images at the indices ``bad``.

    Raises:
        UserError: a split is empty then, or has no example of a class.
    """
    rest = {split: images.without(bad[split]) for split, images in splits.items()}
    advice = "replace the images that cannot be used"
    for split, images in rest.items():
        if not len(images):
            raise UserError(f"{name}: all images of the split {split!r} are skipped; {advice}")
    if classes:
        labels = {
            split: images.labels.numpy()
            for split, images in rest.items()
            if images.labels is not None
        }
        check_classes(labels, classes, name, advice)
    return rest


def _describe_findings(found: _Findings) -> str:
    text = ""
    if found.transparent:
        plural = "s" if found.transparent > 1 else ""
        text += f", transparency of {found.transparent} image{plural} dropped"
    if found.skipped:
        count, names = len(found.skipped), found.skipped[:_LONGEST_LIST]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        text += f", {count} image{'s' if count > 1 else ''} skipped: {', '.join(names)}{more}"
    return text
