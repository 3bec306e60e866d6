r"""Layers of the networks.

.. math::
    \text{attention: } x + W_o\, \mathrm{softmax}\bigl(q k^\top / \sqrt{d}\bigr) v, \qquad
    (q, k, v) = W\, \mathrm{norm}(x)
"""

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ndm.autodiff.functorch import NOTHING, RULES, nesting
from ndm.errors import UserError, check_whole

Norm = Literal["group", "channel"]


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Build a group norm with up to eight channels per group, or a :class:`ChannelNorm`."""
    return group_norm(channels) if norm == "group" else ChannelNorm()


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm of :func:`make_norm` to ``(B, C, ...)``; half precision returns float32."""
    if isinstance(norm, nn.GroupNorm):
        return normal(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return norm(x)


def group_norm(channels: int, group_channels: int = 8) -> nn.GroupNorm:
    """Build a group norm of C channels.

    The size of a group is the largest divisor of C up to ``group_channels``.
    """
    sizes = range(min(group_channels, channels), 0, -1)
    size = next(size for size in sizes if channels % size == 0)
    return nn.GroupNorm(channels // size, channels)


class ChannelNorm(nn.Module):
    """x / rms(x), with the root mean square over the channels of each position of ``(B, C, ...)``.

    It has no weights, because a convolution or a modulation follows. Positions are independent, so
    a compiler needs only one pass.
    """

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, ...)`` to the same shape; half precision returns float32."""
        wide = widened(x)
        return wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + self.eps)


class Attention(nn.Module):
    """Residual self-attention over the positions of an image ``(B, C, H, W)``.

    Args:
        channels: C.
        head_channels: channels per head; if it does not divide C, there is one head.
        norm: ``group`` or ``channel``, see :func:`make_norm`.
    """

    def __init__(self, channels: int, head_channels: int = 32, norm: Norm = "group"):
        super().__init__()
        self.heads = channels // head_channels if channels % head_channels == 0 else 1
        self.norm = make_norm(norm, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        zeroed(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        channels, height, width = x.shape[1:]
        # Positions before channels, as in channels_last: this copies nothing, and the convolutions
        # are matrix products.
        tokens = normalized(self.norm, x).to(x.dtype).movedim(1, -1).flatten(1, 2)
        qkv = nnf.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias)
        qkv = qkv.unflatten(2, (3, self.heads, channels // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)
        mixed = nnf.linear(mixed, self.out.weight.flatten(1), self.out.bias)
        return x + mixed.unflatten(1, (height, width)).movedim(-1, 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v.

    On CPUs it is computed in float32, because PyTorch's attention is slower in half precision.
    """
    if q.device.type != "cpu":
        return nnf.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return nnf.scaled_dot_product_attention(widened(q), widened(k), widened(v)).to(q.dtype)


HALF = (torch.bfloat16, torch.float16)
"""Dtypes of half precision."""


def widened(x: Tensor) -> Tensor:
    """Convert half precision to float32; return any other dtype unchanged."""
    return x.float() if x.dtype in HALF else x


def normal(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return the group norm of ``(B, C, ...)``; half precision returns float32."""
    if torch.compiler.is_compiling():
        return channel_norm(widened(x), groups, widened(weight), widened(bias), eps)
    # PyTorch's kernel for channels_last has no forward derivative, and its backward pass crashes
    # if x requires no gradient. Inside torch.func requires_grad is always False.
    differentiated = torch.is_grad_enabled() or nesting() != NOTHING
    if not RULES.get() and not x.requires_grad and differentiated:
        x = x.contiguous()
    return nnf.group_norm(widened(x), groups, widened(weight), widened(bias), eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm of vectors, with correct second-order derivatives when compiled.

    When compiled it is a plain formula, because those of PyTorch's fused norm are wrong.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., D)`` to the same shape."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        wide = widened(x)
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        y = (wide - mean) * torch.rsqrt(variance + self.eps)
        return (y if self.weight is None else y * self.weight + self.bias).to(x.dtype)


def channel_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return the group norm of ``(B, C, ...)`` from the mean and variance of each channel.

    The variance of a group is the mean of its channels' variances plus the variance of their means.
    So every reduction runs over the positions of single channels. A compiler keeps it in
    channels_last and fuses it with its neighbors.
    """
    within, mean = torch.var_mean(x.flatten(2), 2, correction=0)  # (B, C)
    between, group_mean = torch.var_mean(mean.unflatten(1, (groups, -1)), 2, correction=0)  # (B, G)
    rstd = torch.rsqrt(within.unflatten(1, (groups, -1)).mean(2) + between + eps)
    repeats = x.shape[1] // groups
    slope = rstd.repeat_interleave(repeats, 1) * weight
    start = bias - group_mean.repeat_interleave(repeats, 1) * slope
    shape = (*slope.shape, *([1] * (x.dim() - 2)))
    return x * slope.reshape(shape) + start.reshape(shape)


def doubled(x: Tensor, height: int, width: int) -> Tensor:
    """Upsample images ``(B, C, H, W)`` by 2 (nearest neighbor), cut to ``height`` and ``width``."""
    if not torch.compiler.is_compiling():
        return nnf.interpolate(x, size=(height, width), mode="nearest")
    # A compiler would move interpolate and its gradient out of channels_last.
    last = x.movedim(1, -1)
    twice = last[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2)
    return twice[:, :height, :width].movedim(-1, 1)


def zeroed(layer: nn.Module) -> nn.Module:
    """Set every parameter of a layer to zero in place, and return it."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def expected_channels(image_channels: int, context: int) -> str:
    """Return the channels that a network takes, for a message."""
    return f"{image_channels} + {context} of context" if context else str(image_channels)


def check_conditions(**sizes: int) -> bool:
    """Check the arguments of a network that describe its condition, 0 for none.

    Returns:
        Whether it takes a condition.

    Raises:
        UserError: one is negative, or there are two.
    """
    for name, size in sizes.items():
        check_whole(name, size, 0)
    given = [name for name, size in sizes.items() if size]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: a network takes one condition; give one of them")
    return bool(given)


def check_given(network: nn.Module, conditional: bool, c: Tensor | None) -> None:
    """Check that a network is called with a condition if and only if it takes one.

    Raises:
        UserError: it is not.
    """
    if conditional and c is None:
        raise UserError(
            f"this {type(network).__name__} takes a condition: bind the model to one,"
            " model.given(c), or call the network as network(x, t, c)"
        )
    if c is not None and not conditional:
        raise UserError(
            f"this {type(network).__name__} takes no condition: give it classes, condition_dims or"
            " condition_channels"
        )


def check_dropout(dropout: float) -> float:
    """Return a dropout probability, or raise :class:`UserError` if it is not in [0, 1)."""
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout}: give a probability in [0, 1)")
    return dropout


def check_outputs(outputs: int | None) -> None:
    """Raise :class:`UserError` unless ``outputs`` is None or at least 1."""
    if outputs is not None and outputs < 1:
        raise UserError(f"outputs={outputs}: give the number of outputs, at least 1, or None")
