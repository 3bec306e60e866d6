"""Sample quality of two models against the number of network evaluations."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ndm.data import DataSource, spread
from ndm.evaluation.tables import plus_minus
from ndm.model import DiffusionModel
from ndm.quality import (
    FeatureNetwork,
    SampleQuality,
    classifier_features,
    compare_features,
    find_classifier,
)
from ndm.random import part_seed
from ndm.reproduce.report import QUALITY, Report
from ndm.reproduce.steps_figures import quality_figure
from ndm.reproduce.steps_plan import MODELS, Plan
from ndm.sample import Method

_SAMPLES, _PICTURES = 40, 41  # random streams
SAMPLERS: Mapping[str, tuple[Method, int, int]] = {
    "ancestral": ("ancestral", 1, 100),
    "DDIM": ("ddim", 1, 100),
    "ODE, Heun": ("ode", 2, 32),
}
"""Samplers: method, evaluations of the predictor per step, and most evaluations.

Heun's method is of second order and converges earlier than the others.
"""


DIGITS = (3, 4, 2, 2)
"""Decimals of the quality measures in tables."""


def quality(
    report: Report, plan: Plan, models: Mapping[str, DiffusionModel], data: DataSource
) -> None:
    """Measure FID, KID, precision and recall against the number of evaluations; figure 2."""
    classifier = find_classifier(
        report.out / "classifier", data, report.seed, progress=True, steps=plan.classifier_steps
    )
    network = classifier_features(classifier)
    train, test = data.split("train"), data.split("test")
    real = network(train.__getitems__(spread(len(train), plan.real)))
    judge = Judge(network, real, data.describe().event_shape, plan.images, report.seed)
    held_out = network(test.__getitems__(spread(len(test), plan.images)))
    reference = report.cache("quality-test-images", lambda: judge.compare(held_out).to_dict())
    curves = _measure_curves(report, plan, judge, models)
    matched = {"real test images": reference}
    steps, same_size = plan.evaluations[-1], replace(judge, images=reference["generated_images"])
    for number, (name, model) in enumerate(models.items()):
        seed = part_seed(report.seed, _SAMPLES, number, plan.sets)
        matched[f"{name}, ancestral, {steps} evaluations"] = report.cache(
            f"quality-{name}-matched".lower(),
            partial(same_size.sample, model, "ancestral", steps, seed),
        )
    numbers = {
        "classifier": classifier.info,
        "features_sha256": network.sha256,
        "real": f"{len(real)} of {len(train)} train images",
        "test_images": reference,
        "as_many_samples_as_test_images": matched,
        "samplers": curves,
    }
    report.add_number("quality", numbers)
    alike = reference["generated_images"] == plan.images
    caption = (
        f"Quality of {plan.images} samples against {len(real)} train images, mean of {plan.sets}"
        " sets; bars: range of the sets"
    )
    caption += ". Dotted: as many real test images" if alike else ""
    report.figure("quality", quality_figure(curves, reference if alike else None), caption)
    report_quality(report, plan, curves, numbers)
    if not report.smoke:
        _expect_quality(report, curves, numbers)


@dataclass(frozen=True)
class Judge:
    """The real images that samples are compared with."""

    network: FeatureNetwork
    real: Tensor
    """Features of real images."""
    event_shape: tuple[int, ...]
    images: int
    """Samples per set."""
    seed: int
    """Seed of the subsets for KID."""

    def compare(self, features: Tensor) -> SampleQuality:
        """Return the quality of images from their features."""
        return compare_features(
            self.real, features, self.network, kid_subsets=20, kid_subset_size=500, seed=self.seed
        )

    def sample(
        self, model: DiffusionModel, method: Method, steps: int, seed: int
    ) -> dict[str, Any]:
        """Draw one set of samples; return its quality and its cost."""
        started = time.perf_counter()
        with count_evaluations(model) as count:
            samples = model.sample(
                (self.images, *self.event_shape),
                method,
                seed=seed,
                steps=steps,
                batch_size=256,
                progress=True,
            )
        seconds = time.perf_counter() - started
        costs = {f"{part}_evaluations": number / self.images for part, number in count.items()}
        return {
            **self.compare(self.network(samples)).to_dict(),
            **costs,
            "seed": seed,
            "seconds": round(seconds, 2),
        }


def _measure_curves(
    report: Report, plan: Plan, judge: Judge, models: Mapping[str, DiffusionModel]
) -> dict[str, list[dict[str, Any]]]:
    """Measure sample quality for each model and sampler against the number of evaluations."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for number, (name, model) in enumerate(models.items()):
        for sampler, (method, cost, most) in SAMPLERS.items():
            points = curves.setdefault(f"{name}, {sampler}", [])
            for evaluations in (n for n in plan.evaluations if n % cost == 0 and n <= most):
                sets, steps = [], evaluations // cost
                for index in range(plan.sets):
                    seed = part_seed(report.seed, _SAMPLES, number, index)
                    key = f"quality-{name}-{method}-{evaluations}-{index}".lower()
                    compute = partial(judge.sample, model, method, steps, seed)
                    sets.append(report.cache(key, compute))
                points.append({"evaluations": evaluations, "steps": steps, "sets": sets})
    return curves


@contextlib.contextmanager
def count_evaluations(model: DiffusionModel) -> Iterator[dict[str, int]]:
    """Count evaluations of the networks of the predictor and of F, one per example."""
    count = {"predictor": 0, "transform": 0}

    def counter(part: str) -> Any:
        def add(_: nn.Module, inputs: Sequence[Any], __: Any) -> None:
            count[part] += len(inputs[0])

        return add

    parts = {
        "predictor": getattr(getattr(model, "predictor", None), "network", None),
        "transform": getattr(model.transform, "network", None),
    }
    hooks = [
        module.register_forward_hook(counter(part))
        for part, module in parts.items()
        if isinstance(module, nn.Module)
    ]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def report_quality(
    report: Report,
    plan: Plan,
    curves: Mapping[str, list[dict[str, Any]]],
    numbers: Mapping[str, Any],
) -> None:
    """Add tables of sample quality to the page."""
    info, reference = numbers["classifier"], numbers["test_images"]
    report.text(
        f"Features: a classifier of {info['data']}, test accuracy {info['accuracy']['test']:.3f},"
        f" seed {info['seed']}, sha256 {info['sha256'][:12]}; d = {reference['dims']},"
        f" standardized. Real: {numbers['real']}; {plan.sets} sets of {plan.images} samples per"
        " setting. The samplers and budgets of a model share the initial latents of each set;"
        " different models do not. One training run each."
    )
    report.text(
        f"Real test images as a reference, and as many samples ({reference['generated_images']}),"
        " since all four measures depend on the number of images:"
    )
    report.quality_table(numbers["as_many_samples_as_test_images"], DIGITS)
    used = {point["evaluations"] for points in curves.values() for point in points}
    budgets = [evaluations for evaluations in plan.evaluations if evaluations in used]
    for (title, key), digits in zip(QUALITY.items(), DIGITS, strict=True):
        report.text(
            f"{title}, mean ± half the range of the sets (for two sets, the standard error),"
            " against evaluations of the predictor per image:"
        )
        rows = []
        for name, points in curves.items():
            cells = {
                point["evaluations"]: _mean_and_range([one[key] for one in point["sets"]], digits)
                for point in points
            }
            rows.append([name, *(cells.get(budget, "") for budget in budgets)])
        report.table(["", *(str(budget) for budget in budgets)], rows)
    report.text(
        "Network evaluations per image, as counted (F with its time derivative is one evaluation"
        " for the ODE):"
    )
    rows = [[name, *_costs(points[-1])] for name, points in curves.items()]
    report.table(["", "steps", "predictor", "F"], rows)


def _expect_quality(
    report: Report, curves: Mapping[str, list[dict[str, Any]]], numbers: Mapping[str, Any]
) -> None:
    for evaluations in (8, 100):
        ddpm, ndm = (_mean_fid(curves[f"{name}, ancestral"], evaluations) for name in MODELS)
        text = f"FID of NDM over that of DDPM, ancestral, {evaluations} evaluations"
        report.expect(text, ndm / ddpm, 1.0)
    ddpm_quality, ndm_quality = (
        quality
        for name, quality in numbers["as_many_samples_as_test_images"].items()
        if name.startswith(tuple(MODELS))
    )
    count = numbers["test_images"]["generated_images"]
    text = f"the same ratio, 100 evaluations, for {count} other samples"
    report.expect(text, ndm_quality["fid"] / ddpm_quality["fid"], 1.0)
    best = {
        name: min(
            _mean_fid(points, 8) for key, points in curves.items() if key.startswith(f"{name},")
        )
        for name in MODELS
    }
    text = "FID of NDM over that of DDPM, best sampler, 8 evaluations"
    report.expect(text, best["NDM"] / best["DDPM"], 1.0)


def _mean_and_range(values: Sequence[float], digits: int) -> str:
    return plus_minus(statistics.fmean(values), (max(values) - min(values)) / 2, digits)


def _costs(point: Mapping[str, Any]) -> list[str]:
    return [
        str(point["steps"]),
        *(f"{point['sets'][0][f'{part}_evaluations']:g}" for part in ("predictor", "transform")),
    ]


def _mean_fid(points: Sequence[Mapping[str, Any]], evaluations: int) -> float:
    return statistics.fmean(
        one["fid"]
        for point in points
        if point["evaluations"] == evaluations
        for one in point["sets"]
    )


def pictures(
    report: Report, plan: Plan, models: Mapping[str, DiffusionModel], data: DataSource
) -> dict[str, dict[int, Tensor]]:
    """Draw samples of one seed for each model, sampler and number of evaluations."""
    found: dict[str, dict[int, Tensor]] = {}
    shape, seed = data.describe().event_shape, part_seed(report.seed, _PICTURES)
    for name, model in models.items():
        for sampler, (method, cost, _) in SAMPLERS.items():
            row = found.setdefault(f"{name}, {sampler}", {})
            for evaluations in (n for n in plan.pictures if n % cost == 0):
                row[evaluations] = model.sample(
                    (plan.rows * 8, *shape),
                    method,
                    seed=seed,
                    steps=evaluations // cost,
                    batch_size=256,
                )
    return found
