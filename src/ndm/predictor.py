r"""The predictor x̂(z, t) of the data: a network with preconditioning.

With z = alpha F(x, t) + sigma eps, the network's output is read as one of

.. math::
    v: \; \hat x = \frac{\alpha z - \sigma \hat v}{\alpha^2 + \sigma^2}, \qquad
    \epsilon: \; \hat x = \frac{z - \sigma \hat\epsilon}{\alpha}, \qquad
    x: \; \hat x = \text{network}(z, t).

The v-form (Salimans & Ho 2022) tends to z as t tends to 0, so errors of the network are scaled by
sigma. The eps-form estimates F(x, t) rather than x once F is not the identity (the network has to
make up the difference) and divides by alpha at t = 1. Where the reverse process is direct, x̂
stands for ŷ, see :mod:`ndm.reverse`.

For data on a grid of L values :class:`ndm.RoundingPredictor` rounds what is read where noise is low.
"""

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ndm.decoder import Decoder
from ndm.errors import UserError, check_choice
from ndm.forward import NoisingProcess
from ndm.parts import Part, check_network
from ndm.schedule import NoiseLevel

Target = Literal["v", "eps", "x"]


class DataPredictor(Part, ABC):
    """x̂(z, t), by whatever means: the base class for predictors of your own."""

    @abstractmethod
    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """x̂ for latents ``z`` ``(B, *event)`` at times ``(B,)``; ``(B, *event)`` in the dtype of
        z.
        """

    def check(self, process: NoisingProcess, decoder: Decoder, reverse: str) -> None:
        """Check that the predictor fits the other parts of a model.

        Args:
            process: the forward process.
            decoder: p(x|z_0).
            reverse: the kind of the reverse process, see :mod:`ndm.reverse`.

        Raises:
            UserError: it does not.
        """
        if reverse == "direct-score" and not isinstance(self, Predictor):
            raise UserError(
                f"reverse=direct-score needs two outputs, which a {type(self).__name__} does not"
                " have: use ndm.Predictor"
            )


class Predictor(DataPredictor):
    """x̂(z, t) from any network called as ``network(z, t)``.

    Args:
        network: an ``nn.Module`` that maps ``(B, *event)`` and ``(B,)`` to ``(B, *event)``.
        target: what the network's output means: ``"v"``, ``"eps"`` or ``"x"``.
    """

    def __init__(self, network: nn.Module, target: Target = "v"):
        super().__init__()
        check_choice("target", target, get_args(Target))
        check_network(network, "a predictor", "network(z, t)")
        self.network, self.target = network, target

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        return self.read(self._output(z, level, z.shape), z, level)

    def check(self, process: NoisingProcess, decoder: Decoder, reverse: str) -> None:
        super().check(process, decoder, reverse)
        if self.target == "eps" and bool(
            (process.schedule(torch.ones(1, device=_device(process))).alpha == 0).any()
        ):
            raise UserError(
                "eps-prediction divides by alpha, which is 0 at t = 1 of this schedule; use"
                " target='v' or 'x'"
            )

    def two(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Both outputs of a network that returns ``(B, 2, *event)``, each read as the target says;
        each ``(B, *event)``.
        """
        first, second = self.two_outputs(z, level)
        return self.read(first, z, level), self.read(second, z, level)

    def two_outputs(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Both outputs of such a network as they are; each ``(B, *event)``."""
        first, second = self._output(z, level, torch.Size((z.shape[0], 2, *z.shape[1:]))).unbind(1)
        return first, second

    def _output(self, z: Tensor, level: NoiseLevel, shape: torch.Size) -> Tensor:
        output = self.network(z, level.t)
        if not isinstance(output, torch.Tensor) or output.shape != shape:
            found = (
                tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            )
            mend = (
                "give it as many output channels as input channels, or wrap a diffusers model in"
                " ndm.nn.FromDiffusers"
                if shape == z.shape
                else "for reverse=direct-score give a network of this library outputs=2"
            )
            raise UserError(
                f"the predictor's network maps {tuple(z.shape)} to {found}; it must return"
                f" {tuple(shape)}: {mend}"
            )
        return output.to(z.dtype)

    def read(self, output: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """What an output of the network says by the target, ``(B, *event)``."""
        at = level.expand(z)
        if self.target == "v":
            return (at.alpha * z - at.sigma * output) / (at.alpha**2 + at.sigma**2)
        if self.target == "x":
            return output
        return (z - at.sigma * output) / at.alpha


def _device(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)
