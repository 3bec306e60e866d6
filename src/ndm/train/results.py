"""What a run writes after its last step: the model, the evaluation, the pictures."""

import math
import sys
from typing import Any

import torch

from ndm.data import DataSource
from ndm.device import pick_device
from ndm.errors import UserError
from ndm.evaluation.baselines import histogram_bpd, xz_bpd
from ndm.evaluation.evaluate import evaluate_bound
from ndm.evaluation.tables import bound_table
from ndm.serialize import write_json
from ndm.train.config import RunParts
from ndm.train.run import Run
from ndm.viz import is_image, write_samples, write_transform

_BASELINE_VALUES, _SAMPLE_VALUES = 8_000_000, 200_000


def write_results(parts: RunParts, run: Run, seed: int) -> dict[str, Any]:
    """Save the trained model, evaluate it, draw pictures.

    Returns:
        The metrics.
    """
    model, data, settings = parts.model, parts.data, parts.settings
    description = data.describe().to_dict()
    seconds = run.load_weights(model).get("seconds", 0.0)
    model.to(pick_device(settings.accelerator)).eval()
    model.save_pretrained(run.model_path, {"data": description})
    test = data.split(settings.evaluation_split)
    record = evaluate_bound(
        model, test, draws=settings.evaluation_draws, limit=settings.evaluation_limit, progress=True
    )
    metrics = {
        "split": settings.evaluation_split,
        **record,
        **baselines(data, settings.evaluation_split),
    }
    metrics |= {
        "data_sha256": description["sha256"],
        "training_steps": settings.steps,
        "training_seconds": round(seconds, 1),
    }
    try:
        draw(parts, run, seed)
    except (UserError, torch.OutOfMemoryError) as error:  # the numbers matter more
        print(
            f"ndm: warning: {run.folder} has no pictures: {' '.join(str(error).split())[:200]}",
            file=sys.stderr,
        )
    write_json(run.metrics_path, metrics)
    return metrics


def describe_results(metrics: dict[str, Any]) -> str:
    """The evaluation as a table for the terminal."""
    lines = [bound_table(metrics)]
    lines += [
        f"{name + ' (baseline)':<20}{metrics[f'{name}_bpd']:9.4f}"
        for name in ("histogram", "xz")
        if f"{name}_bpd" in metrics
    ]
    seconds = metrics["training_seconds"]
    lines.append(
        f"{metrics['num_examples']} {metrics['split']} examples, {metrics['parameters']:,}"
        f" parameters, trained {seconds:.0f} s"
    )
    return "\n".join(lines)


def draw(parts: RunParts, run: Run, seed: int) -> None:
    """Draw samples and F(x, t) over time, with no more images at once than a training batch has,
    unless they are small.

    Raises:
        UserError: samples are not finite.
    """
    model, data, settings = parts.model, parts.data, parts.settings
    test, shape = data.split(settings.evaluation_split), data.describe().event_shape
    images = is_image(shape)
    count, size = (
        (settings.sample_images or 64) if images else 4096,
        settings.batch_size // settings.accumulate,
    )
    samples = model.sample(
        (count, *shape),
        steps=settings.sample_steps,
        seed=seed,
        batch_size=max(size, _SAMPLE_VALUES // math.prod(shape)),
        progress=True,
    )
    write_samples(
        run.folder / "samples.png",
        samples,
        None if images else test.__getitems__(range(min(len(test), 4096))),
    )
    shown = [0, len(test) // 2] if images else range(min(len(test), 2000))
    write_transform(run.folder / "transform.png", model, test.__getitems__(shown), seed=seed)


def baselines(data: DataSource, split: str) -> dict[str, float]:
    """Bits/dim of simple coders on a split of discrete data; empty for continuous data."""
    num_values = data.describe().num_values
    if num_values is None:
        return {}
    train, test = (data.split(name) for name in ("train", split))
    most = max(1, _BASELINE_VALUES // math.prod(data.describe().event_shape))
    first, second = (
        data.integers(part.__getitems__(range(min(len(part), most)))) for part in (train, test)
    )
    return {
        "histogram_bpd": histogram_bpd(first, second, num_values),
        "xz_bpd": xz_bpd(second, num_values),
    }
