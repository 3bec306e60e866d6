r"""Data in memory, one array ``(N, *event)`` per split: integers on a grid, or standardized reals.

.. math::
    b_i = \operatorname{mean}_{\text{train}} v_i, \qquad
    a_i = \operatorname{std}_{\text{train}} v_i, \qquad x_i = (v_i - b_i)/a_i .

Only the train split determines b and a. A dimension that is constant over the train split has no
density, so it raises an error instead of getting an arbitrary scale.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ndm.data.columns import column_label, number_text
from ndm.data.mapped import IntegerRows
from ndm.data.source import ContentHash, DataDescription, EventDataset, Loaded
from ndm.decoder import to_grid
from ndm.errors import UserError

MOST_DEVIATIONS = 1e9
"""The largest distance of a value from the mean, in standard deviations, that can be scored."""
MOST_RAW = 1e15
"""The largest value that is not standardized."""
_LARGEST, _SMALLEST = 1e150, 1e-150  # deviations whose squares are doubles
_MOST_SPREADS = 1e12  # of the middle half of a column, from its median


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
    arrays: "Mapping[str, np.ndarray | IntegerRows]",
    num_values: int,
    low: float = 0.0,
    labels: Mapping[str, np.ndarray] | None = None,
    classes: Sequence[str] = (),
    columns: Sequence[str] | None = None,
) -> Loaded:
    """Describe integer data and store arrays in memory.

    Args:
        name: name of the data.
        version: version of the data.
        arrays: split -> integers 0 ... num_values-1, ``(N, *event)``, or rows with these levels.
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
        content.split(split)
        if isinstance(array, IntegerRows):
            array.add_to(content)
            splits[split] = array
            continue
        array = np.ascontiguousarray(array, dtype=np.uint8 if num_values <= 256 else np.int32)
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
        UserError: a dimension to be standardized is constant over the train split, or a value is
            too far from the others, or too large, for the precision of the model.
    """
    event = _event_shape(arrays)
    offset, scale = np.zeros(event), np.ones(event)
    if standardize:
        offset, scale = _standardization(name, np.asarray(arrays["train"]), dimension_names)
    splits: dict[str, EventDataset] = {}
    for split, array in arrays.items():
        array = np.asarray(array, dtype=np.float64)
        x = (array - offset) / scale
        _check_single(name, split, array, x, standardize, dimension_names)
        splits[split] = ArraySplit(torch.from_numpy(x.astype(np.float32)))
    description = describe_reals(name, version, arrays, low, high, dimension_names)
    if standardize:
        description = replace(
            description,
            offset=tuple(offset.reshape(-1).tolist()),
            scale=tuple(scale.reshape(-1).tolist()),
        )
    return Loaded(description, splits)


def describe_reals(
    name: str,
    version: str,
    arrays: Mapping[str, np.ndarray],
    low: float | None = None,
    high: float | None = None,
    dimension_names: Sequence[str] | None = None,
) -> DataDescription:
    """Describe real data that are not standardized, with the arguments of :func:`continuous`."""
    event = _event_shape(arrays)
    content = ContentHash()
    sizes: dict[str, int] = {}
    for split, array in arrays.items():
        content.split(split)
        content.array(np.ascontiguousarray(array, dtype=np.float64))
        sizes[split] = len(array)
    return DataDescription(
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
    )


def _standardization(
    name: str, train: np.ndarray, names: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and standard deviation of each dimension of the train split.

    Raises:
        UserError: a dimension is constant, or double precision cannot represent its spread.
    """
    event = train.shape[1:]
    train = train.astype(np.float64, copy=False)
    constant = (train == train[0]).all(axis=0)
    if constant.any():
        index = np.unravel_index(int(constant.argmax()), event)
        value = number_text(train[(0, *index)])
        raise UserError(
            f"{name}: column {_column(index, event, names)} is {value} in all {len(train)} rows"
            " of the train split and cannot be standardized (a constant has no density); leave it"
            " out with columns=, or give standardize=False"
        )
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        offset, scale = train.mean(axis=0), train.std(axis=0)
        wrong = ~((scale > _SMALLEST) & (scale < _LARGEST) & np.isfinite(offset))
    if wrong.any():
        index = np.unravel_index(int(wrong.argmax()), event)
        column = train.reshape(len(train), -1)[:, int(wrong.argmax())]
        value = number_text(column[np.abs(column).argmax()])
        raise UserError(
            f"{name}: column {_column(index, event, names)} holds values up to {value}, whose"
            " squares double precision cannot represent; remove the rows that are fill values, or"
            " write the column in another unit"
        )
    _check_fill_values(name, train, names)
    return offset, scale


def _check_fill_values(name: str, train: np.ndarray, names: Sequence[str] | None) -> None:
    """Check that no value is so far from the others that standardizing would make those equal.

    Raises:
        UserError: one is; for example, 9.97e36 for a missing value.
    """
    event = train.shape[1:]
    flat = train.reshape(len(train), -1)
    for number in range(flat.shape[1]):
        column = flat[:, number]
        if np.ptp(column) < 1e3 * MOST_DEVIATIONS * np.spacing(np.abs(column).min()):
            continue
        low, middle, high = np.quantile(column, (0.25, 0.5, 0.75))
        away = np.abs(column - middle)
        worst = int(away.argmax())
        if 0 < _MOST_SPREADS * (high - low) < away[worst]:
            label = _column(np.unravel_index(number, event), event, names)
            raise UserError(
                f"{name}: column {label} holds {number_text(column[worst])} in the train split,"
                f" but half of its values are from {number_text(low)} to {number_text(high)};"
                " remove the row if this is a fill value, or transform the column (log)"
            )


def _check_single(
    name: str,
    split: str,
    values: np.ndarray,
    x: np.ndarray,
    standardized: bool,
    names: Sequence[str] | None,
) -> None:
    """Check that single precision can represent the examples x ``(N, *event)`` of a split.

    Raises:
        UserError: a value is too large, or different values of a dimension become equal.
    """
    event = values.shape[1:]
    beyond = too_large(x, standardized)
    if beyond.any():
        row, *position = np.unravel_index(int(beyond.argmax()), x.shape)
        what = f"{MOST_DEVIATIONS:g} standard deviations from the mean of the train split"
        raise UserError(
            f"{name}: example {row} (the first is 0) of the {split} split, column"
            f" {_column(position, event, names)}, holds {number_text(values[(row, *position)])},"
            f" beyond {what if standardized else format(MOST_RAW, 'g')}; drop or fix the row"
        )
    if standardized or len(x) < 2:
        return
    spread = x.std(axis=0)
    step = np.spacing(np.abs(x).max(axis=0).astype(np.float32))
    coarse = (spread > 0) & (step > spread)
    if coarse.any():
        index = np.unravel_index(int(coarse.argmax()), event)
        raise UserError(
            f"{name}: column {_column(index, event, names)} of the {split} split has a standard"
            f" deviation of {spread[index]:.3g} at values up to"
            f" {number_text(np.abs(x).max(axis=0)[index])}, which single precision does not"
            " resolve; leave standardize at true"
        )


def too_large(x: np.ndarray, standardized: bool) -> np.ndarray:
    """Return where examples x are too large for computations in single precision."""
    limit = MOST_DEVIATIONS if standardized else MOST_RAW
    result: np.ndarray = ~(np.abs(x) <= limit)
    return result


def check_values(
    array: np.ndarray,
    where: str,
    names: Sequence[str] | None,
    low: float | None = None,
    high: float | None = None,
    first: int = 0,
) -> None:
    """Check that all values are finite and inside the declared range.

    Args:
        array: ``(N, *event)``.
        where: file or split, for the message.
        names: names of the dimensions of the flattened example, or None.
        low: least allowed value, or None.
        high: greatest allowed value, or None.
        first: number of the first row, for the message.

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
            f"allowed are {number_text(least)} to {number_text(most)}; fix the data, or declare"
            " their range with num_values=, low= and high="
        )
        rules.append(((array < least) | (array > most), advice))
    for wrong, advice in rules:
        if wrong.any():
            row, *position = np.unravel_index(int(wrong.argmax()), array.shape)
            value = array[(row, *position)]
            raise UserError(
                f"{where}: row {first + row} (the first is 0), column"
                f" {_column(position, array.shape[1:], names)} holds {number_text(value)}; {advice}"
            )


def _column(
    position: Sequence[np.integer], event: Sequence[int], names: Sequence[str] | None
) -> str:
    """Return the name of a dimension of the example, or its number or numbers, for messages."""
    if names:
        return column_label(names[int(np.ravel_multi_index(tuple(position), tuple(event)))])
    numbers = tuple(int(number) for number in position)
    return str(numbers[0] if len(numbers) == 1 else numbers)


def _event_shape(arrays: "Mapping[str, np.ndarray | IntegerRows]") -> tuple[int, ...]:
    first = next(iter(arrays.values()))
    shape = first.event if isinstance(first, IntegerRows) else first.shape[1:]
    return tuple(int(size) for size in shape)
