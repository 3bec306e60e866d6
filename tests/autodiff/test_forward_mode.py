"""Forward-mode derivatives in time: values, derivatives and gradients of derivatives."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ndm.autodiff.forward_mode import time_derivative
from ndm.errors import ForwardModeError

F64 = torch.float64
W, B = torch.linspace(0.5, 2, 8, dtype=F64), torch.linspace(-1, 1, 8, dtype=F64)
K = torch.randn(8, 8, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) / 5


def last(h: Tensor) -> Tensor:
    return h.flatten(2).transpose(1, 2)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda h: nnf.layer_norm(last(h), (8,), W, B),
    "layer_norm_two_dimensions": lambda h: nnf.layer_norm(h, (4, 3), eps=0.1),
    "layer_norm_torch": lambda h: torch.layer_norm(last(h), [8], W, None),
    "group_norm": lambda h: nnf.group_norm(h, 2, W, B),
    "group_norm_channels_last": lambda h: nnf.group_norm(
        h.contiguous(memory_format=torch.channels_last), 4, W, B
    ),
    "group_norm_plain": lambda h: torch.group_norm(h, 2),
    "instance_norm": lambda h: nnf.instance_norm(h, weight=W, bias=B),
    "instance_norm_running": lambda h: nnf.instance_norm(h, B, W, W, B, use_input_stats=False),
    "batch_norm_running": lambda h: nnf.batch_norm(h, B, W, W, B),
    "rms_norm": lambda h: nnf.rms_norm(last(h), (8,), W),
    "group_norm_of_vectors": lambda h: nnf.group_norm(h[:, :, 0, 0], 2, W, B)[..., None, None],
    "group_norm_weighted_by_time": lambda h: nnf.group_norm(
        h.cos(), 2, h[0, :, 0, 0], h[0, :, 1, 1]
    )[:1],
    "silu": nnf.silu,
    "silu_in_place": lambda h: nnf.silu(1 * h, inplace=True),
    "gelu": nnf.gelu,
    "glu": lambda h: nnf.glu(h, 1),
    "softmax": lambda h: nnf.softmax(h, 1),
    "attention": lambda h: nnf.scaled_dot_product_attention(
        last(h)[:, None], 1.1 * last(h)[:, None], last(h)[:, None].sin()
    ),
    "convolution": lambda h: nnf.conv2d(h, K, padding=1),
    "convolution_with_groups": lambda h: nnf.conv2d(
        h, K[:, :4, :, :2], B, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2
    ),
    "convolution_same": lambda h: nnf.conv2d(h, K, padding="same"),
    "convolution_of_lines": lambda h: nnf.conv1d(h.flatten(2), K[..., 0], B),
    "convolution_of_one": lambda h: nnf.conv2d(h[0], K, padding=1)[None],
    "convolution_by_time": lambda h: nnf.conv2d(
        h[:1], K * h[0, :, 0, 0, None, None, None], h[0, 0, 0, 0] * B, padding=1
    ),
    "interpolation": lambda h: nnf.interpolate(h, scale_factor=2.0, mode="nearest"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_value_derivative_and_its_gradient_match_finite_differences(name: str) -> None:
    """PyTorch's fused norms silently get this gradient wrong."""
    generator = torch.Generator().manual_seed(1)
    x, mix = (
        torch.randn(shape, dtype=F64, generator=generator) for shape in ((3, 8, 4, 3), (8, 8))
    )
    t = torch.rand(3, dtype=F64, generator=generator)
    parameter = torch.randn(8, dtype=F64, generator=generator)

    def network(x: Tensor, t: Tensor, parameter: Tensor) -> Tensor:
        wave = torch.sin(3 * t[:, None, None, None] * parameter[:, None, None])
        mixed = torch.einsum("bchw,cd->bdhw", x, mix)
        return OPERATIONS[name](mixed * wave + parameter[:, None, None])

    def derivative_at(parameter: Tensor) -> Tensor:
        return time_derivative(lambda x, t: network(x, t, parameter), x, t)[1]

    step = 1e-5
    value, derivative = time_derivative(lambda x, t: network(x, t, parameter), x, t)
    torch.testing.assert_close(value, network(x, t, parameter))
    central = (network(x, t + step, parameter) - network(x, t - step, parameter)) / (2 * step)
    torch.testing.assert_close(derivative, central, rtol=1e-4, atol=1e-6)

    probe = torch.randn(derivative.shape, dtype=F64, generator=generator)
    leaf = parameter.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((probe * derivative_at(leaf)).sum(), leaf)
    changes = [
        (probe * (derivative_at(parameter + shift) - derivative_at(parameter - shift))).sum()
        for shift in step * torch.eye(8, dtype=F64)
    ]
    expected = torch.stack(changes) / (2 * step)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_second_gradients_match_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2,), (2, 4, 3, 2), (4,), (4, 4, 2, 1))
    t, x, weight, kernel = (
        torch.rand(shape, dtype=F64, generator=generator).requires_grad_() for shape in shapes
    )

    def both(t: Tensor, x: Tensor, weight: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        def network(x: Tensor, t: Tensor) -> Tensor:
            convolved = nnf.conv2d((x + t[:, None, None, None]).cos(), kernel)
            return nnf.silu(nnf.group_norm(convolved, 2, weight, weight))

        return time_derivative(network, x, t)

    assert torch.autograd.gradgradcheck(both, (t, x, weight, kernel))


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 8), nn.LayerNorm([8, 40]), nn.InstanceNorm1d(8)])
def test_norms_are_accurate_for_large_offsets_in_float32(norm: nn.Module) -> None:
    """Here a mean of squares minus the square of the mean would cancel."""
    x = 100 + 0.1 * torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    got = time_derivative(lambda x, t: norm(x), x, torch.rand(2))[0]
    torch.testing.assert_close(got, norm.double()(x.double()).float(), rtol=1e-3, atol=1e-3)


def test_half_precision_inputs_are_normalized_in_float32() -> None:
    norm = nn.GroupNorm(2, 8).to(torch.bfloat16)
    x = (50 + torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    got = time_derivative(lambda x, t: norm(x), x, torch.rand(2))[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, norm(x), rtol=0.02, atol=0.02)


def test_expanded_times_are_accepted() -> None:
    t = torch.tensor(0.3).expand(4)
    value, derivative = time_derivative(lambda x, t: x * t[:, None] ** 2, torch.ones(4, 2), t)
    torch.testing.assert_close(value, torch.full((4, 2), 0.09))
    torch.testing.assert_close(derivative, torch.full((4, 2), 0.6))


def test_batch_norm_in_training_is_rejected_because_it_couples_times() -> None:
    norm = nn.BatchNorm1d(2)
    for coupled in (norm, lambda h: nnf.batch_norm(h, None, None, training=True)):
        with pytest.raises(ForwardModeError, match="group norm for batch norm"):
            network = lambda x, t, coupled=coupled: coupled(x * t[:, None])  # noqa: E731
            time_derivative(network, torch.randn(4, 2), torch.rand(4))
    norm.eval()
    network = lambda x, t: norm(x * t[:, None])  # noqa: E731
    _, derivative = time_derivative(network, torch.ones(4, 2), torch.rand(4))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    torch.testing.assert_close(derivative, scale.expand(4, 2))


def test_errors_of_the_network_are_raised_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        time_derivative(lambda x, t: nn.Linear(3, 2)(x), torch.randn(4, 2), torch.rand(4))
    assert not isinstance(caught.value, ForwardModeError)
