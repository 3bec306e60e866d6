r"""Images that stay encoded until they are needed: the common part of image folders and image
columns.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

When a source is read, the header of every image is checked and its bytes enter the checksum; pixels
are decoded batch by batch. Images of more than 8 bits a value are refused, since decoding would
drop bits without notice. Transparency is dropped; colors become gray, or gray becomes three equal
channels, as ``channels`` says. Photographs are turned upright, as their EXIF data say.
"""

import hashlib
import io
import struct
import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data.source import ContentHash, DataDescription, EventDataset, Loaded
from ndm.decoder import to_grid
from ndm.errors import UserError, check_whole, describe_value, require

if TYPE_CHECKING:
    from PIL import Image

NUM_VALUES = 256
_MODES = {1: "L", 3: "RGB"}
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, struct.error, zlib.error)


class EncodedImages(EventDataset):
    """A split of encoded images; a kind of storage implements ``__len__``, :meth:`where` and
    :meth:`read`.

    Args:
        channels: 1 for gray, 3 for color.
        size: side of the center square that images are cut and scaled to, or None to leave them as
            they are.
        labels: class index of each example, or None.
    """

    def __init__(self, channels: int, size: int | None, labels: np.ndarray | None):
        self.channels = channels
        self.size = size
        self.labels = None if labels is None else torch.from_numpy(labels).long()

    @abstractmethod
    def where(self, index: int) -> str:
        """Name of an image, for messages."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded bytes of an image; may raise OSError."""

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return to_grid(
            torch.from_numpy(np.stack([self.decode(int(index)) for index in indices])), NUM_VALUES
        )

    def decode(self, index: int) -> np.ndarray:
        """The pixels of an image, uint8, ``(channels, height, width)``.

        Raises:
            UserError: the image is damaged.
        """
        from PIL import Image, ImageOps

        try:
            with Image.open(io.BytesIO(self.read(index))) as image:
                pixels = upright(image).convert(_MODES[self.channels])
                if self.size is not None:
                    pixels = ImageOps.fit(pixels, (self.size, self.size), Image.Resampling.BICUBIC)
        except _DECODING_ERRORS as error:
            raise _unreadable(self.where(index), error) from error
        return (
            np.asarray(pixels)
            .reshape(pixels.height, pixels.width, self.channels)
            .transpose(2, 0, 1)
        )

    def inspect(self, index: int) -> tuple[tuple[int, int], bytes]:
        """Check an image without decoding its pixels.

        Returns:
            Its (height, width) upright, and the SHA-256 of its bytes.

        Raises:
            UserError: the image cannot be read, or has more than 8 bits a value.
        """
        from PIL import Image

        try:
            data = self.read(index)
            with Image.open(io.BytesIO(data)) as image:
                mode, (width, height), kind = image.mode, image.size, Image.Transpose
                if _turn(image) in (
                    kind.ROTATE_90,
                    kind.ROTATE_270,
                    kind.TRANSPOSE,
                    kind.TRANSVERSE,
                ):
                    width, height = height, width
                image.verify()
        except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
            raise _unreadable(self.where(index), error) from error
        # Pillow opens a PNG of 16 bits with color as one of 8 bits, so the depth is read from the
        # file itself.
        deep_png = data[:8] == b"\x89PNG\r\n\x1a\n" and data[24] == 16
        if deep_png or mode.startswith("I") or mode == "F":
            raise UserError(
                f"{self.where(index)} has more than 8 bits a value; convert it to 8 bits, or use"
                " Table with num_values=65536"
            )
        return (height, width), hashlib.sha256(data).digest()


def upright(image: "Image.Image") -> "Image.Image":
    """An image that was just opened, turned as its EXIF data say."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: "Image.Image") -> "Image.Transpose | None":
    """How an image that was just opened is turned upright, by the EXIF data in front of its pixels;
    None where they are not there, or damaged.

    Pillow turns TIFF images itself.
    """
    from PIL import ExifTags, Image

    if image.format == "TIFF":
        return None
    try:
        orientation = Image.Image.getexif(image).get(
            ExifTags.Base.Orientation
        )  # that of PNG images decodes them
    except _DECODING_ERRORS:
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


def check_image_arguments(channels: int, size: int | None) -> None:
    """Check ``channels`` and ``size``.

    Raises:
        UserError: ``channels`` is neither 1 nor 3, or ``size`` is not a whole number of at least 1.
    """
    if channels not in _MODES:
        raise UserError(f"channels={describe_value(channels)}: give 1 (gray) or 3 (color)")
    if size is not None:
        check_whole("size", size, 1)


def size_words(size: int | None) -> str:
    """How images were cut, for the version of a description."""
    return "" if size is None else f", center square scaled to {size} x {size} (bicubic)"


def encoded(
    name: str, version: str, splits: Mapping[str, EncodedImages], classes: Sequence[str] = ()
) -> Loaded:
    """Check and describe splits of encoded images.

    Args:
        name: of the data.
        version: of the data.
        splits: split -> images, all with the same ``channels`` and ``size``, none empty.
        classes: the declared classes.

    Returns:
        Description and splits.

    Raises:
        UserError: an image cannot be read, or sizes differ and no ``size`` is given.
    """
    require("PIL", "pillow", "data")
    content = ContentHash()
    first: tuple[str, tuple[int, int]] | None = None
    channels, size = next((images.channels, images.size) for images in splits.values())
    with tqdm(
        total=sum(map(len, splits.values())),
        desc=f"checking {name}",
        unit="image",
        delay=2,
        disable=None,
        leave=False,
    ) as progress:
        for split, images in splits.items():
            content.split(split)
            for index in range(len(images)):
                shape, digest = images.inspect(index)
                content.digest(digest)
                first = first or (images.where(index), shape)
                if size is None and shape != first[1]:
                    a, b = (
                        f"{where} is {s[1]} x {s[0]}"
                        for where, s in (first, (images.where(index), shape))
                    )
                    raise UserError(
                        f"images differ in size: {a}, {b} (width x height); give size= to cut and"
                        " scale all to one square"
                    )
                progress.update()
    if first is None:
        raise UserError(f"{name} has no images in its splits {', '.join(splits)}")
    event = (channels, *(first[1] if size is None else (size, size)))
    sizes = {split: len(images) for split, images in splits.items()}
    description = DataDescription(
        name,
        version,
        "image",
        event,
        NUM_VALUES,
        0.0,
        NUM_VALUES - 1.0,
        sizes,
        content.hexdigest(),
        tuple(classes),
    )
    return Loaded(description, dict(splits))


def _unreadable(where: str, error: Exception) -> UserError:
    return UserError(
        f"{where} cannot be read as an image ({' '.join(str(error).split())[:120]}); replace or"
        " remove it"
    )
