r"""Group norm, modulation and SiLU as one operation that keeps its input alone for the backward pass.

.. math::
    y = \mathrm{SiLU}\bigl(\mathrm{norm}(x)(1 + a) + b\bigr), \qquad \text{a and b by example and channel}

Autograd would keep the normalised and the modulated activations as well, half of what a U-Net holds in training. They are an affine map of
x for each channel, one pass over x to get back. Activations in half precision are normalised in float32, of which nothing is kept: means
over a group need its digits, and PyTorch's norm of half precision is several times slower than that of float32 on CPUs.

PyTorch's norm on GPUs leaves channels_last, and copies from format to format take longer than all convolutions there. In half precision on GPUs
everything is written by sums over single channels, of which a group's are made. With g the gradient of what SiLU gets, k = w (1 + a), m(.) the
mean over a group and :math:`\hat x = s (x - \mu)`,

.. math::
    \nabla_x = s\,\bigl(k g - m(k g) - m(k g \hat x)\, \hat x\bigr),

which is g times a number, plus x times a number, plus a number, for each channel of each example.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd import Function

from ndm.forward_rules import dense, jacobian, per_channel, sizes, through
from ndm.nesting import NOTHING, nesting
from ndm.nn.layers import HALF, normal, widened

_aten = torch.ops.aten
SMALLEST = 2**18
"""Fewer numbers than these are not worth it: the operations' own overhead outweighs what is saved."""
SMALLEST_BY_CHANNEL = 2**23
"""The same for sums over single channels: some thirty short operations more, whose start takes the time of two passes over so many numbers."""


def norm_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """SiLU(norm(x) (1 + scale) + shift) for ``x`` ``(B, C, H, W)``, with ``scale`` and ``shift`` ``(B, C)``, both or neither; in the dtype of x."""
    if _simple(x):
        by_channel = x.device.type == "cuda" and x.dtype in HALF and x.numel() >= SMALLEST_BY_CHANNEL
        return (_NormSiLUByChannel if by_channel else _NormSiLU).apply(x, norm.weight, norm.bias, scale, shift, norm.num_groups, norm.eps)
    return _formula(x, norm.weight, norm.bias, scale, shift, norm.num_groups, norm.eps)


def _simple(x: Tensor) -> bool:
    """Whether it is large, and only a plain backward pass may follow: no compiler, transform of torch.func or forward mode."""
    return (
        torch.is_grad_enabled()
        and x.numel() >= SMALLEST
        and x.dtype in (*HALF, torch.float32, torch.float64)
        and x.device.type in ("cpu", "cuda")
        and not torch.compiler.is_compiling()
        and nesting() == NOTHING
    )


def _formula(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float) -> Tensor:
    inner = normal(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        inner = torch.addcmul(per_channel(widened(shift), x), inner, 1 + per_channel(widened(scale), x))
    return nnf.silu(inner).to(x.dtype)


class _NormSiLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Any, shift: Any, groups: int, eps: float) -> Tensor:
        value, mean, rstd = _aten.native_group_norm(dense(widened(x)), widened(weight), widened(bias), *sizes(x, groups), eps)
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        if scale is not None:
            value.mul_(per_channel(1 + widened(scale), x)).add_(per_channel(widened(shift), x))
        return nnf.silu(value, inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            formula = functools.partial(_formula, groups=ctx.groups, eps=ctx.eps)
            return (*through(formula, (x, weight, bias, scale, shift), gradient), None, None)
        narrow = x.dtype
        x, weight, bias, gradient = (widened(value) for value in (x, weight, bias, gradient))
        if scale is not None:
            scale, shift = widened(scale), widened(shift)
        repeats = x.shape[1] // ctx.groups
        mean_c, rstd_c = (value.reshape(-1, ctx.groups).repeat_interleave(repeats, 1) for value in (mean, rstd))
        slope = rstd_c * weight  # norm(x) = slope x + start
        start = bias - mean_c * slope
        whole, add = (slope, start) if scale is None else (slope * (1 + scale), start * (1 + scale) + shift)
        inner = torch.addcmul(per_channel(add, x), x, per_channel(whole, x))
        g = _aten.silu_backward(dense(gradient, x), inner)
        dscale = dshift = None
        if scale is not None:
            dims = list(range(2, x.dim()))
            dshift = g.sum(dims)
            dscale = slope * torch.mul(g, x, out=inner).sum(dims) + start * dshift
            g.mul_(per_channel(1 + scale, x))
        found = jacobian(x, mean, rstd, ctx.groups, g, weight, ctx.needs_input_grad[1:3])
        return (found[0].to(narrow), *found[1:], dscale, dshift, None, None)


class _NormSiLUByChannel(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Any, shift: Any, groups: int, eps: float) -> Tensor:
        ctx.groups, ctx.eps = groups, eps
        with torch.autocast(x.device.type, enabled=False):
            first, second = (
                _sums(x, groups),
                torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32).square().unflatten(1, (groups, -1)),
            )
            count = x[0].numel() // groups
            mean = first.sum(2, keepdim=True) / count
            variance = second.sum(2, keepdim=True) / count - mean.square()  # digits suffice: x has eight of them
            rstd = (variance.clamp(min=0) + eps).rsqrt()
            ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
            whole, add = _line(weight, bias, scale, shift, mean, rstd)
            return nnf.silu(_along(x, whole, add), inplace=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            formula = functools.partial(_formula, groups=ctx.groups, eps=ctx.eps)
            return (*through(formula, (x, weight, bias, scale, shift), gradient), None, None)
        whole, add = _line(weight, bias, scale, shift, mean, rstd)
        format = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        g = _aten.silu_backward(gradient.contiguous(memory_format=format), _along(x, whole, add))
        w, b, factor = _grouped(weight, bias, scale, ctx.groups)
        plain, by_x = _sums(g, ctx.groups), _sums(g * x, ctx.groups)
        standard = rstd * (by_x - mean * plain)  # the sum of g x̂
        count, k = x[0].numel() // ctx.groups, w * factor
        level = (k * plain).sum(2, keepdim=True) / count
        slope = (k * standard).sum(2, keepdim=True) / count
        by_value = (-rstd.square() * slope).expand_as(plain)
        constant = rstd * (rstd * slope * mean - level)
        dx = _along(g, rstd * k, _along(x, by_value, constant.expand_as(plain), torch.float32))
        dscale = dshift = None
        if scale is not None:
            dscale, dshift = ((w * standard + b * plain).flatten(1).to(scale.dtype), plain.flatten(1).to(shift.dtype))
        dweight, dbias = ((factor * value).sum(0).flatten().to(weight.dtype) for value in (standard, plain))
        return dx, dweight, dbias, dscale, dshift, None, None


def _sums(x: Tensor, groups: int) -> Tensor:
    """Over the pixels of each channel, in float32; ``(B, G, C/G)``."""
    return x.sum((2, 3), dtype=torch.float32).unflatten(1, (groups, -1))


def _grouped(weight: Tensor, bias: Tensor, scale: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Any]:
    """w, b and 1 + a in float32, by group."""
    w, b = (value.float().unflatten(0, (groups, -1)) for value in (weight, bias))
    return w, b, 1.0 if scale is None else 1 + scale.float().unflatten(1, (groups, -1))


def _line(weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """What norm and modulation multiply x by, and what they add, ``(B, G, C/G)``."""
    w, b, factor = _grouped(weight, bias, scale, mean.shape[1])
    whole = rstd * w * factor
    add = b * factor - mean * whole
    return whole, add if shift is None else add + shift.float().unflatten(1, (mean.shape[1], -1))


def _along(x: Tensor, whole: Tensor, add: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x times ``whole`` plus ``add``, each of them for each channel or for each value; in the dtype of x by default."""
    whole, add = (value if value.dim() == 4 else per_channel(value.flatten(1), x) for value in (whole, add))
    return torch.addcmul(add, x, whole, out=torch.empty_like(x, dtype=dtype))
