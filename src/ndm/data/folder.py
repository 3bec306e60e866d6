r"""A folder of image files, with or without one subfolder a class.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

Subfolders ``train`` and ``test`` are the splits; without them, a fixed split is drawn, class by
class. Files are taken in the order of their names, so the split does not depend on the file system.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ndm.data.images import EncodedImages, check_image_arguments, encoded, size_words
from ndm.data.source import DataSource, Loaded
from ndm.data.splits import check_classes, check_split_arguments, draw_split, split_words
from ndm.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
"""Endings of the files taken for images, in either case; other files are ignored."""


class FileImages(EncodedImages):
    """A split of image files.

    Args:
        files: one file an example.
        channels: 1 for gray, 3 for color.
        size: side of the center square, or None.
        labels: class index of each example, or None.
    """

    def __init__(
        self, files: Sequence[Path], channels: int, size: int | None, labels: np.ndarray | None
    ):
        super().__init__(channels, size, labels)
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def where(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> bytes:
        return self.files[index].read_bytes()


class ImageFolder(DataSource):
    """Image files of a folder, ``(channels, height, width)``, 256 values, decoded when needed.

    Args:
        path: the folder.
        channels: 1 for gray, 3 for color; images are converted.
        size: cut every image to its center square and scale it to this side. When not given, all
            images must have one size.
        test_fraction: part of each class in the test split, when the folder has no ``train`` and
            ``test``.
        seed: of that split.
        class_folders: whether each subfolder is a class. When not given, it is if no image lies
            beside or below the subfolders.
    """

    def __init__(
        self,
        path: str,
        channels: int = 3,
        size: int | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        class_folders: bool | None = None,
    ):
        check_image_arguments(channels, size)
        check_split_arguments(test_fraction, seed)
        self.path = path
        self.channels = channels
        self.size = size
        self.test_fraction = test_fraction
        self.seed = seed
        self.class_folders = class_folders

    def load(self) -> Loaded:
        folder = Path(self.path)
        if not folder.is_dir():
            raise UserError(f"path={self.path!r} is not a directory; give the folder of the images")
        there = [split for split in ("train", "test") if (folder / split).is_dir()]
        if len(there) == 1:
            raise UserError(
                f"{folder} has a subfolder {there[0]} but not both train and test; add the other,"
                f" or give path= to {there[0]}"
            )
        has_splits = len(there) == 2
        roots = (
            {split: folder / split for split in ("train", "test")}
            if has_splits
            else {"train": folder}
        )
        files = {split: some_image_files(root) for split, root in roots.items()}
        depths = {
            len(file.relative_to(roots[split]).parts) for split in roots for file in files[split]
        }
        by_class = depths == {2} if self.class_folders is None else self.class_folders
        if by_class and 1 in depths:
            stray = next(
                file for split in roots for file in files[split] if file.parent == roots[split]
            )
            raise UserError(
                f"{stray} lies beside the class subfolders; move it into one, or give"
                " class_folders=False"
            )
        classes = (
            sorted({folder.name for root in roots.values() for folder in _subfolders(root)})
            if by_class
            else []
        )
        labels = {}
        for split, root in roots.items():
            names = [file.relative_to(root).parts[0] for file in files[split]] if by_class else []
            labels[split] = np.array(
                [classes.index(name) for name in names] or [0] * len(files[split])
            )
        if by_class:
            mend = "fill or remove the subfolders of that name, or give class_folders=False"
            check_classes(
                labels if has_splits else {"all images": labels["train"]},
                classes,
                str(folder),
                mend,
            )
        if not has_splits:
            parts = draw_split(labels["train"], classes, str(folder), self.test_fraction, self.seed)
            files = {
                split: [files["train"][index] for index in part] for split, part in parts.items()
            }
            labels = {split: labels["train"][part] for split, part in parts.items()}
        splits = {
            split: FileImages(
                files[split], self.channels, self.size, labels[split] if by_class else None
            )
            for split in ("train", "test")
        }
        drawn = ("stratified " if by_class else "") + split_words(self.test_fraction, self.seed)
        drawn = "own train and test folders" if has_splits else drawn
        return encoded(
            folder.resolve().name, f"image folder, {drawn}{size_words(self.size)}", splits, classes
        )


def image_files(root: Path) -> list[Path]:
    """The image files under a folder, in the order of their names; hidden ones and other files are
    left out.
    """
    files = [
        file
        for file in root.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    ]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def some_image_files(root: Path) -> list[Path]:
    """:func:`image_files`, if there are any.

    Raises:
        UserError: there are none.
    """
    files = image_files(root)
    if not files:
        raise UserError(
            f"{root} has no images; files ending in {' '.join(SUFFIXES)} are taken, in"
            " subfolders too"
        )
    return files


def _subfolders(root: Path) -> list[Path]:
    return [
        folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    ]
