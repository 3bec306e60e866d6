r"""A U-Net for images ``(B, C, H, W)`` of any size, with residual blocks modulated by time.

.. math::
    \text{block: } h + \mathrm{conv}\,\mathrm{SiLU}\bigl(
        \mathrm{norm}(\mathrm{conv}\,\mathrm{SiLU}\,\mathrm{norm}(h))(1 + a(t)) + b(t)\bigr)

Each stage after the first halves height and width (rounding up) and may change the number of
channels. The way up concatenates the activations of the way down. Attention and Fourier input
features are optional. Convolutions run in channels_last, the faster format on CPUs and on GPUs with
tensor cores.
"""

import functools
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from ndm.errors import UserError, check_choice, check_whole
from ndm.nn.embed import FourierFeatures, TimeEmbedding
from ndm.nn.fused import norm_silu
from ndm.nn.layers import (
    Attention,
    Norm,
    check_conditions,
    check_dropout,
    check_given,
    check_outputs,
    doubled,
    expected_channels,
    make_norm,
    zeroed,
)
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
        image_channels: number of channels C of the image, in and out.
        channels: width of the first stage.
        multiples: width of each stage in multiples of ``channels``, one for each stage.
        blocks: residual blocks per stage on the way down; the way up has one more.
        attention: whether the blocks of each stage have self-attention, or one value for all
            stages; the middle has it if any stage has.
        fourier: exponents n of the extra inputs sin(2^n pi x) and cos(2^n pi x).
        max_frequency: fastest frequency of the time embedding, in half-turns per unit of time.
        dropout: dropout probability inside the blocks.
        outputs: K outputs in the shape of x, ``(B, K, C, H, W)``, for
            :class:`ndm.SeparableTransform`; None for one output without that axis.
        context: number of further input channels, after those of the image, such as those of
            :class:`ndm.CategoricalPredictor`; they have no Fourier features.
        norm: ``group`` for group norm, ``channel`` for :class:`ndm.nn.layers.ChannelNorm`, which is
            faster on GPUs.
        attention_head_dim: channels per attention head; a stage whose channels it does not divide
            has one head.
        classes: number of classes, to take an :class:`ndm.ClassCondition`; 0 for none.
        condition_dims: length of the vector, to take an :class:`ndm.VectorCondition`; 0 for none.
        condition_channels: channels of the image, to take an :class:`ndm.ImageCondition`; 0 for
            none.
        masked: take an :class:`ndm.MaskCondition`.
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
        check_choice("norm", norm, get_args(Norm))
        check_whole("attention_head_dim", attention_head_dim, 1)
        stages = len(multiples)
        attend = [attention] * stages if isinstance(attention, bool) else list(attention)
        least = min(image_channels, channels, blocks, stages, *multiples)
        if least < 1 or context < 0 or len(attend) != stages:
            raise UserError(
                f"image_channels={image_channels}, context={context}, channels={channels},"
                f" multiples={list(multiples)}, blocks={blocks}, attention={attention}: need"
                " positive numbers (context may be 0), and as many attention flags as multiples"
            )
        self.image_channels, self.context, self.outputs = image_channels, context, outputs
        self.channels, self.multiples, self.blocks = channels, list(multiples), blocks
        self.attention = attention if isinstance(attention, bool) else attend
        self.norm, self.attention_head_dim = norm, attention_head_dim
        self.fourier, self.max_frequency = list(fourier), max_frequency
        self.classes, self.condition_dims = classes, condition_dims
        self.condition_channels = condition_channels
        self.dropout = check_dropout(dropout)
        self.features = FourierFeatures(fourier)
        embedding = 4 * channels
        block = functools.partial(
            _Block, embedding=embedding, dropout=dropout, norm=norm, head_dim=attention_head_dim
        )
        self.time = TimeEmbedding(
            embedding, max_frequency=max_frequency, classes=classes, condition_dims=condition_dims
        )
        inputs = image_channels * self.features.multiple() + context
        inputs += condition_channels + 1 if condition_channels else 2 * image_channels * masked
        self.first = nn.Conv2d(inputs, channels, 3, padding=1)
        width = self._add_stages(block, attend)
        self.last_norm = make_norm(norm, width)
        self.last = nn.Conv2d(width, image_channels * (outputs or 1), 3, padding=1)
        self.register_buffer("one", torch.ones(()), persistent=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _add_stages(self, block: Callable[[int, int, bool], _Block], attend: list[bool]) -> int:
        """Build the way down, the middle and the way up, and return the final width."""
        stages = [
            (self.channels * multiple, flag)
            for multiple, flag in zip(self.multiples, attend, strict=True)
        ]
        width, skips = self.channels, [self.channels]
        self.down = nn.ModuleList()
        for stage, (stage_width, flag) in enumerate(stages):
            if stage:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
            for _ in range(self.blocks):
                self.down.append(block(width, stage_width, flag))
                width = stage_width
                skips.append(width)
        self.middle = nn.ModuleList([block(width, width, any(attend)), block(width, width, False)])
        self.up = nn.ModuleList()
        for stage, (stage_width, flag) in reversed(list(enumerate(stages))):
            for _ in range(self.blocks + 1):
                self.up.append(block(width + skips.pop(), stage_width, flag))
                width = stage_width
            if stage:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        return width

    def zero_output(self) -> None:
        """Set the last layer to zero, so that the network starts at f = 0."""
        zeroed(self.last)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """Map ``(B, C + context, H, W)`` and times ``(B,)`` to ``(B, C, H, W)``.

        The condition ``c`` is that of :mod:`ndm.condition`; images join the inputs.
        """
        self._check(x)
        check_given(self, self.conditional, c)
        time = self.time(t, None if self.condition_channels or self.masked else c)
        if self.context:
            image, context = x[:, : self.image_channels], x[:, self.image_channels :]
            inputs = torch.cat([self.features(image), context], 1)
        else:
            inputs = self.features(x)
        of_image = self.condition_channels > 0 or self.masked
        if of_image and c is not None:
            inputs = torch.cat([inputs, c], 1)
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
                    # Otherwise the gradient of h is a slice of that of the concatenation, which
                    # every convolution would copy.
                    h = h * self.one
                h = module(torch.cat([h, skips.pop()], dim=1), time)
            else:
                h = module(doubled(h, *skips[-1].shape[-2:]))
        out = self.last(norm_silu(self.last_norm, h))
        if self.outputs is None:
            return out
        return out.unflatten(1, (self.outputs, self.image_channels))

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.image_channels + self.context:
            expected = expected_channels(self.image_channels, self.context)
            raise UserError(
                f"the U-Net takes images (B, {expected}, H, W), got a batch of shape"
                f" {tuple(x.shape)}; set image_channels to fit the data, and context to 0, or to"
                " image_channels * embedding + histogram in an ndm.CategoricalPredictor"
            )
