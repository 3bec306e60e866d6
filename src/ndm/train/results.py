"""The results of a run after its last step: model, evaluation and pictures."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm.condition import ClassCondition
from ndm.data import DataSource, spread
from ndm.device import pick_device
from ndm.errors import UserError
from ndm.evaluation.baselines import histogram_bpd, webp_bpd, xz_bpd
from ndm.evaluation.evaluate import evaluate_bound
from ndm.evaluation.tables import bound_table
from ndm.model import DiffusionModel
from ndm.serialize import write_json
from ndm.train.config import RunParts
from ndm.train.run import Run
from ndm.viz import is_image, write_samples, write_transform

_BASELINE_VALUES, _SAMPLE_VALUES = 8_000_000, 200_000


def write_results(parts: RunParts, run: Run, seed: int) -> dict[str, Any]:
    """Save the trained model, evaluate it and draw pictures.

    Returns:
        The metrics.

    Raises:
        UserError: a file cannot be written, or the folder of the run was removed.
    """
    model, data, settings = parts.model, parts.data, parts.settings
    description = data.describe().to_dict()
    seconds = run.load_weights(model).get("seconds", 0.0)
    model.to(pick_device(settings.accelerator)).eval()
    model.save_pretrained(run.model_path, {"data": description})
    split = settings.evaluation_split
    draws, limit = settings.evaluation_draws, settings.evaluation_limit
    record = evaluate_bound(model, data.split(split), draws=draws, limit=limit, progress=True)
    metrics = {
        "split": split,
        **record,
        **baselines(data, split),
        "data_sha256": description["sha256"],
        "training_steps": settings.steps,
        "training_seconds": round(seconds, 1),
    }
    if not run.checkpoint_path.exists():
        raise run.removed()
    try:
        draw(parts, run, seed)
    except (UserError, torch.OutOfMemoryError) as error:  # still write the metrics
        if isinstance(error.__cause__, OSError):  # as a full disk, after which a rerun draws them
            raise
        print(
            f"ndm: warning: {run.folder} has no pictures: {' '.join(str(error).split())[:200]}",
            file=sys.stderr,
        )
    if not run.checkpoint_path.exists():
        raise run.removed()
    write_json(run.metrics_path, metrics)
    return metrics


def describe_results(metrics: dict[str, Any]) -> str:
    """Return the evaluation as a table for the terminal."""
    lines = [bound_table(metrics)]
    lines += [
        f"{name:<16}{metrics[f'{name}_bpd']:9.4f}  (baseline)"
        for name in ("histogram", "xz", "webp")
        if f"{name}_bpd" in metrics
    ]
    seconds = metrics["training_seconds"]
    lines.append(
        f"{metrics['num_examples']} {metrics['split']} examples, {metrics['parameters']:,}"
        f" parameters, trained {seconds:.0f} s"
    )
    return "\n".join(lines)


def draw(parts: RunParts, run: Run, seed: int) -> None:
    """Draw pictures of samples and of F(x, t) over time.

    Raises:
        UserError: samples are not finite.
    """
    model, test = parts.model, parts.data.split(parts.settings.evaluation_split)
    images = is_image(parts.data.describe().event_shape)
    draw_samples(parts, model, run.folder / "samples.png", seed, progress=True)
    shown = [0, len(test) // 2] if images else range(min(len(test), 2000))
    given = model.given_data(test, list(shown))
    write_transform(run.folder / "transform.png", given, test[shown], seed=seed)


def draw_samples(
    parts: RunParts, model: DiffusionModel, path: Path, seed: int, progress: bool = False
) -> None:
    """Draw a picture of samples of a model: that of the parts, or a copy with other weights.

    Sampling uses the batch size of training, or a larger one if examples are small.

    Raises:
        UserError: samples are not finite.
    """
    data, settings = parts.data, parts.settings
    test, shape = data.split(settings.evaluation_split), data.describe().event_shape
    images = is_image(shape)
    count = (settings.sample_images or 64) if images else 4096
    given, columns = model, None
    if isinstance(model.condition, ClassCondition):  # a class a row
        classes = model.condition.num_classes
        columns = -(-count // classes)
        count = classes * columns
        given = model.given(torch.arange(classes).repeat_interleave(columns))
    elif model.condition is not None:
        numbers = spread(len(test), count)
        count, given = len(numbers), model.given_data(test, numbers)
    part_size = settings.batch_size // settings.accumulate
    samples = given.sample(
        (count, *shape),
        steps=settings.sample_steps,
        seed=seed,
        batch_size=max(part_size, _SAMPLE_VALUES // math.prod(shape)),
        progress=progress,
    )
    write_samples(path, samples, None if images else test[: min(len(test), 4096)], columns)


def baselines(data: DataSource, split: str) -> dict[str, float]:
    """Return the bits/dim of simple coders on a split; empty for continuous data."""
    description = data.describe()
    num_values = description.num_values
    if num_values is None:
        return {}
    limit = max(1, _BASELINE_VALUES // math.prod(description.event_shape))

    def integers(name: str) -> Tensor:
        part = data.split(name)
        return data.integers(part.__getitems__(spread(len(part), limit)))

    train, test = integers("train"), integers(split)
    found = {
        "histogram_bpd": histogram_bpd(train, test, num_values),
        "xz_bpd": xz_bpd(test, num_values),
        "webp_bpd": webp_bpd(test, num_values),
    }
    return {name: value for name, value in found.items() if value is not None}
