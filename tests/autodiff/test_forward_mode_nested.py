"""The time derivative inside and after other transforms: vmap, jvp, reverse mode, itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ndm.autodiff.forward_mode import time_derivative
from ndm.autodiff.functorch import NOTHING, ONE_JVP, Nesting, nesting
from ndm.errors import ForwardModeError
from ndm.nn import MLP, Attention, UNet
from ndm.nn import fused as fused_module
from oracles import F64, randomized

STEP = 1e-5


def make(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, x, t, and a direction in x."""
    torch.manual_seed(0)
    network, shape = {
        "mlp": lambda: (MLP(3, hidden=8, blocks=1), (3, 3)),
        "norm": lambda: (Normed(), (3, 4)),
        "unet": lambda: (UNet(channels=8, multiples=(1, 2), attention=(False, True)), (3, 1, 4, 4)),
    }[name]()
    network = randomized(network, 0.1).double()
    x, t = torch.randn(shape, dtype=F64), torch.rand(3, dtype=F64)
    return network, x, t, torch.randn(shape, dtype=F64)


class Normed(nn.Module):
    """Group norm and SiLU between layers, in PyTorch's default memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.SiLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x + t[:, None])  # type: ignore[no-any-return]


every_network = pytest.mark.parametrize("name", ["mlp", "unet"])
Pair = tuple[Tensor, Tensor]


def central(function: Callable[[Tensor], Pair], at: Tensor, along: Tensor) -> Pair:
    """Central differences of value and derivative."""
    with torch.no_grad():
        up, down = function(at + STEP * along), function(at - STEP * along)
    return (up[0] - down[0]) / (2 * STEP), (up[1] - down[1]) / (2 * STEP)


def assert_close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_network
def test_within_forward_mode_the_derivative_matches_finite_differences(name: str) -> None:
    network, x, t, dx = make(name)
    one = torch.ones_like(t)
    in_x = lambda x: time_derivative(network, x, t)  # noqa: E731
    in_t = lambda t: time_derivative(network, x, t)  # noqa: E731
    assert_close(torch.func.jvp(in_x, (x,), (dx,))[1], central(in_x, x, dx))
    assert_close(torch.func.jvp(in_t, (t,), (one,))[1], central(in_t, t, one))
    second = time_derivative(lambda x, t: time_derivative(network, x, t)[1], x, t)
    assert_close(second, (in_t(t)[1], central(in_t, t, one)[1]))
    jacobian = torch.func.jacfwd(lambda x: in_x(x)[1])(x)
    assert_close(torch.tensordot(jacobian, dx, dx.dim()), central(in_x, x, dx)[1])


@pytest.mark.slow
@every_network
def test_within_reverse_mode_the_derivative_matches_finite_differences(name: str) -> None:
    """In U-Nets, convolutions of inputs without gradients precede norms with gradients, and vice
    versa.
    """
    network, x, t, dx = make(name)

    def derivative(x: Tensor) -> Tensor:
        return time_derivative(network, x, t)[1]

    expected = central(lambda x: time_derivative(network, x, t), x, dx)
    for part in (0, 1):
        jacobian = torch.func.jacrev(lambda x, part=part: time_derivative(network, x, t)[part])(x)
        assert_close(torch.tensordot(jacobian, dx, dx.dim()), expected[part])
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(derivative(leaf).square().sum(), leaf)
    gradient = torch.func.grad(lambda x: derivative(x).square().sum())
    assert_close(gradient(x), plain)
    hessian = torch.func.jacrev(gradient)(x)
    expected = central(lambda x: (gradient(x), gradient(x)), x, dx)[0]
    assert_close(torch.tensordot(hessian, dx, dx.dim()), expected)


@pytest.mark.parametrize("name", ["mlp", "norm"])
def test_batched_gradients_match_single_gradients(name: str) -> None:
    network, x, t, _ = make(name)
    derivative = time_derivative(network, leaf := x.clone().requires_grad_(), t)[1]
    vectors = torch.randn(4, *x.shape, dtype=F64)
    expected = torch.stack(
        [torch.autograd.grad(derivative, leaf, vector, retain_graph=True)[0] for vector in vectors]
    )
    for again in (False, True):
        (found,) = torch.autograd.grad(
            derivative, leaf, vectors, is_grads_batched=True, retain_graph=True, create_graph=again
        )
        torch.testing.assert_close(found, expected)


def test_vmap_over_batches_and_examples_matches_single_calls() -> None:
    network, x, t, _ = make("mlp")
    batches, times = torch.stack([x, x + 1, 2 * x]), torch.stack([t, t / 2, t / 3])
    pairs = [time_derivative(network, x, t) for x, t in zip(batches, times, strict=True)]
    expected = [torch.stack(part) for part in zip(*pairs, strict=True)]
    found = torch.func.vmap(lambda x, t: time_derivative(network, x, t))(batches, times)
    torch.testing.assert_close(list(found), expected)
    single = torch.func.vmap(lambda x, t: time_derivative(network, x[None], t[None])[1][0])(x, t)
    torch.testing.assert_close(single, time_derivative(network, x, t)[1])


@every_network
def test_vmap_of_gradients_matches_the_batch_gradient(name: str) -> None:
    network, x, t, _ = make(name)
    loss = lambda x, t: time_derivative(network, x[None], t[None])[1].square().sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    total = time_derivative(network, leaf, t)[1].square().sum()
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, t), expected)


@every_network
def test_unsupported_nesting_is_rejected_and_named(name: str) -> None:
    network, x, t, dx = make(name)
    pattern = r"within another transform.*dual_level.*Nested.*torch.func.jvp"
    with forward_ad.dual_level(), pytest.raises(ForwardModeError, match=pattern):
        time_derivative(network, forward_ad.make_dual(x, dx), t)


def test_a_network_that_fails_only_in_forward_mode_is_named() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        if nesting() != Nesting(1, "Vmap", 0):
            raise RuntimeError("no derivative of this")
        return x

    x = torch.ones(2, 3)
    pattern = r"works but .* within another transform, of torch.func \(vmap.*no derivative"
    with pytest.raises(ForwardModeError, match=pattern) as caught:
        torch.func.vmap(lambda x: time_derivative(network, x, x))(x)
    assert "discrete time" not in str(caught.value)


def test_errors_of_the_network_are_raised_unchanged_within_a_transform() -> None:
    wrong, x = nn.Linear(3, 2), torch.randn(4, 2)
    derivative = lambda x: time_derivative(lambda x, t: wrong(x), x, torch.rand(4))  # noqa: E731
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        torch.func.jvp(derivative, (x,), (x,))
    assert not isinstance(caught.value, ForwardModeError)


def test_nesting_reports_the_active_transforms() -> None:
    seen = []

    def record(x: Tensor) -> Tensor:
        seen.append(nesting())
        return x.sin()

    x = torch.ones(2)
    record(x)
    torch.func.jvp(record, (x,), (x,))
    torch.func.jvp(lambda x: torch.func.jvp(record, (x,), (x,))[1], (x,), (x,))
    torch.func.vmap(record)(x)
    with forward_ad.dual_level():
        record(x)
    two_jvps, vmap, dual = Nesting(2, "Jvp", 1), Nesting(1, "Vmap", 0), Nesting(0, "", 1)
    assert seen == [NOTHING, ONE_JVP, two_jvps, vmap, dual]


@pytest.mark.parametrize("owner", ["interpreter", "level"])
def test_without_pytorchs_private_names_the_plain_path_is_used(
    owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_module, "SMALLEST", 1)
    network, x, t, _ = make("unet")
    expected = network(x, t), *time_derivative(network, x, t)
    if owner == "interpreter":
        monkeypatch.delattr(torch._C._functorch, "peek_interpreter_stack")
    else:
        monkeypatch.setattr("ndm.autodiff.functorch.torch.autograd.forward_ad", object())
    assert nesting() is None
    used = []
    monkeypatch.setattr(fused_module._NormSiLU, "apply", lambda *_: used.append(1))
    torch.testing.assert_close((network(x, t), *time_derivative(network, x, t)), expected)
    assert not used


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 128], ids=["plain", "fused"])
@pytest.mark.parametrize("frozen", [False, True])
def test_user_forward_mode_through_a_unet_matches_finite_differences(
    size: int, frozen: bool
) -> None:
    """Outside time_derivative, PyTorch's norms run and must not get channels_last inputs, forward
    or backward, with frozen layers or without.
    """
    torch.manual_seed(0)
    t = torch.rand(3, dtype=F64)
    # Without attention, whose fused form has no forward derivative.
    network = randomized(UNet(channels=8, multiples=(1, 2)), 0.1).double()
    x, dx = (torch.randn(3, 1, size, size, dtype=F64) for _ in range(2))
    for parameter in network.first.parameters():
        parameter.requires_grad_(not frozen)
    value, derivative = torch.func.jvp(lambda x: network(x, t), (x,), (dx,))  # type: ignore[misc]
    with torch.no_grad():
        again = torch.func.jvp(lambda x: network(x, t), (x,), (dx,))[1]  # type: ignore[misc]
        torch.testing.assert_close(again, derivative)
        torch.testing.assert_close(value, network(x, t))
        difference = (network(x + STEP * dx, t) - network(x - STEP * dx, t)) / (2 * STEP)
    assert_close(derivative, difference)
    derivative.square().sum().backward()
    gradient = network.last.weight.grad
    assert gradient is not None and bool(gradient.isfinite().all())


def test_forward_mode_in_t_accepts_norms_of_constant_inputs() -> None:
    norm, attention = randomized(nn.GroupNorm(2, 16), 0.3), randomized(Attention(16), 0.3)
    x = torch.randn(3, 16, 5, 4, dtype=F64).to(memory_format=torch.channels_last)
    for function in (lambda: fused_module.norm_silu(norm, x), lambda: attention(x)):
        t = torch.rand(3, dtype=F64)

        def scaled(t: Tensor, function: Callable[[], Tensor] = function) -> Tensor:
            return function() * t[:, None, None, None]

        found = torch.func.jvp(scaled, (t,), (torch.ones_like(t),))[1]
        torch.testing.assert_close(found, function())
        found.sum().backward()
