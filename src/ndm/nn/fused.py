r"""Group norm, modulation and SiLU as one operation that saves only its input for backward.

.. math::
    y = \mathrm{SiLU}\bigl(\mathrm{norm}(x)(1 + a) + b\bigr), \qquad
    \text{a and b by example and channel}

Autograd would also save the normalized and the modulated activations, half of the memory of a U-Net
in training. Both are affine maps of x for each channel, so one pass over x recomputes them.
Activations in half precision are normalized in float32, but no float32 tensor is saved. Means over
a group need the precision, and on CPUs PyTorch's norm is several times slower in half precision
than in float32.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd import Function

from ndm.autodiff.functorch import NOTHING, nesting
from ndm.autodiff.rules import dense, jacobian, per_channel, sizes, through
from ndm.nn.layers import HALF, normal, widened

_aten = torch.ops.aten
SMALLEST = 2**18
"""Number of elements below which the overhead of the fused operation outweighs its savings."""


def norm_silu(
    norm: nn.Module, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Return SiLU(norm(x) (1 + scale) + shift) in the dtype of x.

    Args:
        norm: a norm of :func:`ndm.nn.layers.make_norm`.
        x: ``(B, C, H, W)``.
        scale: ``(B, C)``; both scale and shift, or neither.
        shift: ``(B, C)``.
    """
    if not isinstance(norm, nn.GroupNorm):
        return _silu(norm(x), x, scale, shift)
    if _can_fuse(x):
        return _NormSiLU.apply(x, norm.weight, norm.bias, scale, shift, norm.num_groups, norm.eps)
    return _formula(x, norm.weight, norm.bias, scale, shift, norm.num_groups, norm.eps)


def _can_fuse(x: Tensor) -> bool:
    """Whether ``x`` is large, and not inside a compiler, torch.func or forward mode."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and x.numel() >= SMALLEST
        and x.dtype in (*HALF, torch.float32, torch.float64)
        and x.device.type in ("cpu", "cuda")
        and nesting() == NOTHING
    )


def _formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    return _silu(normal(x, groups, weight, bias, eps), x, scale, shift)


def _silu(inner: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return SiLU(inner (1 + scale) + shift) in the dtype of x."""
    if scale is not None and shift is not None:
        factor = 1 + per_channel(widened(scale), x)
        inner = torch.addcmul(per_channel(widened(shift), x), inner, factor)
    return nnf.silu(inner).to(x.dtype)


class _NormSiLU(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Any,
        shift: Any,
        groups: int,
        eps: float,
    ) -> Tensor:
        value, mean, rstd = _aten.native_group_norm(
            dense(widened(x)), widened(weight), widened(bias), *sizes(x, groups), eps
        )
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        if scale is not None:
            value.mul_(per_channel(1 + widened(scale), x)).add_(per_channel(widened(shift), x))
        return nnf.silu(value, inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # this pass may be differentiated, too
            formula = functools.partial(_formula, groups=ctx.groups, eps=ctx.eps)
            return (*through(formula, (x, weight, bias, scale, shift), gradient), None, None)
        narrow = x.dtype
        x, weight, bias, gradient = (widened(value) for value in (x, weight, bias, gradient))
        if scale is not None:
            scale, shift = widened(scale), widened(shift)
        repeats = x.shape[1] // ctx.groups
        mean_c, rstd_c = (
            value.reshape(-1, ctx.groups).repeat_interleave(repeats, 1) for value in (mean, rstd)
        )
        slope = rstd_c * weight  # norm(x) = slope x + start
        start = bias - mean_c * slope
        factor, offset = slope, start
        if scale is not None:
            factor, offset = slope * (1 + scale), start * (1 + scale) + shift
        inner = torch.addcmul(per_channel(offset, x), x, per_channel(factor, x))
        g = _aten.silu_backward(dense(gradient, x), inner)
        dscale = dshift = None
        if scale is not None:
            dims = list(range(2, x.dim()))
            dshift = g.sum(dims)
            dscale = slope * torch.mul(g, x, out=inner).sum(dims) + start * dshift
            g.mul_(per_channel(1 + scale, x))
        dx, *dnorm = jacobian(x, mean, rstd, ctx.groups, g, weight, ctx.needs_input_grad[1:3])
        return (dx.to(narrow), *dnorm, dscale, dshift, None, None)
