"""Steps of 1/T for large T: single precision gives the numbers of double precision."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from ndm.decoder import GaussianDecoder
from ndm.discrete_time import path_log_weight
from ndm.evaluation.calibrate import best_variance_ratio
from ndm.forward import ForwardProcess, posterior_coefficients
from ndm.model import NDM
from ndm.nn import MLP
from ndm.predictor import Predictor
from ndm.random import ExampleGenerators, standard_normal
from ndm.reverse import ReverseKind
from ndm.sample import Ancestral, Euler, GridSampler, Heun
from ndm.schedule import (
    CosineSchedule,
    FlowMatchingSchedule,
    LearnedSchedule,
    LinearBetaSchedule,
    LinearLogSNRSchedule,
    Schedule,
    VariancePreserving,
)
from ndm.time_sampling import PiecewiseConstant
from ndm.transform import GatedTransform, Identity, NetworkTransform, SeparableTransform, Transform
from oracles import F64, Points, randomized
from train.test_compilation import TrainingTerms, compiled, losses_and_gradients


class OwnSchedule(VariancePreserving):
    """A schedule with a network of its own, whose weights are in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Linear(1, 1)
        nn.init.constant_(self.slope.weight, 2.5)

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = 14.0 + self.slope.weight[0, 0]
        return 14.0 * t + self.slope(t[:, None])[:, 0] - 10.0, rate.expand_as(t)


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": LinearLogSNRSchedule,
    "cosine": CosineSchedule,
    "beta": LinearBetaSchedule,
    "flow": FlowMatchingSchedule,
    "learned": lambda: randomized(LearnedSchedule(learn_ends=True), 0.1).float(),
    "own": OwnSchedule,
    "short": lambda: LinearLogSNRSchedule(-13.3, -13.2998),
}
LONG = [name for name in SCHEDULES if name != "short"]


def network(outputs: int | None = None) -> MLP:
    return MLP(3, hidden=24, blocks=1, outputs=outputs)


TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "identity": Identity,
    "network": lambda: NetworkTransform(network()),
    "gated": lambda: GatedTransform(network()),
    "separable": lambda: SeparableTransform(network(2)),
}


def both_precisions(
    transform: str = "identity",
    reverse: ReverseKind = "tied",
    schedule: str = "linear",
    steps: int | None = None,
) -> list[NDM]:
    """One model in single and in double precision, with the same weights."""
    torch.manual_seed(0)
    predictor = Predictor(network(2 if reverse == "direct-score" else None))
    parts = SCHEDULES[schedule](), TRANSFORMS[transform](), predictor, GaussianDecoder()
    model = NDM(*parts, reverse=reverse, steps=steps)
    for part in (model.transform, model.predictor):
        randomized(part, 0.1)
    single = model.float().eval()
    return [single, copy.deepcopy(single).double()]


def data(count: int = 64) -> Tensor:
    return torch.randn(count, 3, dtype=F64, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=0)


@pytest.mark.parametrize("steps", [1_000, 5_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize(
    ("transform", "reverse"),
    [
        ("identity", "tied"),
        ("network", "tied"),
        ("separable", "tied"),
        ("gated", "direct"),
        ("gated", "direct-score"),
        ("network", "diffenc"),
    ],
)
def test_the_bound_of_many_steps_is_that_of_double_precision(
    transform: str, reverse: ReverseKind, steps: int
) -> None:
    """For the image schedule, where rounding gave errors of 2 to 4,000 percent."""
    means = []
    for model in both_precisions(transform, reverse):
        x, source = data().to(model.like), ExampleGenerators(0, range(64), 1)
        with torch.no_grad():
            means.append(model.bound(x, steps=steps, draws=8, generator=source).total.mean())
    assert_close(*means, rtol=1e-4)  # type: ignore[call-arg]


@pytest.mark.parametrize("schedule", LONG)
def test_bounds_tend_to_continuous_time_with_every_schedule(schedule: str) -> None:
    """The remaining difference is of order 1/T."""
    model, _ = both_precisions("gated", schedule=schedule)
    source = lambda: ExampleGenerators(0, range(64), 1)  # noqa: E731
    x, values = data().float(), []
    with torch.no_grad():
        for steps in (1_000_000, 10_000_000, None):
            bound = model.bound(x, steps=steps, draws=8, generator=source())
            values.append(bound.total.mean())
    assert_close(values[0], values[2], rtol=2e-3)
    assert_close(values[1], values[2], rtol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("schedule", LONG)
def test_the_posterior_of_neighbors_has_the_coefficients_of_double_precision(
    schedule: str, eta: float
) -> None:
    made = SCHEDULES[schedule]().float()
    double = ForwardProcess(copy.deepcopy(made).double(), Identity())
    single = ForwardProcess(made, Identity())
    for steps in (1_000, 10_000_000):
        for index in (0, steps // 3, steps - 1):
            times = index / steps, (index + 1) / steps
            found, expected = (
                posterior_coefficients(*(process.level(t, like) for t in times), eta)
                for process, like in (
                    (single, torch.zeros(2, 1)),
                    (double, torch.zeros(2, 1, dtype=F64)),
                )
            )
            for name in ("k", "decay", "target_weight", "variance"):
                assert_close(getattr(found, name), getattr(expected, name), rtol=3e-6)


def test_gradients_of_training_with_many_steps_are_those_of_double_precision() -> None:
    gradients = []
    for model in both_precisions("gated", schedule="learned", steps=1_000_000):
        model.train()
        x, draw = data().to(model.like), model.draw(data(), torch.Generator().manual_seed(2))
        values = {
            name: None if value is None else value.to(x) for name, value in vars(draw).items()
        }
        model.bound_at(x, type(draw)(**values)).loss.mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        assert expected is not None
        scale = float(expected.abs().max())
        found = gradients[0][name].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * scale, msg=name)


def test_the_fitted_variance_of_many_steps_is_that_of_double_precision() -> None:
    """Its excess over 1 is of order 1/T, and so is its share of the bound."""
    steps, ratios, bounds = 1_000_000, [], []
    for model in both_precisions("gated"):
        points = Points(data().to(model.like))
        ratios.append(best_variance_ratio(model, points, steps, bins=4))
        source = ExampleGenerators(0, range(64), 1)
        with torch.no_grad():
            bound = model.bound(
                points.x, steps=steps, draws=8, generator=source, variance_ratio=ratios[-1]
            )
        assert bound.diffusion.dtype == points.x.dtype
        bounds.append(bound.total.mean())
    assert_close(ratios[0].values - 1, ratios[1].values - 1, rtol=1e-3)
    assert_close(*bounds, rtol=1e-4)  # type: ignore[call-arg]


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize(
    ("transform", "fine", "steps"),
    [("identity", 4096, 20), ("network", 4096, 20), ("separable", 1, 100)],
)
def test_path_weights_of_short_steps_are_those_of_double_precision(
    transform: str, fine: int, steps: int, fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 1/100,000 of the schedule, by differences of F or by its derivative."""
    monkeypatch.setattr("ndm.discrete_time._SHORTEST", 1 / fine)
    count, weights = 16, []
    ratio = PiecewiseConstant(1 + torch.tensor([0.02, 0.01], dtype=F64)) if fitted else None
    for model in both_precisions(transform, schedule="short"):
        x, source = data(count).to(model.like), ExampleGenerators(0, range(count), 1)
        reverse = model.reverse_process
        with torch.no_grad():
            found = path_log_weight(reverse, model.decoder, x, steps, source, variance_ratio=ratio)
        assert found.dtype == x.dtype
        weights.append(found)
    single, double = weights
    # z is rounded to 6e-8, which is 5e-5 of the width of the decoder.
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=5e-3)


def test_a_path_weight_is_the_ratio_of_the_densities_of_its_path() -> None:
    """Against torch.distributions; the midpoint of step i of 3 lies in part 2 i + 1 of 6."""
    steps, count = 3, 6
    _, model = both_precisions("network", schedule="flow")
    process, predictor, x = model.process, model.predictor, data(count)
    ratio = PiecewiseConstant(torch.tensor([0.7, 3.0, 2.2, 0.4, 1.2, 1.7], dtype=F64))
    source = ExampleGenerators(0, range(count), 1)
    with torch.no_grad():
        found = path_log_weight(
            model.reverse_process,
            model.decoder,
            x,
            steps,
            ExampleGenerators(0, range(count), 1),
            0.9,
            ratio,
        )
        t = process.level(1.0, x)
        marginal = process.marginal(x, t)
        z = marginal.sample(standard_normal(x, source))
        q = Normal(marginal.mean, marginal.std.expand_as(z)).log_prob(z)
        log_weight = (Normal(torch.zeros_like(z), 1.0).log_prob(z) - q).sum(1)
        for index in (2, 1, 0):
            s = process.level(index / steps, x)
            true = process.posterior(z, x, s, t, 0.9)
            guess = process.posterior(z, predictor(z, t), s, t, 0.9)
            wide = guess.std * ratio.values[2 * index + 1].sqrt()
            z = true.sample(standard_normal(x, source))
            of_model = Normal(guess.mean, wide.expand_as(z)).log_prob(z)
            log_weight += (of_model - Normal(true.mean, true.std.expand_as(z)).log_prob(z)).sum(1)
            t = s
        log_weight += model.decoder.log_prob(x, z, t)
    torch.testing.assert_close(found, log_weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("index", [0, 400_000, 999_999])
@pytest.mark.parametrize("step", [Ancestral(), Ancestral(0.0), Euler(), Euler(0.0), Heun()])
def test_one_of_a_million_sampling_steps_is_that_of_double_precision(
    step: Ancestral | Euler | Heun, index: int
) -> None:
    """From z = 0, where no rounding of z hides the step."""
    steps, ends = 1_000_000, []
    for model in both_precisions():
        z, noise = torch.zeros(2, 8, 3, dtype=F64).to(model.like)
        noise = noise + torch.linspace(-2, 2, 24).reshape(8, 3).to(noise)
        s, t = (model.process.level(i / steps, z) for i in (index, index + 1))
        with torch.no_grad():
            ends.append(step(model.reverse_process, z, t, s, noise))
    scale = float(ends[1].abs().max())
    torch.testing.assert_close(ends[0].double(), ends[1], rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("parts", [4, 8])
def test_every_step_of_a_sampler_has_its_own_variance_ratio(parts: int) -> None:
    """With 4 steps the midpoint of step i lies in part i of 4, and in part 2 i + 1 of 8."""
    _, model = both_precisions(schedule="cosine")
    reverse, process = model.reverse_process, model.process
    ratio = PiecewiseConstant(torch.arange(1, parts + 1, dtype=F64) ** 2)
    z, noise = torch.randn(2, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    for index in range(4):
        s, t = process.level(index / 4, z), process.level((index + 1) / 4, z)
        with torch.no_grad():
            posterior = reverse.posterior(z, s, t, 1.0)
            found = Ancestral(1.0, ratio)(reverse, z, t, s, noise)
        part = index if parts == 4 else 2 * index + 1
        torch.testing.assert_close(found, posterior.mean + (part + 1) * posterior.std * noise)
    draws = []
    for sampler in (GridSampler(Ancestral(1.0, ratio), 4), GridSampler(Ancestral(), 4)):
        with torch.no_grad():
            draws.append(sampler(reverse, z, torch.Generator().manual_seed(0)))
    assert not torch.equal(*draws)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("steps", [10, 100_000])
@pytest.mark.parametrize("schedule", ["linear", "learned"])
def test_the_compiled_bound_of_discrete_time_is_one_graph(schedule: str, steps: int) -> None:
    model, _ = both_precisions("gated", schedule=schedule, steps=steps)
    x = data(8).float()
    terms = TrainingTerms(model)
    torch.compiler.reset()
    expected = losses_and_gradients(model, terms, x)
    found = losses_and_gradients(model, compiled(terms, fullgraph=True, backend="aot_eager"), x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = 1e-6 + float(value.abs().max())
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=2e-3, msg=name)
    on_meta = model.to("meta")
    TrainingTerms(on_meta)(x.to("meta"), on_meta.draw(x.to("meta"))).loss.backward()
