r"""Layers of the networks.

.. math::
    \text{attention: } x + W_o\, \mathrm{softmax}\bigl(q k^\top / \sqrt{d}\bigr) v, \qquad (q, k, v) = W\, \mathrm{norm}(x)
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ndm.errors import UserError
from ndm.nesting import NOTHING, RULES, nesting


def group_norm(channels: int, group_channels: int = 8) -> nn.GroupNorm:
    """Group normalisation of ``(B, C, ...)`` with at most ``group_channels`` channels a group, and as many as divide C evenly."""
    size = next(size for size in range(min(group_channels, channels), 0, -1) if channels % size == 0)
    return nn.GroupNorm(channels // size, channels)


class Attention(nn.Module):
    """Residual self-attention over the positions of an image ``(B, C, H, W)``.

    Args:
        channels: C.
        head_channels: wanted channels of a head; must divide C, or C is one head.
    """

    def __init__(self, channels: int, head_channels: int = 32):
        super().__init__()
        self.heads = channels // head_channels if channels % head_channels == 0 else 1
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        batch, channels, height, width = x.shape
        qkv = (
            self.qkv(normal(x, self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps).to(x.dtype))
            .flatten(2)
            .unflatten(1, (3, self.heads, channels // self.heads))
        )
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = _attend(q, k, v).transpose(-1, -2).reshape(batch, channels, height, width)
        return x + self.out(mixed)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; on CPUs in float32, where PyTorch's attention in half precision is the slower one."""
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
    # PyTorch's kernel for channels_last has no forward derivative, and its backward pass crashes where x wants no gradient. Within torch.func no x
    # says that it wants one.
    if not RULES.get() and not x.requires_grad and (torch.is_grad_enabled() or nesting() != NOTHING):
        x = x.contiguous()
    return nnf.group_norm(widened(x), groups, widened(weight), widened(bias), eps)


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
        raise UserError(f"outputs={outputs}: give the number of outputs in the shape of x, at least 1, or leave it out")
