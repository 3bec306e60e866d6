r"""Data in memory, one array ``(N, *event)`` per split: integers on a grid, or standardized reals.

.. math::
    b_i = \operatorname{mean}_{\text{train}} v_i, \qquad
    a_i = \operatorname{std}_{\text{train}} v_i, \qquad x_i = (v_i - b_i)/a_i .

Only the train split determines b and a. A dimension that is constant over the train split has no
density, so it raises an error instead of getting an arbitrary scale.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ndm.data.source import ContentHash, DataDescription, EventDataset, Loaded
from ndm.decoder import to_grid
from ndm.errors import UserError


class ArraySplit(EventDataset):
    """A split in memory.

    Args:
        values: ``(N, *event)``: integers 0 ... num_values-1 if ``num_values`` is given, otherwise
            float32 examples x.
        num_values: number of integer values, or None.
        labels: class index of each example, or None.
    """

    def __init__(self, values: Tensor, num_values: int | None = None, labels: Tensor | None = None):
        self.values = values
        self.num_values = num_values
        self.labels = labels

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        chosen = self.values[torch.as_tensor(indices, dtype=torch.int64)]
        return chosen if self.num_values is None else to_grid(chosen, self.num_values)


def kind_of(event_shape: tuple[int, ...]) -> Literal["image", "vector"]:
    """Return ``image`` for a shape (channels, height, width), otherwise ``vector``."""
    return "image" if len(event_shape) == 3 else "vector"


def discrete(
    name: str,
    version: str,
    arrays: Mapping[str, np.ndarray],
    num_values: int,
    low: float = 0.0,
    labels: Mapping[str, np.ndarray] | None = None,
    classes: Sequence[str] = (),
    columns: Sequence[str] | None = None,
) -> Loaded:
    """Describe integer data and store them in memory.

    Args:
        name: name of the data.
        version: version of the data.
        arrays: split -> integers 0 ... num_values-1, ``(N, *event)``.
        num_values: number of integer values.
        low: value of level 0 in the source's units.
        labels: split -> class index of each example.
        classes: the declared classes.
        columns: names of the columns of a table.

    Returns:
        The description and the splits.
    """
    content = ContentHash()
    splits: dict[str, EventDataset] = {}
    for split, array in arrays.items():
        array = np.ascontiguousarray(array, dtype=np.uint8 if num_values <= 256 else np.int32)
        content.split(split)
        content.array(array)
        splits[split] = ArraySplit(
            torch.from_numpy(array),
            num_values,
            torch.from_numpy(labels[split]).long() if labels else None,
        )
    event = _event_shape(arrays)
    sizes = {split: len(array) for split, array in arrays.items()}
    description = DataDescription(
        name,
        version,
        kind_of(event),
        event,
        num_values,
        low,
        low + num_values - 1,
        sizes,
        content.hexdigest(),
        tuple(classes),
        tuple(columns or ()),
    )
    return Loaded(description, splits)


def continuous(
    name: str,
    version: str,
    arrays: Mapping[str, np.ndarray],
    standardize: bool,
    low: float | None = None,
    high: float | None = None,
    dimension_names: Sequence[str] | None = None,
) -> Loaded:
    """Describe real data and store them in memory, standardized on request.

    Args:
        name: name of the data.
        version: version of the data.
        arrays: split -> finite values in the source's units, ``(N, *event)``; ``standardize``
            requires the split ``train``.
        standardize: whether to subtract the train mean of each dimension and divide by its train
            standard deviation.
        low: declared least value, for the description.
        high: declared greatest value, for the description.
        dimension_names: names of the columns of a table.

    Returns:
        The description and the splits.

    Raises:
        UserError: a dimension to be standardized is constant over the train split.
    """
    event = _event_shape(arrays)
    offset, scale = np.zeros(event), np.ones(event)
    if standardize:
        train = np.asarray(arrays["train"], dtype=np.float64)
        offset, scale = train.mean(axis=0), train.std(axis=0)
        constant = np.flatnonzero((train == train[0]).all(axis=0) | (scale == 0))
        if len(constant):
            index = int(constant[0])
            column = _column(np.unravel_index(index, event), event, dimension_names)
            value = float(train[0].reshape(-1)[index])
            raise UserError(
                f"{name}: column {column} is {value:g} in all {len(train)} rows of the train split"
                " and cannot be standardized (a constant has no density); leave it out with"
                " columns=, or give standardize=False"
            )
    content = ContentHash()
    splits: dict[str, EventDataset] = {}
    sizes: dict[str, int] = {}
    for split, array in arrays.items():
        array = np.ascontiguousarray(array, dtype=np.float64)
        content.split(split)
        content.array(array)
        splits[split] = ArraySplit(torch.from_numpy(((array - offset) / scale).astype(np.float32)))
        sizes[split] = len(array)
    description = DataDescription(
        name,
        version,
        kind_of(event),
        event,
        None,
        low,
        high,
        sizes,
        content.hexdigest(),
        columns=tuple(dimension_names or ()),
        offset=tuple(offset.reshape(-1).tolist()) if standardize else (),
        scale=tuple(scale.reshape(-1).tolist()) if standardize else (),
    )
    return Loaded(description, splits)


def check_values(
    array: np.ndarray,
    where: str,
    names: Sequence[str] | None,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Check that all values are finite and inside the declared range.

    Args:
        array: ``(N, *event)``.
        where: file or split, for the message.
        names: names of the dimensions of the flattened example, or None.
        low: least allowed value, or None.
        high: greatest allowed value, or None.

    Raises:
        UserError: a value is not finite or out of range; the message contains the value, its row
            (counted from 0) and its column.
    """
    rules = []
    if array.dtype.kind == "f":
        rules.append((~np.isfinite(array), "values must be finite; drop or fill the row"))
    if low is not None or high is not None:
        least, most = -math.inf if low is None else low, math.inf if high is None else high
        advice = (
            f"allowed are {least:g} to {most:g}; fix the data, or declare their range with"
            " num_values=, low= and high="
        )
        rules.append(((array < least) | (array > most), advice))
    for wrong, advice in rules:
        if wrong.any():
            row, *position = np.unravel_index(int(wrong.argmax()), array.shape)
            value = array[(row, *position)]
            raise UserError(
                f"{where}: row {row} (the first is 0), column"
                f" {_column(position, array.shape[1:], names)} holds {value:g}; {advice}"
            )


def _column(
    position: Sequence[np.integer], event: Sequence[int], names: Sequence[str] | None
) -> str:
    """Return the name of a dimension of the example, or its number or numbers, for messages."""
    if names:
        return repr(names[int(np.ravel_multi_index(tuple(position), tuple(event)))])
    numbers = tuple(int(number) for number in position)
    return str(numbers[0] if len(numbers) == 1 else numbers)


def _event_shape(arrays: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    return tuple(int(size) for size in next(iter(arrays.values())).shape[1:])
