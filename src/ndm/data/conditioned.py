r"""Tables of which some columns are known: x given c, both standardized.

.. math::
    v = (v_x, v_c), \qquad x_i = (v_i - b_i)/a_i, \qquad c_j = (v_j - b_j)/a_j, \qquad
    -\log p(v_x|v_c) = -\log p(x|c) + \textstyle\sum_i \log a_i .

The whole table is read first and then split. In the whole table known columns come last if columns
have names, and keep their places if they have none. The checksum covers all columns.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ndm.data.source import DataDescription, EventDataset, Loaded


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
