r"""Data sources: what a data set is, and how its values reach the model.

.. math::
    \text{discrete: } x = (2k + 1)/L - 1, \quad k = v - v_{\min} \in \{0, \dots, L - 1\}, \qquad
    \text{continuous: } x = (v - b)/a \;\Rightarrow\; -\log p(v) = -\log p(x) + \textstyle\sum_i \log a_i .

v is a value in the source's own units, x what the model sees. Integers lie on the centers of L
equal bins of [-1, 1], the grid of
:class:`ndm.decoder.DiscretizedGaussian`; a probability of integers needs no constant. Continuous values may be standardized, and then
the sum of log a_i moves the negative log-likelihood, in nats, back to the units of v.

A source only keeps its arguments when it is built; the first ``describe()`` or ``split()`` reads
the data. Splits that a source makes itself are drawn class by class with a fixed seed, and the
description carries a checksum, so two runs can be compared.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ndm.decoder import from_grid
from ndm.errors import UserError, describe_value


@dataclass(frozen=True)
class DataDescription:
    """What a data set is, recorded with each run.

    ``sha256`` is taken over the splits in the order of ``splits``: of each its name, then its
    examples in order. Arrays in memory enter as dtype, shape and little-endian bytes in C order
    (integers 0 ... num_values-1 as uint8, or int32 above 256 values; continuous values as float64
    in the source's own units); images that stay encoded enter as the SHA-256 of each file's bytes.
    """

    name: str
    """Short name of the data."""
    version: str
    """Which release, and how it was split and prepared."""
    kind: Literal["image", "vector"]
    """``image`` when an example is (channels, height, width), otherwise ``vector``."""
    event_shape: tuple[int, ...]
    """Shape of one example."""
    num_values: int | None
    """Number of integer values of discrete data; None for continuous data."""
    low: float | None
    """Least value, in the source's own units; None when not declared."""
    high: float | None
    """Greatest value, in the source's own units; None when not declared."""
    splits: dict[str, int]
    """Number of examples of each split."""
    sha256: str
    """Checksum of the content, as defined above."""
    classes: tuple[str, ...] = ()
    """Declared classes of labeled data; each occurs in every split."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a table, where it has them."""
    offset: tuple[float, ...] = field(default=(), repr=False)
    """b of each dimension (of the flattened example), when standardized."""
    scale: tuple[float, ...] = field(default=(), repr=False)
    """a of each dimension (of the flattened example), when standardized."""

    @property
    def log_scale(self) -> float:
        """Sum of log a_i: nats per example to add to a negative log-likelihood of x to have that of
        v.
        """
        return math.fsum(math.log(value) for value in self.scale)

    def about(self, split: str) -> dict[str, str]:
        """What the protocol of a measurement on a split says of the data."""
        return {"data": self.name, "split": split, "data_sha256": self.sha256}

    def to_source_units(self, x: Tensor) -> Tensor:
        """V of x ``(..., *event)``, in the shape and dtype of x: standardization undone, or low +
        integer level of discrete data.
        """
        if self.num_values is not None:
            return (from_grid(x, self.num_values) + (self.low or 0.0)).to(x.dtype)
        if not self.scale:
            return x
        offset, scale = (
            torch.tensor(values, dtype=torch.float64, device=x.device).reshape(self.event_shape)
            for values in (self.offset, self.scale)
        )
        return (x.double() * scale + offset).to(x.dtype)

    def to_dict(self) -> dict[str, object]:
        """All fields as data that JSON can hold."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields_of: object) -> "DataDescription":
        """The description that :meth:`to_dict` wrote.

        Raises:
            UserError: it is not one.
        """
        try:
            values: dict[str, Any] = dict(fields_of)  # type: ignore[call-overload]
            values = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            }
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise UserError(
                "the model carries no description of its data; save it with info={'data':"
                " description.to_dict()}"
            ) from error


class EventDataset(Dataset[Tensor], ABC):
    """One split: examples by number, single ``(*event)`` or a batch ``(B, *event)``, float32.

    ``__getitems__`` answers a whole batch at once, so a ``DataLoader`` takes
    ``collate_fn=keep_batch``.
    """

    labels: Tensor | None = None
    """Class index of each example, int64, or None."""

    @abstractmethod
    def __len__(self) -> int: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> "EventDataset":
        """Data never change: a copy of a training module shares them."""
        return self

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """The examples ``indices``, ``(B, *event)``, float32."""

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]


def keep_batch(batch: Any) -> Any:
    """The ``collate_fn`` for an :class:`EventDataset`, whose batches are stacked already."""
    return batch


def spread(count: int, limit: int | None = None) -> list[int]:
    """Numbers of all of ``count`` examples, or of ``limit`` of them evenly spread from the first
    on.
    """
    most = count if limit is None else min(limit, count)
    return [index * count // most for index in range(most)]


@dataclass(frozen=True)
class Loaded:
    """What a source has after reading its data."""

    description: DataDescription
    splits: dict[str, EventDataset]


class DataSource(ABC):
    """A data set: where it comes from, its splits, value range and bit depth.

    A kind of source implements :meth:`load`; everything else is the same for all. Sources can be
    pickled; the data do not travel along but are read again where they are needed.
    """

    _loaded: Loaded | None = None

    @abstractmethod
    def load(self) -> Loaded:
        """Read the data and check them; called once, by the first ``describe()`` or ``split()``.

        Raises:
            UserError: the data are missing, damaged or not what was declared.
        """

    def describe(self) -> DataDescription:
        """What the data are; reads them when not yet read."""
        return self._content().description

    def split(self, name: str) -> EventDataset:
        """The examples of one split.

        Raises:
            UserError: there is no split of this name.
        """
        content = self._content()
        if name not in content.splits:
            have = ", ".join(content.splits)
            raise UserError(
                f"{content.description.name} has no split {describe_value(name)}; its splits are:"
                f" {have}"
            )
        return content.splits[name]

    def integers(self, x: Tensor) -> Tensor:
        """Nearest integers 0 ... num_values-1 of values on (or near) the grid, int64, in the shape
        of x.

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
        """V of x ``(..., *event)``: see :meth:`DataDescription.to_source_units`."""
        return self.describe().to_source_units(x)

    def _content(self) -> Loaded:
        if self._loaded is None:
            self._loaded = self.load()
        return self._loaded

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_loaded"}


class ContentHash:
    """The checksum that :class:`DataDescription` defines."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def split(self, name: str) -> None:
        """Begin a split."""
        self._hash.update(f"split {name}\n".encode())

    def array(self, values: np.ndarray) -> None:
        """Add the examples of a split held in one array ``(N, *event)``."""
        values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        self.begin_array(values.dtype.name, values.shape)
        self.rows(values)

    def begin_array(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Begin such an array whose rows come piece by piece."""
        self._hash.update(f"{dtype} {shape}\n".encode())

    def rows(self, values: np.ndarray) -> None:
        """Add rows of that array, contiguous and little-endian."""
        self._hash.update(values.data if values.size else b"")

    def digest(self, sha256: bytes) -> None:
        """Add one example by the SHA-256 of its encoded bytes."""
        self._hash.update(sha256)

    def hexdigest(self) -> str:
        """The checksum so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()
