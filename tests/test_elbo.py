"""The bound against an independent VDM loss, torch.distributions and its own estimates."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.elbo import Bound, bits_per_dim, prior_term, reconstruction_term
from ndm.errors import UserError
from ndm.forward import ForwardProcess
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.predictor import Predictor
from ndm.random import ExampleGenerators
from ndm.reverse import Reverse
from ndm.schedule import FlowMatchingSchedule, LearnedSchedule, LinearLogSNRSchedule, Schedule
from ndm.time_sampling import (
    ImportanceTimeSampler,
    LowDiscrepancyTimeSampler,
    UniformTimeSampler,
)
from ndm.transform import GatedTransform, Identity, NetworkTransform, SeparableTransform, Transform
from oracles import (
    F64,
    SHEAR,
    LinearTransform,
    diffusion,
    randomized,
)


def fixed_batch(dims: int = 3, count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, noise = torch.randn(2, count, dims, dtype=F64, generator=generator)
    return x, noise, torch.rand(count, dtype=F64, generator=generator)


def network(dims: int = 3, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return randomized(MLP(dims, hidden=16, blocks=1, max_frequency=2.0), 0.1, seed)


@pytest.mark.parametrize("target", ["v", "eps", "x"])
@pytest.mark.parametrize(
    "schedule",
    [LinearLogSNRSchedule(-8.0, 4.0), randomized(LearnedSchedule(-6.0, 3.0))],
    ids=["linear", "learned"],
)
def test_identity_gives_the_loss_of_variational_diffusion_models(
    schedule: Schedule, target: str
) -> None:
    """Against an independent implementation: gamma by autograd, noise prediction, expm1."""
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
    found = diffusion(process, predictor, x, u, noise)
    torch.testing.assert_close(found, 0.5 * gamma_slope * error, rtol=1e-7, atol=0)
    steps = 17
    t = (torch.floor(u * steps) + 1) / steps
    error, gamma_t, _ = noise_error(t)
    expected = 0.5 * steps * torch.expm1(gamma_t - schedule(t - 1 / steps).gamma) * error
    found = diffusion(process, predictor, x, u, noise, steps)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.slow
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
    limit = diffusion(process, predictor, x, u, noise, None, eta)
    torch.testing.assert_close(fine, limit, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "schedule",
    [LinearLogSNRSchedule(-6.0, 0.5), FlowMatchingSchedule(0.05, 0.1)],
    ids=["linear", "flow"],
)
def test_prior_and_reconstruction_match_torch_distributions(schedule: Schedule) -> None:
    x, noise, _ = fixed_batch(2)
    process = ForwardProcess(schedule, LinearTransform(start=SHEAR))
    end, start = schedule(torch.ones(1, dtype=F64)), schedule(torch.zeros(1, dtype=F64))
    matrix, offset = process.transform.matrix(torch.tensor([0.0, 1.0], dtype=F64))  # type: ignore[operator]
    latent = Normal(end.alpha * (x @ matrix[1].T + offset[1]), end.sigma)
    prior = Normal(torch.zeros(()).double(), 1.0)
    torch.testing.assert_close(prior_term(process, x), kl_divergence(latent, prior).sum(1))
    z = start.alpha * x @ matrix[0].T + start.sigma * noise
    log_p = Normal(z / start.alpha, torch.exp(start.gamma / 2)).log_prob(x).sum(1)
    torch.testing.assert_close(reconstruction_term(process, GaussianDecoder(), x, noise), -log_p)


def test_the_prior_term_of_an_image_sums_over_all_pixels() -> None:
    process = ForwardProcess(LinearLogSNRSchedule(-6.0, 1.0), Identity())
    x = torch.randn(2, 3, 4, 5, dtype=F64)
    flat = prior_term(process, x.flatten(1))
    torch.testing.assert_close(prior_term(process, x), flat)
    sigma, alpha = math.sqrt(1 / (1 + math.exp(-1.0))), math.sqrt(1 / (1 + math.exp(1.0)))
    squares = alpha**2 * (x**2).flatten(1).sum(1)
    torch.testing.assert_close(flat, 0.5 * (squares + 60 * (sigma**2 - 1 - 2 * math.log(sigma))))


@pytest.mark.parametrize("steps", [None, 8])
def test_each_term_has_gradients_only_for_its_own_parameters(steps: int | None) -> None:
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
    reached = set()
    for name, term in terms.items():
        for group, parameters in groups.items():
            grads = torch.autograd.grad(
                term.sum(), parameters, retain_graph=True, allow_unused=True
            )
            grads = [g for g in grads if g is not None]
            assert all(bool(g.isfinite().all()) for g in grads)
            if any(float(g.abs().max()) > 1e-9 for g in grads):
                reached.add((name, group))
    always = {(name, group) for name in terms for group in ("ends", "transform")}
    assert reached == always | {("diffusion", "inside"), ("diffusion", "predictor")}


def toy_model(**options: object) -> NDM:
    schedule, transform = LinearLogSNRSchedule(-5.0, 3.0), NetworkTransform(network(2, 3))
    predictor = Predictor(network(2, 4))
    return NDM(schedule, transform, predictor, GaussianDecoder(), **options).double()  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 6])
def test_draws_are_unbiased_and_their_standard_error_is_calibrated(steps: int | None) -> None:
    model = toy_model(steps=steps).eval()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 2, dtype=F64, generator=generator)
    with torch.no_grad():
        many = model.bound(x.repeat_interleave(20_000, 0), draws=1, generator=generator).total
        few = model.bound(x.repeat_interleave(2_000, 0), draws=4, generator=generator).total
        many, few = many.reshape(2, -1), few.reshape(2, -1)
        spread = (many.var(1) / 20_000 + few.var(1) / 2_000).sqrt()
        assert bool(((many.mean(1) - few.mean(1)).abs() < 4 * spread).all())
        lower = few.var(1) < many.var(1) / 3
        assert bool(lower.all()), "strata must not raise the variance of the mean of four draws"
        data = torch.randn(200 * 64, 2, dtype=F64, generator=generator)
        total = model.bound(data, draws=2, generator=generator).total.reshape(200, 64)
    score = (total.mean(1) - total.mean()) / (total.std(1) / 8)
    assert 0.85 < float(score.std()) < 1.2


@pytest.mark.slow
@pytest.mark.parametrize(
    "times",
    [LowDiscrepancyTimeSampler(), ImportanceTimeSampler(bins=16)],
    ids=["low", "importance"],
)
@pytest.mark.parametrize("steps", [None, 6])
def test_every_time_sampler_estimates_the_same_bound(times: nn.Module, steps: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 2, dtype=F64, generator=generator).expand(2_000, 2)
    model = toy_model(time_sampler=times, steps=steps).train()
    plain = toy_model(time_sampler=UniformTimeSampler(), steps=steps).eval()
    with torch.no_grad():
        for _ in range(5):
            model.bound(x, generator=generator)
        model.eval()
        if isinstance(times, ImportanceTimeSampler):
            assert float(times.density().std()) > 0.1, "the density must be learned"
        means = [
            [m.bound(x, generator=generator).diffusion.mean() for _ in range(20)]
            for m in (model, plain)
        ]
    a, b = (torch.stack(values) for values in means)
    assert abs(float(a.mean() - b.mean())) < 4 * float((a.var() / 20 + b.var() / 20).sqrt())


def test_a_uniform_model_of_bytes_costs_eight_bits() -> None:
    schedule, decoder = LinearLogSNRSchedule(40.0, 41.0), DiscretizedGaussian(256)
    model = NDM(schedule, Identity(), Predictor(network(12)), decoder).double().eval()
    x = decoder.values[torch.arange(24).reshape(2, 12) * 10]
    bound = model.bound(x, draws=2, generator=torch.Generator().manual_seed(0))
    bits = bits_per_dim(bound.total, 12)
    torch.testing.assert_close(bits, torch.full((2,), 8.0, dtype=F64), rtol=1e-6, atol=0)
    total = bound.prior + bound.diffusion + bound.reconstruction
    torch.testing.assert_close(bound.terms()["nelbo"], total)


def test_the_total_is_the_sum_of_the_terms() -> None:
    bound = Bound(torch.tensor([1.0]), torch.tensor([20.0]), torch.tensor([-300.0]))
    assert bound.total.item() == -279.0
    expected = {"prior": 1.0, "diffusion": 20.0, "reconstruction": -300.0, "nelbo": -279.0}
    assert {name: value.item() for name, value in bound.terms().items()} == expected


@pytest.mark.parametrize(
    ("steps", "eta"), [(None, 0.0), (None, -1.0), (0, 1.0), (-3, 1.0), (None, math.nan)]
)
def test_infinite_and_empty_bounds_are_rejected(steps: int | None, eta: float) -> None:
    x, noise, u = fixed_batch()
    process = ForwardProcess(LinearLogSNRSchedule(), Identity())
    with pytest.raises(UserError, match=r"eta|steps") as caught:
        diffusion(process, Predictor(network()), x, u, noise, steps, eta)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("draws", "steps"), [(0, None), (2, 0)])
def test_zero_draws_and_zero_steps_are_rejected(draws: int, steps: int | None) -> None:
    with pytest.raises(UserError, match=r"draws|steps"):
        toy_model().bound(torch.zeros(2, 2, dtype=F64), draws=draws, steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", ["tied", "direct", "direct-score", "diffenc"])
@pytest.mark.parametrize("steps", [None, 10])
def test_an_empty_batch_has_an_empty_bound(reverse: Reverse, steps: int | None) -> None:
    """A process that gets no data still takes part in the training step."""
    schedule, decoder = LinearLogSNRSchedule(-6.0, 4.0), DiscretizedGaussian(256)
    heads = 2 if reverse == "direct-score" else None
    for separable in (False, True):
        network = UNet(channels=8, multiples=(1,), outputs=2 if separable else None)
        transform = SeparableTransform(network) if separable else NetworkTransform(network)
        predictor = Predictor(UNet(channels=8, multiples=(1,), outputs=heads))
        model = NDM(schedule, transform, predictor, decoder, steps=steps, reverse=reverse)
        empty = torch.zeros(0, 1, 8, 8)
        with torch.no_grad():
            assert model.bound(empty).total.shape == (0,)
        for draws, source in ((None, None), (3, None), (3, ExampleGenerators(0, [], 1))):
            bound = model.bound(empty, draws=draws, generator=source)
            assert bound.total.shape == bound.loss.shape == (0,)
            bound.loss.sum().backward()
        assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())
