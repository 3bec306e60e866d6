r"""What is known of each example: columns of a table, or another image.

Of a table some columns are x and others c, both standardized:

.. math::
    v = (v_x, v_c), \qquad x_i = (v_i - b_i)/a_i, \qquad c_j = (v_j - b_j)/a_j, \qquad
    -\log p(v_x|v_c) = -\log p(x|c) + \textstyle\sum_i \log a_i .

The whole table is read first and then split. In the whole table known columns come last if columns
have names, and keep their places if they have none. The checksum covers all columns.

Images are paired by their names in two folders.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ndm.data.crops import CroppedImages
from ndm.data.source import DataDescription, EventDataset, Loaded
from ndm.errors import UserError, describe_value


class WithoutConditions(EventDataset):
    """The same examples, of which a conditional model is given nothing: for bounds on p(x).

    Args:
        data: the examples.
    """

    def __init__(self, data: EventDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return self.data.__getitems__(indices)


class KnownColumns(EventDataset):
    """Rows of which some columns are known.

    Args:
        rows: the rows of the whole table.
        known: the places of the known columns.
    """

    def __init__(self, rows: EventDataset, known: Sequence[int]):
        self.rows, self._known = rows, list(known)
        count = rows[0].numel()
        self._open = [place for place in range(count) if place not in self._known]

    @property
    def unusable(self) -> dict[int, str]:
        """Rows that cannot be computed with, see :class:`ndm.data.other.NewRows`."""
        return dict(getattr(self.rows, "unusable", {}))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return self.rows.__getitems__(indices)[:, self._open]

    def conditions(self, indices: Sequence[int]) -> Tensor | None:
        return self.rows.__getitems__(indices)[:, self._known]


class PairedImages(EventDataset):
    """Images, each with another image that is known of it.

    Args:
        images: the images.
        known: the other images, in the same order.
    """

    def __init__(self, images: EventDataset, known: EventDataset):
        self.images, self.known = images, known

    @property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        """Class of each image."""
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return self.images.__getitems__(indices)

    def conditions(self, indices: Sequence[int]) -> Tensor | None:
        return self.known.__getitems__(indices)


def paired(images: Loaded, known: Loaded, folder: str) -> Loaded:
    """Return images with those of another folder as what is known of them.

    Args:
        images: the images.
        known: the images of the other folder.
        folder: its name, for the description.

    Raises:
        UserError: an image has no partner of its name, or one of another size.
    """
    shapes = images.description.event_shape[1:], known.description.event_shape[1:]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"condition={describe_value(folder)}: its images are {_size(shapes[1])} and the others"
            f" {_size(shapes[0])}; make the sizes equal, or give size="
        )
    there, here = (
        {n for one in part.splits.values() for n in _names(one)} for part in (images, known)
    )
    if there != here:
        name = min(there ^ here)
        raise UserError(
            f"condition={describe_value(folder)}: images are paired by their names, and"
            f" {describe_value(name)} is missing {'there' if name in there else 'here'}"
        )
    for split, data in images.splits.items():
        partners = known.splits.get(split)
        if partners is None or _names(data) != _names(partners):
            raise UserError(
                f"condition={describe_value(folder)}: images are paired by their names, and two"
                f" have one name in the split {split!r}, or its classes differ"
            )
        if isinstance(data, CroppedImages) and not (
            isinstance(partners, CroppedImages) and np.array_equal(data.places, partners.places)
        ):
            raise UserError(
                f"condition={describe_value(folder)}: images of one name have different sizes in"
                " the two folders; make them equal"
            )
    description = replace(
        images.description,
        version=f"{images.description.version}, given the images of {Path(folder).resolve().name}",
        condition_sha256=known.description.sha256,
    )
    splits: dict[str, EventDataset] = {
        name: PairedImages(data, known.splits[name]) for name, data in images.splits.items()
    }
    return Loaded(description, splits)


def _size(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)


def _names(data: EventDataset) -> list[str]:
    """Return the names of the images of a split in their folder, without suffix."""
    images = data.images if isinstance(data, CroppedImages) else data
    files, root = getattr(images, "files", []), getattr(images, "root", None) or Path()
    return [Path(file).relative_to(root).with_suffix("").as_posix() for file in files]


def split_off(loaded: Loaded, known: Sequence[str], named: bool) -> Loaded:
    """Return a table with known columns.

    Args:
        loaded: the whole table.
        known: names of the known columns, which are the last ones, or their numbers.
        named: whether they are names.
    """
    whole = loaded.description
    count = whole.event_shape[0]
    places = _places(known, count, named)
    rest = [place for place in range(count) if place not in places]

    def pick(values: tuple[float, ...], chosen: Sequence[int]) -> tuple[float, ...]:
        return tuple(values[place] for place in chosen) if values else ()

    description = replace(
        whole,
        event_shape=(len(rest),),
        columns=whole.columns[: len(rest)],
        offset=pick(whole.offset, rest),
        scale=pick(whole.scale, rest),
        known_columns=tuple(known),
        known_offset=pick(whole.offset, places),
        known_scale=pick(whole.scale, places),
    )
    splits: dict[str, EventDataset] = {
        name: KnownColumns(rows, places) for name, rows in loaded.splits.items()
    }
    return Loaded(description, splits)


def joined(description: DataDescription) -> DataDescription:
    """Return the description of the whole table."""
    known, named = description.known_columns, bool(description.columns)
    count = description.event_shape[0] + len(known)
    places = _places(known, count, named)
    order = [*(place for place in range(count) if place not in places), *places]

    def merge(first: tuple[float, ...], last: tuple[float, ...]) -> tuple[float, ...]:
        values = dict(zip(order, (*first, *last), strict=bool(first)))
        return tuple(values[place] for place in sorted(values))

    return replace(
        description,
        event_shape=(count,),
        columns=(*description.columns, *known) if named else (),
        offset=merge(description.offset, description.known_offset),
        scale=merge(description.scale, description.known_scale),
        known_columns=(),
        known_offset=(),
        known_scale=(),
    )


def _places(known: Sequence[str], count: int, named: bool) -> list[int]:
    """Return the places of the known columns among ``count``."""
    if named:
        return list(range(count - len(known), count))
    return [int(name) for name in known]
