"""Samplers: convergence orders against closed forms, distributions of a mixture, seeds, shapes and
errors.

On a Gaussian problem a step is affine, so mean and covariance are propagated exactly and the order
is fitted without sampling. In theory posterior steps (DDPM and DDIM) and Euler have order 1. Heun
has order 2 on the ODE and, as the noise is additive, weak order 2 on the SDE.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ndm.decoder import Decoder, DiscretizedGaussian, GaussianDecoder
from ndm.errors import UserError
from ndm.forward import ForwardProcess
from ndm.model import NDM
from ndm.nn import MLP
from ndm.predictor import DataPredictor, Predictor
from ndm.reverse import ReverseProcess
from ndm.sample import (
    AdaptiveODE,
    Ancestral,
    Euler,
    GridSampler,
    Heun,
    Sampler,
    Step,
    TorchSDE,
    make_sampler,
)
from ndm.schedule import CosineSchedule, FlowMatchingSchedule, LinearLogSNRSchedule, Schedule
from ndm.transform import GatedTransform, Identity
from oracles import (
    COVARIANCE,
    F64,
    OFFSET,
    GaussianProblem,
    LinearTransform,
    MixtureProblem,
    affine_map,
    constant,
    sliced_w2,
    slope,
)

STEPS: dict[str, tuple[Callable[[], Step], int]] = {
    "ancestral": (lambda: Ancestral(1.0), 1),
    "ancestral_half": (lambda: Ancestral(0.5), 1),
    "ddim": (lambda: Ancestral(0.0), 1),
    "euler_ode": (lambda: Euler(0.0), 1),
    "heun_ode": (lambda: Heun(0.0), 2),
    "euler_sde": (lambda: Euler(1.0), 1),
    "euler_sde_hot": (lambda: Euler(1.4), 1),
    "heun_sde": (lambda: Heun(1.0), 2),
    "heun_sde_cool": (lambda: Heun(0.6), 2),
}
SCHEDULES: dict[str, Schedule] = {
    "linear": LinearLogSNRSchedule(-4.0, 3.0),
    "cosine": CosineSchedule(-4.0, 3.0),
    "flow": FlowMatchingSchedule(0.1, 0.15),
}


@torch.no_grad()
def end_error(problem: GaussianProblem, step: Step, steps: int) -> float:
    """Error of the mean and covariance of z_0, starting from the exact ones of q(z_1)."""
    level = problem.process.schedule(torch.arange(steps + 1, dtype=F64) / steps)
    at = [level.rows(slice(i, i + 1)) for i in range(steps + 1)]
    mean, covariance = problem.marginal(1.0)
    for i in range(steps, 0, -1):
        bias, gain, noise = affine_map(step, problem, at[i], at[i - 1])
        mean, covariance = bias + gain @ mean, gain @ covariance @ gain.T + noise @ noise.T
    true_mean, true_covariance = problem.marginal(0.0)
    error = ((mean - true_mean) ** 2).sum() + ((covariance - true_covariance) ** 2).sum()
    return float(error.sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", STEPS)
def test_steps_converge_at_their_order(name: str, schedule: str) -> None:
    make, order = STEPS[name]
    problem = GaussianProblem(SCHEDULES[schedule])
    sizes = [128, 256] if schedule != "linear" else [64, 128, 256]
    errors = [end_error(problem, make(), size) for size in sizes]
    assert order - 0.2 < slope(sizes, errors) < order + 0.5, errors
    assert errors[-1] < {1: 0.1, 2: 3e-3}[order]


def test_ddim_is_exact_on_a_point_mass_for_any_number_of_steps() -> None:
    point = 1e-16 * torch.eye(2, dtype=F64)
    problem = GaussianProblem(LinearLogSNRSchedule(-4.0, 3.0), covariance=point)
    assert end_error(problem, Ancestral(0.0), 2) < 1e-7
    assert end_error(problem, Ancestral(1.0), 3) < 1e-7


WEIGHTS = torch.tensor([0.3, 0.7], dtype=F64)
MEANS = torch.tensor([[-1.2, 0.5], [0.9, -0.2]], dtype=F64)
COVARIANCES = torch.tensor(
    [[[0.10, 0.06], [0.06, 0.08]], [[0.20, -0.05], [-0.05, 0.05]]], dtype=F64
)
COUNT = 2500


class Exact(DataPredictor):
    """The exact predictor, with a parameter that sets the model's dtype."""

    def __init__(self, problem: MixtureProblem):
        super().__init__()
        self.problem, self.precision = problem, nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, z: Tensor, level: object) -> Tensor:
        return self.problem(z, level)


def mixture_model(
    transform: LinearTransform, schedule: Schedule | None = None
) -> tuple[MixtureProblem, NDM]:
    schedule = schedule or LinearLogSNRSchedule(-7.0, 7.0)
    problem = MixtureProblem(schedule, transform, WEIGHTS, MEANS, COVARIANCES)
    return problem, NDM(problem.process.schedule, transform, Exact(problem), GaussianDecoder())  # type: ignore[arg-type]


def assert_distributed(problem: MixtureProblem, found: Tensor) -> None:
    """Check mean, covariance and sliced W2 against true samples, with room for discretization."""
    generator = torch.Generator().manual_seed(7)
    truth = [problem.draw(len(found), generator) for _ in range(4)]
    yardstick = max(sliced_w2(a, b) for i, a in enumerate(truth) for b in truth[:i])
    assert sliced_w2(found, truth[0]) < 2 * yardstick + 0.01
    spread = problem.covariance().diagonal().sqrt() / math.sqrt(len(found))
    assert bool(((found.mean(0) - problem.mean()).abs() < 5 * spread + 0.015).all())
    torch.testing.assert_close(found.T.cov(), problem.covariance(), rtol=0.06, atol=0.03)


LINEAR_CASES = {"identity": lambda: constant(torch.eye(2, dtype=F64)), "tilted": LinearTransform}
METHODS: dict[str, dict[str, object]] = {
    "ancestral": {"method": "ancestral", "steps": 200},
    "ancestral_cool": {"method": "ancestral", "steps": 200, "eta": 0.5},
    "ddim": {"method": "ddim", "steps": 200},
    "sde_euler": {"method": "sde", "steps": 200},
    "sde_heun": {"method": "sde", "solver": "heun", "steps": 70},
    "sde_hot": {"method": "sde", "solver": "heun", "steps": 100, "eta": 1.5},
    "torchsde": {"method": "sde", "solver": "torchsde-srk", "steps": 40},
    "ode_heun": {"method": "ode", "steps": 60},
    "ode_euler": {"method": "ode", "solver": "euler", "steps": 200},
    "dopri5": {"method": "ode", "solver": "dopri5"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LINEAR_CASES)
@pytest.mark.parametrize("method", METHODS)
def test_samples_of_a_mixture_follow_the_data_distribution(method: str, case: str) -> None:
    problem, model = mixture_model(LINEAR_CASES[case]())
    assert_distributed(problem, model.sample((COUNT, 2), seed=1, **METHODS[method]))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "ode", "steps": 80},
        {"method": "ancestral", "steps": 200},
        {"method": "ddim", "steps": 200},
    ],
)
def test_flow_matching_samples_from_pure_noise(options: dict[str, object]) -> None:
    problem, model = mixture_model(LinearTransform(), FlowMatchingSchedule(0.02, 0.0))
    assert_distributed(problem, model.sample((COUNT, 2), seed=2, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["euler", "heun", "torchsde-srk"])
def test_the_sde_of_flow_matching_needs_some_signal_at_the_end(solver: str) -> None:
    _, model = mixture_model(LinearTransform(), FlowMatchingSchedule(0.02, 0.0))
    with pytest.raises(UserError, match=r"alpha_1") as caught:
        model.sample((4, 2), "sde", solver=solver, steps=10, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_reversing_the_ode_returns_to_the_start() -> None:
    problem, _ = mixture_model(LinearTransform(), LinearLogSNRSchedule(-4.0, 4.0))
    z = torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        start = AdaptiveODE(rtol=1e-6, atol=1e-6)(problem.reverse, z)
        back, heun, grid = start, Heun(0.0), torch.linspace(0, 1, 401, dtype=F64)
        for a, b in itertools.pairwise(grid):
            t, s = problem.process.level(a, z), problem.process.level(b, z)
            back = heun(problem.reverse, back, t, s, z)
        fine = GridSampler(heun, 400)(problem.reverse, z)
    torch.testing.assert_close(back, z, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(fine, start, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_path_of_the_ode_follows_the_closed_form(schedule: str) -> None:
    """If all matrices share their eigenvectors, each direction is a separate ODE with a monotone
    flow: z_t = m_t + (S_t S_1^{-1})^{1/2} (z_1 - m_1).
    """
    tilt = 0.3 * COVARIANCE - 0.5 * torch.eye(2, dtype=F64)
    problem = GaussianProblem(SCHEDULES[schedule], LinearTransform(tilt, OFFSET))
    z = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    first_mean, first_covariance = problem.marginal(1.0)
    directions = torch.linalg.eigh(COVARIANCE).eigenvectors
    with torch.no_grad():
        path = list(GridSampler(Heun(0.0), 400).path(problem.reverse, z))
        assert [time for time, _ in path] == pytest.approx([1 - k / 400 for k in range(401)])
        assert torch.equal(path[0][1], z)
        for time, state in path[::50]:
            mean, covariance = problem.marginal(time)
            variance = (directions.T @ covariance @ directions).diagonal()
            first_variance = (directions.T @ first_covariance @ directions).diagonal()
            stretch = (variance / first_variance).sqrt()
            expected = mean + (z - first_mean) @ (directions * stretch @ directions.T)
            torch.testing.assert_close(state, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("step", [Ancestral(1.0), Euler(1.0), Heun(0.0)])
def test_a_path_ends_at_the_result_of_the_sampler(step: Step) -> None:
    problem = GaussianProblem(LinearLogSNRSchedule(-4.0, 3.0))
    z = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    sampler, reverse = GridSampler(step, 5), problem.reverse
    with torch.no_grad():
        *_, (time, last) = sampler.path(reverse, z, torch.Generator().manual_seed(1))
        assert time == 0.0
        assert torch.equal(last, sampler(reverse, z, torch.Generator().manual_seed(1)))


class Scale(nn.Module):
    """A network for any event shape."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.gain * z * (1 + t.reshape(-1, *[1] * (z.dim() - 1)))


def any_shape_model() -> NDM:
    schedule = LinearLogSNRSchedule(-6.0, 5.0)
    return NDM(schedule, GatedTransform(Scale()), Predictor(Scale()), GaussianDecoder())


ANY = {name: {**options, "steps": 5} for name, options in METHODS.items() if "hot" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 1), (2, 3), (2, 2, 3, 3), (1, 2, 4)])
@pytest.mark.parametrize("method", ANY)
def test_samples_are_reproducible_for_any_shape(method: str, shape: tuple[int, ...]) -> None:
    model = any_shape_model()
    a, b, c = (model.sample(shape, seed=seed, **ANY[method]) for seed in (5, 5, 6))  # type: ignore[arg-type]
    assert a.shape == shape and a.dtype == torch.float32 and bool(a.isfinite().all())
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(0)
    assert not torch.equal(model.sample(shape, **ANY[method]), model.sample(shape, **ANY[method]))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [name for name in ANY if name not in ("torchsde", "dopri5")])
def test_the_shape_of_an_event_does_not_change_its_samples(method: str) -> None:
    model = any_shape_model()
    image, flat = (model.sample(shape, seed=5, **ANY[method]) for shape in ((2, 2, 2, 2), (2, 8)))  # type: ignore[arg-type]
    torch.testing.assert_close(image.flatten(1), flat)


def test_an_ancestral_loop_visits_the_grid_and_ends_in_the_decoder() -> None:
    class Spy(Step):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.seen: list[tuple[float, float]] = []

        def __call__(
            self, reverse: ReverseProcess, z: Tensor, t: object, s: object, noise: Tensor
        ) -> Tensor:
            self.seen.append((float(t.t[0]), float(s.t[0])))  # type: ignore[attr-defined]
            return torch.zeros_like(z)

    spy = Spy()
    model = NDM(LinearLogSNRSchedule(-20.0, 5.0), Identity(), Predictor(Scale()), GaussianDecoder())
    x = model.sample((500, 2), GridSampler(spy, 4), seed=0)
    assert spy.seen == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]
    assert float(x.std()) == pytest.approx(math.exp(-10.0), rel=0.1)


def test_steps_default_to_the_training_steps() -> None:
    model = any_shape_model()
    hundred = model.sample((2, 2), seed=1)
    assert torch.equal(hundred, model.sample((2, 2), seed=1, steps=100))
    model.steps = 7
    assert torch.equal(model.sample((2, 2), seed=1), model.sample((2, 2), seed=1, steps=7))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"method": "langevin"}, "ancestral, ddim, sde, ode"),
        ({"method": "ancestral", "solver": "heun"}, "leave solver out"),
        ({"method": "ode", "solver": "torchsde-srk"}, "heun, euler, dopri5"),
        ({"method": "sde", "solver": "dopri5"}, "euler, heun"),
        ({"method": "ddim", "eta": 0.5}, "deterministic"),
        ({"method": "ode", "eta": 1.0}, "deterministic"),
        ({"method": "ancestral", "eta": -1.0}, "eta=-1"),
        ({"method": "sde", "eta": math.nan}, "eta=nan"),
        ({"method": "ancestral", "steps": 0}, "steps=0"),
        ({"method": "sde", "solver": "torchsde-srk", "steps": 0}, "steps=0"),
        ({"method": "sde", "solver": "torchsde-srk", "eta": 0.0}, "eta"),
        ({"method": "ode", "solver": "dopri5", "rtol": 0.0}, "rtol=0"),
    ],
)
def test_contradictory_options_are_rejected_in_one_line(
    options: dict[str, object], pattern: str
) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        make_sampler(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, GridSampler),
        ({"method": "ddim"}, GridSampler),
        ({"method": "sde", "solver": "torchsde-euler"}, TorchSDE),
        ({"method": "ode", "solver": "dopri5"}, AdaptiveODE),
        ({"method": "ode", "eta": 0.0}, GridSampler),
    ],
)
def test_options_select_the_sampler(options: dict[str, object], kind: type[Sampler]) -> None:
    assert isinstance(make_sampler(**options), kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ancestral", "sde", "ode"])
def test_a_sampler_uses_the_given_eta(method: str) -> None:
    sampler = make_sampler(method, 3, None if method == "ode" else 0.6)  # type: ignore[arg-type]
    assert isinstance(sampler, GridSampler)
    assert sampler.step.eta == (0.0 if method == "ode" else 0.6)


def test_scalar_events_are_sampled() -> None:
    process = ForwardProcess(LinearLogSNRSchedule(-6.0, 5.0), Identity())
    z = torch.randn(5, generator=torch.Generator().manual_seed(0))
    wide = z[:, None]
    sampler, reverse = GridSampler(Heun(0.0), 5), ReverseProcess(process, Predictor(Scale()))
    torch.testing.assert_close(sampler(reverse, z), sampler(reverse, wide)[:, 0])


def test_samples_use_the_reverse_process_of_the_training_bound() -> None:
    torch.manual_seed(0)
    parts = LinearLogSNRSchedule(-5.0, 3.0), Identity(), Predictor(MLP(2, 8, 1)), GaussianDecoder()
    model = NDM(*parts, steps=4, eta=0.5)
    assert torch.equal(model.sample((3, 2), seed=0), model.sample((3, 2), seed=0, eta=0.5, steps=4))
    assert not torch.equal(model.sample((3, 2), seed=0), model.sample((3, 2), seed=0, eta=1.0))


@pytest.mark.parametrize("solver", ["rk4", "foo"])
def test_solvers_without_step_size_control_are_rejected(solver: str) -> None:
    with pytest.raises(UserError, match="adaptive"):
        AdaptiveODE(solver)


@pytest.mark.parametrize(
    "decoder", [GaussianDecoder(), DiscretizedGaussian(16)], ids=["continuous", "discrete"]
)
def test_nonfinite_samples_are_rejected(decoder: Decoder) -> None:
    """For example of a network that overflows in half precision."""

    class Overflows(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return z / 0.0

    model = NDM(LinearLogSNRSchedule(-4.0, 3.0), Identity(), Predictor(Overflows(), "x"), decoder)
    with pytest.raises(UserError, match=r"not finite.*more steps"):
        model.sample((2, 3), steps=4, seed=0)
