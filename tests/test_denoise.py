"""The reverse process from any latent, densities of samples, and gradients through both."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ndm
from ndm.decoder import DiscretizedGaussian, GaussianDecoder, NetworkDecoder
from ndm.errors import UserError
from ndm.ode import OdeSettings, ode_log_prob
from ndm.random import standard_normal
from ndm.reverse import ReverseKind
from ndm.sample import AdaptiveODE, Sampler
from ndm.schedule import LinearLogSNRSchedule
from ndm.transform import GatedTransform
from oracles import F64, GaussianProblem, LinearTransform, randomized
from test_condition import mlp

SCHEDULE = LinearLogSNRSchedule(-6.0, 12.0)
METHODS: list[tuple[Any, float | None]] = [
    *[("ancestral", eta) for eta in (0.5, 1.0)],
    *[("sde", eta) for eta in (0.5, 1.0)],
    ("ddim", None),
    ("ode", None),
    (AdaptiveODE(rtol=1e-6, atol=1e-6), None),
]


def exact() -> ndm.NDM:
    problem = GaussianProblem(SCHEDULE, LinearTransform())
    return ndm.NDM(SCHEDULE, problem.linear, problem, GaussianDecoder()).double()


def random_model(reverse: ReverseKind = "tied") -> ndm.NDM:
    return ndm.NDM(
        LinearLogSNRSchedule(-5.0, 3.0),
        randomized(GatedTransform(mlp(3)), 0.1),
        ndm.Predictor(mlp(4, 2 if reverse == "direct-score" else None)),
        GaussianDecoder(),
        reverse=reverse,
    ).double()


def latents(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("method", "eta"), METHODS)
def test_from_the_marginal_of_any_time_the_result_is_that_of_zero(
    method: Any, eta: float | None
) -> None:
    model, t = exact(), 0.4
    problem = model.predictor
    assert isinstance(problem, GaussianProblem)
    mean, covariance = problem.marginal(t)
    z = mean + latents(40_000) @ torch.linalg.cholesky(covariance).T
    steps = None if isinstance(method, Sampler) else 160
    found = model.denoise(z.detach(), t, method, steps=steps, eta=eta, seed=1, decode="latent")
    expected_mean, expected = problem.marginal(0.0)
    torch.testing.assert_close(found.mean(0), expected_mean.detach(), rtol=0, atol=0.03)
    torch.testing.assert_close(found.T.cov(), expected.detach(), rtol=0, atol=0.06)


@pytest.mark.parametrize("method", ["ddim", "ode", "ancestral", "sde"])
def test_from_the_end_of_time_it_is_a_sample(method: str) -> None:
    model = random_model()
    sample = model.sample((3, 2), method, steps=6, seed=5)
    generator = torch.Generator().manual_seed(5)
    z = standard_normal(torch.empty(3, 2, dtype=F64), generator)
    state = generator.get_state()
    again = model.denoise(z, 1.0, method, steps=6, seed=5, decode="latent")
    generator.set_state(state)
    sampler = model._sampler(method, 6, None, None, 1e-4, 1e-4)
    expected = sampler(model.reverse_process, z, torch.Generator().manual_seed(5))
    torch.testing.assert_close(again, expected)
    if method in ("ddim", "ode"):  # without noise on the way, only the decoder differs
        mean = model.denoise(z, 1.0, method, steps=6, decode="mean")
        width = torch.exp(0.5 * model.process.level(0.0, z).gamma)[0]
        assert float((mean - sample).abs().max() / width) < 5


def test_the_number_of_steps_is_that_of_the_part_of_time() -> None:
    model, seen = random_model(), []
    handle = model.predictor.network.register_forward_hook(lambda *_: seen.append(1))
    for t, steps in ((0.25, 25), (0.07, 7), (0.55, 55)):
        seen.clear()
        model.denoise(latents(2), t, "ddim")
        assert len(seen) == steps
    seen.clear()
    model.denoise(latents(2), 0.25, "ddim", steps=ndm.TimeGrid([0.0, 0.5, 1.0]))
    handle.remove()
    assert len(seen) == 2


@pytest.mark.parametrize("reverse", ["tied", "direct-score", "diffenc"])
@pytest.mark.parametrize("method", ["ancestral", "sde", "ddim", "ode"])
def test_gradients_through_the_reverse_process(reverse: ReverseKind, method: str) -> None:
    """Against finite differences, with the same noise; each step is recomputed."""
    model = random_model(reverse)
    z, probe = latents(3), latents(3, 1)

    def value(z: Tensor, differentiable: bool) -> Tensor:
        options: dict[str, Any] = {"decode": "mean", "differentiable": differentiable}
        return (probe * model.denoise(z, 0.6, method, steps=4, seed=2, **options)).sum()

    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf, True), leaf)
    direction = latents(3, 3)
    change = (value(z + 1e-6 * direction, False) - value(z - 1e-6 * direction, False)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-5, atol=1e-6)
    weight = next(model.predictor.parameters())
    value(z, True).backward()
    slope = weight.grad
    assert slope is not None
    moved = torch.zeros_like(weight)
    moved.view(-1)[0] = 1e-6
    with torch.no_grad():
        weight.add_(moved)
        up = value(z, False)
        weight.sub_(2 * moved)
        down = value(z, False)
        weight.add_(moved)
    torch.testing.assert_close(slope.view(-1)[0], (up - down) / 2e-6, rtol=1e-4, atol=1e-6)


def test_memory_of_gradients_does_not_grow_with_the_steps() -> None:
    """Tensors kept by the graph: a few for each step, not the activations of networks."""
    model = random_model()
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    totals = []
    for steps in (4, 8):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.denoise(
                latents(50).requires_grad_(), 0.6, "ddim", steps=steps, decode="mean",
                differentiable=True,
            )  # fmt: skip
        totals.append(sum(kept))
    assert totals[1] - totals[0] <= 4 * 50 * 12  # for four steps more


def test_gradients_do_not_depend_on_the_mode_of_the_model() -> None:
    """With dropout, a step is computed again in evaluation mode, too."""
    torch.manual_seed(0)
    network = ndm.nn.MLP(2, hidden=12, blocks=1, dropout=0.5)
    model = ndm.NDM(SCHEDULE, ndm.Identity(), ndm.Predictor(network), GaussianDecoder()).double()
    gradients = []
    for training in (False, True):
        model.train(training)
        leaf = latents(3).requires_grad_()
        found = model.denoise(leaf, 0.5, "ddim", steps=3, decode="mean", differentiable=True)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        gradients.append(gradient)
        assert model.training == training
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("probes", ["exact", 2])
def test_a_sample_and_its_density_come_from_one_solution(probes: Any) -> None:
    model = exact()
    settings = OdeSettings("rk4", probes=probes, nodes=64)
    found = model.sample_with_log_prob((200, 2), settings=settings, seed=0)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(found.z_1, standard_normal(torch.empty(200, 2, dtype=F64), generator))
    back = ode_log_prob(model.reverse_process, found.z_0, settings, torch.Generator())
    torch.testing.assert_close(back.z_1, found.z_1, rtol=0, atol=1e-4)
    problem = model.predictor
    assert isinstance(problem, GaussianProblem)
    normal = torch.distributions.MultivariateNormal(*problem.marginal(0.0))
    expected = normal.log_prob(found.z_0).detach()
    tolerance = 0.02 if probes == "exact" else 3.0
    torch.testing.assert_close(found.log_p, expected, rtol=0, atol=tolerance)
    assert float((found.log_p - expected).mean().abs()) < tolerance / 10


def test_the_gradient_of_the_log_likelihood_is_the_score() -> None:
    """For a Gaussian, -S^-1 (x - m) with the covariance S of z_0/alpha_0."""
    model, x = exact(), latents(5).requires_grad_()
    settings = OdeSettings("rk4", probes="exact", nodes=64)
    log_p = model.log_likelihood(
        x, dequantization="none", settings=settings, differentiable=True
    ).log_p
    (score,) = torch.autograd.grad(log_p.sum(), x)
    problem = model.predictor
    assert isinstance(problem, GaussianProblem)
    with torch.no_grad():
        alpha = float(model.process.level(0.0, x).alpha[0])
        mean, covariance = problem.marginal(0.0)
        expected = -(alpha * x - mean) @ torch.linalg.inv(covariance) * alpha
    torch.testing.assert_close(score, expected, rtol=0, atol=0.02)
    plain = model.log_likelihood(x, dequantization="none", settings=settings).log_p
    assert not plain.requires_grad
    torch.testing.assert_close(plain, log_p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("probes", ["exact", 2])
def test_the_gradient_of_an_estimated_likelihood_matches_finite_differences(probes: Any) -> None:
    model, x = random_model(), latents(3)
    settings = OdeSettings("rk4", probes=probes, nodes=8)

    def log_p(x: Tensor, differentiable: bool) -> Tensor:
        found = model.log_likelihood(x, samples=2, settings=settings, differentiable=differentiable)
        return found.log_p.sum()

    leaf, direction = x.clone().requires_grad_(), latents(3, 4)
    (gradient,) = torch.autograd.grad(log_p(leaf, True), leaf)
    change = (log_p(x + 1e-5 * direction, False) - log_p(x - 1e-5 * direction, False)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_likelihood_are_in_x_alone() -> None:
    """The decoder and F get none either, and keep asking for gradients."""
    model = random_model()
    settings = OdeSettings("rk4", probes="exact", nodes=8)
    leaf = latents(2).requires_grad_()
    model.log_likelihood(leaf, settings=settings, differentiable=True).log_p.sum().backward()
    assert leaf.grad is not None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    found = model.log_likelihood(latents(2), settings=settings, differentiable=True)
    assert not found.log_p.requires_grad


def test_the_gradient_of_an_exact_density_matches_finite_differences() -> None:
    from ndm.variants import ConvexMap, TransportNDM

    torch.manual_seed(0)
    transform = randomized(GatedTransform(mlp(3)), 0.1)
    model = TransportNDM(
        LinearLogSNRSchedule(-5.0, 3.0), transform, randomized(ConvexMap(2), 0.1), GaussianDecoder()
    ).double()

    def log_p(x: Tensor, differentiable: bool) -> Tensor:
        return model.log_likelihood(x, differentiable=differentiable).log_p.sum()

    x, direction = latents(3), latents(3, 4)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_p(leaf, True), leaf)
    change = (log_p(x + 1e-5 * direction, False) - log_p(x - 1e-5 * direction, False)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-4, atol=1e-5)


def test_the_mean_of_a_decoder_is_that_of_its_samples() -> None:
    level = LinearLogSNRSchedule(-1.0, 3.0)(torch.zeros(20_000, dtype=F64))
    z = torch.tensor([[0.3, -0.8]], dtype=F64).expand(20_000, 2)
    network = torch.nn.Linear(2, 2).double()
    for decoder in (
        DiscretizedGaussian(5),
        DiscretizedGaussian([-1.0, 0.1, 0.9]),
        GaussianDecoder(),
        NetworkDecoder(network, DiscretizedGaussian(5)),
    ):
        decoder = decoder.double()
        with torch.no_grad():
            drawn = decoder.sample(z, level, torch.Generator().manual_seed(0))
            mean = decoder.mean(z, level)
        error = 5 * drawn.std(0) / len(z) ** 0.5
        assert bool(((drawn.mean(0) - mean[0]).abs() < error).all())
    leaf = z[:1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        DiscretizedGaussian(5).mean(leaf, level.rows(slice(1))).sum(), leaf
    )
    assert bool((slope > 0).all())


def test_requests_that_make_no_sense_are_rejected() -> None:
    model, z = random_model(), latents(2)
    direct = random_model("direct")
    cases: list[tuple[str, Any]] = [
        ("t=0", lambda: model.denoise(z, 0.0)),
        ("z is a list", lambda: model.denoise([0.0], 0.5)),  # type: ignore[arg-type]
        ("z has dtype", lambda: model.denoise(z.float(), 0.5)),
        ("t=1.5", lambda: model.denoise(z, 1.5)),
        ("decode", lambda: model.denoise(z, 0.5, decode="best")),  # type: ignore[arg-type]
        ("no gradient", lambda: model.denoise(z, 0.5, differentiable=True)),
        ("belong to the sampler", lambda: model.denoise(z, 0.5, AdaptiveODE(), steps=3)),
        ("reverse", lambda: direct.sample_with_log_prob((2, 2))),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message):
            call()
