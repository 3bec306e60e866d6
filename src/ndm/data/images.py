r"""Images that stay encoded until needed: the common part of image folders and image columns.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

Reading a source checks the header of every image and adds its bytes to the checksum; pixels are
decoded batch by batch. Images with more than 8 bits per value raise an error, because decoding
would silently drop bits. Transparency is dropped. ``channels`` converts color to gray, or gray to
three equal channels. Photographs are turned upright according to their EXIF data.
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
    """A split of encoded images.

    Subclasses implement ``__len__``, :meth:`where` and :meth:`read` for one kind of storage.

    Args:
        channels: 1 for gray, 3 for color.
        size: side of the center square to which images are cropped and scaled, or None to keep
            their size.
        labels: class index of each example, or None.
    """

    def __init__(self, channels: int, size: int | None, labels: np.ndarray | None):
        self.channels = channels
        self.size = size
        self.labels = None if labels is None else torch.from_numpy(labels).long()

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the name of an image, for messages."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image; may raise OSError."""

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
            with Image.open(io.BytesIO(self.read(index))) as image:
                pixels = upright(image).convert(_MODES[self.channels])
                if self.size is not None:
                    pixels = ImageOps.fit(pixels, (self.size, self.size), Image.Resampling.BICUBIC)
        except _DECODING_ERRORS as error:
            raise _unreadable(self.where(index), error) from error
        shape = (pixels.height, pixels.width, self.channels)
        return np.asarray(pixels).reshape(shape).transpose(2, 0, 1)

    def inspect(self, index: int) -> tuple[tuple[int, int], bytes]:
        """Check an image without decoding its pixels.

        Returns:
            The (height, width) of the upright image, and the SHA-256 of its bytes.

        Raises:
            UserError: the image cannot be read, or has more than 8 bits per value.
        """
        from PIL import Image

        kind = Image.Transpose
        sideways = (kind.ROTATE_90, kind.ROTATE_270, kind.TRANSPOSE, kind.TRANSVERSE)
        try:
            data = self.read(index)
            with Image.open(io.BytesIO(data)) as image:
                mode, (width, height) = image.mode, image.size
                if _turn(image) in sideways:
                    width, height = height, width
                image.verify()
        except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
            raise _unreadable(self.where(index), error) from error
        # Pillow opens a color PNG of 16 bits as 8 bits, so read the depth from the file.
        deep_png = data[:8] == b"\x89PNG\r\n\x1a\n" and data[24] == 16
        if deep_png or mode.startswith("I") or mode == "F":
            raise UserError(
                f"{self.where(index)} has more than 8 bits per value; convert it to 8 bits, or use"
                " Table with num_values=65536"
            )
        return (height, width), hashlib.sha256(data).digest()


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


def describe_size(size: int | None) -> str:
    """Describe how images were cropped and scaled, for a description's version."""
    return "" if size is None else f", center square scaled to {size} x {size} (bicubic)"


def encoded(
    name: str, version: str, splits: Mapping[str, EncodedImages], classes: Sequence[str] = ()
) -> Loaded:
    """Check and describe splits of encoded images.

    Args:
        name: name of the data.
        version: version of the data.
        splits: split -> images, all with the same ``channels`` and ``size``.
        classes: the declared classes.

    Returns:
        The description and the splits.

    Raises:
        UserError: there are no images, one cannot be read, or sizes differ and ``size`` is None.
    """
    require("PIL", "pillow", "data")
    content = ContentHash()
    first: tuple[str, tuple[int, int]] | None = None
    channels, size = next((images.channels, images.size) for images in splits.values())
    sizes = {split: len(images) for split, images in splits.items()}
    with tqdm(
        total=sum(sizes.values()),
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
                    raise _different_sizes(*first, images.where(index), shape)
                progress.update()
    if first is None:
        raise UserError(f"{name} has no images in its splits {', '.join(splits)}")
    event = (channels, *(first[1] if size is None else (size, size)))
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


def _different_sizes(
    first: str, shape: tuple[int, int], other: str, other_shape: tuple[int, int]
) -> UserError:
    (height, width), (other_height, other_width) = shape, other_shape
    return UserError(
        f"images differ in size: {first} is {width} x {height}, {other} is {other_width} x"
        f" {other_height} (width x height); give size= to crop and scale all to one square"
    )


def _unreadable(where: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120]
    return UserError(f"{where} cannot be read as an image ({reason}); replace or remove it")
