r"""Data sets of the Hugging Face hub, or local folders in its formats (Parquet, CSV, images).

.. math::
    \text{images: } x = (2k + 1)/256 - 1, \qquad
    \text{columns of numbers: } x_i = (v_i - b_i)/a_i .

Requires the extra ``hub``. The checksum covers the encoded images or the values of the columns, so
it does not depend on caches or library versions. Images are decoded when needed.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ndm.data.arrays import check_values, continuous
from ndm.data.arrow import arrow_columns
from ndm.data.files import is_folder
from ndm.data.images import EncodedImages, OnError, check_image_arguments, describe_size, encoded
from ndm.data.source import DataSource, Loaded
from ndm.data.splits import check_classes
from ndm.errors import UserError, describe_value, one_line, require


class ColumnImages(EncodedImages):
    """A split of images in a column of a data set.

    Args:
        dataset: a ``datasets.Dataset`` with one column, of undecoded images.
        name: name of the data set and split, for messages.
        channels: 1 for gray, 3 for color.
        size: side of the center square, or None.
        labels: class index of each example, or None.
    """

    def __init__(
        self, dataset: Any, name: str, channels: int, size: int | None, labels: np.ndarray | None
    ):
        super().__init__(channels, size, labels)
        self.dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, index: int) -> str:
        return f"{self.name}: image {index}"

    def name_of(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        (image,) = self.dataset[index].values()
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise OSError("it is empty")
        if image["bytes"] is not None:
            return image["bytes"]
        file = Path(image["path"])
        if file.exists() and not file.is_file():
            raise OSError("it is not a regular file")
        return file.read_bytes()

    def without(self, indices: Collection[int]) -> "ColumnImages":
        left_out = set(indices)
        rest = [index for index in range(len(self)) if index not in left_out]
        labels = None if self.labels is None else self.labels[rest].numpy()
        return ColumnImages(self.dataset.select(rest), self.name, self.channels, self.size, labels)


class HuggingFace(DataSource):
    """A data set of the hub: a column of images or columns of numbers.

    Images are ``(channels, height, width)`` with 256 values; n columns of numbers are ``(n,)``.

    Args:
        name: name of the data set on the hub (``owner/name``), or a local folder.
        image_column: the column of images; None with ``columns``.
        columns: columns of numbers, treated as continuous and standardized by the train split.
        config: configuration of the data set, if it has several.
        revision: commit, tag or branch on the hub; a commit pins the data.
        splits: name of each split here -> its name in the data set; by default ``train`` and
            ``test`` under the same names.
        channels: 1 for gray, 3 for color; images are converted.
        size: crop every image to its center square and scale it to this side. By default images
            keep their size, which must be the same for all.
        label_column: column of the classes, each of which must occur in every split. By default
            the data have no classes.
        on_error: raise an error for images that cannot be used, or skip them; the description names
            those that are skipped, and they enter its checksum.
    """

    def __init__(
        self,
        name: str,
        image_column: str | None = "image",
        columns: Sequence[str] | None = None,
        config: str | None = None,
        revision: str | None = None,
        splits: Mapping[str, str] | None = None,
        channels: int = 3,
        size: int | None = None,
        label_column: str | None = None,
        on_error: OnError = "raise",
    ):
        check_image_arguments(channels, size, on_error)
        if (image_column is None) == (not columns) or isinstance(columns, str):
            raise UserError(
                f"image_column={describe_value(image_column)} and"
                f" columns={describe_value(columns)}: give the name of one column of images, or a"
                " list of columns of numbers and image_column=None"
            )
        if splits is not None and (not splits or "train" not in splits):
            example = {"train": "train", "test": "test"}
            raise UserError(
                f"splits={describe_value(splits)}: give a mapping that contains 'train', for"
                f" example {example}"
            )
        self.name = name
        self.image_column = image_column
        self.columns = columns
        self.config = config
        self.revision = revision
        self.splits = splits
        self.channels = channels
        self.size = size
        self.label_column = label_column
        self.on_error = on_error

    def load(self) -> Loaded:
        require("datasets", "datasets", "hub")
        import datasets

        tables = self._tables(datasets)
        name = Path(self.name).resolve().name if is_folder(self.name) else self.name
        version = "" if self.config is None else f"config {self.config}, "
        version += f"revision {self.revision or 'not pinned'}"
        labels, classes = self._labels(tables, datasets) if self.label_column else ({}, [])
        if self.columns:
            arrays = self._numbers(tables, self.columns)
            version += f", columns {' '.join(self.columns)}"
            return continuous(name, version, arrays, True, dimension_names=list(self.columns))
        splits = {}
        for split, table in tables.items():
            images = self._images(table, datasets)
            where = f"{self.name}: split {split!r}"
            splits[split] = ColumnImages(images, where, self.channels, self.size, labels.get(split))
        version += describe_size(self.size)
        return encoded(name, version, splits, classes, on_error=self.on_error)

    def _numbers(self, tables: Mapping[str, Any], columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the columns of numbers of each split, ``(N, D)``."""
        arrays = {}
        for split, table in tables.items():
            where = f"{self.name}: split {split!r}"
            chosen = table.select_columns(list(columns)).with_format("arrow")[:]
            arrays[split], names = arrow_columns(chosen, columns, where)
            check_values(arrays[split], where, names)
        return arrays

    def _images(self, table: Any, datasets: Any) -> Any:
        """Return the column of undecoded images of one split."""
        try:
            return table.select_columns([self.image_column]).cast_column(
                self.image_column, datasets.Image(decode=False)
            )
        except (ValueError, TypeError, NotImplementedError) as error:  # includes Arrow's errors
            kind = describe_value(table.features[self.image_column])
            raise UserError(
                f"{self.name}: column {self.image_column!r} holds {kind}, not images; choose"
                " another with image_column="
            ) from error

    def _tables(self, datasets: Any) -> dict[str, Any]:
        """Load each split as a ``datasets.Dataset``; check its columns and that it is not empty."""
        tables: dict[str, Any] = {}
        for split, theirs in (self.splits or {"train": "train", "test": "test"}).items():
            try:
                tables[split] = datasets.load_dataset(
                    self.name, self.config, split=theirs, revision=self.revision
                )
            # The client raises errors of many libraries, all about names, network or files.
            except Exception as error:
                text = one_line(f"{type(error).__name__}: {error}")
                raise UserError(
                    f"split {theirs!r} of data set {self.name!r} cannot be loaded; check name,"
                    f" config, revision and splits, and the network ({text[:300]})"
                ) from error
        needed = (self.image_column, *(self.columns or ()), self.label_column)
        for split, table in tables.items():
            for column in needed:
                if column is not None and column not in table.column_names:
                    have = ", ".join(table.column_names)
                    raise UserError(
                        f"{self.name}: split {split!r} has no column {column!r}; its columns are:"
                        f" {have}"
                    )
            if len(table) == 0:
                raise UserError(
                    f"{self.name}: split {split!r} is empty; choose other splits with splits="
                )
        return tables

    def _labels(
        self, tables: Mapping[str, Any], datasets: Any
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return split -> class index of each example, and the classes.

        The classes are those that the column declares, otherwise those that occur.
        """
        column = str(self.label_column)
        values = {
            split: table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
            for split, table in tables.items()
        }
        feature = tables["train"].features[column]
        if isinstance(feature, datasets.ClassLabel):
            classes = list(feature.names)
            index_of = {index: index for index in range(len(classes))}
        else:
            found = sorted(
                {value for part in values.values() for value in part if value is not None}
            )
            classes = [str(value) for value in found]
            index_of = {value: index for index, value in enumerate(found)}
        for split, part in values.items():
            wrong = [row for row, value in enumerate(part) if value not in index_of]
            if wrong:
                raise UserError(
                    f"{self.name}: split {split!r}, row {wrong[0]} (the first is 0), column"
                    f" {column!r} holds {part[wrong[0]]!r}, which is not one of the"
                    f" {len(classes)} classes; choose another split, or leave label_column out"
                )
        indices = {
            split: np.array([index_of[value] for value in part]) for split, part in values.items()
        }
        advice = "choose other splits with splits=, or leave label_column out"
        check_classes(indices, classes, self.name, advice)
        return indices, classes
