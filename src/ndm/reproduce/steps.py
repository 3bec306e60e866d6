r"""Few steps: the bound against the number of steps T, and sample quality against the number of evaluations (NDM, section 4).

.. math::
    \text{NELBO}_T \to \text{NELBO}_\infty \quad (T \to \infty), \qquad
    \text{evaluations of } \hat x = \text{steps} \times (1 \text{ for ancestral, DDIM; } 2 \text{ for Heun on the ODE}) .

DDPM is F = x, with the same predictor unless the user names other runs; it is VDM with a fixed schedule as well. A tied NDM evaluates F
besides: at s and t in each step of ancestral sampling and DDIM, once with its time derivative in each evaluation of the ODE. Evaluations are counted where they happen, in the networks.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ndm.data import DataDescription, DataSource, spread
from ndm.elbo import bits_per_dim
from ndm.errors import UserError
from ndm.evaluation.evaluate import Evaluation, standard_error
from ndm.evaluation.tables import Measurement, plus_minus
from ndm.model import DiffusionModel
from ndm.ode import OdeSettings
from ndm.quality import FeatureNetwork, SampleQuality, classifier_features, compare_features, find_classifier
from ndm.random import part_seed
from ndm.reproduce.plane import LEARNED, PLAIN, both_configs
from ndm.reproduce.report import QUALITY, Report
from ndm.reproduce.steps_figures import CONTINUOUS, bound_figure, quality_figure, sample_figure
from ndm.sample import Method
from ndm.serialize import read_json, to_config
from ndm.transform import Identity
from ndm.viz import is_image

MODELS = (PLAIN, LEARNED)
SAMPLERS: Mapping[str, tuple[Method, int, int]] = {
    "ancestral": ("ancestral", 1, 100),
    "DDIM": ("ddim", 1, 100),
    "ODE, Heun": ("ode", 2, 32),
}
"""Samplers: method, evaluations of the predictor a step, and most evaluations; Heun's trapezoid is of second order and done before the others."""
DIGITS = (3, 4, 2, 2)
"""Of the measures of sample quality, in a table."""
_SAMPLES, _PICTURES = 40, 41  # streams of noise


@dataclass(frozen=True)
class Plan:
    """How large the experiment is."""

    config: str = "digits"
    overrides: Mapping[str, object] = field(default_factory=dict)
    horizons: tuple[int | None, ...] = (1, 2, 4, 10, 50, 100, 1000, None)
    fitted: tuple[int, ...] = (1, 2, 4, 10, 50, 100, 1000)
    """Horizons whose reverse variance is fitted as well, on 512 train examples at each of up to 64 times."""
    draws: int = 16
    limit: int | None = None
    """Test examples for the NELBO."""
    nll_limit: int | None = None
    """Test examples for the NLL."""
    ode: OdeSettings = OdeSettings()  # noqa: RUF009 - frozen
    evaluations: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 100)
    sets: int = 2
    """Independent sets of samples, for an error bar."""
    images: int = 1000
    """Samples in a set."""
    real: int | None = None
    """Train images that samples are compared with."""
    classifier_steps: int = 1000
    pictures: tuple[int, ...] = (4, 10, 100)
    rows: int = 3

    @classmethod
    def of(cls, report: Report) -> "Plan":
        """The plan of a size and of the data."""
        digits = report.settings.data is None and not report.runs
        plan: dict[str, Any] = {} if digits else {"config": "mnist-small"}
        if report.smoke:
            overrides = {"model.predictor.network.channels": 8, "train.steps": 4, "train.batch_size": 16}
            overrides |= {"train.evaluation_limit": 8, "train.evaluation_draws": 1, "train.sample_steps": 4}
            return cls(
                **plan,
                overrides=overrides,
                horizons=(1, 4, None),
                fitted=(4,),
                draws=1,
                limit=16,
                nll_limit=4,
                ode=OdeSettings(solver="rk4", nodes=2, probes=1),
                evaluations=(1, 2, 4),
                images=12,
                real=100,
                classifier_steps=10,
                pictures=(1, 2),
                rows=1,
            )
        if digits:
            return cls()
        # Three quarters of the configuration's steps.
        of_data = {"train.steps": 3000, "train.ema": 0.998, "train.evaluation_limit": 500}
        return cls(**plan, overrides=of_data, fitted=(1, 2, 4, 10), draws=8, limit=500, nll_limit=32, images=250, real=10_000)


def run(report: Report) -> None:
    """Train DDPM and NDM, or take the user's; measure bounds and sample quality, draw them."""
    plan = Plan.of(report)
    models, data = given(report) if report.runs else trained(report, plan)
    sizes = ", ".join(f"{name} {sum(p.numel() for p in model.parameters()):,}" for name, model in models.items())
    alike = to_config(models["DDPM"].predictor) == to_config(models["NDM"].predictor)
    predictors = "the predictors are built alike" if alike else "the predictors differ"
    report.say(f"Data: {data.describe().name}, {data.describe().version}. Parameters: {sizes}; {predictors}.")
    bounds(report, plan, models, data)
    quality(report, plan, models, data)
    figure = sample_figure(pictures(report, plan, models, data))
    report.figure("samples", figure, "Samples of one seed; above each grid, evaluations of the predictor")


def trained(report: Report, plan: Plan) -> tuple[dict[str, DiffusionModel], DataSource]:
    """DDPM and NDM trained here, and their data."""
    found = report.train_all(both_configs(report, plan.config, plan.overrides))
    return {name: found[name.lower()][0] for name in MODELS}, found["ndm"][1]


def given(report: Report) -> tuple[dict[str, DiffusionModel], DataSource]:
    """DDPM and NDM of the runs that the user names, and their data.

    Raises:
        UserError: the first is no DDPM or the second is one, or the two were trained on different data or on no images with labels.
    """
    models = dict(zip(MODELS, report.models, strict=True))
    data, where = report.runs[0].data(), f"--runs {' '.join(report.settings.runs)}"
    what, other = data.describe().to_dict(), DataDescription.from_dict(read_json(report.runs[1].data_path)).to_dict()
    if [isinstance(model.transform, Identity) for model in models.values()] != [True, False]:
        raise UserError(
            f"{where}: give first a run that does not transform its data, with --model.transform ndm.Identity, then one that does"
        )
    for key in what:
        if what[key] != other.get(key):
            raise UserError(f"{where}: trained on different data: {key} is {what[key]!r} and {other.get(key)!r}; name two runs on the same")
    if not is_image(data.describe().event_shape) or data.split("train").labels is None or len(data.describe().classes) < 2:
        raise UserError(
            f"{where}: {what['name']} are no images with labels, which the features for the quality of samples are learned from"
        )
    return models, data


def bounds(report: Report, plan: Plan, models: Mapping[str, DiffusionModel], data: DataSource) -> None:
    """NELBO against T, plain and with the fitted reverse variance, and the NLL; figure 1."""
    kept: dict[str, dict[str, Any]] = {}
    about = data.describe().about("test")
    for name, model in models.items():
        evaluation = Evaluation(model, data.split("test"), seed=report.seed, limit=plan.limit, progress=True, about=about)
        for horizon in plan.horizons:
            for fit in (None, data.split("train")) if horizon in plan.fitted else (None,):
                key = f"{name.lower()}-{horizon or CONTINUOUS}" + ("-fitted" if fit else "")
                kept[key] = report.cache(f"nelbo-{key}", partial(_kept, evaluation.nelbo, horizon, plan.draws, fit))
        likelihood = Evaluation(model, data.split("test"), seed=report.seed, limit=plan.nll_limit, progress=True, about=about)
        kept[f"{name.lower()}-nll"] = report.cache(f"nll-{name.lower()}", partial(_kept, likelihood.nll, settings=plan.ode))
    for key, one in kept.items():
        report.measured(key, one["record"])
    records = {key: one["record"] for key, one in kept.items()}
    report.figure(
        "nelbo",
        bound_figure(records, list(models), plan.horizons),
        "NELBO of the T-step model, with the posterior's variance v and with one fitted on the train split; bars: standard error over "
        f"{records['ddpm-' + CONTINUOUS]['num_examples']} examples. Dotted: NLL in continuous time, of {records['ddpm-nll']['num_examples']} of them",
    )
    dims = math.prod(data.describe().event_shape)
    less = {horizon: _difference(kept, f"{horizon or CONTINUOUS}", dims) for horizon in plan.horizons}
    rows = [_bound_row(records, horizon, less[horizon]) for horizon in plan.horizons]
    rows.append(
        ["NLL, ODE", *_pair(records["ddpm-nll"], None), *_pair(records["ndm-nll"], None), plus_minus(*_difference(kept, "nll", dims))]
    )
    report.say(
        f"Bits/dim on {records['ddpm-' + CONTINUOUS]['num_examples']} test examples (NLL: {records['ddpm-nll']['num_examples']}, one sample of z_0), "
        f"± over examples; the last column pairs them."
    )
    report.table(["T", "DDPM", "fitted", "NDM", "fitted", "NDM less DDPM"], rows)
    report.number("ndm_less_ddpm_bpd", {str(h or CONTINUOUS): {"difference": d, "stderr": e} for h, (d, e) in less.items()})
    if not report.smoke:
        report.expect(
            "largest NELBO of NDM less that of DDPM over T >= 10, bits/dim", max(less[h][0] for h in (10, 50, 100, 1000, None)), 0.0
        )
        gain = records["ndm-10-fitted"]["bpd"] - records["ndm-10"]["bpd"]
        report.expect("what a fitted variance adds to NDM's NELBO at T = 10, bits/dim", gain, 0.0)
        report.expect(
            "NDM's NELBO at T = 1000 less continuous time, bits/dim", records["ndm-1000"]["bpd"] - records[f"ndm-{CONTINUOUS}"]["bpd"], 0.02
        )


def _kept(measure: Callable[..., Measurement], *arguments: Any, **options: Any) -> dict[str, Any]:
    measurement = measure(*arguments, **options)
    return {"record": measurement.to_dict(), "values": measurement.values.tolist()}


def _difference(kept: Mapping[str, dict[str, Any]], key: str, dims: int) -> tuple[float, float]:
    """NDM less DDPM over the same examples and its standard error, bits/dim."""
    first, second = (torch.tensor(kept[f"{name.lower()}-{key}"]["values"], dtype=torch.float64) for name in ("NDM", "DDPM"))
    return float(bits_per_dim((first - second).mean(), dims)), float(bits_per_dim(standard_error(first - second), dims))


def _bound_row(records: Mapping[str, dict[str, Any]], horizon: int | None, less: tuple[float, float]) -> list[str]:
    row = [str(horizon or "continuous time")]
    for name in ("ddpm", "ndm"):
        row += _pair(records[f"{name}-{horizon or CONTINUOUS}"], records.get(f"{name}-{horizon}-fitted"))
    return [*row, plus_minus(*less)]


def _pair(plain: Mapping[str, Any], fitted: Mapping[str, Any] | None) -> list[str]:
    return [plus_minus(one["bpd"], one["bpd_stderr"]) if one else "" for one in (plain, fitted)]


def quality(report: Report, plan: Plan, models: Mapping[str, DiffusionModel], data: DataSource) -> None:
    """FID, KID, precision and recall against the number of evaluations; figure 2."""
    classifier = find_classifier(report.out / "classifier", data, report.seed, progress=True, steps=plan.classifier_steps)
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
                    sets.append(report.cache(key, partial(judge.sample, model, method, evaluations // cost, seed)))
                curves.setdefault(f"{name}, {way}", []).append({"evaluations": evaluations, "steps": evaluations // cost, "sets": sets})
    matched = {"real test images": reference}
    for number, (name, model) in enumerate(models.items()):
        seed, count, steps = part_seed(report.seed, _SAMPLES, number, plan.sets), reference["generated_images"], plan.evaluations[-1]
        compute = partial(replace(judge, images=count).sample, model, "ancestral", steps, seed)
        matched[f"{name}, ancestral, {steps} evaluations"] = report.cache(f"quality-{name}-matched".lower(), compute)
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
    caption = f"Quality of {plan.images} samples against {len(real)} train images, mean of {plan.sets} sets; bars: least and greatest"
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
        return compare_features(self.real, features, self.network, kid_subsets=20, kid_subset_size=500, seed=self.seed)

    def sample(self, model: DiffusionModel, method: Method, steps: int, seed: int) -> dict[str, Any]:
        """One set of samples: its quality, and what it took."""
        started = time.perf_counter()
        with counted(model) as count:
            samples = model.sample((self.images, *self.event_shape), method, seed=seed, steps=steps, batch_size=256, progress=True)
        seconds = time.perf_counter() - started
        costs = {f"{part}_evaluations": number / self.images for part, number in count.items()}
        return {**self.compare(self.network(samples)).to_dict(), **costs, "seed": seed, "seconds": round(seconds, 2)}


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
    hooks = [module.register_forward_hook(counter(part)) for part, module in parts.items() if isinstance(module, nn.Module)]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def say_quality(report: Report, plan: Plan, curves: Mapping[str, list[dict[str, Any]]], numbers: Mapping[str, Any]) -> None:
    """Tables of sample quality, and what they should show."""
    info, reference = numbers["classifier"], numbers["test_images"]
    report.say(
        f"Features: a classifier of {info['data']}, test accuracy {info['accuracy']['test']:.3f}, seed {info['seed']}, sha256 {info['sha256'][:12]}; "
        f"d = {reference['dims']}, standardized. Real: {numbers['real']}; {plan.sets} sets of {plan.images} samples a setting. "
        "Sets share their first latents between the samplers and budgets of a model, and share none between the models. One training each."
    )
    report.say(
        f"Real images for a reference, and as many samples ({reference['generated_images']}), since all four depend on their number:"
    )
    report.quality_table(numbers["as_many_samples_as_test_images"], DIGITS)
    budgets = [evaluations for evaluations in plan.evaluations if any(p["evaluations"] == evaluations for c in curves.values() for p in c)]
    for (title, key), digits in zip(QUALITY.items(), DIGITS, strict=True):
        report.say(
            f"{title}, mean ± half the range of the sets (of two, the standard error), against evaluations of the predictor an image:"
        )
        rows = []
        for name, points in curves.items():
            cells = {point["evaluations"]: [one[key] for one in point["sets"]] for point in points}
            rows.append(
                [
                    name,
                    *(
                        plus_minus(statistics.fmean(cells[n]), (max(cells[n]) - min(cells[n])) / 2, digits) if n in cells else ""
                        for n in budgets
                    ),
                ]
            )
        report.table(["", *(str(n) for n in budgets)], rows)
    report.say("Evaluations of the networks an image, as counted (F with its time derivative counts once on the ODE):")
    rows = [[name, *_costs(points[-1])] for name, points in curves.items()]
    report.table(["", "steps", "predictor", "F"], rows)
    if not report.smoke:
        for evaluations in (8, 100):
            ddpm, ndm = (_mean_fid(curves[f"{name}, ancestral"], evaluations) for name in MODELS)
            report.expect(f"FID of NDM over that of DDPM, ancestral, {evaluations} evaluations", ndm / ddpm, 1.0)
        ddpm, ndm = (one for name, one in numbers["as_many_samples_as_test_images"].items() if name.startswith(tuple(MODELS)))
        text = f"the same, 100 evaluations, {reference['generated_images']} other samples: do draws agree?"
        report.expect(text, ndm["fid"] / ddpm["fid"], 1.0)
        best = {name: min(_mean_fid(points, 8) for way, points in curves.items() if way.startswith(f"{name},")) for name in MODELS}
        report.expect("FID of NDM over that of DDPM, best sampler, 8 evaluations", best["NDM"] / best["DDPM"], 1.0)


def _costs(point: Mapping[str, Any]) -> list[str]:
    return [str(point["steps"]), *(f"{point['sets'][0][f'{part}_evaluations']:g}" for part in ("predictor", "transform"))]


def _mean_fid(points: Sequence[Mapping[str, Any]], evaluations: int) -> float:
    return statistics.fmean(one["fid"] for point in points if point["evaluations"] == evaluations for one in point["sets"])


def pictures(report: Report, plan: Plan, models: Mapping[str, DiffusionModel], data: DataSource) -> dict[str, dict[int, Tensor]]:
    """Samples of one seed for each model, sampler and number of evaluations."""
    found: dict[str, dict[int, Tensor]] = {}
    shape, seed = data.describe().event_shape, part_seed(report.seed, _PICTURES)
    for name, model in models.items():
        for way, (method, cost, _) in SAMPLERS.items():
            for evaluations in plan.pictures:
                if evaluations % cost == 0:
                    samples = model.sample((plan.rows * 8, *shape), method, seed=seed, steps=evaluations // cost, batch_size=256)
                    found.setdefault(f"{name}, {way}", {})[evaluations] = samples
    return found
