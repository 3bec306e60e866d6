"""The direct reverse process against the exact tied one; DiffEnc against its published loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.elbo import diffusion_integrand
from ndm.errors import UserError
from ndm.forward import ForwardProcess, gaussian, posterior_coefficients
from ndm.model import NDM
from ndm.nn import MLP
from ndm.ode import OdeSettings, ode_log_prob
from ndm.predictor import DataPredictor, Predictor
from ndm.reverse import Reverse, ReverseProcess
from ndm.sample import AdaptiveODE, Ancestral, Euler, GridSampler
from ndm.schedule import (
    FlowMatchingSchedule,
    LearnedSchedule,
    LinearLogSNRSchedule,
    NoiseLevel,
    Schedule,
)
from ndm.time_sampling import Draw
from ndm.transform import GatedTransform, Identity
from oracles import F64, GaussianProblem, diffusion, randomized, slope

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: LinearLogSNRSchedule(-6.0, 3.0),
    "flow": lambda: FlowMatchingSchedule(0.05, 0.1),
    "learned": lambda: randomized(LearnedSchedule(-6.0, 3.0)),
}


class ExactTarget(DataPredictor):
    """E[y|z_t] and E[F|z_t] of a Gaussian problem, whose F is affine in x."""

    def __init__(self, problem: GaussianProblem, eta: float, steps: int | None = None):
        super().__init__()
        self.problem, self.eta, self.steps = problem, eta, steps

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        x, transform = self.problem(z, level), self.problem.linear
        if self.steps is None:
            value, derivative = transform.with_derivative(x, level)
            return value - 2 / (1 + self.eta**2) * derivative / level.dgamma[:, None]
        s = self.problem.process.schedule(level.t - 1 / self.steps)
        k = posterior_coefficients(s, level, self.eta).k
        of_s, of_t = s.alpha[:, None], (k * level.alpha)[:, None]
        return (of_s * transform(x, s) - of_t * transform(x, level)) / (of_s - of_t)

    def two(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self(z, level), self.problem.linear(self.problem(z, level), level)


def direct(
    problem: GaussianProblem, kind: Reverse, eta: float, steps: int | None = None
) -> ReverseProcess:
    return ReverseProcess(problem.process, ExactTarget(problem, eta, steps), kind, eta)  # type: ignore[arg-type]


def batch(problem: GaussianProblem, count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = problem.draw(count, generator)
    noise = torch.randn(x.shape, dtype=F64, generator=generator)
    return x, noise, torch.rand(count, dtype=F64, generator=generator)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.02])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [None, 7])
def test_with_the_exact_target_the_direct_bound_equals_the_tied_bound(
    schedule: str, eta: float, steps: int | None
) -> None:
    problem = GaussianProblem(SCHEDULES[schedule]())
    x, noise, u = batch(problem)
    reverse, curve = direct(problem, "direct", eta, steps), problem.linear.curve(x)
    found = diffusion_integrand(reverse, curve, Draw(u, noise), steps, eta).bound
    expected = diffusion(problem.process, problem, x, u, noise, steps, eta)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_the_continuous_target_is_the_limit_of_the_discrete_target() -> None:
    problem = GaussianProblem(LinearLogSNRSchedule(-6.0, 3.0))
    x, noise, u = batch(problem)
    sizes, gaps = [200, 400, 800], []
    for steps in sizes:
        draw = Draw((torch.floor(u * steps) + 0.5) / steps, noise)
        terms = []
        for target_steps in (None, steps):
            reverse = direct(problem, "direct", 1.0, target_steps)
            terms.append(diffusion_integrand(reverse, problem.linear.curve(x), draw, steps).bound)
        gaps.append(float((terms[0] - terms[1]).sum().detach().abs()))
    assert slope(sizes, gaps) > 0.8


@pytest.mark.parametrize("other", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("eta", [0.7, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_a_second_head_the_direct_drift_is_exact_for_every_eta(
    schedule: str, eta: float, other: float
) -> None:
    problem = GaussianProblem(SCHEDULES[schedule]())
    z, _, t = batch(problem)
    level = problem.process.schedule(t)
    found = direct(problem, "direct-score", eta).drift(z, level, other)
    torch.testing.assert_close(found, problem.reverse.drift(z, level, other), rtol=1e-8, atol=1e-8)


def test_the_direct_ode_has_the_likelihood_of_the_tied_ode() -> None:
    problem = GaussianProblem(LinearLogSNRSchedule(-4.0, 3.0))
    z, _, _ = batch(problem, 4)
    settings = OdeSettings(rtol=1e-7, atol=1e-7, probes="exact")
    found = ode_log_prob(direct(problem, "direct-score", 1.0), z, settings).log_p
    expected = ode_log_prob(problem.reverse, z, settings).log_p
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_ddim_with_the_second_head_converges_to_the_ode_at_order_one() -> None:
    problem = GaussianProblem(LinearLogSNRSchedule(-4.0, 3.0))
    reverse = direct(problem, "direct-score", 1.0)
    z = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        end = AdaptiveODE(rtol=1e-9, atol=1e-9)(problem.reverse, z)
        sizes = [40, 80, 160]
        errors = [
            float((GridSampler(Ancestral(0.0), steps)(reverse, z) - end).norm()) for steps in sizes
        ]
    assert 0.8 < slope(sizes, errors) < 1.3
    assert errors[-1] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("step", [Ancestral, Euler])
def test_sampling_at_the_trained_eta_needs_neither_second_head_nor_transform(
    step: type[Ancestral] | type[Euler],
) -> None:
    problem, eta = GaussianProblem(LinearLogSNRSchedule(-4.0, 3.0)), 0.8
    z = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        processes = (direct(problem, "direct", eta), problem.reverse)
        ends = [
            GridSampler(step(eta), 2000)(reverse, z, torch.Generator().manual_seed(1))
            for reverse in processes
        ]
    # With the same noise, ancestral steps differ at second order.
    torch.testing.assert_close(*ends, rtol=0, atol=5e-3)


def small_model(reverse: Reverse, outputs: int | None, **options: object) -> NDM:
    torch.manual_seed(0)
    predictor = Predictor(MLP(3, hidden=16, blocks=1, max_frequency=2.0, outputs=outputs))
    transform = GatedTransform(MLP(3, hidden=8, blocks=1, max_frequency=2.0))
    parts = LinearLogSNRSchedule(-5.0, 3.0), transform, predictor, GaussianDecoder()
    return randomized(NDM(*parts, reverse=reverse, **options), 0.2)  # type: ignore[arg-type]


def test_without_a_second_head_other_etas_and_the_ode_are_rejected() -> None:
    model = small_model("direct", None)
    x = torch.randn(4, 3, dtype=F64)
    for call in (
        lambda: model.sample((2, 3), method="ode", steps=3),
        lambda: model.sample((2, 3), method="ddim", steps=3),
        lambda: model.sample((2, 3), eta=0.5, steps=3),
        lambda: model.log_likelihood(x),
        lambda: model.bound(x, eta=0.5),
    ):
        with pytest.raises(UserError, match="direct-score") as caught:
            call()
        assert "\n" not in str(caught.value)
    for method in ("ancestral", "sde"):
        assert model.sample((2, 3), method=method, steps=3).shape == (2, 3)  # type: ignore[arg-type]


def test_a_wrong_number_of_outputs_is_rejected() -> None:
    with pytest.raises(UserError, match="outputs=2"):
        small_model("direct-score", None).bound(torch.zeros(2, 3, dtype=F64))
    with pytest.raises(UserError, match=r"must return \(2, 3\)"):
        small_model("direct", 2).bound(torch.zeros(2, 3, dtype=F64))
    with pytest.raises(UserError, match="choose one of tied, direct"):
        small_model("loose", None)  # type: ignore[arg-type]


def gradients(loss: Tensor, model: NDM) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


@pytest.mark.parametrize("steps", [None, 5])
def test_the_second_head_trains_without_bias_and_leaves_the_bound_unchanged(
    steps: int | None,
) -> None:
    """Averaged over the random bit, the bound has its plain gradient; the regression's gradient
    stops at z and F.
    """
    model = small_model("direct-score", 2)
    x, noise = torch.randn(2, 6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    u = torch.linspace(0.05, 0.95, 6, dtype=F64)
    reverse, curve = model.reverse_process, model.transform.curve(x)
    sums: dict[str, list[Tensor]] = {}
    for coin in (0.2, 0.8):  # both sides, equally often
        draw = Draw(u, noise, torch.tensor([coin], dtype=F64))
        found = diffusion_integrand(reverse, curve, draw, steps)
        assert found.regression is not None
        for part, loss in (("bound", found.bound.sum()), ("regression", found.regression.sum())):
            sums.setdefault(part, []).append(gradients(loss, model))  # type: ignore[arg-type]

    level = model.schedule(u if steps is None else (torch.floor(u * steps) + 1) / steps)
    value = curve.at(level)
    z = gaussian(value, level).sample(noise)
    plain = ReverseProcess(model.process, model.predictor, "direct-score")
    with torch.no_grad():
        without = diffusion_integrand(plain, curve, Draw(u, noise), steps).bound
    torch.testing.assert_close(found.bound, without, rtol=1e-12, atol=1e-12)

    class First(DataPredictor):
        def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
            return model.predictor.two(z, level)[0]

    single = ReverseProcess(model.process, First(), "direct")  # type: ignore[arg-type]
    bound = diffusion_integrand(single, curve, Draw(u, noise), steps).bound.sum()
    error = value.detach() - model.predictor.two(z.detach(), level)[1]
    regression = (0.5 * level.snr_decay * (error**2).sum(1)).sum()
    expected = {"bound": gradients(bound, model), "regression": gradients(regression, model)}
    for part, pair in sums.items():
        for name, gradient in expected[part].items():
            mean = (pair[0][name] + pair[1][name]) / 2  # type: ignore[index]
            torch.testing.assert_close(mean, gradient, rtol=1e-9, atol=1e-9, msg=f"{part} {name}")
    touched = [name for name, value in expected["regression"].items() if bool((value != 0).any())]
    assert touched and all(name.startswith("predictor") for name in touched)


@pytest.mark.parametrize("steps", [None, 5])
def test_the_regression_does_not_train_a_learned_schedule(steps: int | None) -> None:
    model = small_model("direct-score", 2)
    model.process.schedule = randomized(LearnedSchedule(-5.0, 3.0, learn_ends=True), 0.1)
    bound = model.bound(torch.randn(16, 3, dtype=F64), steps=steps)
    assert bound.regression is not None
    for name, gradient in gradients(bound.regression.sum(), model).items():
        assert name.startswith("predictor") or not bool(gradient.any()), name
    assert bool(gradients(bound.total.sum(), model)["process.schedule.start_and_log_range"].any())


def test_training_minimizes_the_bound_and_the_regression() -> None:
    x = torch.randn(5, 3, dtype=F64)
    bound = small_model("direct-score", 2).bound(x)
    assert bound.regression is not None
    torch.testing.assert_close(bound.loss, bound.total + bound.regression)
    with torch.no_grad():
        assert small_model("direct-score", 2).bound(x).regression is None
    plain = small_model("direct", None).bound(x)
    assert plain.regression is None and plain.loss.equal(plain.total)


@pytest.mark.parametrize("schedule", ["linear", "learned"])
def test_diffenc_has_its_published_loss(schedule: str) -> None:
    """Nielsen et al. 2024, with lambda = -gamma, by autograd.

    -½ dSNR/dt ||x̂ + d/dlambda x_phi(x̂) - x_phi(x) - d/dlambda x_phi(x)||²
    """
    model = small_model("diffenc", None)
    model.process.schedule = SCHEDULES[schedule]()
    x, noise = torch.randn(2, 6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    u = torch.linspace(0.05, 0.95, 6, dtype=F64)
    curve = model.transform.curve(x)
    found = diffusion_integrand(model.reverse_process, curve, Draw(u, noise)).bound
    t = u.clone().requires_grad_()
    level = model.schedule(t)

    def encoded(data: Tensor) -> tuple[Tensor, Tensor]:
        """x_phi = x + sigma² f(x, t) and its derivative in lambda."""
        value = data + level.sigma[:, None] ** 2 * model.transform.network(data, t)  # type: ignore[operator]
        slopes = [torch.autograd.grad(value[:, i].sum(), t, retain_graph=True)[0] for i in range(3)]
        rate = -torch.autograd.grad(level.gamma.sum(), t, retain_graph=True)[0]
        return value, torch.stack(slopes, 1) / rate[:, None]

    value, derivative = encoded(x)
    z = level.alpha[:, None] * value + level.sigma[:, None] * noise
    guess = model.predictor(z, level).detach()
    error = ((guess + encoded(guess)[1] - value - derivative) ** 2).sum(1)
    snr = torch.exp(-model.schedule(t).gamma)
    expected = -0.5 * torch.autograd.grad(snr.sum(), t)[0] * error
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_discrete_diffenc_bound_converges_to_the_continuous_bound(eta: float) -> None:
    model = small_model("diffenc", None)
    x, noise = torch.randn(2, 6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    steps = 100_000
    u = (torch.floor(torch.linspace(0.05, 0.95, 6, dtype=F64) * steps) + 0.5) / steps
    reverse, curve, draw = model.reverse_process, model.transform.curve(x), Draw(u, noise)
    terms = [diffusion_integrand(reverse, curve, draw, n, eta).bound for n in (steps, None)]
    torch.testing.assert_close(*terms, rtol=1e-3, atol=0)


def test_models_of_every_reverse_kind_save_and_load(tmp_path: object) -> None:
    values = DiscretizedGaussian(4).values.float()
    for kind, outputs in (("direct", None), ("direct-score", 2), ("diffenc", None)):
        torch.manual_seed(0)
        transform = GatedTransform(MLP(4, 8, 1))
        predictor = Predictor(MLP(4, 8, 1, outputs=outputs))
        parts = LinearLogSNRSchedule(-4.0, 3.0), transform, predictor, DiscretizedGaussian(4)
        model = NDM(*parts, eta=0.9, reverse=kind)  # type: ignore[arg-type]
        model.save_pretrained(f"{tmp_path}/{kind}")
        again = NDM.from_pretrained(f"{tmp_path}/{kind}")
        assert again.reverse == kind
        x = values[torch.arange(8).reshape(2, 4) % 4]
        bounds = [
            m.eval().bound(x, draws=2, generator=torch.Generator().manual_seed(0)).total
            for m in (model, again)
        ]
        assert bounds[0].equal(bounds[1])


def test_a_constant_transformation_needs_no_second_head() -> None:
    process = ForwardProcess(LinearLogSNRSchedule(-4.0, 3.0), Identity())
    predictor = Predictor(randomized(MLP(3, hidden=8, blocks=1)))
    z, t = torch.randn(4, 3, dtype=F64), torch.rand(4, dtype=F64)
    drifts = [
        ReverseProcess(process, predictor, kind).drift(z, process.schedule(t), 0.0)
        for kind in ("direct", "tied")
    ]
    assert drifts[0].equal(drifts[1])
