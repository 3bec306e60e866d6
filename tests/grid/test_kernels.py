"""Bayes' rule over a grid's values: its own backward pass against finite differences, once and
twice, in several blocks.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ndm.grid import kernels
from oracles import F64


def inputs() -> dict[str, Tensor]:
    """Five examples of three places, seven values, and two features; noise from little to much."""
    torch.manual_seed(0)
    v = torch.linspace(-1, 1, 7, dtype=F64)
    scale = torch.tensor([6.0, 3.0, 1.5, 0.7, 0.2], dtype=F64)
    s = scale[:, None] * torch.rand(5, 3, dtype=F64).mul(2).sub(1) + 0.3
    n = 1 + 3 * torch.rand(5, 7, dtype=F64)  # more than any r, whose sum it would be
    features, weight, bias = (torch.randn(shape, dtype=F64) for shape in ((5, 3, 2), (7, 2), (7,)))
    return {
        "s": s,
        "w": scale[:, None] * v,
        "n": n,
        "c": torch.tensor(0.8, dtype=F64),
        "v": v,
        "features": features,
        "weight": weight,
        "bias": bias,
    }


def both() -> list[tuple[Callable[..., object], tuple[Tensor, ...]]]:
    given = inputs()
    for name, value in given.items():
        value.requires_grad_(name != "v")
    embedding = torch.randn(7, 2, dtype=F64, requires_grad=True)
    return [
        (kernels.value_posteriors, (given["s"], given["w"], embedding)),
        (kernels.posterior_mean, tuple(given.values())),
    ]


@pytest.mark.parametrize(
    "numbers",
    [1, 2 * 7, 3 * 7, 2 * 3 * 7, 5 * 3 * 7],
    ids=["place", "two places", "example", "two examples", "all"],
)
def test_gradients_are_those_of_finite_differences(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_CPU_BLOCK", numbers)
    for function, arguments in both():
        assert torch.autograd.gradcheck(function, arguments)


@pytest.mark.parametrize("wanted", [[0], [1], [0, 2], [2], [3], [5, 6, 7], [3, 7]])
def test_gradients_of_some_inputs_alone(wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CPU_BLOCK", 2 * 3 * 7)
    for function, arguments in both():
        some = [index for index in wanted if index < len(arguments)]
        if some:
            alone = [
                value.detach().requires_grad_(index in some)
                for index, value in enumerate(arguments)
            ]
            assert torch.autograd.gradcheck(function, alone) and torch.autograd.gradgradcheck(
                function, alone
            )


def test_gradients_can_be_differentiated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CPU_BLOCK", 2 * 3 * 7)
    for function, arguments in both():
        assert torch.autograd.gradgradcheck(function, arguments)


def test_features_in_half_precision_change_little() -> None:
    """Their product with the weight is rounded, and nothing else; gradients come in the precision
    of each input.
    """
    given = {name: value.float() for name, value in inputs().items()}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = {
            name: (
                value.to(dtype if name == "features" else torch.float32).requires_grad_(name != "v")
            )
            for name, value in given.items()
        }
        x = kernels.posterior_mean(**leaves)
        gradients = torch.autograd.grad(
            x.square().sum(), [leaf for name, leaf in leaves.items() if name != "v"]
        )
        assert [one.dtype for one in gradients] == [
            leaf.dtype for name, leaf in leaves.items() if name != "v"
        ]
        found.append((x, *gradients))
    for single, half in zip(*found, strict=True):
        assert float((single - half).norm().detach() / single.norm().detach()) < 2e-2


def test_what_is_kept_for_the_backward_pass_has_no_number_for_every_value() -> None:
    kept: list[torch.Size] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.shape)
        return value

    given = {name: value.requires_grad_(name != "v") for name, value in inputs().items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        kernels.posterior_mean(**given)
        kernels.value_posteriors(given["s"], given["w"], torch.randn(7, 2, dtype=F64))
    assert kept and max(shape.numel() for shape in kept) < 5 * 3 * 7
