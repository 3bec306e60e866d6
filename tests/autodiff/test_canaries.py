"""Canaries: tests that fail once PyTorch fixes a bug that ndm.autodiff works around.

When one fails, delete the rule named in its message, and the canary.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from oracles import F64

Norm = Callable[[Tensor], Tensor]


def layer_norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[1:])


def instance_norm(x: Tensor) -> Tensor:
    return functional.instance_norm(x)


def group_norm(x: Tensor) -> Tensor:
    return functional.group_norm(x, 2)


def plain(x: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """Normalize each group of channels by elementary operations."""
    grouped = x.reshape(x.shape[0], groups, -1)
    centered = grouped - grouped.mean(2, keepdim=True)
    return (centered * (centered.square().mean(2, keepdim=True) + eps).rsqrt()).reshape(x.shape)


def gradient_of_derivative(norm: Norm) -> Tensor:
    """The gradient, in the input, of a functional of the norm's forward-mode derivative."""
    generator = torch.Generator().manual_seed(0)
    x, dx, weight = (torch.randn(3, 4, 5, generator=generator, dtype=F64) for _ in range(3))
    x.requires_grad_()
    _, derivative = torch.func.jvp(norm, (x,), (dx,))
    return torch.autograd.grad((derivative * weight).sum(), x)[0]


def agrees(norm: Norm, groups: int) -> bool:
    """Whether the gradient is that of the plain formula."""
    expected = gradient_of_derivative(lambda x: plain(x, groups))
    return torch.allclose(gradient_of_derivative(norm), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("norm", "groups"), [(layer_norm, 1), (instance_norm, 4)])
def test_fused_norms_have_wrong_gradients_of_forward_mode_derivatives(
    norm: Norm, groups: int
) -> None:
    assert not agrees(norm, groups), (
        f"PyTorch's fused {norm.__name__} is right now: delete _{norm.__name__} in"
        " ndm.autodiff.forward_mode and the condition for it"
    )


def test_group_norm_needs_its_rule_only_for_speed() -> None:
    assert agrees(group_norm, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_plain_formula_matches_group_norm(groups: int) -> None:
    x = torch.randn(3, 4, 5, dtype=F64)
    torch.testing.assert_close(plain(x, groups), functional.group_norm(x, groups))


def test_torch_func_has_no_public_names_for_its_active_transforms() -> None:
    public = [name for name in dir(torch.func) if "interpreter" in name or "level" in name]
    assert not public, f"torch.func has {public}: use them in ndm.autodiff.functorch"
