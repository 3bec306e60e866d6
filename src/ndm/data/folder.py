r"""A folder of image files, with or without one subfolder per class.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

Subfolders named like splits (``train`` and ``test``, ``Training``, ``val``, ``seg_train``) are the
splits; without them, a fixed split is drawn class by class. Files are sorted by name, so the split
does not depend on the file system. Hidden files and folders are skipped, links followed.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path

import numpy as np

from ndm.data.conditioned import paired
from ndm.data.crops import CropKind, Cropping, make_cropping
from ndm.data.files import (
    Files,
    check_disjoint,
    check_no_splits,
    describe_ignored,
    find_files,
    find_splits,
    is_folder,
)
from ndm.data.images import EncodedImages, OnError, check_image_arguments, describe_size, encoded
from ndm.data.source import DataSource, Loaded
from ndm.data.splits import check_classes, check_split_arguments, describe_split, draw_split
from ndm.errors import UserError, describe_value

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
"""Suffixes of image files, in upper or lower case; other files are ignored."""


class FileImages(EncodedImages):
    """A split of image files.

    Args:
        files: one file per example.
        channels: 1 for gray, 3 for color.
        size: side of the center square, or None.
        labels: class index of each example, or None.
        root: the folder of the files, below which they have their names.
        cropping: how examples are cropped from the images, or None.
    """

    def __init__(
        self,
        files: Sequence[Path],
        channels: int,
        size: int | None,
        labels: np.ndarray | None,
        root: Path | None = None,
        cropping: Cropping | None = None,
    ):
        super().__init__(channels, size, labels, cropping)
        self.files, self.root = list(files), root

    def __len__(self) -> int:
        return len(self.files)

    def where(self, index: int) -> str:
        return str(self.files[index])

    def name_of(self, index: int) -> str:
        file = self.files[index]
        return file.relative_to(self.root).as_posix() if self.root else str(file)

    def read(self, index: int) -> bytes:
        return self.files[index].read_bytes()

    def without(self, indices: Collection[int]) -> "FileImages":
        left_out = set(indices)
        rest = [index for index in range(len(self)) if index not in left_out]
        labels = None if self.labels is None else self.labels[rest].numpy()
        files = [self.files[index] for index in rest]
        return FileImages(files, self.channels, self.size, labels, self.root, self.cropping)


class ImageFolder(DataSource):
    """Image files of a folder, ``(channels, height, width)``, 256 values, decoded when needed.

    Args:
        path: the folder.
        channels: 1 for gray, 3 for color; images are converted.
        size: crop every image to its center square and scale it to this side, or with ``crop`` the
            side of the crops. By default images keep their size, which must be the same for all.
        crop: take crops of images of any size instead of scaling them: ``center``, ``grid`` or
            ``random`` (:mod:`ndm.data.crops`).
        average: side of the blocks of pixels to average before cropping, 2 or 4 for photographs
            that were JPEG files.
        test_fraction: fraction of each class in the test split, if the folder has no ``train`` and
            ``test``.
        seed: seed of that split.
        class_folders: whether each subfolder is a class. By default it is if every image lies
            directly in a subfolder.
        splits: name of each split -> the subfolder that holds it, for example ``{train: training,
            test: validation}``; ``{}`` if no subfolder is a split. By default the subfolders that
            are named like splits; ``val`` is the split ``validation``.
        on_error: raise an error for images that cannot be used, or skip them; the description names
            those that are skipped, and they enter its checksum.
        condition: another folder with an image of the same name and size for each image, which is
            known of it: for a model of the images given these.
        condition_channels: 1 if those are gray, 3 if they are in color; by default ``channels``.
    """

    def __init__(
        self,
        path: str,
        channels: int = 3,
        size: int | None = None,
        crop: CropKind | None = None,
        average: int = 1,
        test_fraction: float = 0.2,
        seed: int = 0,
        class_folders: bool | None = None,
        splits: Mapping[str, str] | None = None,
        on_error: OnError = "raise",
        condition: str | None = None,
        condition_channels: int | None = None,
    ):
        check_image_arguments(channels, size, on_error)
        if condition == "":
            raise UserError("condition='': give the folder of the known images, or leave it out")
        if condition_channels is not None and condition is None:
            raise UserError("condition_channels= needs condition=, the folder of the known images")
        if condition is not None and on_error != "raise":
            raise UserError("on_error=skip would separate pairs: leave it out with condition=")
        if condition_channels is not None:
            check_image_arguments(condition_channels, size, on_error)
        self.cropping = make_cropping(crop, size, average)
        check_split_arguments(test_fraction, seed)
        if splits and (
            "train" not in splits or not all(isinstance(name, str) for name in splits.values())
        ):
            raise UserError(
                f"splits={describe_value(splits)}: give a mapping from train and other splits to"
                " subfolders, {} for no split folders, or leave it out"
            )
        self.path = path
        self.channels = channels
        self.size = size
        self.crop = crop
        self.average = average
        self.test_fraction = test_fraction
        self.seed = seed
        self.class_folders = class_folders
        self.splits = splits
        self.on_error = on_error
        self.condition = condition
        self.condition_channels = condition_channels

    def load(self) -> Loaded:
        if self.condition is None:
            return self._load()
        other = copy(self)
        other.path, other.channels = self.condition, self.condition_channels or self.channels
        return paired(self._load(), other._load(), self.condition)

    def _load(self) -> Loaded:
        folder = Path(self.path)
        if not is_folder(folder):
            raise UserError(
                f"path={describe_value(self.path)} is not a folder; give the folder of the images"
            )
        own = find_splits(folder, self.splits)
        roots = {split: folder / name for split, name in own.items()} or {"train": folder}
        trees = {split: find_files(root) for split, root in roots.items()}
        check_disjoint(trees)
        files = {split: _images_of(tree) for split, tree in trees.items()}
        if self.splits is None and not own:
            relative = [file.relative_to(folder).as_posix() for file in files["train"]]
            check_no_splits(folder, relative, "give path= to their parent, or splits={}")
        ignored = _describe_ignored(folder, files, trees)
        labels, classes = self._labels(folder, files, trees)
        if own:
            *first, last = own.values()
            others = f"{', '.join(first)} and " if first else ""
            drawn = f"own {others}{last} folders"
        else:
            drawn = "stratified " if classes else ""
            drawn += describe_split(self.test_fraction, self.seed)
            parts = draw_split(labels["train"], classes, str(folder), self.test_fraction, self.seed)
            images, indices = files["train"], labels["train"]
            files = {split: [images[index] for index in part] for split, part in parts.items()}
            labels = {split: indices[part] for split, part in parts.items()}
        splits = {
            split: FileImages(
                part,
                self.channels,
                self.size if self.cropping is None else None,
                labels[split] if classes else None,
                folder,
                self.cropping,
            )
            for split, part in files.items()
        }
        kept = describe_size(self.size) if self.cropping is None else self.cropping.describe()
        version = f"image folder, {drawn}{kept}{ignored}"
        name = folder.resolve().name
        return encoded(name, version, splits, classes, on_error=self.on_error)

    def _labels(
        self, folder: Path, files: Mapping[str, Sequence[Path]], trees: Mapping[str, Files]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the class index of each file of each split, and the classes if there are any.

        Raises:
            UserError: a class has no image in a split.
        """
        labels = {split: np.zeros(len(part), dtype=int) for split, part in files.items()}
        roots = {split: tree.root for split, tree in trees.items()}
        if not self._is_by_class(roots, files):
            return labels, []
        classes = sorted(
            {name for tree in trees.values() for name in tree.folders if "/" not in name}
        )
        for split, root in roots.items():
            names = [file.relative_to(root).parts[0] for file in files[split]]
            labels[split] = np.array([classes.index(name) for name in names])
        check_classes(
            {"all images": labels["train"]} if roots == {"train": folder} else labels,
            classes,
            str(folder),
            "fill or remove the subfolders of that name, or give class_folders=False",
        )
        return labels, classes

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
    """Return the image files under a folder, sorted by name; see :func:`find_files`."""
    return find_files(root).ending_in(SUFFIXES)


def some_image_files(root: Path) -> list[Path]:
    """Return :func:`image_files` of a folder that must have some.

    Raises:
        UserError: it has none.
    """
    return _images_of(find_files(root))


def _images_of(tree: Files) -> list[Path]:
    files = tree.ending_in(SUFFIXES)
    if not files:
        raise UserError(
            f"{tree.root} has no images; give a folder of files that end in {' '.join(SUFFIXES)},"
            " in subfolders or not"
        )
    return files


def _describe_ignored(
    folder: Path, files: Mapping[str, Sequence[Path]], trees: Mapping[str, Files]
) -> str:
    """Count the visible files that are not examples, for a description's version."""
    used = {os.path.realpath(tree.root) for tree in trees.values()}
    others = sum(len(tree.names) + tree.others - len(files[split]) for split, tree in trees.items())
    repeated = sum(tree.repeated for tree in trees.values())
    if os.path.realpath(folder) not in used:
        known = {place for tree in trees.values() for place in tree.places}
        rest = find_files(folder, known)
        others += len(rest.names) + rest.others
    return describe_ignored(others, repeated)
