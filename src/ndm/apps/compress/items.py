"""Conversion of images, folders of images, ``.npy`` and ``.npz`` arrays to levels and back."""

import itertools
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ndm.data.folder import SUFFIXES
from ndm.data.images import upright
from ndm.errors import UserError, describe_value

KINDS = ("image", "npy", "npz")
_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_LONGEST_NAME = 1000


@dataclass(frozen=True)
class Item:
    """A file, or an array in an ``.npz`` file."""

    name: str
    """Path below the output folder, with ``/`` between folders."""
    kind: str
    """``image``, ``npy`` or ``npz``."""
    count: int
    """Number of images."""
    dtype: str = "uint8"
    """dtype of the array."""
    shape: tuple[int, ...] = ()
    """Shape of the array."""
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
        fields: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v
            for name, v in values.items()
            if name != "values"
        }
        item = cls(**fields)
        strings = (item.name, item.kind, item.dtype, item.key, item.mode)
        are_strings = all(isinstance(text, str) for text in strings)
        if not are_strings or item.kind not in KINDS or item.dtype not in _DTYPES:
            raise ValueError("an item is damaged")
        are_sizes = all(
            isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**40
            for size in (item.count, *item.shape)
        )
        if not are_sizes or not item.count:
            raise ValueError("a size is out of range")
        if item.kind == "npz" and not (item.key and item.name.endswith(f"/{item.key}")):
            raise ValueError("an array has no name")
        item.check_name()
        return item

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
    """Read files and folders of files.

    Args:
        paths: images, folders of images, ``.npy``, ``.npz``.
        event_shape: shape of one image in the model.
        num_values: number of values of a pixel.
        low: least value of a pixel.

    Raises:
        UserError: a file is missing, cannot be read, or does not fit the model.
    """
    items: list[Item] = []
    for text in paths:
        path = Path(text)
        if path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.is_file() and file.suffix.lower() in (*SUFFIXES, ".npy", ".npz")
            )
            if not found:
                raise UserError(
                    f"the folder {path} holds no images or arrays"
                    f" ({', '.join((*SUFFIXES, '.npy', '.npz'))})"
                )
            for file in found:
                name = file.relative_to(path).as_posix()
                items += _read_file(file, name, event_shape, num_values, low)
        else:
            items += _read_file(path, path.name, event_shape, num_values, low)
    for item in items:
        try:
            item.check_name()
        except ValueError as error:
            raise UserError(f"{describe_value(item.name)}: {error}; rename it") from error
    names = sorted(item.name for item in items)
    for name, following in itertools.pairwise(names):
        if name == following:
            raise UserError(
                f"{name} would be written twice; give files with different names, or a folder that"
                " contains them"
            )
    return items


def _read_file(
    path: Path, name: str, event_shape: tuple[int, ...], num_values: int, low: int
) -> list[Item]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            return [_array_item(path, name, "npy", "", array, event_shape, num_values, low)]
        if suffix == ".npz":
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                if not file.files or {"file", "allow_pickle"} & set(file.files):
                    raise UserError(
                        f"{path} holds no arrays, or one with a name that NumPy cannot write (file,"
                        " allow_pickle); rename it"
                    )
                return [
                    _array_item(
                        path, f"{name}/{key}", "npz", key, file[key], event_shape, num_values, low
                    )
                    for key in file.files
                ]
        return [_image_item(path, name, event_shape, num_values)]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        UnidentifiedImageError,
        SyntaxError,
        Image.DecompressionBombError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(
            f"{path} cannot be read as an image or array ({' '.join(str(error).split())[:80]});"
            " replace or remove it"
        ) from error


def _image_item(path: Path, name: str, event_shape: tuple[int, ...], num_values: int) -> Item:
    if num_values != 256:
        raise UserError(
            f"{path}: image files have 256 values per pixel but the model {num_values}; give whole"
            " numbers in a .npy file"
        )
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"{path} has several frames; only single images can be compressed")
        if image.mode not in ("L", "RGB"):
            raise UserError(
                f"{path} has mode {image.mode}; only gray (L) and RGB images of 8 bits can be"
                " restored exactly, so convert it first"
            )
        # Turned upright, because the restored image has no EXIF data.
        pixels, mode = np.asarray(upright(image)), image.mode
    events = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
    if events.shape != event_shape:
        raise UserError(
            f"{path} is an image of shape {events.shape} (channels, height, width), but the model"
            f" requires {event_shape}"
        )
    # The file photo.jpg is restored as photo.jpg.png.
    output = name if PurePosixPath(name).suffix.lower() == ".png" else f"{name}.png"
    return Item(output, "image", 1, mode=mode, values=events.reshape(1, -1).astype(np.int64))


def _array_item(
    path: Path,
    name: str,
    kind: str,
    key: str,
    array: np.ndarray,
    event_shape: tuple[int, ...],
    num_values: int,
    low: int,
) -> Item:
    if array.dtype.name not in _DTYPES:
        raise UserError(
            f"{path}: the array has dtype {array.dtype}; give whole numbers from {low} to"
            f" {low + num_values - 1}"
        )
    plain = event_shape[1:] if len(event_shape) == 3 and event_shape[0] == 1 else event_shape
    fits = any(shape in (array.shape, array.shape[1:]) for shape in (event_shape, plain))
    if not fits or not array.size:
        raise UserError(
            f"{path}: the array has shape {array.shape}; the model requires (N,"
            f" {', '.join(map(str, event_shape))})"
        )
    rows = array.reshape(-1, int(np.prod(event_shape)))
    outside = rows[(rows < low) | (rows > low + num_values - 1)]
    if outside.size:
        raise UserError(
            f"{path}: the value {describe_value(outside.flat[0].item())} is not among the model's"
            f" {low} to {low + num_values - 1}"
        )
    levels = rows.astype(np.int64) - low
    return Item(name, kind, len(rows), array.dtype.name, array.shape, key, values=levels)


def check_places(items: Sequence[Item], folder: Path) -> list[str]:
    """Return the output files of items, below a folder, and check that none exists.

    Raises:
        UserError: one exists already.
    """
    places = list(dict.fromkeys(item.place for item in items))
    for place in places:
        if (folder / place).exists():
            raise UserError(f"{folder / place} exists already; choose another folder")
    return places


def write_items(
    items: Sequence[Item], index: np.ndarray, event_shape: tuple[int, ...], low: int, folder: Path
) -> list[Path]:
    """Write all files into a folder, or none if one of them fails.

    Args:
        items: descriptions in the order of the images.
        index: levels of all images, ``(N, D)``.
        event_shape: shape of one image.
        low: least value of a pixel.
        folder: the output folder, created if missing.

    Returns:
        The paths of the files.

    Raises:
        UserError: a file exists already, or cannot be written.
        ValueError: the descriptions do not fit the images.
    """
    places = check_places(items, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
            temporary, start = Path(name), 0
            archives: dict[str, dict[str, np.ndarray]] = {}
            for item in items:
                rows = index[start : start + item.count]
                start += item.count
                (temporary / item.place).parent.mkdir(parents=True, exist_ok=True)
                if item.kind == "image":
                    _write_image(temporary / item.place, rows, event_shape, item.mode)
                    continue
                array = (rows.astype(np.int64) + low).reshape(item.shape).astype(item.dtype)
                if item.kind == "npy":
                    _save(temporary / item.place, array)
                else:
                    archives.setdefault(item.place, {})[item.key] = array
            for place, arrays in archives.items():
                with (temporary / place).open("wb") as file:
                    np.savez_compressed(file, allow_pickle=False, **arrays)
            _move(temporary, folder, places)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
    return [folder / place for place in places]


def _move(source: Path, target: Path, places: Sequence[str]) -> None:
    """Move files from one folder to another; if one fails, delete those already moved."""
    moved: list[Path] = []
    try:
        for place in places:
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            (source / place).replace(target / place)
            moved.append(target / place)
    except OSError:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _write_image(path: Path, rows: np.ndarray, event_shape: tuple[int, ...], mode: str) -> None:
    pixels = rows.reshape(event_shape).astype(np.uint8)
    channels = {"L": 1, "RGB": 3}.get(mode)
    if pixels.ndim != 3 or pixels.shape[0] != channels:
        raise ValueError("an image does not have the shape of its mode")
    image = Image.fromarray(pixels[0] if mode == "L" else pixels.transpose(1, 2, 0))
    image.save(path, format="PNG", optimize=True)
