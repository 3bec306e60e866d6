r"""Convolution, group norm and SiLU with custom forward-mode derivatives.

They serve :mod:`ndm.autodiff.forward_mode`:

.. math::
    \text{convolution: } \dot y = w * \dot x, \qquad
    \text{norm: } \dot y = w J \dot x, \quad
    J = s\,(I - \tfrac1n 1 1^\top - \tfrac1n \hat x \hat x^\top), \quad
    s = 1/\text{deviation}, \qquad
    \text{SiLU: } \dot y = \mathrm{SiLU}'(x)\, \dot x .

PyTorch's rule for convolutions also convolves with a kernel of zeros, forward and backward, which
takes a third of their time. As plain formulas, norm and SiLU are dozens of operations that read and
write every activation. Here each tangent is one fused operation, and its gradients are written out.
The Jacobian J of the standardized :math:`\hat x` is symmetric, so PyTorch's backward pass of the
norm also gives its tangent. With m(.) the mean over a group and :math:`u = w g`,

.. math::
    \nabla_x \langle g, w J \dot x \rangle
    = -s\, \bigl( b\, J u + a\, J \dot x + m(u\, J \dot x)\, \hat x \bigr), \qquad
    a = m(\hat x u), \quad b = m(\hat x \dot x) .

All rules can be differentiated further by autograd: with ``create_graph`` the backward passes use
the plain formulas. They support one forward level and no batching, so use them only within one
``torch.func.jvp``, with no other transform of torch.func around or within it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

_aten = torch.ops.aten


class Convolution(Function):
    """``torch.convolution`` without transposition."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0], groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, *ctx.how = inputs
        ctx.bias_shape = None if bias is None else list(bias.shape)
        ctx.set_materialize_grads(False)  # no kernel of zeros
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if gradient is None:
            return (None,) * 7
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        wanted = [*ctx.needs_input_grad[:2], ctx.bias_shape is not None and ctx.needs_input_grad[2]]
        how = (stride, padding, dilation, False, [0], groups)
        found = _aten.convolution_backward(gradient, x, weight, ctx.bias_shape, *how, wanted)
        return (*found, None, None, None, None)

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: Any
    ) -> Tensor:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        how = (stride, padding, dilation, False, [0], groups)
        terms = []
        if dx is not None:
            terms.append(torch.convolution(dx, weight, dbias, *how))
        if dweight is not None:
            bias = None if terms else dbias
            terms.append(torch.convolution(x, dweight, bias, *how))
        return sum(terms[1:], terms[0])


def through(
    formula: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    gradient: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the gradients of a plain formula, such that they can be differentiated again.

    Args:
        formula: maps the inputs to one output or several.
        inputs: inputs of the formula; those that do not require a gradient get None.
        gradient: gradient of each output.
    """
    # If one input depends on another, its gradient must not pass through that dependence.
    aliases = [None if value is None else value.view_as(value) for value in inputs]
    wanted = {
        index: value
        for index, value in enumerate(aliases)
        if value is not None and value.requires_grad
    }
    outputs = formula(*aliases)
    single = isinstance(outputs, Tensor)
    pairs = [(outputs, gradient)] if single else zip(outputs, gradient, strict=True)
    needed = [(output, by) for output, by in pairs if output.requires_grad]
    outputs, gradients = zip(*needed, strict=True)
    values = list(wanted.values())
    found = torch.autograd.grad(outputs, values, gradients, create_graph=True, allow_unused=True)
    by_index = dict(zip(wanted, found, strict=True))
    return [by_index.get(index) for index in range(len(inputs))]


def _silu_slope(value: Tensor, x: Tensor) -> Tensor:
    """Return SiLU'(x) times a value; PyTorch's fused operation has no derivative."""
    if not torch.is_grad_enabled():
        return _aten.silu_backward(value, x)
    gate = torch.sigmoid(x)
    return value * gate * (1 + x * (1 - gate))


class SiLU(Function):
    """x sigmoid(x)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return functional.silu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _silu_slope(gradient, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return _SiLUTangent.apply(*ctx.saved_tensors, dx)


class _SiLUTangent(Function):
    """SiLU'(x) dx."""

    @staticmethod
    def forward(x: Tensor, dx: Tensor) -> Tensor:
        return _aten.silu_backward(dx, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, dx = ctx.saved_tensors
        gate = torch.sigmoid(x)
        # SiLU''(x) = gate' (2 + x (1 - 2 gate))
        bend = 2 + torch.addcmul(x, x, gate, value=-2)
        return _aten.sigmoid_backward(gradient * dx, gate) * bend, _silu_slope(gradient, x)


def standardized(x: Tensor, groups: int, eps: float) -> Tensor:
    """Return the group norm without weights, as a plain formula."""
    grouped = x.unflatten(1, (groups, -1))
    dims = list(range(2, grouped.dim()))
    centered = grouped - grouped.mean(dims, keepdim=True)
    variance = (centered * centered).mean(dims, keepdim=True)
    return (centered * torch.rsqrt(variance + eps)).flatten(1, 2)


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """Reshape ``(C,)`` or ``(B, C)`` to broadcast against ``x`` ``(B, C, ...)``."""
    return value.reshape(*([1] * (2 - value.dim())), *value.shape, *([1] * (x.dim() - 2)))


def dense(value: Tensor, like: Tensor | None = None) -> Tensor:
    """Return ``value`` in a memory format that the fused norm accepts.

    On the CPU that is the format of ``like`` (by default that of ``value``), elsewhere contiguous.
    """
    like = value if like is None else like
    last = (
        like.device.type == "cpu"
        and like.dim() == 4
        and like.is_contiguous(memory_format=torch.channels_last)
    )
    return value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Return the sizes that PyTorch's fused norm takes: B, C, positions, groups."""
    batch, channels = x.shape[:2]
    return batch, channels, x.numel() // max(1, batch * channels), groups


def jacobian(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    gradient: Tensor,
    weight: Tensor | None,
    wanted: Sequence[bool],
) -> Any:
    """Return J (w g), and those gradients of weight and bias that are wanted.

    J (w g) is always computed: PyTorch's channels_last kernel crashes without it.
    """
    x = dense(x)
    return _aten.native_group_norm_backward(
        dense(gradient, x), x, mean, rstd, weight, *sizes(x, groups), [True, *wanted]
    )


class GroupNorm(Function):
    """``torch.native_group_norm``: the norm, and means and inverse deviations ``(B, G)``."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _aten.native_group_norm(dense(x), weight, bias, *sizes(x, groups), eps)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, weight, bias, ctx.groups, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if gradient is None:
            return (None,) * 5
        if torch.is_grad_enabled():

            def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                normal = standardized(x, ctx.groups, ctx.eps)
                normal = normal if weight is None else normal * per_channel(weight, x)
                return normal if bias is None else normal + per_channel(bias, x)

            return (*through(formula, (x, weight, bias), gradient), None, None)
        wanted = ctx.needs_input_grad[1:3]
        found = jacobian(x, mean, rstd, ctx.groups, gradient, weight, wanted)
        return (*found, None, None)

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: Any
    ) -> tuple[Tensor, None, None]:
        x, weight, _, mean, rstd = ctx.saved_tensors
        terms = []
        if dx is not None:
            terms.append(_GroupNormTangent.apply(x, dx, weight, mean, rstd, ctx.groups, ctx.eps))
        if dweight is not None:
            terms.append(standardized(x, ctx.groups, ctx.eps) * per_channel(dweight, x))
        if dbias is not None:
            terms.append(per_channel(dbias, x).expand_as(x))
        return sum(terms[1:], terms[0]), None, None


class _GroupNormTangent(Function):
    """The tangent w J dx."""

    @staticmethod
    def forward(
        x: Tensor,
        dx: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        groups: int,
        eps: float,
    ) -> Tensor:
        moved = jacobian(x, mean, rstd, groups, dx, None, [False, False])[0]
        return moved if weight is None else moved.mul_(per_channel(weight, x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.groups, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, dx, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():

            def formula(x: Tensor, dx: Tensor, weight: Tensor | None) -> Tensor:
                pullback = torch.func.vjp(lambda x: standardized(x, ctx.groups, ctx.eps), x)[1]
                moved = pullback(dx)[0]  # J is symmetric
                return moved if weight is None else moved * per_channel(weight, x)

            return (*through(formula, (x, dx, weight), gradient), None, None, None, None)
        found = _tangent_gradients(x, dx, weight, mean, rstd, ctx.groups, gradient)
        return (*found, None, None, None, None)


def _tangent_gradients(
    x: Tensor, dx: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, groups: int, g: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of <g, w J dx> in x, dx and w.

    They are sums over each channel, and then linear combinations of g, dx and x̂ by channel.
    """
    batch, channels, size, _ = sizes(x, groups)
    dims = list(range(2, x.dim()))
    w = x.new_ones(channels) if weight is None else weight

    def total(value: Tensor) -> Tensor:
        return value.sum(dims) if dims else value

    def repeat(value: Tensor) -> Tensor:
        """Repeat ``(B, G)`` for the channels of each group."""
        return value.repeat_interleave(channels // groups, 1)

    def over_group(value: Tensor) -> Tensor:
        """Return the mean over a group from sums over channels ``(B, C)``, for each channel."""
        return repeat(value.reshape(batch, groups, -1).mean(2) / size)

    s, mu = (repeat(value.reshape(batch, groups)) for value in (rstd, mean))
    normal = torch.addcmul(per_channel(-s * mu, x), x, per_channel(s, x))
    sum_g, sum_dx = total(g), total(dx)
    g_dx, g_normal, dx_normal = total(g * dx), total(g * normal), total(dx * normal)
    mean_u, mean_dx = over_group(w * sum_g), over_group(sum_dx)
    a, b = over_group(w * g_normal), over_group(dx_normal)
    cross = s * (over_group(w * g_dx) - mean_u * mean_dx - a * b)
    dweight = None if weight is None else (s * (g_dx - mean_dx * sum_g - b * g_normal)).sum(0)

    def combine(of_g: Tensor, of_dx: Tensor | None, of_normal: Tensor, constant: Tensor) -> Tensor:
        combined = torch.addcmul(per_channel(constant, x), normal, per_channel(of_normal, x))
        combined.addcmul_(g, per_channel(of_g, x))
        return combined if of_dx is None else combined.addcmul_(dx, per_channel(of_dx, x))

    # J u = s (u - m(u) - a x̂) and J dx = s (dx - m(dx) - b x̂).
    to_dx = combine(s * w, None, -s * a, -s * mean_u)
    square = s * s
    of_normal = 2 * square * a * b - s * cross
    constant = square * (b * mean_u + a * mean_dx)
    to_x = combine(-square * b * w, -square * a, of_normal, constant)
    return to_x, to_dx, dweight
