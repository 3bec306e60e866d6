r"""A U-Net for images ``(B, C, H, W)`` of any size: residual blocks modulated by time, optional
attention and Fourier input features.

.. math::
    \text{block: } h + \mathrm{conv}\,\mathrm{SiLU}\bigl(\mathrm{norm}(\mathrm{conv}\,\mathrm{SiLU}\,\mathrm{norm}(h))(1 + a(t)) + b(t)\bigr)

Each stage halves height and width (rounding up) and may widen the channels; the way up meets the
way down by concatenation. Convolutions run in channels_last, the faster format on CPUs and on GPUs
with tensor cores.
"""

import functools
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from ndm.errors import UserError, check_choice, check_whole
from ndm.nn.embed import FourierFeatures, TimeEmbedding
from ndm.nn.fused import norm_silu
from ndm.nn.layers import Attention, Norm, check_dropout, check_outputs, doubled, make_norm, zeroed
from ndm.parts import Part


class _Block(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        attention: bool,
        embedding: int,
        dropout: float,
        norm: Norm,
        head_dim: int,
    ):
        super().__init__()
        self.norm_1, self.norm_2 = make_norm(norm, inputs), make_norm(norm, outputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv_2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs, head_dim, norm) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation(time).chunk(2, dim=1)
        h = self.conv_1(norm_silu(self.norm_1, x))
        h = norm_silu(self.norm_2, h, scale, shift)
        return self.attention(self.skip(x) + self.conv_2(self.dropout(h)))


class UNet(Part):
    """A U-Net f(x, t) for images.

    Args:
        image_channels: channels C of the image, in and out.
        context: further channels that come in after those of the image, such as those of
            :class:`ndm.CategoricalPredictor`; no Fourier features of them.
        channels: width of the first stage.
        multiples: width of each stage in multiples of ``channels``; its length is the number of
            stages.
        blocks: residual blocks a stage on the way down; one more on the way up.
        attention: whether each stage has self-attention after its blocks, or one answer for all;
            the middle has it if any has.
        fourier: exponents n of the extra inputs sin(2^n pi x) and cos(2^n pi x).
        max_frequency: fastest frequency of the time embedding, in half-turns per unit of time.
        dropout: dropout probability inside the blocks.
        outputs: K outputs in the shape of x, ``(B, K, C, H, W)``, for
            :class:`ndm.SeparableTransform`; None for one without that axis.
        attention_head_dim: channels of a head of the attention; where it does not divide the
            channels of a stage, they are one head.
        norm: ``group`` for group norm, ``channel`` for :class:`ndm.nn.ChannelNorm`, which takes
            less time on GPUs.
    """

    def __init__(
        self,
        image_channels: int = 1,
        channels: int = 32,
        multiples: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: bool | Sequence[bool] = False,
        fourier: Sequence[int] = (),
        max_frequency: float = 32.0,
        dropout: float = 0.0,
        outputs: int | None = None,
        context: int = 0,
        norm: Norm = "group",
        attention_head_dim: int = 32,
    ):
        super().__init__()
        check_outputs(outputs)
        check_choice("norm", norm, get_args(Norm))
        check_whole("attention_head_dim", attention_head_dim, 1)
        self.norm, self.attention_head_dim = norm, attention_head_dim
        self.outputs, stages = outputs, len(multiples)
        self.attention = attention if isinstance(attention, bool) else list(attention)
        attend = [attention] * stages if isinstance(attention, bool) else list(attention)
        if (
            image_channels < 1
            or context < 0
            or channels < 1
            or blocks < 1
            or stages < 1
            or min(multiples) < 1
            or len(attend) != stages
        ):
            raise UserError(
                f"image_channels={image_channels}, context={context}, channels={channels},"
                f" multiples={list(multiples)}, blocks={blocks}, attention={attention}: need"
                " positive numbers (context may be 0), and as many attention flags as multiples"
            )
        self.image_channels, self.context, self.channels = image_channels, context, channels
        self.blocks, self.max_frequency = blocks, max_frequency
        self.multiples, self.fourier, self.dropout = (
            list(multiples),
            list(fourier),
            check_dropout(dropout),
        )
        self.features = FourierFeatures(fourier)
        embedding = 4 * channels
        block = functools.partial(
            _Block, embedding=embedding, dropout=dropout, norm=norm, head_dim=attention_head_dim
        )
        self.time = TimeEmbedding(embedding, max_frequency=max_frequency)
        self.first = nn.Conv2d(
            image_channels * self.features.multiple() + context, channels, 3, padding=1
        )

        width, skips = channels, [channels]
        self.down = nn.ModuleList()
        for stage, multiple in enumerate(multiples):
            if stage:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
            for _ in range(blocks):
                self.down.append(block(width, channels * multiple, attend[stage]))
                width = channels * multiple
                skips.append(width)
        self.middle = nn.ModuleList([block(width, width, any(attend)), block(width, width, False)])
        self.up = nn.ModuleList()
        for stage, multiple in reversed(list(enumerate(multiples))):
            for _ in range(blocks + 1):
                self.up.append(block(width + skips.pop(), channels * multiple, attend[stage]))
                width = channels * multiple
            if stage:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.last_norm, self.last = (
            make_norm(norm, width),
            nn.Conv2d(width, image_channels * (outputs or 1), 3, padding=1),
        )
        self.register_buffer("one", torch.ones(()), persistent=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def zero_output(self) -> None:
        """Set the last layer to zero, so that the network starts at f = 0."""
        zeroed(self.last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``(B, C, H, W)`` and ``(B,)`` to ``(B, C, H, W)``; with context, x is ``(B, C + context,
        H, W)``.
        """
        if x.dim() != 4 or x.shape[1] != self.image_channels + self.context:
            wanted = (
                self.image_channels
                if not self.context
                else f"{self.image_channels} + {self.context} of context"
            )
            raise UserError(
                f"the U-Net takes images (B, {wanted}, H, W), got a batch of shape"
                f" {tuple(x.shape)}; set image_channels to fit the data, and context to 0, or to"
                " image_channels * embedding + histogram in an ndm.CategoricalPredictor"
            )
        time = self.time(t)
        inputs = (
            torch.cat([self.features(x[:, : self.image_channels]), x[:, self.image_channels :]], 1)
            if self.context
            else self.features(x)
        )
        h = self.first(inputs.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for module in self.down:
            h = module(h, time) if isinstance(module, _Block) else module(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, time)
        for module in self.up:
            if isinstance(module, _Block):
                if torch.compiler.is_compiling():
                    h = (
                        h * self.one
                    )  # or its gradient would be a part of that of both, which every convolution would copy
                h = module(torch.cat([h, skips.pop()], dim=1), time)
            else:
                h = module(doubled(h, *skips[-1].shape[-2:]))
        out = self.last(norm_silu(self.last_norm, h))
        return (
            out if self.outputs is None else out.unflatten(1, (self.outputs, self.image_channels))
        )
