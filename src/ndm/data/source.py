r"""Data sources: read a data set, describe it, and map its values v to the model's inputs x.

.. math::
    \text{discrete: } x = (2k + 1)/L - 1, \quad k = v - v_{\min} \in \{0, \dots, L - 1\}, \qquad
    \text{continuous: } x = (v - b)/a
    \;\Rightarrow\; -\log p(v) = -\log p(x) + \textstyle\sum_i \log a_i .

v is in the source's units. Integers map to the centers of L equal bins of [-1, 1], the grid of
:class:`ndm.decoder.DiscretizedGaussian`; their probability needs no correction. Continuous values
may be standardized. The sum of log a_i then converts the negative log-likelihood, in nats, back to
the units of v.

The constructor of a source only stores its arguments. The first ``describe()`` or ``split()`` reads
the data. Splits that a source draws are stratified by class with a fixed seed. The description
contains a checksum, so that runs can be compared.
"""

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ndm.decoder import from_grid, to_grid
from ndm.errors import UserError, describe_value

_GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio's fraction, times 2^64
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: object) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return whole or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True)
class DataDescription:
    """The description of a data set, recorded with each run.

    ``sha256`` covers the splits in the order of ``splits``: the name of each, then its examples in
    order. Arrays in memory enter as dtype, shape and little-endian bytes in C order (integers 0 ...
    num_values-1 as uint8, or int32 above 256 values; continuous values as float64 in the source's
    units). Encoded images enter as the SHA-256 of each file's bytes.
    """

    name: str
    """Short name of the data."""
    version: str
    """Release of the data, and how they were split and prepared."""
    kind: Literal["image", "vector"]
    """``image`` if an example is (channels, height, width), otherwise ``vector``."""
    event_shape: tuple[int, ...]
    """Shape of one example."""
    num_values: int | None
    """Number of integer values of discrete data; None for continuous data."""
    low: float | None
    """Least value, in the source's units; None if not declared."""
    high: float | None
    """Greatest value, in the source's units; None if not declared."""
    splits: dict[str, int]
    """Number of examples in each split."""
    sha256: str
    """Checksum of the content, as defined above."""
    classes: tuple[str, ...] = ()
    """Declared classes of labeled data; each occurs in every split."""
    columns: tuple[str, ...] = ()
    """Column names of a table that has them."""
    offset: tuple[float, ...] = field(default=(), repr=False)
    """b of each dimension of the flattened example, if standardized."""
    scale: tuple[float, ...] = field(default=(), repr=False)
    """a of each dimension of the flattened example, if standardized."""
    frequencies: tuple[float, ...] = ()
    """Share of each class in the split ``train``."""
    condition_sha256: str = ""
    """Checksum of the class indices of all splits, or of the images that are known of each example;
    empty without them.
    """
    known_columns: tuple[str, ...] = ()
    """Columns of a table that are known of each example, by name or number."""
    known_offset: tuple[float, ...] = field(default=(), repr=False)
    """b of each known column, if standardized."""
    known_scale: tuple[float, ...] = field(default=(), repr=False)
    """a of each known column, if standardized."""

    @property
    def log_scale(self) -> float:
        """Sum of log a_i, in nats per example: -log p(v) = -log p(x) + log_scale."""
        return math.fsum(math.log(value) for value in self.scale)

    def about(self, split: str) -> dict[str, str]:
        """Return the entries that identify the data in the protocol of a measurement."""
        return {"data": self.name, "split": split, "data_sha256": self.sha256}

    def to_source_units(self, x: Tensor) -> Tensor:
        """Convert x ``(..., *event)`` to v, in the shape of x.

        Discrete data become low + level, int64. For continuous data standardization is undone, in
        float64, because single precision cannot represent, for example, 2460000.01. Data that are
        not standardized are returned unchanged.
        """
        if self.num_values is not None:
            return from_grid(x, self.num_values) + int(self.low or 0)
        if not self.scale:
            return x
        offset, scale = (
            torch.tensor(values, dtype=torch.float64, device=x.device).reshape(self.event_shape)
            for values in (self.offset, self.scale)
        )
        return x.double() * scale + offset

    def known_to_model(self, values: Tensor) -> Tensor:
        """Convert known columns ``(N, K)``, float64, in the source's units to what the model takes.

        Raises:
            UserError: a value of discrete data is not one of theirs.
        """
        if self.num_values is not None:
            levels = values - float(self.low or 0)
            wrong = (levels != levels.round()) | (levels < 0) | (levels >= self.num_values)
            if bool(wrong.any()):
                raise UserError(
                    f"a known column is {float(values[wrong][0]):g}: {self.name} has whole numbers"
                    f" from {self.low:g} to {self.high:g}"
                )
            return to_grid(levels.long(), self.num_values)
        if self.known_scale:
            offset, scale = (
                torch.tensor(one, dtype=torch.float64)
                for one in (self.known_offset, self.known_scale)
            )
            values = (values - offset) / scale
        return values.float()

    def to_dict(self) -> dict[str, object]:
        """Return all fields in a form that JSON can store."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields_of: object) -> "DataDescription":
        """Restore the description that :meth:`to_dict` returned.

        Raises:
            UserError: ``fields_of`` is not such a description.
        """
        try:
            values: dict[str, Any] = dict(fields_of)  # type: ignore[call-overload]
            values = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            }
            description = cls(**values)
        except (TypeError, ValueError) as error:
            raise UserError(
                "the model has no description of its data; save it with"
                " info={'data': description.to_dict()}"
            ) from error
        wrong = next((name for name, holds in description._checks() if not holds), None)
        if wrong is not None:
            raise UserError(
                f"the description of the data is damaged: {wrong} is"
                f" {describe_value(values.get(wrong))}; restore the model from a copy"
            )
        return description

    def _checks(self) -> Iterator[tuple[str, bool]]:
        """Yield the names of the fields, and whether they can be true; a file may be damaged."""
        for name in ("name", "version", "sha256", "condition_sha256"):
            yield name, isinstance(getattr(self, name), str)
        yield "kind", self.kind in ("image", "vector")
        shape, most = self.event_shape, 2**31
        yield "event_shape", isinstance(shape, tuple) and 1 <= len(shape) <= 8
        yield "event_shape", all(_is_whole(size, 1) for size in shape) and math.prod(shape) < most
        yield "num_values", self.num_values is None or _is_whole(self.num_values, 2)
        for name in ("low", "high"):
            value = getattr(self, name)
            yield name, value is None or _is_number(value)
        splits = self.splits
        yield "splits", isinstance(splits, dict) and all(_is_whole(n, 0) for n in splits.values())
        for name in ("classes", "columns", "known_columns"):
            yield name, isinstance(getattr(self, name), tuple)
            yield name, all(isinstance(label, (str, int)) for label in getattr(self, name))
        for prefix, size in (("", math.prod(shape)), ("known_", len(self.known_columns))):
            for name in (f"{prefix}offset", f"{prefix}scale"):
                values = getattr(self, name)
                yield name, isinstance(values, tuple) and len(values) in (0, size)
                yield name, all(_is_number(value) for value in values)
            yield f"{prefix}scale", all(value > 0 for value in getattr(self, f"{prefix}scale"))
        shares, classes = self.frequencies, len(self.classes)
        yield "frequencies", isinstance(shares, tuple) and len(shares) in (0, classes)
        yield "frequencies", all(_is_number(share) and share >= 0 for share in shares)
        yield "frequencies", not shares or sum(shares) > 0


class EventDataset(Dataset[Tensor], ABC):
    """One split of a data set: examples ``(*event)`` or batches ``(B, *event)``, float32.

    ``__getitems__`` returns a stacked batch, so give a ``DataLoader``
    ``collate_fn=identity_collate``.
    """

    labels: Tensor | None = None
    """Class index of each example, int64, or None."""

    def conditions(self, indices: Sequence[int]) -> Tensor | None:
        """Return what a conditional model is given of the examples ``indices``, ``(B, ...)``.

        These are their classes, or None if the data have none.
        """
        return None if self.labels is None else self.labels[list(indices)]

    @abstractmethod
    def __len__(self) -> int: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} examples)"

    def __deepcopy__(self, memo: dict[int, Any]) -> "EventDataset":
        """Return the data set: data never change, so copies of a training module share them."""
        return self

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Return the examples ``indices``, each in 0 ... len-1, as ``(B, *event)``, float32."""

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """Return the example of an int, ``(*event)``, or a batch of examples, ``(B, *event)``.

        Args:
            index: an int for one example; a slice, a sequence of ints or a 1-D integer tensor for a
                batch. Negative numbers count from the end. A 1-D bool tensor with one entry per
                example selects the examples where it is True.

        Raises:
            IndexError: a number is out of range, or a bool tensor has another length than the
                split.
            TypeError: the index is of another type, or has more than one dimension.
        """
        size = len(self)
        if isinstance(index, slice):
            return self._batch(range(size)[index])
        numbers = torch.as_tensor(index)
        if numbers.dtype == torch.bool and numbers.ndim == 1:
            if len(numbers) != size:
                raise IndexError(f"a bool index of length {len(numbers)} for {size} examples")
            return self._batch(numbers.nonzero().flatten().tolist())
        if numbers.ndim > 1 or (numbers.numel() and numbers.dtype not in _INTEGERS):
            raise TypeError(
                f"an index of shape {tuple(numbers.shape)} and dtype {numbers.dtype}: give an int,"
                " a slice, a sequence of ints, or a 1-D integer or bool tensor"
            )
        numbers = numbers.long()
        outside = numbers[(numbers < -size) | (numbers >= size)]
        if outside.numel():
            raise IndexError(f"index {int(outside[0])} is out of range for {size} examples")
        batch = self._batch((numbers % size).reshape(-1).tolist())
        return batch if numbers.ndim else batch[0]

    def _batch(self, indices: Sequence[int]) -> Tensor:
        """Return the examples ``indices``; an empty batch has the shape ``(0, *event)``."""
        return self.__getitems__(indices) if len(indices) else self.__getitems__([0])[:0]


def identity_collate(batch: Any) -> Any:
    """Return the batch unchanged: the ``collate_fn`` for an :class:`EventDataset`."""
    return batch


def spread(count: int, limit: int | None = None) -> list[int]:
    """Return ``limit`` increasing indices of ``count`` examples, evenly spread; all by default.

    There is one in each of ``limit`` equal parts, at a place that changes from part to part by the
    golden ratio. At equal distances they could all be alike: every seventh crop of photographs cut
    into rows of seven is from the same column.
    """
    most = count if limit is None else min(limit, count)
    places = [(index << 64) + (index + 1) * _GOLDEN % (1 << 64) for index in range(most)]
    return [place * count // (most << 64) for place in places]


@dataclass(frozen=True)
class Loaded:
    """The description and the splits of a data set that has been read."""

    description: DataDescription
    splits: dict[str, EventDataset]


class DataSource(ABC):
    """A data set: its location, splits and values.

    Subclasses implement :meth:`load`. Sources can be pickled: the copy holds only the arguments and
    reads the data again when it needs them.
    """

    _loaded: Loaded | None = None

    @abstractmethod
    def load(self) -> Loaded:
        """Read and check the data; called once, by the first ``describe()`` or ``split()``.

        Raises:
            UserError: the data are missing, damaged or not as declared.
        """

    def describe(self) -> DataDescription:
        """Return the description of the data; the first call reads them."""
        return self._content().description

    def split(self, name: str) -> EventDataset:
        """Return the examples of one split; the first call reads the data.

        Raises:
            UserError: the data have no split of this name.
        """
        content = self._content()
        if name not in content.splits:
            have = ", ".join(content.splits)
            raise UserError(
                f"{content.description.name} has no split {describe_value(name)}; its splits are:"
                f" {have}"
            )
        return content.splits[name]

    def __repr__(self) -> str:
        names = inspect.signature(type(self).__init__).parameters
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in values.items())})"

    def integers(self, x: Tensor) -> Tensor:
        """Return the levels 0 ... num_values-1 nearest to x, int64, in the shape of x.

        Raises:
            UserError: the data are continuous.
        """
        description = self.describe()
        if description.num_values is None:
            raise UserError(
                f"{description.name} is continuous and has no integers; use to_source_units(x)"
            )
        return from_grid(x, description.num_values)

    def to_source_units(self, x: Tensor) -> Tensor:
        """Convert x ``(..., *event)`` to v; see :meth:`DataDescription.to_source_units`."""
        return self.describe().to_source_units(x)

    def _content(self) -> Loaded:
        if self._loaded is None:
            self._loaded = _with_labels(self.load())
        return self._loaded

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_loaded"}


def _with_labels(loaded: Loaded) -> Loaded:
    """Describe the labels of data that have classes."""
    classes = len(loaded.description.classes)
    labels = {name: split.labels for name, split in loaded.splits.items()}
    if not classes or any(one is None for one in labels.values()):
        return loaded
    checksum, shares = ContentHash(), ()
    checksum.digest(loaded.description.condition_sha256.encode())  # of images that are known, too
    for name, indices in labels.items():
        assert indices is not None
        checksum.split(name)
        checksum.array(indices.numpy())
        if name == "train":
            shares = tuple((indices.bincount(minlength=classes) / len(indices)).tolist())
    description = replace(
        loaded.description, frequencies=shares, condition_sha256=checksum.hexdigest()
    )
    return Loaded(description, loaded.splits)


class ContentHash:
    """The checksum defined by :class:`DataDescription`, computed step by step."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def split(self, name: str) -> None:
        """Start a split."""
        self._hash.update(f"split {name}\n".encode())

    def array(self, values: np.ndarray) -> None:
        """Add the examples of a split as one array ``(N, *event)``."""
        values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        self.begin_array(values.dtype.name, values.shape)
        self.rows(values)

    def begin_array(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Start an array; :meth:`rows` adds its content."""
        self._hash.update(f"{dtype} {shape}\n".encode())

    def rows(self, values: np.ndarray) -> None:
        """Add rows of an array, contiguous and little-endian."""
        self._hash.update(values.data if values.size else b"")

    def digest(self, sha256: bytes) -> None:
        """Add one example by the SHA-256 of its encoded bytes."""
        self._hash.update(sha256)

    def hexdigest(self) -> str:
        """Return the checksum so far as 64 hexadecimal digits."""
        return self._hash.hexdigest()
