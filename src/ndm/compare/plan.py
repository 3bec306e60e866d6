r"""Rows of a comparison, and the sizes of their models.

A comparison is a YAML file. A row lists the values that it overrides in the base, with the names of
the options of ``ndm train --config BASE``:

.. code-block:: yaml

    base: digits.yaml            # relative to this file
    rows:
      VDM: {model.transform: ndm.Identity}
      NDM, separable: {model.transform: ndm.SeparableTransform, model.transform.network.outputs: 4}
    widen: VDM                   # row to widen; default: the first with F = identity
    width: model.predictor.network.channels   # default: channels (U-Net) or hidden (MLP)

=================  ====================================================================
budget             shared by all rows
=================  ====================================================================
``steps``          optimizer steps
``seconds``        training time: steps = seconds / (measured seconds per step)
``parameters``     optimizer steps and parameters: every row is widened to the largest
=================  ====================================================================

All rows also share the data and the batch size. The row ``widen`` is the baseline. If it is
smaller than the largest row, a widened copy of it becomes the baseline. :mod:`ndm.compare.budget`
measures the seconds per step.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ndm.errors import UserError, check_choice, describe_value
from ndm.model import DiffusionModel
from ndm.train.config import Overrides, RunConfig, RunParts, find_config
from ndm.train.yaml_reader import read_yaml
from ndm.transform import Identity

Budget = Literal["steps", "seconds", "parameters"]
WIDENED = "{name}, widened"
KEYS = ("base", "rows", "widen", "width")
SHARED = ("data", "train.steps", "train.batch_size", "train.accumulate")
"""Values that a row may not override: all rows share them, or the budget sets them."""
_WIDEST = 4096


@dataclass(frozen=True)
class Row:
    """One configuration of a comparison."""

    name: str
    config: RunConfig
    """The configuration of its runs, except for the seed."""
    parameters: int = 0
    """Number of parameters of the model."""
    baseline: bool = False
    """Whether this is the conventional diffusion model to compare with, as large as the largest."""

    @property
    def folder(self) -> str:
        """The name in paths."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "row"


def read_rows(
    path: Path, overrides: Overrides = (), base: Path | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """Read the rows of a comparison file.

    Args:
        path: path or name of the file.
        overrides: overrides of every row; those of the row come later.
        base: configuration to use instead of the base in the file.

    Returns:
        The rows, and the other values of the file (``widen``, ``width``).

    Raises:
        UserError: the file is missing, invalid or incomplete.
    """
    path = find_config(str(path))
    content = read_yaml(path)
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("base"), str)
        or not isinstance(content.get("rows"), dict)
    ):
        raise UserError(
            f"{path} is not a comparison: give base (a configuration of ndm train) and rows (for"
            " each a name and its overrides)"
        )
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; choose from {', '.join(KEYS)}")
    base = base or path.parent / content["base"]
    if not base.is_file():
        raise UserError(
            f"{path}: the base {base} does not exist; give its path relative to {path.name}"
        )
    checked = {str(name): _check_row(path, name, row) for name, row in content["rows"].items()}
    if not checked or any(";" in name for name in checked):
        raise UserError(f"{path}: give at least one row, and names without semicolons")
    shared = RunConfig.read(base, overrides)
    rows = [Row(name, _configure(shared, name, row)) for name, row in checked.items()]
    return rows, {key: content[key] for key in ("widen", "width") if key in content}


def _check_row(path: Path, name: object, row: object) -> dict[str, object]:
    """Return the overrides of a row after checking them."""
    if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
        raise UserError(
            f"{path}: the row {name!r} is {describe_value(row)}; give overrides such as"
            " {model.transform: ndm.Identity}, or {}"
        )
    for key, value in row.items():
        if key.split(".")[0] not in ("model", "train") or any(
            key == shared or key.startswith(f"{shared}.") for shared in SHARED
        ):
            raise UserError(
                f"{path}: the row {name!r} sets {key!r}; a row sets keys that begin with model. or"
                f" train., but not {', '.join(SHARED[1:])}, which all rows share: set those in"
                " the base"
            )
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(
                f"{path}: the row {name!r} sets {key!r} to {describe_value(value)}; give text,"
                " numbers, lists or mappings"
            ) from error
    return dict(row)


def _configure(shared: RunConfig, name: str, overrides: Overrides) -> RunConfig:
    """Return the configuration of a row.

    Raises:
        UserError: an override is wrong.
    """
    try:
        return shared.override(overrides)
    except UserError as error:
        raise UserError(f"the row {name!r}: {error}") from error


def build(row: Row) -> RunParts:
    """Build the model, the data and the settings of a row.

    Raises:
        UserError: they cannot be built.
    """
    try:
        return row.config.build()
    except UserError as error:
        raise UserError(f"the row {row.name!r}: {error}") from error


def widened(row: Row, target: int, width: str | None = None) -> Row:
    """Return the row with a wider predictor, of at least ``target`` parameters.

    The width is the smallest even one that suffices.

    Args:
        row: the row.
        target: number of parameters to reach.
        width: dotted key of the width; by default ``channels`` or ``hidden`` of the predictor.

    Raises:
        UserError: there is no such width, or it cannot reach the target.
    """
    candidates = (
        [width] if width else ["model.predictor.network.channels", "model.predictor.network.hidden"]
    )
    for key in candidates:
        start = row.config.get(key)
        if isinstance(start, int):
            break
    else:
        raise UserError(
            f"the row {row.name!r} has no {' or '.join(candidates)} to widen; set width to"
            " the key of another integer in the comparison file"
        )
    for value in range(start + 2 - start % 2, _WIDEST, 2):
        wider = replace(row, config=_configure(row.config, row.name, {key: value}))
        wider = replace(wider, parameters=build(wider).num_parameters)
        if wider.parameters >= target:
            return wider
    raise UserError(
        f"the row {row.name!r} does not reach {target:,} parameters with {key} below {_WIDEST};"
        " set width to another key in the comparison file"
    )


def plan_rows(rows: list[Row], extra: Mapping[str, Any], budget: Budget) -> list[Row]:
    """Return all rows with their sizes and the baseline.

    The baseline is the plain diffusion, or a widened copy of it if it is not the largest. With the
    budget ``parameters``, every row is widened to the largest.

    Raises:
        UserError: the row to widen does not exist, or two rows have the same folder name.
    """
    check_choice("budget", budget, get_args(Budget))
    parts = [build(row) for row in rows]
    models = [one.model for one in parts]
    rows = [
        replace(row, parameters=one.num_parameters) for row, one in zip(rows, parts, strict=True)
    ]
    largest, chosen = max(row.parameters for row in rows), _plain(rows, models, extra.get("widen"))
    planned = []
    for row in rows:
        small = row.parameters < largest
        if budget == "parameters":
            row = widened(row, largest, extra.get("width")) if small else row
            planned.append(replace(row, baseline=row.name == chosen.name))
        elif row is chosen and small:
            wider = widened(row, largest, extra.get("width"))
            planned += [row, replace(wider, name=WIDENED.format(name=row.name), baseline=True)]
        else:
            planned.append(replace(row, baseline=row is chosen))
    if len({row.folder for row in planned}) < len(planned):
        raise UserError(
            f"two of the rows {', '.join(repr(row.name) for row in planned)} have names that differ"
            " only in case and punctuation; rename one (the row"
            f" {WIDENED.format(name=chosen.name)!r} is added by ndm compare)"
        )
    return planned


def _plain(rows: list[Row], models: list[DiffusionModel], name: str | None) -> Row:
    """Return the row called ``name``; without a name, the first whose F is the identity."""
    for row, model in zip(rows, models, strict=True):
        if row.name == name if name is not None else isinstance(model.transform, Identity):
            return row
    if name is not None:
        raise UserError(
            f"widen: there is no row {name!r}; choose one of {', '.join(row.name for row in rows)}"
        )
    raise UserError(
        "a fair comparison needs a plain diffusion as large as the largest model: add a row with"
        " model.transform: ndm.Identity, or set widen to the row to widen"
    )
