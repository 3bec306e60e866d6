"""The bound against dense Gaussians, against an independent VDM loss, and against its own limits."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.elbo import (
    Bound,
    bits_per_dim,
    path_log_weight,
    prior_term,
    reconstruction_term,
)
from ndm.errors import UserError
from ndm.forward import ForwardProcess
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.predictor import Predictor
from ndm.random import ExampleGenerators
from ndm.reverse import Reverse
from ndm.sample import Ancestral
from ndm.schedule import FlowMatchingSchedule, LearnedSchedule, LinearLogSNRSchedule, Schedule
from ndm.time_sampling import (
    ImportanceTimeSampler,
    LowDiscrepancyTimeSampler,
    PiecewiseConstant,
    UniformTimeSampler,
)
from ndm.transform import GatedTransform, Identity, NetworkTransform, SeparableTransform, Transform
from oracles import (
    F64,
    SHEAR,
    GaussianProblem,
    LinearTransform,
    affine_map,
    constant,
    diffusion,
    joint_bound,
    randomized,
    slope,
)


def learned() -> Schedule:
    return randomized(LearnedSchedule(-6.0, 3.0))


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: LinearLogSNRSchedule(-6.0, 3.0),
    "flow": lambda: FlowMatchingSchedule(0.05, 0.1),
    "learned": learned,
}
TRANSFORMS: dict[str, Callable[[], LinearTransform]] = {
    "tilted": LinearTransform,
    "sheared": lambda: LinearTransform(start=SHEAR),
}


def expected_ends(problem: GaussianProblem) -> Tensor:
    """E[prior + reconstruction], exactly: both are quadratic in (x, noise)."""
    x, noise, _, mean = problem.cubature(torch.zeros(1, dtype=F64))
    return mean(
        prior_term(problem.process, x)
        + reconstruction_term(problem.process, GaussianDecoder(), x, noise)
    )[0].detach()


def expected_discrete(problem: GaussianProblem, steps: int, eta: float) -> Tensor:
    """E[discrete NELBO], exactly: every step once, quadratic in (x, noise)."""
    x, noise, u, mean = problem.cubature((torch.arange(steps, dtype=F64) + 0.5) / steps)
    with torch.no_grad():
        return (
            expected_ends(problem)
            + mean(diffusion(problem.process, problem, x, u, noise, steps, eta)).mean()
        )  # type: ignore[arg-type]


def expected_continuous(problem: GaussianProblem, eta: float, panels: int = 100) -> Tensor:
    """E[continuous NELBO] by two-point Gauss-Legendre panels in t."""
    edge = (
        torch.arange(panels, dtype=F64)[:, None]
        + 0.5
        + torch.tensor([-1, 1], dtype=F64) / math.sqrt(12)
    )
    x, noise, u, mean = problem.cubature(edge.flatten() / panels)
    with torch.no_grad():
        return (
            expected_ends(problem)
            + mean(diffusion(problem.process, problem, x, u, noise, None, eta)).mean()
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "eta"), [(1, 1.0), (3, 0.4), (5, 1.0), (60, 1.2)])
def test_discrete_bound_is_the_divergence_of_joint_gaussians(
    schedule: str, transform: str, steps: int, eta: float
) -> None:
    problem = GaussianProblem(SCHEDULES[schedule](), TRANSFORMS[transform]())
    expected = joint_bound(problem, steps, eta)
    assert expected_discrete(problem, steps, eta).item() == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("eta", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_bound_tends_to_the_continuous_one_at_order_one(schedule: str, eta: float) -> None:
    problem = GaussianProblem(SCHEDULES[schedule]())
    limit = expected_continuous(problem, eta).item()
    sizes = [500, 1000, 2000]
    gaps = [expected_discrete(problem, size, eta).item() - limit for size in sizes]
    assert 0.8 < slope(sizes, [abs(gap) for gap in gaps]) < 1.2
    assert 2 * gaps[-1] - gaps[-2] == pytest.approx(0.0, abs=1e-3)  # Richardson


def test_flow_matching_without_signal_at_the_end_has_the_same_limit() -> None:
    problem = GaussianProblem(FlowMatchingSchedule(0.05, 0.0))
    assert problem.prior_gap().item() == pytest.approx(0.0, abs=1e-12)
    assert expected_discrete(problem, 20, 1.0).item() == pytest.approx(
        joint_bound(problem, 20, 1.0 - 1e-12).item(), rel=1e-6
    )
    gaps = [
        expected_discrete(problem, size, 1.0).item() - expected_continuous(problem, 1.0).item()
        for size in (400, 800)
    ]
    assert 2 * gaps[1] - gaps[0] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("start", [torch.eye(2, dtype=F64), SHEAR], ids=["identity", "sheared"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_markov_case_is_tight_up_to_prior_and_decoder(schedule: str, start: Tensor) -> None:
    problem = GaussianProblem(SCHEDULES[schedule](), constant(start))
    expected = problem.entropy() + problem.prior_gap() + problem.decoder_gap()
    assert expected_continuous(problem, 1.0).item() == pytest.approx(expected.item(), abs=2e-5)
    coarse = expected_discrete(problem, 10, 1.0)
    assert coarse > expected + 1e-3, "a coarse chain must cost nats"


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.7, 1.0, 1.5])
def test_time_dependent_case_costs_just_the_path_gap_more(
    schedule: str, transform: str, eta: float
) -> None:
    problem = GaussianProblem(SCHEDULES[schedule](), TRANSFORMS[transform]())
    assert problem.path_gap(eta) > 1e-3
    expected = (
        problem.entropy() + problem.prior_gap() + problem.decoder_gap() + problem.path_gap(eta)
    )
    assert expected_continuous(problem, eta).item() == pytest.approx(expected.item(), abs=1e-3)


def test_a_worse_predictor_has_a_worse_bound() -> None:
    problem = GaussianProblem(LinearLogSNRSchedule(-6.0, 3.0))
    best = expected_continuous(problem, 1.0)
    problem.means = problem.means + 0.1
    x, noise, u, mean = GaussianProblem(LinearLogSNRSchedule(-6.0, 3.0)).cubature(
        (torch.arange(200, dtype=F64) + 0.5) / 200
    )
    with torch.no_grad():
        worse = mean(diffusion(problem.process, problem, x, u, noise)).mean() + expected_ends(  # type: ignore[arg-type]
            GaussianProblem(LinearLogSNRSchedule(-6.0, 3.0))
        )
    assert worse > best + 1e-3


def fixed_batch(dims: int = 3, count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, noise = torch.randn(2, count, dims, dtype=F64, generator=generator)
    return x, noise, torch.rand(count, dtype=F64, generator=generator)


def network(dims: int = 3, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return randomized(MLP(dims, hidden=16, blocks=1, max_frequency=2.0), 0.1, seed)


@pytest.mark.parametrize("target", ["v", "eps", "x"])
@pytest.mark.parametrize(
    "schedule", [LinearLogSNRSchedule(-8.0, 4.0), learned()], ids=["linear", "learned"]
)
def test_identity_is_the_loss_of_variational_diffusion_models(
    schedule: Schedule, target: str
) -> None:
    """An implementation of its own: gamma by autograd, noise prediction, expm1."""
    x, noise, u = fixed_batch()
    process, predictor = ForwardProcess(schedule, Identity()), Predictor(network(), target)  # type: ignore[arg-type]

    def noise_error(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = t.clone().requires_grad_()
        gamma = schedule(t).gamma
        slope_t = torch.autograd.grad(gamma.sum(), t)[0]
        alpha, sigma = torch.sigmoid(-gamma).sqrt()[:, None], torch.sigmoid(gamma).sqrt()[:, None]
        z = alpha * x + sigma * noise
        guess = (z - alpha * predictor(z, schedule(t))) / sigma
        return ((noise - guess) ** 2).sum(1), gamma, slope_t

    error, _, gamma_slope = noise_error(u)
    torch.testing.assert_close(
        diffusion(process, predictor, x, u, noise), 0.5 * gamma_slope * error, rtol=1e-7, atol=0
    )
    steps = 17
    t = (torch.floor(u * steps) + 1) / steps
    error, gamma_t, _ = noise_error(t)
    expected = 0.5 * steps * torch.expm1(gamma_t - schedule(t - 1 / steps).gamma) * error
    torch.testing.assert_close(
        diffusion(process, predictor, x, u, noise, steps), expected, rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("kind", [NetworkTransform, GatedTransform])
@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_fine_steps_agree_with_the_continuous_integrand_for_networks(
    kind: type[Transform], eta: float
) -> None:
    x, noise, u = fixed_batch()
    process = ForwardProcess(LinearLogSNRSchedule(-6.0, 4.0), kind(network(seed=2)))  # type: ignore[call-arg]
    randomized(process.transform, 0.1, 3)
    predictor, steps = Predictor(network(seed=4)), 100_000
    u = (torch.floor(u * steps) + 0.5) / steps
    fine = diffusion(process, predictor, x, u, noise, steps, eta)
    torch.testing.assert_close(
        fine, diffusion(process, predictor, x, u, noise, None, eta), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    "schedule",
    [LinearLogSNRSchedule(-6.0, 0.5), FlowMatchingSchedule(0.05, 0.1)],
    ids=["linear", "flow"],
)
def test_prior_and_reconstruction_are_those_of_torch_distributions(schedule: Schedule) -> None:
    x, noise, _ = fixed_batch(2)
    process = ForwardProcess(schedule, LinearTransform(start=SHEAR))
    end, start = schedule(torch.ones(1, dtype=F64)), schedule(torch.zeros(1, dtype=F64))
    matrix, offset = process.transform.matrix(torch.tensor([0.0, 1.0], dtype=F64))  # type: ignore[operator]
    latent = torch.distributions.Normal(end.alpha * (x @ matrix[1].T + offset[1]), end.sigma)
    expected = torch.distributions.kl_divergence(
        latent, torch.distributions.Normal(torch.zeros(()).double(), 1.0)
    ).sum(1)
    torch.testing.assert_close(prior_term(process, x), expected)
    z = start.alpha * x @ matrix[0].T + start.sigma * noise
    log_p = (
        torch.distributions.Normal(z / start.alpha, torch.exp(start.gamma / 2)).log_prob(x).sum(1)
    )
    torch.testing.assert_close(reconstruction_term(process, GaussianDecoder(), x, noise), -log_p)


def test_the_prior_term_of_an_image_counts_every_pixel() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=F64)
    flat = prior_term(ForwardProcess(LinearLogSNRSchedule(-6.0, 1.0), Identity()), x.flatten(1))
    torch.testing.assert_close(
        prior_term(ForwardProcess(LinearLogSNRSchedule(-6.0, 1.0), Identity()), x), flat
    )
    sigma, alpha = math.sqrt(1 / (1 + math.exp(-1.0))), math.sqrt(1 / (1 + math.exp(1.0)))
    expected = 0.5 * (
        alpha**2 * (x**2).flatten(1).sum(1) + 60 * (sigma**2 - 1 - 2 * math.log(sigma))
    )
    torch.testing.assert_close(flat, expected)


@pytest.mark.parametrize("steps", [None, 8])
def test_every_term_trains_what_it_depends_on(steps: int | None) -> None:
    torch.manual_seed(0)
    process = ForwardProcess(LearnedSchedule(-5.0, 2.0, learn_ends=True), GatedTransform(network()))
    process.double()
    randomized(process.transform, 0.1)
    predictor = Predictor(network(seed=7))
    x, noise, u = fixed_batch()
    ends, inside = process.schedule.start_and_log_range, process.schedule.log_height
    terms = {
        "prior": prior_term(process, x),
        "diffusion": diffusion(process, predictor, x, u, noise, steps),
        "reconstruction": reconstruction_term(process, GaussianDecoder(), x, noise),
    }
    groups = {
        "ends": [ends],
        "inside": [inside],
        "transform": [*process.transform.parameters()],
        "predictor": [*predictor.parameters()],
    }
    reached = {}
    for name, term in terms.items():
        for group, parameters in groups.items():
            gradients = torch.autograd.grad(
                term.sum(), parameters, retain_graph=True, allow_unused=True
            )  # type: ignore[arg-type]
            reached[name, group] = any(
                g is not None and float(g.abs().max()) > 1e-9 for g in gradients
            )
            assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    always = {(name, group) for name in terms for group in ("ends", "transform")}
    assert {pair for pair, hit in reached.items() if hit} == always | {
        ("diffusion", "inside"),
        ("diffusion", "predictor"),
    }


def toy_model(**options: object) -> NDM:
    return NDM(
        LinearLogSNRSchedule(-5.0, 3.0),
        NetworkTransform(network(2, 3)),
        Predictor(network(2, 4)),
        GaussianDecoder(),
        **options,  # type: ignore[arg-type]
    ).double()


@pytest.mark.parametrize("steps", [None, 6])
def test_draws_are_unbiased_and_their_standard_error_covers(steps: int | None) -> None:
    model = toy_model(steps=steps).eval()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 2, dtype=F64, generator=generator)
    with torch.no_grad():
        many = model.bound(
            x.repeat_interleave(20_000, 0), draws=1, generator=generator
        ).total.reshape(2, -1)
        few = model.bound(
            x.repeat_interleave(2_000, 0), draws=4, generator=generator
        ).total.reshape(2, -1)
        spread = (many.var(1) / 20_000 + few.var(1) / 2_000).sqrt()
        assert bool(((many.mean(1) - few.mean(1)).abs() < 4 * spread).all())
        assert bool((few.var(1) < many.var(1) / 3).all()), (
            "strata must not raise the variance of the mean of four"
        )
        data = torch.randn(200 * 64, 2, dtype=F64, generator=generator)
        total = model.bound(data, draws=2, generator=generator).total.reshape(200, 64)
    score = (total.mean(1) - total.mean()) / (total.std(1) / 8)
    assert 0.85 < float(score.std()) < 1.2


@pytest.mark.parametrize(
    "times",
    [LowDiscrepancyTimeSampler(), ImportanceTimeSampler(bins=16)],
    ids=["low", "importance"],
)
@pytest.mark.parametrize("steps", [None, 6])
def test_every_time_sampler_estimates_the_same_bound(times: nn.Module, steps: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 2, dtype=F64, generator=generator).expand(2_000, 2)
    model, plain = (
        toy_model(time_sampler=times, steps=steps).train(),
        toy_model(time_sampler=UniformTimeSampler(), steps=steps).eval(),
    )
    with torch.no_grad():
        for _ in range(5):
            model.bound(x, generator=generator)
        model.eval()
        if isinstance(times, ImportanceTimeSampler):
            assert float(times.density().std()) > 0.1, "the density must have been learned"
        means = [
            [m.bound(x, generator=generator).diffusion.mean() for _ in range(20)]
            for m in (model, plain)
        ]
    a, b = (torch.stack(values) for values in means)
    assert abs(float(a.mean() - b.mean())) < 4 * float((a.var() / 20 + b.var() / 20).sqrt())


def test_a_uniform_model_of_bytes_costs_eight_bits() -> None:
    model = (
        NDM(
            LinearLogSNRSchedule(40.0, 41.0),
            Identity(),
            Predictor(network(12)),
            DiscretizedGaussian(256),
        )
        .double()
        .eval()
    )
    x = DiscretizedGaussian(256).values[torch.arange(24).reshape(2, 12) * 10]
    bound = model.bound(x, draws=2, generator=torch.Generator().manual_seed(0))
    bits = bits_per_dim(bound.total, 12)
    torch.testing.assert_close(bits, torch.full((2,), 8.0, dtype=F64), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        bound.terms()["nelbo"], bound.prior + bound.diffusion + bound.reconstruction
    )


def test_the_total_is_the_plain_sum() -> None:
    bound = Bound(torch.tensor([1.0]), torch.tensor([20.0]), torch.tensor([-300.0]))
    assert bound.total.item() == -279.0
    assert {name: value.item() for name, value in bound.terms().items()} == {
        "prior": 1.0, "diffusion": 20.0, "reconstruction": -300.0, "nelbo": -279.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "eta"), [(None, 0.0), (None, -1.0), (0, 1.0), (-3, 1.0), (None, math.nan)]
)
def test_a_bound_that_is_infinite_or_empty_is_refused(steps: int | None, eta: float) -> None:
    x, noise, u = fixed_batch()
    process = ForwardProcess(LinearLogSNRSchedule(), Identity())
    with pytest.raises(UserError, match=r"eta|steps") as caught:
        diffusion(process, Predictor(network()), x, u, noise, steps, eta)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("draws", "steps"), [(0, None), (2, 0)])
def test_the_model_refuses_no_draws_and_no_steps(draws: int, steps: int | None) -> None:
    with pytest.raises(UserError, match=r"draws|steps"):
        toy_model().bound(torch.zeros(2, 2, dtype=F64), draws=draws, steps=steps)


def chain_log_prob(
    problem: GaussianProblem, x: Tensor, steps: int, eta: float, scale: PiecewiseConstant | None
) -> Tensor:
    """log p(x) of the T-step model with the exact predictor: N(0, I) pushed through its affine
    steps and the Gaussian decoder.
    """
    mean, covariance = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    for i in range(steps, 0, -1):
        t, s = (problem.process.level(j / steps, torch.zeros(1, 2, dtype=F64)) for j in (i, i - 1))
        a, b, c = affine_map(Ancestral(eta, scale), problem, t, s)
        mean, covariance = a + b @ mean, b @ covariance @ b.T + c @ c.T
    level = problem.process.schedule(torch.zeros(1, dtype=F64))
    covariance = covariance / level.alpha**2 + torch.exp(level.gamma) * torch.eye(2, dtype=F64)
    return torch.distributions.MultivariateNormal(mean / level.alpha, covariance).log_prob(x)


@pytest.mark.parametrize(
    "scale",
    [None, PiecewiseConstant(torch.tensor([1.3, 1.1, 1.8, 1.2], dtype=F64))],
    ids=["v", "wide"],
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_importance_weighted_paths_rise_to_the_exact_likelihood_of_the_chain(
    transform: str, scale: PiecewiseConstant | None
) -> None:
    round_one = torch.tensor(
        [[0.6, 0.2], [0.2, 0.5]], dtype=F64
    )  # a thin Gaussian would need too many paths
    problem = GaussianProblem(
        LinearLogSNRSchedule(-1.0, 2.0), TRANSFORMS[transform](), covariance=round_one
    )
    steps, eta, rows = 4, 0.9, 80_000
    x = problem.draw(2, torch.Generator().manual_seed(0))
    exact = chain_log_prob(problem, x, steps, eta, scale)
    generator = torch.Generator().manual_seed(1)
    many = x.repeat_interleave(rows, 0)
    with torch.no_grad():
        weights = path_log_weight(
            problem.reverse, GaussianDecoder(), many, steps, generator, eta, scale
        ).reshape(2, rows)  # type: ignore[arg-type]
    ratio = (weights - exact[:, None]).exp()
    assert bool(((ratio.mean(1) - 1).abs() < 4 * ratio.std(1) / math.sqrt(rows)).all()), (
        "the weights must be unbiased for p(x)"
    )
    assert float((ratio.std(1) / math.sqrt(rows)).max()) < 0.05
    bounds = [
        float((torch.logsumexp(weights.reshape(2, -1, k), 2) - math.log(k)).mean())
        for k in (1, 5, 50)
    ]
    assert bounds[0] + 0.05 < bounds[1] < bounds[2] < float(exact.mean()) + 0.02


@pytest.mark.parametrize("eta", [1.0, 0.8])
def test_one_path_estimates_the_discrete_bound(eta: float) -> None:
    problem, steps = GaussianProblem(LinearLogSNRSchedule(-3.0, 4.0)), 3
    x = problem.draw(40_000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = path_log_weight(
            problem.reverse, GaussianDecoder(), x, steps, torch.Generator().manual_seed(1), eta
        )  # type: ignore[arg-type]
    expected = joint_bound(problem, steps, eta).detach()
    assert abs(float(-weights.mean() - expected)) < 4 * float(weights.std()) / 200
    assert float(weights.std()) / 200 < 0.05


@pytest.mark.parametrize("reverse", ["tied", "direct", "direct-score", "diffenc"])
@pytest.mark.parametrize("steps", [None, 10])
def test_an_empty_batch_has_an_empty_bound(reverse: Reverse, steps: int | None) -> None:
    """A process whose share of the data is nothing still takes part in the step."""
    for separable in (False, True):
        network = UNet(channels=8, multiples=(1,), outputs=2 if separable else None)
        predictor = Predictor(
            UNet(channels=8, multiples=(1,), outputs=2 if reverse == "direct-score" else None)
        )
        transform = SeparableTransform(network) if separable else NetworkTransform(network)
        model = NDM(
            LinearLogSNRSchedule(-6.0, 4.0),
            transform,
            predictor,
            DiscretizedGaussian(256),
            steps=steps,
            reverse=reverse,
        )
        nothing = torch.zeros(0, 1, 8, 8)
        with torch.no_grad():
            assert model.bound(nothing).total.shape == (0,)
        for draws, source in ((None, None), (3, None), (3, ExampleGenerators(0, [], 1))):
            bound = model.bound(nothing, draws=draws, generator=source)
            assert bound.total.shape == bound.loss.shape == (0,)
            bound.loss.sum().backward()
        assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())
