"""The option ``--condition`` of commands that sample: classes, or known columns of a table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ndm.condition import ClassCondition, ImageCondition, VectorCondition
from ndm.data import DataDescription, EventDataset
from ndm.data.columns import listed
from ndm.errors import UserError
from ndm.guidance import Guide, guided
from ndm.model import DiffusionModel
from ndm.readers import read_text
from ndm.writing import shortened

NOTHING = "nothing"
"""The condition of samples of p(x)."""


@dataclass(frozen=True)
class Wanted:
    """The samples that are wanted of a conditional model."""

    count: int
    """Their number."""
    given: Tensor | None = None
    """The condition of each, ``(count, ...)``; None for p(x), or for a model that takes none."""
    classes: Tensor | None = None
    """The class of each, ``(count,)``, if the condition is one."""
    columns: int | None = None
    """The number of each class, if they follow one another: the columns of a picture."""


def wanted(
    text: str | None,
    n: int,
    model: DiffusionModel,
    description: DataDescription,
    seed: int,
    train: Callable[[], EventDataset],
) -> Wanted:
    """Return the conditions of samples.

    Args:
        text: names of classes, or the numbers of known columns, with commas between them, a file
            with one of them in a line, :data:`NOTHING`, or None for conditions as frequent as in
            training.
        n: number of samples, of each class if classes are given.
        model: the model.
        description: description of the data of the model.
        seed: seed of the conditions, if they are drawn.
        train: returns the train split, if conditions are drawn from it.

    Raises:
        UserError: the model does not take this condition, or a class is unknown.
    """
    if model.condition is None:
        if text is not None:
            raise UserError("condition: this model takes none; train one with model.condition")
        return Wanted(n)
    if text == NOTHING or (text is None and model.condition.masks):
        model.condition.encode(None)  # raises an error if the model has no p(x)
        return Wanted(n)
    columns = isinstance(model.condition, VectorCondition) and bool(description.known_columns)
    if text is None and (columns or isinstance(model.condition, ImageCondition)):
        return _drawn(n, seed, train)
    if text is not None and columns:
        return _vectors(text, n, description)
    names = [str(name) for name in description.classes]
    if not isinstance(model.condition, ClassCondition) or not names:
        raise UserError(
            "this model takes a condition that the command line cannot give: sample from Python by"
            " model.given(c).sample(n), or give --condition nothing if it has p(x)"
        )
    if text is None:
        shares = description.frequencies or (1.0,) * len(names)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=generator)
        return Wanted(n, drawn, drawn)
    if _is_file(text):
        lines = read_text(Path(text)).splitlines()
        classes = [_index(line.strip(), names, text) for line in lines if line.strip()]
        if not classes:
            raise UserError(f"condition={text}: the file is empty; write one class in each line")
        return Wanted(len(classes), torch.tensor(classes), torch.tensor(classes))
    classes = [_index(name.strip(), names, "condition") for name in text.split(",")]
    each = torch.tensor(classes).repeat_interleave(n)
    return Wanted(len(each), each, each, n)


def bound_to(asked: Wanted, model: DiffusionModel, guidance: float, guide: Guide) -> DiffusionModel:
    """Return the model given the conditions of the samples.

    Raises:
        UserError: the model cannot be guided so, or there is nothing to guide by.
    """
    if asked.given is None:
        if guidance != 1:
            raise UserError(
                "guidance needs a condition: use a model that takes one, and not --condition"
                " nothing"
            )
        return model
    model = model.given(asked.given)
    guided(model.reverse_process, model.condition, guidance, guide)  # raises errors before sampling
    return model


def _drawn(n: int, seed: int, train: Callable[[], EventDataset]) -> Wanted:
    """Return the conditions of random training examples."""
    rows, generator = train(), torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(rows), (n,), generator=generator).tolist()
    return Wanted(n, rows.conditions(drawn))


def _vectors(text: str, n: int, description: DataDescription) -> Wanted:
    """Return known columns, in the units of the data, as the model takes them."""
    columns = description.known_columns
    in_file = _is_file(text)
    lines = read_text(Path(text)).splitlines() if in_file else [text]
    vectors = []
    for line in filter(None, (line.strip() for line in lines)):
        try:
            vector = [float(cell) for cell in line.split(",")]
        except ValueError:
            vector = []
        if len(vector) != len(columns) or not all(math.isfinite(value) for value in vector):
            raise UserError(
                f"condition: {shortened(line)!r} are not the numbers of the known columns"
                f" {listed(columns, 80)}: give one of each, with commas between them, in each line"
                " of a file"
            )
        vectors.append(vector)
    if not vectors:
        raise UserError(
            f"condition={text}: the file is empty; write the known columns in each line"
        )
    values = description.known_to_model(torch.tensor(vectors, dtype=torch.float64))
    given = values if in_file else values.expand(n, -1)
    return Wanted(len(given), given)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name
        return False


def _index(name: str, names: list[str], where: str) -> int:
    if name not in names:
        raise UserError(
            f"{where}: {shortened(name)!r} is not a class of the data: give some of"
            f" {listed(names, 80)} with commas between them, a file with one in each line, or"
            f" {NOTHING}"
        )
    return names.index(name)
