"""Conversion of images, folders of images, ``.npy`` and ``.npz`` arrays to levels and back."""

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ndm.apps.compress.arrays import Grid, read_arrays
from ndm.apps.compress.tiles import cut, layout
from ndm.data.files import check_regular, describe_ignored, find_files, is_folder
from ndm.data.folder import SUFFIXES
from ndm.data.formats import (
    ImageError,
    check_png,
    has_hidden_channels,
    open_image,
    unusable_images,
)
from ndm.data.images import CHANNELS, upright, upright_size
from ndm.errors import UserError, describe_value, one_line

KINDS = ("image", "npy", "npz")
_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_LONGEST_NAME, _LONGEST_PART = 1000, 255
INPUTS = (*SUFFIXES, ".npy", ".npz")
"""Suffixes of the files that are taken from folders."""
JPEG = (".jpg", ".jpeg")
MOST_AXES = 8
"""Most axes of an array in an archive."""
MOST_VALUES = 2**31
"""Most values of an archive, which are held in memory."""


@dataclass(frozen=True)
class Item:
    """A file, or an array in an ``.npz`` file."""

    name: str
    """Path below the output folder, with ``/`` between folders."""
    kind: str
    """``image``, ``npy`` or ``npz``."""
    count: int
    """Number of images of the model's size."""
    dtype: str = "uint8"
    """dtype of the array."""
    shape: tuple[int, ...] = ()
    """Shape of the array, or (channels, height, width) of an image that is cut into tiles."""
    key: str = ""
    """Name of the array within an ``.npz`` file."""
    mode: str = ""
    """``L`` or ``RGB`` of an image."""
    values: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Levels 0 ... L-1, ``(count, D)``; not part of the description."""

    @property
    def place(self) -> str:
        """Path of the output file below the output folder."""
        return self.name if self.kind != "npz" else self.name.removesuffix(f"/{self.key}")

    @property
    def is_tiled(self) -> bool:
        """Whether it is an image that is cut into tiles."""
        return self.kind == "image" and bool(self.shape)

    def size(self, event_shape: Sequence[int]) -> int:
        """Return the number of its values, those of a gray image once."""
        if self.kind != "image":
            return self.count * math.prod(event_shape)
        height, width = (self.shape or tuple(event_shape))[1:]
        return CHANNELS.get(self.mode, 0) * height * width

    def to_dict(self) -> dict[str, Any]:
        """Return the description in a form that JSON can store."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name != "values"
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Item":
        """Restore and check the description that :meth:`to_dict` returned.

        Raises:
            ValueError: ``values`` is not such a description; TypeError likewise.
        """
        if values.keys() - {"name", "kind", "count", "dtype", "shape", "key", "mode"}:
            raise ValueError("an item is damaged")
        fields: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values.items()
        }
        item = cls(**fields)
        strings = (item.name, item.kind, item.dtype, item.key, item.mode)
        are_strings = all(isinstance(text, str) for text in strings)
        if not are_strings or item.kind not in KINDS or item.dtype not in _DTYPES:
            raise ValueError("an item is damaged")
        if not isinstance(item.shape, tuple) or len(item.shape) > MOST_AXES:
            raise ValueError("a shape is damaged")
        are_sizes = all(
            isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**40
            for size in (item.count, *item.shape)
        )
        if not are_sizes or not item.count:
            raise ValueError("a size is out of range")
        if item.kind == "npz" and not (item.key and item.name.endswith(f"/{item.key}")):
            raise ValueError("an array has no name")
        try:
            os.fsencode(item.place)  # Names of files need not be valid UTF-8, keys must.
            item.key.encode()
        except UnicodeEncodeError as error:
            raise ValueError("a name has characters that are not allowed") from error
        item.check_name()
        return item

    def check_shape(self, event_shape: tuple[int, ...], num_values: int) -> None:
        """Check that the item can hold its images.

        Args:
            event_shape: shape of one image.
            num_values: number of values of a pixel.

        Raises:
            ValueError: it cannot.
        """
        if self.kind == "image":
            channels = CHANNELS.get(self.mode)
            fits = len(event_shape) == 3 and channels is not None and channels <= event_shape[0]
            fits = fits and num_values == 256 and not self.key
            fits = fits and self.count == self._tiles(event_shape)
        else:
            is_gray = len(event_shape) == 3 and event_shape[0] == 1
            shapes = [event_shape, event_shape[1:]] if is_gray else [event_shape]
            fits = any(
                self.shape == (self.count, *shape) or (self.count == 1 and self.shape == shape)
                for shape in shapes
            )
            fits = fits and not self.mode and (self.kind == "npz" or not self.key)
        if not fits:
            raise ValueError("an item does not fit its images")

    def _tiles(self, event_shape: tuple[int, ...]) -> int:
        """Return the number of tiles of an image; 0 for a wrong shape."""
        if not self.shape:
            return 1
        if len(self.shape) != 3 or self.shape[0] != event_shape[0] or not all(self.shape):
            return 0
        return math.prod(layout(self.shape[1], self.shape[2], (event_shape[1], event_shape[2])))

    def check_name(self) -> None:
        """Check that the name stays inside the output folder, on every operating system.

        Raises:
            ValueError: it does not, is too long, or contains characters that are not allowed.
        """
        parts, windows = self.place.split("/"), PureWindowsPath(self.place)
        is_outside = any(part in ("", ".", "..") for part in parts) or windows.drive or windows.root
        is_strange = "\\" in self.place or any(ord(letter) < 32 for letter in self.name)
        if is_outside or is_strange or len(self.name) > _LONGEST_NAME:
            raise ValueError(
                "a name points outside the folder, is too long or has characters that are not"
                " allowed"
            )


def read_items(
    paths: Sequence[str], event_shape: tuple[int, ...], num_values: int, low: int
) -> list[Item]:
    """Read files and folders of files. Hidden files in folders are skipped, and links followed.

    The files of a folder have their names below it. If two folders have files of the same name, the
    names begin with the folder.

    Args:
        paths: images, folders of images, ``.npy``, ``.npz``.
        event_shape: shape of one image in the model.
        num_values: number of values of a pixel.
        low: least value of a pixel.

    Raises:
        UserError: a file is missing, cannot be read, or does not fit the model.
    """
    reader = _Reader(Grid(event_shape, num_values, low))
    files = _list_files(paths)
    items: list[Item] = []
    failures: list[tuple[str, str]] = []
    for path, name in files:
        try:
            items += reader.read(path, name)
        except ImageError as error:
            failures.append((str(path), str(error)))
    if failures:
        raise unusable_images(failures, len(files))
    for item in items:
        try:
            item.check_name()
        except ValueError as error:
            raise UserError(f"{describe_value(item.name)}: {error}; rename it") from error
        check_lengths(item)
    names = sorted(item.name for item in items)
    for name, following in itertools.pairwise(names):
        if name == following:
            raise UserError(
                f"{describe_value(name)} would be written twice; give files with different names,"
                " or a folder that contains them"
            )
    return items


def count_left_out(paths: Sequence[str]) -> str:
    """Count the visible files in folders that are no images or arrays, as text; empty if none."""
    trees = [find_files(Path(text)) for text in paths if is_folder(text)]
    taken = sum(len(tree.ending_in(INPUTS)) for tree in trees)
    others = sum(len(tree.names) + tree.others for tree in trees) - taken
    return describe_ignored(others, sum(tree.repeated for tree in trees)).removeprefix(", ")


def describe_jpeg(paths: Sequence[str]) -> str:
    """Say that files that are JPEG will grow, as text; empty if there are none."""
    files = _list_files(paths)
    sizes = [file.stat().st_size for file, name in files if Path(name).suffix.lower() in JPEG]
    if not sizes:
        return ""
    return (
        f"note: {len(sizes)} of {len(files)} files are JPEG, {sum(sizes):,} bytes; their pixels"
        " take more without loss, so keep the files"
    )


def _list_files(paths: Sequence[str]) -> list[tuple[Path, str]]:
    """Return the files, with their names in the archive.

    Raises:
        UserError: a path does not exist, is a pipe or the like, or is a folder without files.
    """
    folders: dict[int, list[tuple[Path, str]]] = {}
    files: dict[int, tuple[Path, str]] = {}
    for number, path in enumerate(map(Path, paths)):
        if not is_folder(path):
            check_regular(path)
            files[number] = (path, path.name)
            continue
        # Sorted as paths: the files of a folder before those of folders whose names begin with it.
        found = sorted(find_files(path).ending_in(INPUTS))
        if not found:
            raise UserError(f"the folder {path} holds no images or arrays ({', '.join(INPUTS)})")
        folders[number] = [(file, file.relative_to(path).as_posix()) for file in found]
    names = [name for part in folders.values() for _, name in part]
    if len(set(names)) < len(names):
        places = {number: os.path.abspath(paths[number]) for number in folders}  # noqa: PTH100
        common = os.path.commonpath(places.values())
        for number, part in folders.items():
            prefix = Path(places[number]).relative_to(common)
            folders[number] = [(file, (prefix / name).as_posix()) for file, name in part]
    return [
        pair
        for number in range(len(paths))
        for pair in (folders[number] if number in folders else [files[number]])
    ]


class _Reader:
    """Reads the files that fit a model.

    Args:
        grid: the arrays that the model takes.
    """

    def __init__(self, grid: Grid):
        self.grid = grid
        self.room = MOST_VALUES

    def read(self, path: Path, name: str) -> list[Item]:
        """Return the items of a file.

        Raises:
            UserError: the file is missing, or does not fit the model.
            ImageError: the file is damaged, or is an image that cannot be restored exactly.
        """
        try:
            if path.suffix.lower() not in (".npy", ".npz"):
                return [self._image(path, name)]
            kind = path.suffix.lower()[1:]
            return [
                Item(
                    f"{name}/{array.key}" if kind == "npz" else name,
                    kind,
                    len(array.levels),
                    array.dtype.name,
                    array.shape,
                    array.key,
                    values=array.levels,
                )
                for array in read_arrays(path, self.grid, self.reserve)
            ]
        except (UserError, ImageError, MemoryError):
            raise
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; check the path") from error
        # zipfile and its decoders raise errors of any kind for damaged files.
        except Exception as error:
            reason = one_line(error, 80)
            raise ImageError(f"it cannot be read as an image or array: {reason}") from error

    def reserve(self, values: int) -> None:
        """Count values before they are read.

        Raises:
            UserError: they do not fit into one archive.
        """
        self.room -= values
        if self.room < 0:
            raise UserError(
                f"the inputs hold more than {MOST_VALUES:,} values; compress them in several parts"
            )

    def _image(self, path: Path, name: str) -> Item:
        if self.grid.num_values != 256:
            raise UserError(
                f"{path}: image files have 256 values per pixel but the model"
                f" {self.grid.num_values}; give whole numbers in a .npy file"
            )
        data = path.read_bytes()
        with open_image(data) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ImageError("it has several frames; only single images can be compressed")
            if image.mode not in ("L", "RGB"):
                raise ImageError(
                    f"it has mode {image.mode}; only gray (L) and RGB images of 8 bits can be"
                    " restored exactly"
                )
            if image.has_transparency_data:
                raise ImageError("it has a transparent color, which cannot be restored")
            if has_hidden_channels(image):
                raise ImageError("it has more channels than can be restored")
            width, height = upright_size(image)
            bands, event = len(image.getbands()), self.grid.event_shape
            if len(event) != 3 or event[0] not in (1, 3):
                raise UserError(
                    f"{path} is an image, but the model requires arrays of shape {event}; give a"
                    " .npy file"
                )
            if bands > event[0]:
                raise UserError(
                    f"{path} is an image in color, but the model requires gray images; convert it"
                )
            tile = (event[1], event[2])
            self.reserve(math.prod(layout(height, width, tile)) * math.prod(event))
            if image.format == "PNG":
                check_png(data)
            # Turned upright, because the restored image has no EXIF data.
            pixels, mode = np.asarray(upright(image)), image.mode
        values = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        values = np.broadcast_to(values, (event[0], *values.shape[1:]))
        # The file photo.jpg is restored as photo.jpg.png.
        output = name if PurePosixPath(name).suffix.lower() == ".png" else f"{name}.png"
        levels, shape = cut(values, tile), () if values.shape == event else values.shape
        return Item(output, "image", len(levels), shape=shape, mode=mode, values=levels)


def check_lengths(item: Item) -> None:
    """Check that a file system can hold the name of an item's file.

    Raises:
        UserError: a part of the name is longer than 255 bytes.
    """
    for part in item.place.split("/"):
        size = len(os.fsencode(part))
        if size > _LONGEST_PART:
            raise UserError(
                f"{describe_value(part)} would be restored under a name of {size} bytes, more than"
                f" the {_LONGEST_PART} bytes that file systems take; rename it"
            )
