r"""A folder of image files, with or without one subfolder per class.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

Subfolders ``train`` and ``test`` are the splits; without them, a fixed split is drawn class by
class. Files are sorted by name, so the split does not depend on the file system.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ndm.data.images import EncodedImages, check_image_arguments, describe_size, encoded
from ndm.data.source import DataSource, Loaded
from ndm.data.splits import check_classes, check_split_arguments, describe_split, draw_split
from ndm.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
"""Suffixes of image files, in upper or lower case; other files are ignored."""


class FileImages(EncodedImages):
    """A split of image files.

    Args:
        files: one file per example.
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
        size: crop every image to its center square and scale it to this side. By default images
            keep their size, which must be the same for all.
        test_fraction: fraction of each class in the test split, if the folder has no ``train`` and
            ``test``.
        seed: seed of that split.
        class_folders: whether each subfolder is a class. By default it is if every image lies
            directly in a subfolder.
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
        roots = _split_folders(folder)
        has_splits = "test" in roots
        files = {split: some_image_files(root) for split, root in roots.items()}
        ignored = _describe_ignored(folder, files)
        by_class = self._is_by_class(roots, files)
        classes: list[str] = []
        labels = {split: np.zeros(len(part), dtype=int) for split, part in files.items()}
        if by_class:
            classes = sorted({place.name for root in roots.values() for place in _subfolders(root)})
            for split, root in roots.items():
                names = [file.relative_to(root).parts[0] for file in files[split]]
                labels[split] = np.array([classes.index(name) for name in names])
            check_classes(
                labels if has_splits else {"all images": labels["train"]},
                classes,
                str(folder),
                "fill or remove the subfolders of that name, or give class_folders=False",
            )
        drawn = "own train and test folders"
        if not has_splits:
            parts = draw_split(labels["train"], classes, str(folder), self.test_fraction, self.seed)
            images, indices = files["train"], labels["train"]
            files = {split: [images[index] for index in part] for split, part in parts.items()}
            labels = {split: indices[part] for split, part in parts.items()}
            drawn = "stratified " if by_class else ""
            drawn += describe_split(self.test_fraction, self.seed)
        splits = {}
        for split in ("train", "test"):
            of_split = labels[split] if by_class else None
            splits[split] = FileImages(files[split], self.channels, self.size, of_split)
        version = f"image folder, {drawn}{describe_size(self.size)}{ignored}"
        return encoded(folder.resolve().name, version, splits, classes)

    def _is_by_class(self, roots: Mapping[str, Path], files: Mapping[str, Sequence[Path]]) -> bool:
        """Return whether the subfolders are classes.

        Raises:
            UserError: they are declared to be, but an image lies next to them.
        """
        depths = {
            len(file.relative_to(roots[split]).parts) for split in roots for file in files[split]
        }
        by_class = depths == {2} if self.class_folders is None else self.class_folders
        if by_class and 1 in depths:
            stray = next(
                file for split in roots for file in files[split] if file.parent == roots[split]
            )
            raise UserError(
                f"{stray} lies next to the class subfolders; move it into one, or give"
                " class_folders=False"
            )
        return by_class


def image_files(root: Path) -> list[Path]:
    """Return the image files under a folder, sorted by name, without hidden files."""
    files = [
        file
        for file in root.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    ]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def some_image_files(root: Path) -> list[Path]:
    """Return :func:`image_files` of a folder that must have some.

    Raises:
        UserError: it has none.
    """
    files = image_files(root)
    if not files:
        raise UserError(
            f"{root} has no images; give a folder of files that end in {' '.join(SUFFIXES)}, in"
            " subfolders or not"
        )
    return files


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders ``train`` and ``test`` if they exist, otherwise the folder as ``train``.

    Raises:
        UserError: only one of them exists.
    """
    roots = {split: folder / split for split in ("train", "test") if (folder / split).is_dir()}
    if len(roots) == 1:
        (found,) = roots
        raise UserError(
            f"{folder} has a subfolder {found} but not both train and test; add the other, or give"
            f" path= to {found}"
        )
    return roots or {"train": folder}


def _describe_ignored(folder: Path, files: Mapping[str, Sequence[Path]]) -> str:
    """Count the visible files that are not examples, for a description's version."""
    examples = {file for part in files.values() for file in part}
    count = sum(
        path not in examples
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        for path in folder.rglob("*")
    )
    if not count:
        return ""
    return f", {count} other file{'s' if count > 1 else ''} ignored"


def _subfolders(root: Path) -> list[Path]:
    return [
        folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    ]
