r"""Layers that forward-mode differentiation can pass, in either memory format.

:class:`GroupNorm` is torch's fused group norm in a plain pass, and its plain formula inside :func:`ndm.ops.time_derivative`, where the
fused one fails on channels_last input. :class:`Attention` calls ``scaled_dot_product_attention``, fused in a plain pass; :func:`ndm.ops.time_derivative` switches
it to its plain formula.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ndm.errors import UserError
from ndm.ops import in_forward_mode


class GroupNorm(nn.Module):
    """Group normalisation over channel groups and all positions, with a learned scale and shift per channel.

    Args:
        channels: number of channels C of ``(B, C, ...)``.
        group_channels: wanted channels in a group; the largest divisor of C not above it is used.
    """

    def __init__(self, channels: int, group_channels: int = 8):
        super().__init__()
        self.groups = next(channels // size for size in range(min(group_channels, channels), 0, -1) if channels % size == 0)
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Normalise ``(B, C, ...)``, then multiply by 1 + ``scale`` and add ``shift``, each ``(B, C)``.

        Under forward mode this is one multiplication and one addition an element: normalisation, weight and modulation are folded
        into a factor and an offset for each example and channel first.
        """
        if not in_forward_mode():
            normal = nnf.group_norm(x, self.groups, self.weight, self.bias, eps=1e-5)
            if scale is None or shift is None:
                return normal
            return torch.addcmul(expand_channels(shift, x), normal, expand_channels(1 + scale, x)).to(normal.dtype)
        grouped = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).unflatten(1, (self.groups, -1))
        dims = list(range(2, grouped.dim()))
        mean = grouped.mean(dims)
        variance = (grouped * grouped).mean(dims) - mean * mean
        inverse = torch.rsqrt(variance.clamp(min=0) + 1e-5)
        size = x.shape[1] // self.groups
        factor = inverse.repeat_interleave(size, 1) * self.weight
        offset = self.bias - mean.repeat_interleave(size, 1) * factor
        if scale is not None and shift is not None:
            factor, offset = factor * (1 + scale), offset * (1 + scale) + shift
        return (x * expand_channels(factor, x) + expand_channels(offset, x)).to(x.dtype)


def expand_channels(value: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B, C)`` to ``(B, C, 1, ..., 1)``, so that it broadcasts against ``like`` ``(B, C, ...)``."""
    return value.reshape(*value.shape, *([1] * (like.dim() - 2)))


class Attention(nn.Module):
    """Residual self-attention over the positions of an image ``(B, C, H, W)``.

    Args:
        channels: C.
        head_channels: wanted channels of a head; must divide C, or C is one head.
    """

    def __init__(self, channels: int, head_channels: int = 32):
        super().__init__()
        self.heads = channels // head_channels if channels % head_channels == 0 else 1
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, channels // self.heads))
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = nnf.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, channels, height, width)
        return x + self.out(mixed)


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
