"""The time derivative within, and after, other transforms: vmap, jvp, reverse mode, itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ndm.errors import ForwardModeError
from ndm.forward_mode import time_derivative
from ndm.nesting import NOTHING, ONE_JVP, Nesting, nesting
from ndm.nn import MLP, UNet
from ndm.nn import fused as fused_module
from oracles import F64, randomised

STEP = 1e-5


def make(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, x, t, and a direction in x."""
    torch.manual_seed(0)
    network = MLP(3, hidden=8, blocks=1) if name == "mlp" else UNet(channels=8, multiples=(1, 2), attention=(False, True))
    shape = (3, 3) if name == "mlp" else (3, 1, 4, 4)
    return randomised(network, 0.1).double(), torch.randn(shape, dtype=F64), torch.rand(3, dtype=F64), torch.randn(shape, dtype=F64)


every_network = pytest.mark.parametrize("name", ["mlp", "unet"])
Pair = tuple[Tensor, Tensor]


def central(function: Callable[[Tensor], Pair], at: Tensor, along: Tensor) -> Pair:
    """The change of value and derivative by finite differences."""
    with torch.no_grad():
        up, down = function(at + STEP * along), function(at - STEP * along)
    return (up[0] - down[0]) / (2 * STEP), (up[1] - down[1]) / (2 * STEP)


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_network
def test_within_forward_mode_it_agrees_with_finite_differences(name: str) -> None:
    network, x, t, dx = make(name)
    one = torch.ones_like(t)
    in_x, in_t = (lambda x: time_derivative(network, x, t)), (lambda t: time_derivative(network, x, t))
    close(torch.func.jvp(in_x, (x,), (dx,))[1], central(in_x, x, dx))
    close(torch.func.jvp(in_t, (t,), (one,))[1], central(in_t, t, one))
    second = time_derivative(lambda x, t: time_derivative(network, x, t)[1], x, t)
    close(second, (in_t(t)[1], central(in_t, t, one)[1]))
    jacobian = torch.func.jacfwd(lambda x: in_x(x)[1])(x)
    close(torch.tensordot(jacobian, dx, dx.dim()), central(in_x, x, dx)[1])


@every_network
def test_within_reverse_mode_it_agrees_with_finite_differences(name: str) -> None:
    """U-Nets: convolutions whose inputs need no gradient followed by norms that do, and the reverse."""
    network, x, t, dx = make(name)

    def derivative(x: Tensor) -> Tensor:
        return time_derivative(network, x, t)[1]

    expected = central(lambda x: time_derivative(network, x, t), x, dx)
    for part in (0, 1):
        jacobian = torch.func.jacrev(lambda x, part=part: time_derivative(network, x, t)[part])(x)
        close(torch.tensordot(jacobian, dx, dx.dim()), expected[part])
    (alone,) = torch.autograd.grad(derivative(leaf := x.clone().requires_grad_()).square().sum(), leaf)
    close(torch.func.grad(lambda x: derivative(x).square().sum())(x), alone)
    hessian = torch.func.jacrev(torch.func.grad(lambda x: derivative(x).square().sum()))(x)
    gradient = lambda x: (torch.func.grad(lambda x: derivative(x).square().sum())(x),) * 2  # noqa: E731
    close(torch.tensordot(hessian, dx, dx.dim()), central(gradient, x, dx)[0])


def test_gradients_of_several_outputs_at_once() -> None:
    network, x, t, _ = make("mlp")
    derivative = time_derivative(network, leaf := x.clone().requires_grad_(), t)[1]
    vectors = torch.randn(4, *x.shape, dtype=F64)
    expected = torch.stack([torch.autograd.grad(derivative, leaf, vector, retain_graph=True)[0] for vector in vectors])
    for again in (False, True):
        (found,) = torch.autograd.grad(derivative, leaf, vectors, is_grads_batched=True, retain_graph=True, create_graph=again)
        torch.testing.assert_close(found, expected)


def test_vmap_over_batches_and_over_examples() -> None:
    network, x, t, _ = make("mlp")
    batches, times = torch.stack([x, x + 1, 2 * x]), torch.stack([t, t / 2, t / 3])
    expected = [
        torch.stack(part) for part in zip(*(time_derivative(network, *each) for each in zip(batches, times, strict=True)), strict=True)
    ]
    torch.testing.assert_close(list(torch.func.vmap(lambda x, t: time_derivative(network, x, t))(batches, times)), expected)
    single = torch.func.vmap(lambda x, t: time_derivative(network, x[None], t[None])[1][0])(x, t)
    torch.testing.assert_close(single, time_derivative(network, x, t)[1])


@every_network
def test_vmap_of_gradients(name: str) -> None:
    network, x, t, _ = make(name)
    loss = lambda x, t: time_derivative(network, x[None], t[None])[1].square().sum()  # noqa: E731
    (expected,) = torch.autograd.grad(time_derivative(network, leaf := x.clone().requires_grad_(), t)[1].square().sum(), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, t), expected)


@every_network
def test_what_cannot_be_nested_is_said_to_be_that(name: str) -> None:
    network, x, t, dx = make(name)
    with forward_ad.dual_level(), pytest.raises(ForwardModeError, match=r"within another transform.*dual_level.*Nested.*torch.func.jvp"):
        time_derivative(network, forward_ad.make_dual(x, dx), t)


def test_a_network_that_works_in_vmap_but_not_in_forward_mode_is_named() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        if nesting() != Nesting(1, "Vmap", 0):
            raise RuntimeError("no derivative of this")
        return x

    x = torch.ones(2, 3)
    with pytest.raises(ForwardModeError, match=r"works but .* within another transform, of torch.func \(vmap.*no derivative") as caught:
        torch.func.vmap(lambda x: time_derivative(network, x, x))(x)
    assert "discrete time" not in str(caught.value)


def test_an_error_of_the_network_itself_passes_within_a_transform_too() -> None:
    wrong = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        torch.func.jvp(lambda x: time_derivative(lambda x, t: wrong(x), x, torch.rand(4)), (torch.randn(4, 2),), (torch.randn(4, 2),))
    assert not isinstance(caught.value, ForwardModeError)


def test_nesting_is_what_is_active() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(nesting())
        return x.sin()

    x = torch.ones(2)
    look(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.jvp(lambda x: torch.func.jvp(look, (x,), (x,))[1], (x,), (x,))
    torch.func.vmap(look)(x)
    with forward_ad.dual_level():
        look(x)
    assert seen[:2] == [NOTHING, ONE_JVP]
    assert seen[2] == Nesting(2, "Jvp", 1) and seen[3:] == [Nesting(1, "Vmap", 0), Nesting(0, "", 1)]


@pytest.mark.parametrize("owner", ["interpreter", "level"])
def test_without_pytorchs_private_names_everything_takes_the_plain_way(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "SMALLEST", 1)
    network, x, t, _ = make("unet")
    expected = network(x, t), *time_derivative(network, x, t)
    if owner == "interpreter":
        monkeypatch.delattr(torch._C._functorch, "peek_interpreter_stack")
    else:
        monkeypatch.setattr("ndm.nesting.torch.autograd.forward_ad", object())
    assert nesting() is None
    used = []
    monkeypatch.setattr(fused_module._NormSiLU, "apply", lambda *_: used.append(1))
    torch.testing.assert_close((network(x, t), *time_derivative(network, x, t)), expected)
    assert not used
