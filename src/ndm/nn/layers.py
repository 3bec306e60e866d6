r"""Layers of the networks.

.. math::
    \text{attention: } x + W_o\, \mathrm{softmax}\bigl(q k^\top / \sqrt{d}\bigr) v, \qquad (q, k, v) = W\, \mathrm{norm}(x)
"""

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ndm.autodiff.functorch import NOTHING, RULES, nesting
from ndm.errors import UserError

Norm = Literal["group", "channel"]


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Group norm of up to eight channels a group, or :class:`ChannelNorm`."""
    return group_norm(channels) if norm == "group" else ChannelNorm()


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm of :func:`make_norm` at ``x`` ``(B, C, ...)``; half precision comes out in float32."""
    if isinstance(norm, nn.GroupNorm):
        return normal(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return norm(x)


def group_norm(channels: int, group_channels: int = 8) -> nn.GroupNorm:
    """Group normalization of ``(B, C, ...)`` with at most ``group_channels`` channels a group, and
    as many as divide C evenly.
    """
    size = next(
        size for size in range(min(group_channels, channels), 0, -1) if channels % size == 0
    )
    return nn.GroupNorm(channels // size, channels)


class ChannelNorm(nn.Module):
    """x / rms(x) with the root mean square over the channels of each position of ``(B, C, ...)``,
    of half precision in float32.

    It has no weights: a convolution or a modulation follows. Every position is by itself, so that a
    compiler makes one pass of it.
    """

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, ...)`` to the same shape; half precision comes out in float32."""
        wide = widened(x)
        return wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + self.eps)


class Attention(nn.Module):
    """Residual self-attention over the positions of an image ``(B, C, H, W)``.

    Args:
        channels: C.
        head_channels: wanted channels of a head; must divide C, or C is one head.
    """

    def __init__(self, channels: int, head_channels: int = 32, norm: Norm = "group"):
        super().__init__()
        self.heads = channels // head_channels if channels % head_channels == 0 else 1
        self.norm = make_norm(norm, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        zeroed(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        channels, height, width = x.shape[1:]
        # Positions before channels, as channels_last has them: no number is moved, and the
        # convolutions are products of matrices.
        tokens = normalized(self.norm, x).to(x.dtype).movedim(1, -1).flatten(1, 2)
        qkv = nnf.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias).unflatten(
            2, (3, self.heads, channels // self.heads)
        )
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nnf.linear(
            attend(q, k, v).transpose(1, 2).flatten(2), self.out.weight.flatten(1), self.out.bias
        )
        return x + mixed.unflatten(1, (height, width)).movedim(-1, 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; on CPUs in float32, where PyTorch's attention in half precision
    is the slower one.
    """
    if q.device.type != "cpu":
        return nnf.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return nnf.scaled_dot_product_attention(widened(q), widened(k), widened(v)).to(q.dtype)


HALF = (torch.bfloat16, torch.float16)
"""Types of half precision."""


def widened(x: Tensor) -> Tensor:
    """Half precision in float32, anything else as it is."""
    return x.float() if x.dtype in HALF else x


def normal(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm of ``(B, C, ...)``, of half precision in float32."""
    if torch.compiler.is_compiling():
        return channel_norm(widened(x), groups, widened(weight), widened(bias), eps)
    # PyTorch's kernel for channels_last has no forward derivative, and its backward pass crashes
    # where x wants no gradient. Within torch.func no x says that it wants one.
    if (
        not RULES.get()
        and not x.requires_grad
        and (torch.is_grad_enabled() or nesting() != NOTHING)
    ):
        x = x.contiguous()
    return nnf.group_norm(widened(x), groups, widened(weight), widened(bias), eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm of vectors, as a plain formula where it is compiled: PyTorch's fused one has no
    right second-order derivatives.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to the same shape."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        wide = widened(x)
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        y = (wide - mean) * torch.rsqrt(variance + self.eps)
        return (y if self.weight is None else y * self.weight + self.bias).to(x.dtype)


def channel_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm of ``(B, C, ...)`` as a plain formula, from the mean and variance of each channel.

    The variance of a group is the mean of its channels' variances plus the variance of their means.
    So every reduction runs over the positions of single channels, which a compiler keeps in
    channels_last and fuses with what stands around it.
    """
    variance, mean = torch.var_mean(x.flatten(2), 2, correction=0)  # (B, C)
    of_channels, mean_g = torch.var_mean(mean.unflatten(1, (groups, -1)), 2, correction=0)  # (B, G)
    rstd = torch.rsqrt(variance.unflatten(1, (groups, -1)).mean(2) + of_channels + eps)
    repeats = x.shape[1] // groups
    slope = rstd.repeat_interleave(repeats, 1) * weight
    start = bias - mean_g.repeat_interleave(repeats, 1) * slope
    shape = (*slope.shape, *([1] * (x.dim() - 2)))
    return x * slope.reshape(shape) + start.reshape(shape)


def doubled(x: Tensor, height: int, width: int) -> Tensor:
    """Images ``(B, C, H, W)`` of twice the size by nearest neighbors, cut to ``height`` and
    ``width``.
    """
    if not torch.compiler.is_compiling():
        return nnf.interpolate(x, size=(height, width), mode="nearest")
    # A compiler would take this operation, and its gradient, out of channels_last.
    last = x.movedim(1, -1)
    twice = last[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2)
    return twice[:, :height, :width].movedim(-1, 1)


def zeroed(layer: nn.Module) -> nn.Module:
    """Set every parameter of a layer to zero in place, and return it."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def check_dropout(dropout: float) -> float:
    """Return a dropout probability, or raise :class:`UserError` if it is not in [0, 1)."""
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout}: give a probability in [0, 1)")
    return dropout


def check_outputs(outputs: int | None) -> None:
    """Raise :class:`UserError` unless ``outputs`` is None or at least 1."""
    if outputs is not None and outputs < 1:
        raise UserError(
            f"outputs={outputs}: give the number of outputs in the shape of x, at least 1, or leave"
            " it out"
        )
