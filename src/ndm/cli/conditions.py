"""The option ``--condition`` of ``ndm sample`` and ``ndm quality``: classes by name."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ndm.condition import ClassCondition
from ndm.data import DataDescription
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
    classes: Tensor | None = None
    """The class of each, ``(count,)``; None for p(x), or for a model that takes no condition."""
    columns: int | None = None
    """The number of each class, if they follow one another: the columns of a picture."""


def wanted(
    text: str | None, n: int, model: DiffusionModel, description: DataDescription, seed: int
) -> Wanted:
    """Return the conditions of samples.

    Args:
        text: names of classes with commas between them, a file with one name in a line,
            :data:`NOTHING`, or None for classes as frequent as in training.
        n: number of samples, of each class if classes are given.
        model: the model.
        description: description of the data of the model.
        seed: seed of the classes, if they are drawn.

    Raises:
        UserError: the model does not take this condition, or a class is unknown.
    """
    if model.condition is None:
        if text is not None:
            raise UserError("condition: this model takes none; train one with model.condition")
        return Wanted(n)
    if text == NOTHING:
        model.condition.encode(None)  # raises an error if the model has no p(x)
        return Wanted(n)
    names = [str(name) for name in description.classes]
    if not isinstance(model.condition, ClassCondition) or not names:
        raise UserError(
            "this model takes a condition that is no class: sample from Python by"
            " model.given(c).sample(n), or give --condition nothing if it has p(x)"
        )
    if text is None:
        shares = description.frequencies or (1.0,) * len(names)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=generator)
        return Wanted(n, drawn)
    if Path(text).is_file():
        lines = read_text(Path(text)).splitlines()
        classes = [_index(line.strip(), names, text) for line in lines if line.strip()]
        if not classes:
            raise UserError(f"condition={text}: the file is empty; write one class in each line")
        return Wanted(len(classes), torch.tensor(classes))
    classes = [_index(name.strip(), names, "condition") for name in text.split(",")]
    return Wanted(n * len(classes), torch.tensor(classes).repeat_interleave(n), n)


def given(asked: Wanted, model: DiffusionModel, guidance: float, guide: Guide) -> DiffusionModel:
    """Return the model given the classes of the samples.

    Raises:
        UserError: the model cannot be guided so, or there is nothing to guide by.
    """
    if asked.classes is None:
        if guidance != 1:
            raise UserError(
                "guidance needs a condition: use a model that takes one, and --condition"
            )
        return model
    model = model.given(asked.classes)
    guided(model.reverse_process, model.condition, guidance, guide)  # raises errors before sampling
    return model


def _index(name: str, names: list[str], where: str) -> int:
    if name not in names:
        raise UserError(
            f"{where}: {shortened(name)!r} is not a class of the data: give some of"
            f" {listed(names, 80)} with commas between them, a file with one in each line, or"
            f" {NOTHING}"
        )
    return names.index(name)
