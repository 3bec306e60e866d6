r"""Data held in memory as one array ``(N, *event)`` a split: integers on a grid, or standardized
real values.

.. math::
    b_i = \operatorname{mean}_{\text{train}} v_i, \qquad a_i = \operatorname{std}_{\text{train}} v_i, \qquad x_i = (v_i - b_i)/a_i .

Only the train split enters b and a. A dimension that is constant over the train split has no
density, so it is refused rather than given an arbitrary scale.
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
        values: ``(N, *event)``: integers 0 ... num_values-1 when ``num_values`` is given, otherwise
            float32 examples as they are.
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
    """``image`` for (channels, height, width), otherwise ``vector``."""
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
    """Describe and hold integer data.

    Args:
        name: of the data.
        version: of the data.
        arrays: split -> integers 0 ... num_values-1, ``(N, *event)``.
        num_values: number of integer values.
        low: value of level 0 in the source's own units.
        labels: split -> class index of each example.
        classes: the declared classes.
        columns: names of the columns of a table.

    Returns:
        Description and splits.
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
    """Describe and hold real data, standardized by the train split when asked.

    Args:
        name: of the data.
        version: of the data.
        arrays: split -> finite values in the source's own units, ``(N, *event)``; with
            ``standardize`` one must be ``train``.
        standardize: whether to subtract the train mean and divide by the train standard deviation,
            dimension by dimension.
        low: declared least value, for the description.
        high: declared greatest value, for the description.
        dimension_names: names of the columns of a table.

    Returns:
        Description and splits.

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
            label = (
                repr(dimension_names[index])
                if dimension_names
                else str(tuple(int(i) for i in np.unravel_index(index, event)))
            )
            value = float(train[0].reshape(-1)[index])
            raise UserError(
                f"{name}: column {label} is {value:g} in all {len(train)} rows of the train split"
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
    """Check that all values are finite, and inside the declared range.

    Args:
        array: ``(N, *event)``.
        where: file or split, for the message.
        names: names of the dimensions of the flattened example, or None.
        low: least allowed value, or None.
        high: greatest allowed value, or None.

    Raises:
        UserError: a value is not finite or out of range; the message names value, row (the first is
            0) and column.
    """
    rules = (
        [(~np.isfinite(array), "values must be finite; drop or fill the row")]
        if array.dtype.kind == "f"
        else []
    )
    if low is not None or high is not None:
        least, most = -math.inf if low is None else low, math.inf if high is None else high
        mend = (
            f"allowed are {least:g} to {most:g}; mend the data, or declare their range with"
            " num_values=, low= and high="
        )
        rules.append(((array < least) | (array > most), mend))
    for wrong, mend in rules:
        if wrong.any():
            at = tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), array.shape))
            column = (
                repr(names[int(np.ravel_multi_index(at[1:], array.shape[1:]))])
                if names
                else f"{at[1] if len(at) == 2 else at[1:]}"
            )
            raise UserError(
                f"{where}: row {at[0]} (the first is 0), column {column} holds {array[at]:g};"
                f" {mend}"
            )


def _event_shape(arrays: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    return tuple(int(size) for size in next(iter(arrays.values())).shape[1:])
