r"""MNIST and its relatives from the original IDX files.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

An IDX file holds a magic number (2051 for images, 2049 for labels), the sizes as big-endian 32-bit
integers, then one byte per value. Source of the format: yann.lecun.com/exdb/mnist. Fashion-MNIST,
KMNIST and EMNIST (with its files renamed) use the same format.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ndm.data.arrays import discrete
from ndm.data.source import DataSource, Loaded
from ndm.data.splits import check_classes
from ndm.errors import UserError, check_whole, describe_value

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""Split -> names of the image and label files, to which ``.gz`` may be appended."""


class MNIST(DataSource):
    """Images of the original IDX files, ``(1, height, width)``, 256 values, split as in the files.

    Args:
        path: folder of the four files; its name becomes the name of the data.
        classes: the labels to use, each of which must occur in both splits. By default the labels
            must be 0 ... 9, all present.
        limit_train: number of train images to use, from the first on; all by default. The classes
            are checked before the others are dropped.
    """

    def __init__(
        self, path: str, classes: Sequence[int] | None = None, limit_train: int | None = None
    ):
        if classes is not None and (
            not classes or len(set(classes)) < len(classes) or not set(classes) <= set(range(256))
        ):
            raise UserError(
                f"classes={describe_value(classes)}: give different labels from 0 to 255, or leave"
                " it out for 0 to 9"
            )
        if limit_train is not None:
            check_whole("limit_train", limit_train, 1)
        self.path = path
        self.classes = classes
        self.limit_train = limit_train

    def load(self) -> Loaded:
        folder = Path(self.path)
        classes = list(range(10)) if self.classes is None else list(self.classes)
        names, arrays, labels = [str(label) for label in classes], {}, {}
        for split, files in FILES.items():
            images, values = self._read(*(_find(folder, file) for file in files))
            chosen = np.isin(values, classes)
            arrays[split] = images[chosen][:, None]
            labels[split] = np.searchsorted(np.sort(classes), values[chosen])
            labels[split] = np.argsort(classes)[labels[split]]
        advice = "complete the files, or choose the labels to use with classes="
        check_classes(labels, names, str(folder), advice)
        if arrays["train"].shape[1:] != arrays["test"].shape[1:]:
            sizes = " and ".join(
                f"{split} {array.shape[2]} x {array.shape[3]}" for split, array in arrays.items()
            )
            raise UserError(
                f"{folder}: images differ in size: {sizes} (height x width); use files of one"
                " release"
            )
        version = "IDX files" + ("" if self.classes is None else ", labels " + " ".join(names))
        if self.limit_train is not None:
            have = len(arrays["train"])
            if self.limit_train > have:
                raise UserError(
                    f"limit_train={self.limit_train}: {folder} has {have} train images; give at"
                    f" most {have}"
                )
            arrays["train"] = arrays["train"][: self.limit_train]
            labels["train"] = labels["train"][: self.limit_train]
            version += f", first {self.limit_train} of train"
        name = folder.resolve().name
        return discrete(name, version, arrays, 256, labels=labels, classes=names)

    def _read(self, image_file: Path, label_file: Path) -> tuple[np.ndarray, np.ndarray]:
        """Read the images and labels of a split, and check that they match.

        Raises:
            UserError: they differ in number, or a label is not in 0 ... 9 without ``classes``.
        """
        images, labels = _read_idx(image_file, 2051), _read_idx(label_file, 2049)
        if len(images) != len(labels):
            raise UserError(
                f"{image_file} holds {len(images)} images but {label_file} holds {len(labels)}"
                " labels; use files of one release"
            )
        outside = labels > 9
        if self.classes is None and outside.any():
            row = int(outside.argmax())
            raise UserError(
                f"{label_file}: label {row} is {labels[row]}, allowed are 0 to 9; choose the labels"
                " to use with classes="
            )
        return images, labels


def _find(folder: Path, name: str) -> Path:
    """Return the path of a file, plain or gzipped."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    expected = ", ".join(file for files in FILES.values() for file in files)
    raise UserError(
        f"{folder} has no {name} or {name}.gz; give the folder of the four files {expected}, each"
        " plain or gzipped"
    )


def _read_idx(file: Path, magic: int) -> np.ndarray:
    """Read the bytes of an IDX file in the shape that its header declares.

    No more is read than the header declares, and nothing if the file is too small for it.
    """
    rank = magic % 256
    size = 4 * (1 + rank)
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            header = stream.read(size)
            if len(header) < size:
                raise UserError(
                    f"{file} is truncated: it ends inside its header, after {len(header)} bytes;"
                    " download it again"
                )
            found, *sizes = struct.unpack(f">{1 + rank}I", header)
            if found != magic:
                word = "images" if magic == 2051 else "labels"
                raise UserError(
                    f"{file} begins with the magic number {found}, but IDX {word} begin with"
                    f" {magic}; check the names of the files"
                )
            count = math.prod(sizes)
            # No byte of a gzip file holds more than 1,032.
            fits = count <= 1032 * file.stat().st_size
            data = stream.read(count + 1) if fits else b""
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read or is damaged ({' '.join(str(error).split())}); download it"
            " again"
        ) from error
    if len(data) != count:
        shape = " x ".join(str(size) for size in sizes)
        follow = f"{len(data)} follow" if len(data) < count else "more follow"
        raise UserError(
            f"{file} is truncated or damaged: its header declares {shape} bytes, but"
            f" {follow if fits else 'fewer follow'}; download it again"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(sizes)
