r"""A transformer over image patches, the DiT of Peebles & Xie (2023).

.. math::
    h_0 = W\,\mathrm{patches}(x) + \mathrm{pos}, \qquad
    h \mathrel{+}= g_1 \odot \mathrm{attention}\bigl(\mathrm{norm}(h)(1 + a_1) + b_1\bigr), \qquad
    h \mathrel{+}= g_2 \odot \mathrm{MLP}\bigl(\mathrm{norm}(h)(1 + a_2) + b_2\bigr),

a, b and g are linear in an embedding of time, with zero initial weights, so that every block starts
as the identity. The positions are sines and cosines of row and column, so one network takes images
of any size whose sides are multiples of the patch. Nearly all the work is in matrix products, which
are fast on GPUs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ndm.errors import UserError, check_whole
from ndm.nn.embed import FourierFeatures, TimeEmbedding
from ndm.nn.layers import (
    LayerNorm,
    attend,
    check_conditions,
    check_dropout,
    check_given,
    check_outputs,
    expected_channels,
    zeroed,
)
from ndm.parts import Part


def positions(height: int, width: int, features: int, like: Tensor) -> Tensor:
    """Return sines and cosines of row and column, ``(height * width, features)``.

    Args:
        height: number of rows.
        width: number of columns.
        features: a multiple of 4.
        like: gives dtype and device.
    """
    quarter = features // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=like.dtype, device=like.device) / quarter)
    row, column = (
        torch.arange(size, dtype=like.dtype, device=like.device)[:, None] * omega
        for size in (height, width)
    )
    rows = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(-1, width, -1)
    columns = torch.cat([column.sin(), column.cos()], 1)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, embedding: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_1 = LayerNorm(width, elementwise_affine=False)
        self.norm_2 = LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = zeroed(nn.Linear(embedding, 6 * width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        modulation = self.modulation(time)[:, None]
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation.chunk(6, dim=2)
        qkv = self.qkv(self.norm_1(h) * (1 + scale_1) + shift_1).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = h + gate_1 * self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        inner = nnf.gelu(self.inner(self.norm_2(h) * (1 + scale_2) + shift_2), approximate="tanh")
        return h + gate_2 * self.outer(self.dropout(inner))


class DiT(Part):
    """A transformer f(x, t) over image patches.

    Args:
        image_channels: number of channels C of the image, in and out.
        patch: side of a patch; it must divide height and width.
        width: features per patch; a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: number of attention heads.
        context: number of further input channels, after those of the image, such as those of
            :class:`ndm.CategoricalPredictor`.
        fourier: exponents n of the extra inputs sin(2^n pi x) and cos(2^n pi x).
        max_frequency: fastest frequency of the time embedding, in half-turns per unit of time.
        dropout: dropout probability inside the blocks.
        outputs: K outputs in the shape of x, ``(B, K, C, H, W)``, for
            :class:`ndm.SeparableTransform`; None for one output without that axis.
        classes: number of classes, to take an :class:`ndm.ClassCondition`; 0 for none.
        condition_dims: length of the vector, to take an :class:`ndm.VectorCondition`; 0 for none.
        condition_channels: channels of the image, to take an :class:`ndm.ImageCondition`; 0 for
            none.
        masked: take an :class:`ndm.MaskCondition`.
    """

    def __init__(
        self,
        image_channels: int = 1,
        patch: int = 2,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        context: int = 0,
        fourier: Sequence[int] = (),
        max_frequency: float = 32.0,
        dropout: float = 0.0,
        outputs: int | None = None,
        classes: int = 0,
        condition_dims: int = 0,
        condition_channels: int = 0,
        masked: bool = False,
    ):
        super().__init__()
        check_outputs(outputs)
        self.conditional = check_conditions(
            classes=classes,
            condition_dims=condition_dims,
            condition_channels=condition_channels,
            masked=int(masked),
        )
        self.masked = masked
        check_whole("context", context, 0)
        check_whole("image_channels", image_channels, 1)
        check_whole("patch", patch, 1)
        check_whole("width", width, 1)
        check_whole("depth", depth, 1)
        check_whole("heads", heads, 1)
        if width % 4 or width % heads:
            raise UserError(
                f"width={width}, heads={heads}: width must be a multiple of 4 and of heads"
            )
        self.image_channels, self.context, self.outputs = image_channels, context, outputs
        self.patch, self.width, self.depth, self.heads = patch, width, depth, heads
        self.fourier, self.max_frequency = list(fourier), max_frequency
        self.classes, self.condition_dims = classes, condition_dims
        self.condition_channels = condition_channels
        self.dropout = check_dropout(dropout)
        self.features = FourierFeatures(fourier)
        self.time = TimeEmbedding(
            width, max_frequency=max_frequency, classes=classes, condition_dims=condition_dims
        )
        channels = image_channels * self.features.multiple() + context
        channels += condition_channels + 1 if condition_channels else 2 * image_channels * masked
        self.first = nn.Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(_Block(width, heads, width, dropout) for _ in range(depth))
        self.norm = LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.last = nn.Linear(width, image_channels * (outputs or 1) * patch**2)

    def zero_output(self) -> None:
        """Set the last layer to zero, so that the network starts at f = 0."""
        zeroed(self.last)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """Map ``(B, C + context, H, W)`` and times ``(B,)`` to ``(B, C, H, W)``.

        The condition ``c`` is that of :mod:`ndm.condition`; images join the inputs.
        """
        self._check(x)
        check_given(self, self.conditional, c)
        image, context = x[:, : self.image_channels], x[:, self.image_channels :]
        inputs = self.features(image)
        if self.context:
            inputs = torch.cat([inputs, context], 1)
        of_image = self.condition_channels > 0 or self.masked
        if of_image and c is not None:
            inputs = torch.cat([inputs, c], 1)
        rows, columns, side = x.shape[2] // self.patch, x.shape[3] // self.patch, self.patch
        # (B, channels, rows, side, columns, side)
        patches = inputs.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        h = self.first(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        h = h + positions(rows, columns, self.width, h)
        time = self.time(t, None if self.condition_channels or self.masked else c)
        for block in self.blocks:
            h = block(h, time)
        scale, shift = self.modulation(time)[:, None].chunk(2, dim=2)
        out = self.last(self.norm(h) * (1 + scale) + shift)
        out = out.unflatten(2, (-1, side, side)).unflatten(1, (rows, columns))
        out = out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        if self.outputs is None:
            return out
        return out.unflatten(1, (self.outputs, self.image_channels))

    def _check(self, x: Tensor) -> None:
        channels = self.image_channels + self.context
        is_image = x.dim() == 4 and x.shape[1] == channels
        if not is_image or x.shape[2] % self.patch or x.shape[3] % self.patch:
            expected = expected_channels(self.image_channels, self.context)
            raise UserError(
                f"the transformer takes images (B, {expected}, H, W) whose sides are multiples of"
                f" {self.patch}, got a batch of shape {tuple(x.shape)}; set image_channels and"
                " patch to fit the data"
            )
