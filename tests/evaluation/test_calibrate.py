"""The fitted reverse process: its optimum, and its terms against torch.distributions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ndm.data import EventDataset, spread
from ndm.decoder import GaussianDecoder
from ndm.errors import UserError
from ndm.evaluation.calibrate import best_eta, best_variance_ratio
from ndm.forward import ForwardProcess
from ndm.model import NDM
from ndm.nn import MLP
from ndm.predictor import Predictor
from ndm.random import ExampleGenerators, standard_normal, uniform
from ndm.reverse import ReverseProcess
from ndm.sample import Ancestral, GridSampler
from ndm.schedule import LinearLogSNRSchedule
from ndm.time_sampling import PiecewiseConstant
from ndm.transform import Identity, NetworkTransform, Transform
from oracles import F64, Points, diffusion, randomized


def network(seed: int) -> MLP:
    torch.manual_seed(seed)
    return randomized(MLP(2, hidden=16, blocks=1, max_frequency=2.0), 0.1, seed)


def model(transform: Transform | None = None) -> NDM:
    transform = randomized(NetworkTransform(network(3)), 0.1) if transform is None else transform
    schedule, predictor = LinearLogSNRSchedule(-5.0, 3.0), Predictor(network(4))
    return NDM(schedule, transform, predictor, GaussianDecoder()).double()


def points(count: int) -> Points:
    """Gaussian data in float64."""
    x = torch.randn(count, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    return Points(x * torch.tensor([1.0, 0.3]))


def bound_of(ndm: NDM, data: EventDataset, steps: int | None, parts: int, **reverse: Any) -> Tensor:
    """The mean diffusion term in each part of time, with the noise of the fit."""
    source, terms = ExampleGenerators(0, range(len(data)), 20), []  # the stream of fits
    x = data.__getitems__(range(len(data)))
    for part in range(parts):
        u = (part + uniform(x[:, 0], source)) / parts
        noise = standard_normal(x, source)
        with torch.no_grad():
            bound = diffusion(ndm.process, ndm.predictor, x, u, noise, steps, **reverse)
        terms.append(bound.mean())
    return torch.stack(terms)


@pytest.mark.parametrize("steps", [3, 40])
def test_the_fitted_variance_ratio_minimizes_every_part(steps: int) -> None:
    ndm, data = model(), points(200)
    scale = best_variance_ratio(ndm, data, steps, bins=8, batch_size=64)
    assert len(scale.values) == min(steps, 8)
    assert bool((scale.values > 1).all())
    parts = len(scale.values)
    at_best = bound_of(ndm, data, steps, parts, variance_ratio=scale)
    for factor in (0.9, 1.1):
        other = PiecewiseConstant(scale.values * factor)
        bound = bound_of(ndm, data, steps, parts, variance_ratio=other)
        assert bool((bound > at_best).all())
    assert bool((bound_of(ndm, data, steps, parts) > at_best).all())
    excess = scale.values - 1  # with r = 1 + u a step costs D/2 log(1 + u)
    torch.testing.assert_close(at_best, steps * torch.log1p(excess), rtol=1e-9, atol=0)


def test_the_variance_ratio_of_each_dimension_minimizes_its_cost() -> None:
    ndm, data, steps = model(), points(200), 3
    ratio = best_variance_ratio(ndm, data, steps, by_dimension=True, batch_size=64)
    assert ratio.values.shape == (steps, 2)
    at_best = bound_of(ndm, data, steps, steps, variance_ratio=ratio)
    torch.testing.assert_close(at_best, steps * 0.5 * ratio.values.log().sum(1), rtol=1e-9, atol=0)
    for dimension in range(2):
        for factor in (0.9, 1.1):
            values = ratio.values.clone()
            values[:, dimension] *= factor
            other = PiecewiseConstant(values)
            assert bool((bound_of(ndm, data, steps, steps, variance_ratio=other) > at_best).all())
    shared = best_variance_ratio(ndm, data, steps, batch_size=64)
    torch.testing.assert_close(ratio.values.mean(1), shared.values)


def test_the_fitted_eta_minimizes_every_part() -> None:
    ndm, data = model(randomized(NetworkTransform(network(3)), 0.6)), points(200)
    eta = best_eta(ndm, data, bins=6, batch_size=64)
    at_best = bound_of(ndm, data, None, 6, eta=eta)
    for factor in (0.93, 1.07):
        bound = bound_of(ndm, data, None, 6, eta=PiecewiseConstant(eta.values * factor))
        assert bool((bound > at_best).all())
    assert float((eta.values - 1).abs().max()) > 0.05, "the transformation must make a difference"


def test_for_the_identity_the_best_eta_is_one() -> None:
    eta = best_eta(model(Identity()), points(50), bins=3)
    torch.testing.assert_close(eta.values, torch.ones(3, dtype=F64))


@pytest.mark.parametrize("by_dimension", [False, True])
def test_a_widened_step_costs_the_divergence_of_two_gaussians(by_dimension: bool) -> None:
    ndm, steps = model(), 5
    x, noise = torch.randn(2, 30, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    u = (torch.arange(30, dtype=F64) + 0.5) / 30
    values = torch.tensor([1.5, 0.7, 2.0, 1.0, 3.0], dtype=F64)
    values = torch.stack([values, values.flip(0)], 1) if by_dimension else values
    scale = PiecewiseConstant(values)
    found = diffusion(ndm.process, ndm.predictor, x, u, noise, steps, 0.8, variance_ratio=scale)
    step = torch.floor(u * steps)
    s, t = ndm.schedule(step / steps), ndm.schedule((step + 1) / steps)
    z = ndm.process.marginal(x, t).sample(noise)
    q = ndm.process.posterior(z, x, s, t, 0.8)
    p = ndm.process.posterior(z, ndm.predictor(z, t), s, t, 0.8)
    wide = p.std * scale.values[step.long()].reshape(30, -1).sqrt()
    true, model_step = Normal(q.mean, q.std.expand_as(z)), Normal(p.mean, wide.expand_as(z))
    expected = kl_divergence(true, model_step).sum(1)
    torch.testing.assert_close(found, steps * expected, rtol=1e-7, atol=1e-9)


def test_a_sampler_uses_the_variance_ratio_of_its_step() -> None:
    process = ForwardProcess(LinearLogSNRSchedule(-5.0, 3.0), Identity())
    reverse = ReverseProcess(process, Predictor(network(4)))
    z, noise = torch.randn(2, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t, s = process.level(1.0, z), process.level(0.5, z)
    scale = PiecewiseConstant(torch.tensor([9.0, 4.0], dtype=F64))
    with torch.no_grad():
        mean = Ancestral()(reverse, z, t, s, 0 * noise)
        plain = Ancestral()(reverse, z, t, s, noise)
        wide = Ancestral(1.0, scale)(reverse, z, t, s, noise)
    torch.testing.assert_close(wide - mean, 2 * (plain - mean))
    sampler = GridSampler(Ancestral(1.0, scale), 2)
    assert bool(sampler(reverse, z, torch.Generator().manual_seed(0)).isfinite().all())


def test_fitting_lowers_the_bound_at_few_steps() -> None:
    ndm, data = model(), points(300)
    x, source = data.__getitems__(range(300)), lambda: ExampleGenerators(7, range(300))
    scale = best_variance_ratio(ndm, data, 4)
    with torch.no_grad():
        plain = ndm.bound(x, steps=4, draws=8, generator=source())
        fitted = ndm.bound(x, steps=4, draws=8, generator=source(), variance_ratio=scale)
    assert float(fitted.diffusion.mean()) < float(plain.diffusion.mean()) - 0.05
    assert torch.equal(fitted.prior, plain.prior)
    assert torch.equal(fitted.reconstruction, plain.reconstruction)


def test_bad_arguments_are_rejected() -> None:
    ndm, data = model(), points(10)
    with pytest.raises(UserError, match="continuous"):
        ndm.bound(data.x, draws=1, variance_ratio=PiecewiseConstant(torch.ones(1)))
    with pytest.raises(UserError, match="positive"):
        PiecewiseConstant(torch.tensor([1.0, 0.0]))
    for options in ({"steps": 0}, {"steps": 2, "examples": 0}, {"steps": 2, "batch_size": 0}):
        with pytest.raises(UserError, match=list(options)[-1]):
            best_variance_ratio(ndm, data, **options)
    with pytest.raises(UserError, match="draws"):
        ndm.bound(data.x, generator=ExampleGenerators(0, range(10)))


def test_a_step_function_is_constant_on_equal_parts() -> None:
    function = PiecewiseConstant(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    times = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.9, 1.0], dtype=F64)
    assert function(times).tolist() == [1, 1, 2, 3, 4, 4]
    assert function(times).dtype == F64


def test_fits_use_examples_spread_over_the_data() -> None:
    class Counting(Points):
        seen: list[int]

        def __getitems__(self, indices: object) -> Tensor:
            self.seen = [*getattr(self, "seen", []), *indices]  # type: ignore[misc]
            return super().__getitems__(indices)

    data = Counting(points(100).x)
    best_variance_ratio(model(), data, 2, examples=10, batch_size=4)
    assert data.seen == spread(100, 10)
