"""Bayes' rule over a grid: its custom backward pass, once and twice, against finite differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ndm.value_grid import kernels
from oracles import F64


def inputs() -> dict[str, Tensor]:
    """Five examples of three pixels, seven values and two features; noise from low to high."""
    torch.manual_seed(0)
    v = torch.linspace(-1, 1, 7, dtype=F64)
    scale = torch.tensor([6.0, 3.0, 1.5, 0.7, 0.2], dtype=F64)
    s = scale[:, None] * torch.rand(5, 3, dtype=F64).mul(2).sub(1) + 0.3
    n = 1 + 3 * torch.rand(5, 7, dtype=F64)  # larger than any r, as it is their sum
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


def functions_and_arguments() -> list[tuple[Callable[..., object], tuple[Tensor, ...]]]:
    arguments = inputs()
    for name, value in arguments.items():
        value.requires_grad_(name != "v")
    embedding = torch.randn(7, 2, dtype=F64, requires_grad=True)
    return [
        (kernels.value_posteriors, (arguments["s"], arguments["w"], embedding)),
        (kernels.posterior_mean, tuple(arguments.values())),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers",
    [1, 2 * 7, 3 * 7, 2 * 3 * 7, 5 * 3 * 7],
    ids=["place", "two places", "example", "two examples", "all"],
)
def test_gradients_match_finite_differences(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CPU_BLOCK", numbers)
    for function, arguments in functions_and_arguments():
        assert torch.autograd.gradcheck(function, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [[0], [1], [0, 2], [2], [3], [5, 6, 7], [3, 7]])
def test_gradients_of_some_inputs_match_finite_differences(
    chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_CPU_BLOCK", 2 * 3 * 7)
    for function, arguments in functions_and_arguments():
        some = [index for index in chosen if index < len(arguments)]
        if some:
            leaves = [
                value.detach().requires_grad_(index in some)
                for index, value in enumerate(arguments)
            ]
            assert torch.autograd.gradcheck(function, leaves)
            assert torch.autograd.gradgradcheck(function, leaves)


def test_second_gradients_match_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CPU_BLOCK", 2 * 3 * 7)
    for function, arguments in functions_and_arguments():
        assert torch.autograd.gradgradcheck(function, arguments)


def test_half_precision_features_change_results_little() -> None:
    """Only their product with the weight is rounded; gradients have the dtype of their input."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        arguments = {name: value.float() for name, value in inputs().items()}
        arguments["features"] = arguments["features"].to(dtype)
        leaves = [value.requires_grad_() for name, value in arguments.items() if name != "v"]
        x = kernels.posterior_mean(**arguments)
        gradients = torch.autograd.grad(x.square().sum(), leaves)
        assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]
        found.append((x, *gradients))
    for single, half in zip(*found, strict=True):
        assert float((single - half).norm().detach() / single.norm().detach()) < 2e-2


def test_tensors_saved_for_backward_have_no_axis_over_values() -> None:
    saved: list[torch.Size] = []

    def record(value: Tensor) -> Tensor:
        saved.append(value.shape)
        return value

    arguments = {name: value.requires_grad_(name != "v") for name, value in inputs().items()}
    with torch.autograd.graph.saved_tensors_hooks(record, lambda value: value):
        kernels.posterior_mean(**arguments)
        kernels.value_posteriors(arguments["s"], arguments["w"], torch.randn(7, 2, dtype=F64))
    assert saved and max(shape.numel() for shape in saved) < 5 * 3 * 7
