"""Transport maps: Jacobians, lines, densities and gradients."""

import math

import pytest
import torch
from torch import Tensor

from ndm.variants.monotone import ConvexMap, MonotoneMap
from oracles import F64, randomized


def bent_map(seed: int = 1) -> MonotoneMap:
    return randomized(MonotoneMap(6, scale=1.3), 0.4, seed)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("steepness", [0.3, 3.0, 80.0])
def test_the_line_through_a_point_is_found(dtype: torch.dtype, steepness: float) -> None:
    """Also where T is nearly a step, so that ζ hardly changes with z."""
    transport = bent_map().to(dtype)
    with torch.no_grad():
        transport.log_steepness.fill_(math.log(steepness))
    z = torch.linspace(-9, 9, 301, dtype=dtype)[:, None]
    for r in (0.0, 0.2, 0.9, 1.0):
        at = torch.full((301,), r, dtype=dtype)
        back, _ = transport.interpolate(transport.origin(z, at), at)
        torch.testing.assert_close(back, z, rtol=0, atol=3e4 * torch.finfo(dtype).eps)


def convex_map(dims: int, terms: int = 3) -> ConvexMap:
    torch.manual_seed(0)
    return randomized(ConvexMap(dims, 6, terms, scale=1.3), 0.3)


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_a_convex_map_has_the_right_jacobian_and_inverse(dims: int) -> None:
    transport = convex_map(dims)
    zeta, r = torch.randn(30, dims, dtype=F64), torch.rand(30, dtype=F64)
    value, jacobian = transport.with_jacobian(zeta)
    expected = torch.func.vmap(torch.func.jacrev(lambda one: transport(one[None])[0]))(zeta)
    torch.testing.assert_close(expected, jacobian)
    assert torch.linalg.eigvalsh(jacobian).min() > 0
    z = transport.interpolate(zeta, r)[0]
    torch.testing.assert_close(transport.origin(z, r), zeta, rtol=0, atol=1e-9)
    moved = zeta.flip(0)
    assert (((transport(moved) - value) * (moved - zeta)).sum(1) > 0)[(moved != zeta).any(1)].all()


def test_a_convex_map_is_the_gradient_of_its_formula() -> None:
    transport, zeta = convex_map(3), torch.randn(20, 3, dtype=F64, requires_grad=True)
    steepness = transport.log_steepness.exp()
    terms = (zeta[:, None, None] * transport.direction).sum(-1) * steepness + transport.offset
    sums = (transport.log_height.exp() / steepness * terms.logsumexp(1)).sum(1)
    potential = zeta @ transport.shift + 0.5 * transport.log_slope.exp() * (zeta**2).sum(1) + sums
    torch.testing.assert_close(transport(zeta), torch.autograd.grad(potential.sum(), zeta)[0])


def test_a_convex_map_in_one_dimension_can_equal_a_monotone_map() -> None:
    monotone, convex = bent_map(), convex_map(1, terms=2)
    with torch.no_grad():
        convex.shift.copy_(monotone.shift[None])
        convex.log_slope.copy_(monotone.log_slope)
        # tanh(u) is the softmax weight of u minus that of -u.
        convex.direction.copy_(torch.tensor([1.0, -1.0])[:, None, None])
        convex.log_height.copy_(monotone.log_height)
        convex.log_steepness.copy_(monotone.log_steepness)
        bend = monotone.log_steepness.exp() * monotone.center
        convex.offset.copy_(torch.stack([-bend, bend]))
    zeta = torch.linspace(-3, 3, 50, dtype=F64)[:, None]
    for one, other in zip(convex.with_jacobian(zeta), monotone.with_jacobian(zeta), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dims", [1, 2, 8])
def test_a_new_convex_map_is_nearly_a_multiple_of_the_identity(dims: int) -> None:
    torch.manual_seed(0)
    zeta = torch.randn(4000, dims)
    image = ConvexMap(dims, 48, 4, scale=2.0)(zeta)
    assert 0.5 < (image * zeta).sum().item() / (zeta * zeta).sum().item() / 2.0 < 1.5
    assert (image.mean(0).norm() / image.norm(dim=1).mean()).item() < 0.3, "no shift"


def test_an_unsolved_line_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndm.variants.monotone._NEWTON_STEPS", 1)
    z, r = torch.tensor([[0.5], [0.5]], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    # At r = 1 the map is the identity, which takes no step.
    with pytest.raises(ArithmeticError, match="at 1 point"):
        bent_map().origin(z, r)


def test_jacobian_density_and_score_obey_the_change_of_variables() -> None:
    transport, r = bent_map(), torch.rand(40, dtype=F64)
    zeta = torch.randn(40, 1, dtype=F64, requires_grad=True)
    value, jacobian = transport.with_jacobian(zeta)
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), zeta)[0], jacobian[..., 0], rtol=1e-10, atol=1e-12
    )
    z = transport.interpolate(zeta, r)[0].detach().requires_grad_()
    found = transport.interpolant(z, r)
    torch.testing.assert_close(found.origin, zeta, rtol=0, atol=1e-9)
    (score,) = torch.autograd.grad(found.log_p.sum(), z)
    torch.testing.assert_close(found.score, score, rtol=1e-8, atol=1e-10)
    for at in (0.0, 0.4, 1.0):
        grid = torch.linspace(-12, 12, 20_001, dtype=F64)[:, None]
        with torch.no_grad():
            density = transport.interpolant(grid, torch.full((20_001,), at, dtype=F64)).log_p.exp()
        assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-6)


def test_gradients_through_the_solved_line_match_finite_differences() -> None:
    """Of the velocity and the score, in the weights of T."""
    transport, r = bent_map(), torch.tensor([0.1, 0.5, 0.8], dtype=F64)
    z, step = torch.tensor([[-0.7], [0.2], [1.1]], dtype=F64), 1e-5

    def function() -> Tensor:
        found, weight = transport.interpolant(z, r), torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)
        return (weight * found.velocity + torch.sin(found.score)).sum()

    for parameter in transport.parameters():
        (gradient,) = torch.autograd.grad(function(), parameter)
        flat = parameter.data.reshape(-1)
        for index in range(min(2, len(flat))):
            around = []
            for shift in (-step, 2 * step):
                flat[index] += shift
                around.append(function().item())
            flat[index] -= step
            expected = pytest.approx((around[1] - around[0]) / (2 * step), rel=1e-6, abs=1e-7)
            assert gradient.reshape(-1)[index].item() == expected
