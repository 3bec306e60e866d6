"""Whether model, data and settings fit together, and what is about to be trained."""

from pathlib import Path

import torch

from ndm.decoder import NetworkDecoder
from ndm.errors import UserError
from ndm.train.config import (
    RunParts,
)


def check_parts(parts: RunParts) -> None:
    """Check that model, data and settings fit together, before training.

    Raises:
        UserError: they do not.
    """
    model, description, settings = parts.model, parts.data.describe(), parts.settings
    place = (
        "model.decoder.init_args.base"
        if isinstance(model.decoder, NetworkDecoder)
        else "model.decoder"
    )  # of the grid
    if description.num_values is None and model.decoder.discrete:
        raise UserError(
            f"{description.name} is continuous but the decoder is discrete; use"
            f" {place}=ndm.GaussianDecoder"
        )
    if description.num_values is not None and not model.decoder.discrete:
        raise UserError(
            f"{description.name} is discrete but the decoder is continuous, and its bound would be"
            f" a density; use {place}=ndm.DiscretizedGaussian with"
            f" num_values={description.num_values}, or read the data without num_values"
        )
    if description.num_values is not None and model.decoder.values is not None:
        have = len(model.decoder.values)
        if have != description.num_values:
            raise UserError(
                f"{description.name} has {description.num_values} values but the decoder {have};"
                f" set {place}.init_args.num_values={description.num_values}"
            )
    for split in (
        "train",
        settings.evaluation_split,
        *([settings.validation_split] if settings.validate_every else []),
    ):
        if len(parts.data.split(split)) == 0:
            raise UserError(f"{description.name}: the split {split!r} is empty")
    # The bound of one example shows whether the networks have the right shapes, before Lightning
    # sets up.
    state = torch.random.get_rng_state()
    model.eval()
    with torch.no_grad():
        model.bound(parts.data.split("train").__getitems__([0, 0]), draws=1)
    model.train()
    torch.random.set_rng_state(state)


def describe(parts: RunParts, folder: Path) -> str:
    """What is about to be trained, in a few lines."""
    model, description, settings = parts.model, parts.data.describe(), parts.settings
    counts = ", ".join(f"{count:,} {name}" for name, count in description.splits.items())
    kind = "real values" if description.num_values is None else f"{description.num_values} values"
    shares = {
        name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()
    }
    shares["transform"] = sum(p.numel() for p in model.transform.parameters())
    shares.pop("process", None)
    of_it = ", ".join(
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
        "model": f"{type(model).__name__}, {parts.num_parameters:,} parameters: {of_it}",
        "training": (
            f"{settings.steps:,} steps of {settings.batch_size:,} examples ({epochs:.3g} epochs),"
            f" {settings.optimizer}"
        ),
        "machine": (
            f"{settings.accelerator} accelerator, {settings.devices} devices, {settings.precision},"
            f" {torch.get_num_threads()} CPU threads"
        ),
        "folder": str(folder),
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())
