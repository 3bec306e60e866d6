r"""What a comparison consists of: rows, a width for the widened ones, a number of steps for each.

A comparison is a YAML file. Every row is what would be given to ``ndm train --config BASE`` after it:

.. code-block:: yaml

    base: digits.yaml            # relative to this file
    rows:
      VDM: {model.transform: ndm.Identity}
      NDM, separable: {model.transform: ndm.SeparableTransform, model.transform.network.outputs: 4}
    widen: VDM                   # the row that gets one more, as large as the largest; by default the first whose F is the identity
    width: model.predictor.network.channels   # the number that makes it larger; by default channels (U-Net) or hidden (MLP) of the predictor

=================  ====================================================================
budget             what all rows share
=================  ====================================================================
``steps``          optimiser steps
``seconds``        training time: steps = seconds / (measured seconds of a step)
``parameters``     optimiser steps and parameters: every row is widened to the largest
=================  ====================================================================

Seconds of a step are measured for all rows in turn, round after round in one process, so that a slow spell of the machine hits each alike; medians
are kept, and written down, so that an interrupted comparison goes on with the same numbers.
"""

import json
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from jsonargparse import Namespace
from tqdm import tqdm

from ndm.commands.parsing import build, parse
from ndm.commands.train import train_parser
from ndm.data import DataSource
from ndm.errors import UserError, describe_value
from ndm.model import NDM
from ndm.train.settings import TrainSettings

Budget = Literal["steps", "seconds", "parameters"]
WIDENED = "{name}, widened"
KEYS = ("base", "rows", "widen", "width")
_ROUNDS, _WARM = 7, 2
_WIDEST = 4096


@dataclass(frozen=True)
class Row:
    """One configuration of a comparison."""

    name: str
    words: tuple[str, ...]
    """What ``ndm train`` is given, without ``--out`` and ``--seed``."""
    parameters: int = 0
    """Number of parameters of the model."""

    @property
    def folder(self) -> str:
        """The name as part of a path."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "row"


def read_rows(path: Path, overrides: tuple[str, ...] = ()) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a comparison file.

    Args:
        path: the file.
        overrides: words for every row, before those of the row.

    Returns:
        The rows, and what else the file says (``widen``, ``width``).

    Raises:
        UserError: the file is missing, damaged or incomplete.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the file of a comparison, such as configs/compare-digits.yaml") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(content, dict) or not isinstance(content.get("base"), str) or not isinstance(content.get("rows"), dict):
        raise UserError(f"{path} is no comparison: it needs base (a configuration of ndm train) and rows (a name and its overrides each)")
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        raise UserError(f"{path}: {unknown[0]!r} is not known; choose from {', '.join(KEYS)}")
    base = path.parent / content["base"]
    if not base.is_file():
        raise UserError(f"{path}: the base {base} does not exist; give its path relative to {path.name}")
    rows = [Row(str(name), ("--config", str(base), *overrides, *_words(path, name, row))) for name, row in content["rows"].items()]
    if len({row.folder for row in rows}) < len(rows) or not rows:
        raise UserError(f"{path}: give at least one row, and names that differ in more than case and punctuation")
    return rows, {key: content[key] for key in ("widen", "width") if key in content}


def _words(path: Path, name: object, row: object) -> list[str]:
    """The overrides of a row as words of ``ndm train``."""
    if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
        raise UserError(
            f"{path}: the row {name!r} is {describe_value(row)}; give overrides such as {{model.transform: ndm.Identity}}, or {{}}"
        )
    words = []
    for key, value in row.items():
        if key.split(".")[0] not in ("data", "model", "train"):
            raise UserError(f"{path}: the row {name!r} sets {key!r}; overrides begin with data., model. or train.")
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def configuration(row: Row) -> Namespace:
    """The parsed configuration of a row.

    Raises:
        UserError: an override is wrong.
    """
    try:
        return parse(train_parser(), [*row.words, "--out", "unused"])
    except UserError as error:
        raise UserError(f"the row {row.name!r}: {error}") from error


def make(row: Row) -> tuple[NDM, DataSource, TrainSettings]:
    """The model, the data and the settings of a row."""
    try:
        parts = build(train_parser(), configuration(row))
    except UserError as error:
        raise UserError(f"the row {row.name!r}: {error}") from error
    return parts.model, parts.data, parts.train


def size(row: Row) -> int:
    """Number of parameters of a row's model."""
    return sum(parameter.numel() for parameter in make(row)[0].parameters())


def widened(row: Row, target: int, width: str | None = None) -> Row:
    """The row with a wider predictor: the least even width whose number of parameters is at least ``target``.

    Args:
        row: the row.
        target: the wanted number of parameters.
        width: dotted key of the number to raise.

    Raises:
        UserError: the predictor has no known width.
    """
    config = configuration(row)
    candidates = [width] if width else ["model.predictor.network.channels", "model.predictor.network.hidden"]
    for key in candidates:
        start = config.get(key.replace("predictor.network.", "predictor.init_args.network.init_args.")) or config.get(key)
        if isinstance(start, int):
            break
    else:
        raise UserError(
            f"the row {row.name!r} has no {' or '.join(candidates)} to widen; name the number in the file of the comparison: width"
        )
    for value in range(start + 2 - start % 2, _WIDEST, 2):
        words = (*row.words, f"--{key}", str(value))
        wider = Row(row.name, words, size(Row(row.name, words)))
        if wider.parameters >= target:
            return wider
    raise UserError(
        f"the row {row.name!r} does not reach {target:,} parameters with {key} below {_WIDEST}; name another number to raise: width"
    )


def plan_rows(rows: list[Row], extra: Mapping[str, Any], budget: Budget) -> list[Row]:
    """All rows with their sizes; one more, widened to the largest, after the plain diffusion.

    With the budget ``parameters`` every row is widened to the largest instead.

    Raises:
        UserError: the row to widen is not there.
    """
    if budget not in get_args(Budget):
        raise UserError(f"budget={budget!r} is not known: choose one of {', '.join(get_args(Budget))}")
    rows = [Row(row.name, row.words, size(row)) for row in rows]
    largest = max(row.parameters for row in rows)
    if budget == "parameters":
        return [row if row.parameters == largest else widened(row, largest, extra.get("width")) for row in rows]
    name = extra.get("widen")
    if name is None:
        name = next((row.name for row in rows if type(make(row)[0].transform).__name__ == "Identity"), None)
    chosen = next((row for row in rows if row.name == name), None)
    if chosen is None:
        raise UserError(
            f"there is no row {name!r} to widen; a fair comparison needs a plain diffusion as large as the largest model: add a row with "
            "model.transform: ndm.Identity"
            if name is None
            else f"widen: there is no row {name!r}; choose one of {', '.join(row.name for row in rows)}"
        )
    if chosen.parameters == largest:
        return rows
    wider = widened(chosen, largest, extra.get("width"))
    place = rows.index(chosen) + 1
    return [*rows[:place], Row(WIDENED.format(name=chosen.name), wider.words, wider.parameters), *rows[place:]]


def step_seconds(rows: list[Row], progress: bool = False) -> dict[str, float]:
    """Seconds of an optimiser step of each row, by its name: the median of several, all rows in turn."""
    steps = {}
    for row in rows:
        model, data, settings = make(row)
        train = data.split("train")
        x = train.__getitems__([index % len(train) for index in range(settings.batch_size)])
        optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate)

        def step(model: NDM = model, x: torch.Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> float:
            started = time.perf_counter()
            optimizer.zero_grad()
            model.bound(x).loss.mean().backward()
            optimizer.step()
            return time.perf_counter() - started

        steps[row.name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in tqdm(range(_WARM + _ROUNDS), desc="timing steps", unit="round", disable=not progress, delay=1, leave=False):
        for name, step in steps.items():
            seconds = step()
            if index >= _WARM:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}
