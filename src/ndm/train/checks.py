"""Checks and a summary of a run before training."""

from pathlib import Path

import torch

from ndm.condition import ClassCondition
from ndm.data import DataDescription
from ndm.decoder import NetworkDecoder
from ndm.errors import UserError
from ndm.model import DiffusionModel
from ndm.train.config import RunParts
from ndm.viz import is_image


def check_parts(parts: RunParts) -> None:
    """Check that model, data and settings fit together.

    Raises:
        UserError: they do not.
    """
    model, settings = parts.model, parts.settings
    description = parts.data.describe()
    _check_decoder(model, description)
    _check_condition(parts, description)
    if settings.horizontal_flips and not is_image(description.event_shape):
        raise UserError(
            f"train.horizontal_flips: {description.name} holds no images but examples of shape"
            f" {tuple(description.event_shape)}; set it to false"
        )
    splits = ["train", settings.evaluation_split]
    if settings.validate_every:
        splits.append(settings.validation_split)
    for split in splits:
        if len(parts.data.split(split)) == 0:
            raise UserError(f"{description.name}: the split {split!r} is empty")
    # One bound shows whether the shapes of the networks fit, before Lightning sets up.
    state = torch.random.get_rng_state()
    model.eval()
    with torch.no_grad():
        train = parts.data.split("train")
        model.given_data(train, [0, 0]).bound(train.__getitems__([0, 0]), draws=1)
    model.train()
    torch.random.set_rng_state(state)


def _check_decoder(model: DiffusionModel, description: DataDescription) -> None:
    """Check that the decoder fits the values of the data.

    Raises:
        UserError: it does not.
    """
    name, num_values, decoder = description.name, description.num_values, model.decoder
    key = "model.decoder"  # where the grid of values is set
    if isinstance(decoder, NetworkDecoder):
        key += ".init_args.base"
    if num_values is None:
        if decoder.discrete:
            raise UserError(
                f"{name} is continuous but the decoder is discrete; use {key}=ndm.GaussianDecoder"
            )
    elif not decoder.discrete:
        raise UserError(
            f"{name} is discrete but the decoder is continuous, so the bound would be a density;"
            f" use {key}=ndm.DiscretizedGaussian with num_values={num_values}, or read the data"
            " without num_values"
        )
    elif decoder.values is not None and len(decoder.values) != num_values:
        raise UserError(
            f"{name} has {num_values} values but the decoder has {len(decoder.values)}; set"
            f" {key}.init_args.num_values={num_values}"
        )


def _check_condition(parts: RunParts, description: DataDescription) -> None:
    """Check that the data have the conditions that the model takes.

    Raises:
        UserError: they do not.
    """
    condition, name = parts.model.condition, description.name
    if condition is None:
        return
    for split in ("train", parts.settings.evaluation_split):
        known = parts.data.split(split).conditions([0])
        if known is None:
            raise UserError(
                f"model.condition is a {type(condition).__name__}, but the split {split!r} of"
                f" {name} has nothing to condition on: use data with classes, a table with"
                " data.condition, or a model without a condition"
            )
        try:
            condition.encode(known)
        except UserError as error:
            raise UserError(f"{name} does not fit model.condition: {error}") from error
    classes = len(description.classes)
    if isinstance(condition, ClassCondition) and condition.num_classes != classes:
        raise UserError(
            f"{name} has {classes} classes and model.condition has {condition.num_classes}: set"
            f" model.condition.num_classes={classes}, and classes={classes} of the networks that"
            " take it"
        )


def describe(parts: RunParts, folder: Path) -> str:
    """Return a summary of the run about to be trained, in a few lines."""
    model, description, settings = parts.model, parts.data.describe(), parts.settings
    counts = ", ".join(f"{count:,} {name}" for name, count in description.splits.items())
    kind = "real values" if description.num_values is None else f"{description.num_values} values"
    children = dict(model.process.named_children()) | dict(model.named_children())
    shares = {
        name: sum(parameter.numel() for parameter in child.parameters())
        for name, child in children.items()
        if name != "process"
    }
    breakdown = ", ".join(
        f"{name} {count:,} ({count / parts.num_parameters:.0%})"
        for name, count in shares.items()
        if count
    )
    epochs = settings.steps * settings.batch_size / len(parts.data.split("train"))
    lines = {
        "data": (
            f"{description.name}: {counts}; examples of shape {tuple(description.event_shape)},"
            f" {kind}"
        ),
        "source": description.version,
        "model": f"{type(model).__name__}, {parts.num_parameters:,} parameters: {breakdown}",
        "training": (
            f"{settings.steps:,} steps of {settings.batch_size:,} examples ({epochs:.3g} epochs),"
            f" {settings.optimizer}{', horizontal flips' if settings.horizontal_flips else ''}"
        ),
        "machine": (
            f"{settings.accelerator} accelerator, {settings.devices} devices, {settings.precision},"
            f" {torch.get_num_threads()} CPU threads"
        ),
        "folder": str(folder),
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())
