"""Quality of samples against the number of network evaluations, for two models."""

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

_SAMPLES, _PICTURES = 40, 41  # streams of noise
SAMPLERS: Mapping[str, tuple[Method, int, int]] = {
    "ancestral": ("ancestral", 1, 100),
    "DDIM": ("ddim", 1, 100),
    "ODE, Heun": ("ode", 2, 32),
}
"""Samplers: method, evaluations of the predictor a step, and most evaluations; Heun's trapezoid is
of second order and done before the others.
"""


DIGITS = (3, 4, 2, 2)
"""Of the measures of sample quality, in a table."""


def quality(
    report: Report, plan: Plan, models: Mapping[str, DiffusionModel], data: DataSource
) -> None:
    """FID, KID, precision and recall against the number of evaluations; figure 2."""
    classifier = find_classifier(
        report.out / "classifier", data, report.seed, progress=True, steps=plan.classifier_steps
    )
    network, train, test = classifier_features(classifier), data.split("train"), data.split("test")
    real = network(train.__getitems__(spread(len(train), plan.real)))
    judge = Judge(network, real, data.describe().event_shape, plan.images, report.seed)
    held_out = network(test.__getitems__(spread(len(test), plan.images)))
    reference = report.cache("quality-test-images", lambda: judge.compare(held_out).to_dict())
    curves: dict[str, list[dict[str, Any]]] = {}
    for number, (name, model) in enumerate(models.items()):
        for way, (method, cost, most) in SAMPLERS.items():
            for evaluations in (n for n in plan.evaluations if n % cost == 0 and n <= most):
                sets = []
                for index in range(plan.sets):
                    seed = part_seed(report.seed, _SAMPLES, number, index)
                    key = f"quality-{name}-{method}-{evaluations}-{index}".lower()
                    sets.append(
                        report.cache(
                            key, partial(judge.sample, model, method, evaluations // cost, seed)
                        )
                    )
                curves.setdefault(f"{name}, {way}", []).append(
                    {"evaluations": evaluations, "steps": evaluations // cost, "sets": sets}
                )
    matched = {"real test images": reference}
    for number, (name, model) in enumerate(models.items()):
        seed, count, steps = (
            part_seed(report.seed, _SAMPLES, number, plan.sets),
            reference["generated_images"],
            plan.evaluations[-1],
        )
        compute = partial(replace(judge, images=count).sample, model, "ancestral", steps, seed)
        matched[f"{name}, ancestral, {steps} evaluations"] = report.cache(
            f"quality-{name}-matched".lower(), compute
        )
    numbers = {
        "classifier": classifier.info,
        "features_sha256": network.sha256,
        "real": f"{len(real)} of {len(train)} train images",
        "test_images": reference,
        "as_many_samples_as_test_images": matched,
        "samplers": curves,
    }
    report.number("quality", numbers)
    alike = reference["generated_images"] == plan.images
    caption = (
        f"Quality of {plan.images} samples against {len(real)} train images, mean of {plan.sets}"
        " sets; bars: least and greatest"
    )
    caption += ". Dotted: as many real test images" if alike else ""
    report.figure("quality", quality_figure(curves, reference if alike else None), caption)
    say_quality(report, plan, curves, numbers)


@dataclass(frozen=True)
class Judge:
    """What samples are compared with."""

    network: FeatureNetwork
    real: Tensor
    """Features of real images."""
    event_shape: tuple[int, ...]
    images: int
    """Samples in a set."""
    seed: int
    """Seed of the subsets for KID."""

    def compare(self, features: Tensor) -> SampleQuality:
        """Quality of images by their features."""
        return compare_features(
            self.real, features, self.network, kid_subsets=20, kid_subset_size=500, seed=self.seed
        )

    def sample(
        self, model: DiffusionModel, method: Method, steps: int, seed: int
    ) -> dict[str, Any]:
        """One set of samples: its quality, and what it took."""
        started = time.perf_counter()
        with counted(model) as count:
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


@contextlib.contextmanager
def counted(model: DiffusionModel) -> Iterator[dict[str, int]]:
    """Count evaluations of the predictor's network and of those of F, one for each example."""
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


def say_quality(
    report: Report,
    plan: Plan,
    curves: Mapping[str, list[dict[str, Any]]],
    numbers: Mapping[str, Any],
) -> None:
    """Tables of sample quality, and what they should show."""
    info, reference = numbers["classifier"], numbers["test_images"]
    report.say(
        f"Features: a classifier of {info['data']}, test accuracy {info['accuracy']['test']:.3f},"
        f" seed {info['seed']}, sha256 {info['sha256'][:12]}; d = {reference['dims']},"
        f" standardized. Real: {numbers['real']}; {plan.sets} sets of {plan.images} samples a"
        " setting. Sets share their first latents between the samplers and budgets of a model, and"
        " share none between the models. One training each."
    )
    report.say(
        f"Real images for a reference, and as many samples ({reference['generated_images']}), since"
        " all four depend on their number:"
    )
    report.quality_table(numbers["as_many_samples_as_test_images"], DIGITS)
    budgets = [
        evaluations
        for evaluations in plan.evaluations
        if any(p["evaluations"] == evaluations for c in curves.values() for p in c)
    ]
    for (title, key), digits in zip(QUALITY.items(), DIGITS, strict=True):
        report.say(
            f"{title}, mean ± half the range of the sets (of two, the standard error), against"
            " evaluations of the predictor an image:"
        )
        rows = []
        for name, points in curves.items():
            cells = {point["evaluations"]: [one[key] for one in point["sets"]] for point in points}
            rows.append(
                [
                    name,
                    *(
                        (
                            plus_minus(
                                statistics.fmean(cells[n]),
                                (max(cells[n]) - min(cells[n])) / 2,
                                digits,
                            )
                            if n in cells
                            else ""
                        )
                        for n in budgets
                    ),
                ]
            )
        report.table(["", *(str(n) for n in budgets)], rows)
    report.say(
        "Evaluations of the networks an image, as counted (F with its time derivative counts once"
        " on the ODE):"
    )
    rows = [[name, *_costs(points[-1])] for name, points in curves.items()]
    report.table(["", "steps", "predictor", "F"], rows)
    if not report.smoke:
        for evaluations in (8, 100):
            ddpm, ndm = (_mean_fid(curves[f"{name}, ancestral"], evaluations) for name in MODELS)
            report.expect(
                f"FID of NDM over that of DDPM, ancestral, {evaluations} evaluations",
                ndm / ddpm,
                1.0,
            )
        ddpm, ndm = (
            one
            for name, one in numbers["as_many_samples_as_test_images"].items()
            if name.startswith(tuple(MODELS))
        )
        text = (
            f"the same, 100 evaluations, {reference['generated_images']} other samples: do draws"
            " agree?"
        )
        report.expect(text, ndm["fid"] / ddpm["fid"], 1.0)
        best = {
            name: min(
                _mean_fid(points, 8) for way, points in curves.items() if way.startswith(f"{name},")
            )
            for name in MODELS
        }
        report.expect(
            "FID of NDM over that of DDPM, best sampler, 8 evaluations",
            best["NDM"] / best["DDPM"],
            1.0,
        )


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
    """Samples of one seed for each model, sampler and number of evaluations."""
    found: dict[str, dict[int, Tensor]] = {}
    shape, seed = data.describe().event_shape, part_seed(report.seed, _PICTURES)
    for name, model in models.items():
        for way, (method, cost, _) in SAMPLERS.items():
            for evaluations in plan.pictures:
                if evaluations % cost == 0:
                    samples = model.sample(
                        (plan.rows * 8, *shape),
                        method,
                        seed=seed,
                        steps=evaluations // cost,
                        batch_size=256,
                    )
                    found.setdefault(f"{name}, {way}", {})[evaluations] = samples
    return found
