r"""Networks between data and latents of another shape, without time.

.. math::
    \text{Dense: } y = W_L\, \mathrm{SiLU}(\dots \mathrm{SiLU}(W_0 x)), \qquad
    \text{convolutions: } h_{l+1} = \mathrm{SiLU}\, \mathrm{norm}(\mathrm{conv}(h_l)) .

The convolutions halve or double height and width. The networks are made for :class:`ndm.Encoder`
and :class:`ndm.NetworkDecoder`.
"""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from ndm.errors import UserError, check_whole
from ndm.nn.layers import group_norm
from ndm.parts import Part


class Dense(Part):
    """A multilayer perceptron from events of one shape to events of another.

    Args:
        inputs: shape of an input event.
        outputs: shape of an output event.
        hidden: width of the hidden layers.
        layers: number of hidden layers; 0 is an affine map.
    """

    def __init__(
        self, inputs: Sequence[int], outputs: Sequence[int], hidden: int = 128, layers: int = 2
    ):
        super().__init__()
        check_whole("hidden", hidden, 1)
        check_whole("layers", layers, 0)
        for name, shape in (("inputs", inputs), ("outputs", outputs)):
            if not all(isinstance(size, int) and size >= 1 for size in shape):
                raise UserError(
                    f"{name}={list(shape)}: give the shape of an event, such as [1, 8, 8]"
                )
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.hidden, self.layers = hidden, layers
        widths = [math.prod(self.inputs), *([hidden] * layers), math.prod(self.outputs)]
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            parts += [nn.Linear(before, after), nn.SiLU()]
        self.net = nn.Sequential(*parts[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, *inputs)`` to ``(B, *outputs)``."""
        if list(x.shape[1:]) != self.inputs:
            raise UserError(
                f"Dense takes events of shape {tuple(self.inputs)}, got a batch of shape"
                f" {tuple(x.shape)}; set inputs to fit"
            )
        return self.net(x.reshape(x.shape[0], -1)).reshape(x.shape[0], *self.outputs)


def _layer(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), group_norm(outputs), nn.SiLU()]


def _check_sizes(image_channels: int, latent_channels: int, channels: int, halvings: int) -> None:
    check_whole("image_channels", image_channels, 1)
    check_whole("latent_channels", latent_channels, 1)
    check_whole("channels", channels, 1)
    check_whole("halvings", halvings, 0)


class ConvEncoder(Part):
    """Strided convolutions from images ``(B, C, H, W)`` to ``(B, latent_channels, H/2^n, W/2^n)``.

    Args:
        image_channels: C.
        latent_channels: channels of the latents.
        channels: width of the first layer; it doubles with each halving.
        halvings: n, the number of times that height and width are halved; 2^n must divide both.
    """

    def __init__(
        self,
        image_channels: int = 1,
        latent_channels: int = 4,
        channels: int = 32,
        halvings: int = 2,
    ):
        super().__init__()
        _check_sizes(image_channels, latent_channels, channels, halvings)
        self.image_channels, self.latent_channels = image_channels, latent_channels
        self.channels, self.halvings = channels, halvings
        parts = _layer(image_channels, channels)
        for index in range(halvings):
            parts += _layer(channels * 2**index, channels * 2 ** (index + 1), stride=2)
        self.net = nn.Sequential(
            *parts, nn.Conv2d(channels * 2**halvings, latent_channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, latent_channels, H/2^n, W/2^n)``."""
        block = 2**self.halvings
        is_image = x.dim() == 4 and x.shape[1] == self.image_channels
        if not is_image or x.shape[2] % block or x.shape[3] % block:
            raise UserError(
                f"the encoder takes images (B, {self.image_channels}, H, W) whose sides are"
                f" multiples of {block}, got a batch of shape {tuple(x.shape)}; set image_channels"
                " and halvings to fit"
            )
        return self.net(x)


class ConvDecoder(Part):
    """Convolutions and nearest-neighbor upsampling, the counterpart of :class:`ConvEncoder`.

    They map ``(B, latent_channels, h, w)`` to ``(B, C, 2^n h, 2^n w)``.

    Args:
        image_channels: C.
        latent_channels: channels of the latents.
        channels: width of the last layer; it doubles toward the latents.
        halvings: n, as in the encoder.
    """

    def __init__(
        self,
        image_channels: int = 1,
        latent_channels: int = 4,
        channels: int = 32,
        halvings: int = 2,
    ):
        super().__init__()
        _check_sizes(image_channels, latent_channels, channels, halvings)
        self.image_channels, self.latent_channels = image_channels, latent_channels
        self.channels, self.halvings = channels, halvings
        parts = _layer(latent_channels, channels * 2**halvings)
        for index in reversed(range(halvings)):
            parts.append(nn.Upsample(scale_factor=2.0))
            parts += _layer(channels * 2 ** (index + 1), channels * 2**index)
        self.net = nn.Sequential(*parts, nn.Conv2d(channels, image_channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        """Map ``(B, latent_channels, h, w)`` to ``(B, C, 2^n h, 2^n w)``."""
        if z.dim() != 4 or z.shape[1] != self.latent_channels:
            raise UserError(
                f"the decoder takes latents (B, {self.latent_channels}, h, w), got a batch of shape"
                f" {tuple(z.shape)}; set latent_channels to fit"
            )
        return self.net(z)
