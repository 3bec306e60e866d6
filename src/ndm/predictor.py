r"""The predictor x̂(z, t) of the data: a network with preconditioning.

With z = alpha F(x, t) + sigma eps, the network's output is one of

.. math::
    v: \; \hat x = \frac{\alpha z - \sigma \hat v}{\alpha^2 + \sigma^2}, \qquad
    \epsilon: \; \hat x = \frac{z - \sigma \hat\epsilon}{\alpha}, \qquad
    x: \; \hat x = \text{network}(z, t).

The v-form (Salimans & Ho 2022) tends to z as t tends to 0, so the network's errors are scaled by
sigma. The eps-form divides by alpha at t = 1. It estimates F(x, t) rather than x, so the network
has to make up the difference unless F is the identity. For a direct reverse process the predictor
returns ŷ instead of x̂, see :mod:`ndm.reverse`.

With ``learned_variance`` a second output w estimates the variance of the prediction's error,

.. math::
    s^2(z, t) = \frac{\sigma^2}{\alpha^2 + \sigma^2}\, e^{w} \approx E[(x - \hat x)^2 | z] ,

for the reverse variance of a process in discrete time, see :mod:`ndm.elbo`.

For data on a grid of L values, :class:`ndm.RoundingPredictor` rounds the prediction at low noise.
"""

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ndm.decoder import Decoder
from ndm.errors import UserError, check_choice
from ndm.forward import NoisingProcess
from ndm.parts import Conditional, check_network, describe_output, masked
from ndm.schedule import NoiseLevel
from ndm.shapes import expand

Target = Literal["v", "eps", "x"]


class DataPredictor(Conditional, ABC):
    """The base class of predictors x̂(z, t)."""

    takes_masks: bool = True
    """Whether it can predict some dimensions given others, :class:`ndm.MaskCondition`."""
    learned_variance: bool = False
    """Whether :meth:`with_variance` estimates a variance."""

    @abstractmethod
    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Return x̂ for ``z`` ``(B, *event)`` at times ``(B,)``, in the shape and dtype of z."""

    def with_variance(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor | None]:
        """Return x̂ and the variance s² of its error, ``(B, *event)``, or None if it has none."""
        return self(z, level), None

    def check(self, process: NoisingProcess, decoder: Decoder, reverse: str) -> None:
        """Check that the predictor fits the other parts of a model.

        Args:
            process: the forward process.
            decoder: p(x|z_0).
            reverse: kind of the reverse process, see :mod:`ndm.reverse`.

        Raises:
            UserError: it does not.
        """
        if reverse == "direct-score" and not isinstance(self, Predictor):
            raise UserError(
                f"reverse=direct-score needs two outputs, but {type(self).__name__} has one: use"
                " ndm.Predictor"
            )


class Predictor(DataPredictor):
    """A predictor x̂(z, t) from any network called as ``network(z, t)``.

    Args:
        network: an ``nn.Module`` that maps ``(B, *event)`` and ``(B,)`` to ``(B, *event)``.
        target: what the network predicts: ``"v"``, ``"eps"`` or ``"x"``.
        learned_variance: the network has a second output, for the reverse variance in discrete
            time; it returns ``(B, 2, *event)``.
    """

    def __init__(self, network: nn.Module, target: Target = "v", learned_variance: bool = False):
        super().__init__()
        check_choice("target", target, get_args(Target))
        check_network(network, "a predictor", "network(z, t)")
        self.network, self.target, self.learned_variance = network, target, learned_variance

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        if self.learned_variance:
            return self.with_variance(z, level)[0]
        return self.with_known(self.read(self._output(z, level, z.shape), z, level))

    def with_variance(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor | None]:
        if not self.learned_variance:
            return self(z, level), None
        output, log_factor = self.two_outputs(z, level)
        share = expand(torch.sigmoid(level.gamma), z)  # sigma²/(alpha² + sigma²)
        return self.with_known(self.read(output, z, level)), share * torch.exp(
            log_factor.clamp(-20, 20)
        )

    def check(self, process: NoisingProcess, decoder: Decoder, reverse: str) -> None:
        super().check(process, decoder, reverse)
        if self.learned_variance and reverse == "direct-score":
            raise UserError(
                "learned_variance does not go with reverse=direct-score, which needs the second"
                " output of the network; use reverse=direct or tied"
            )
        if self.target != "eps":
            return
        end = process.schedule(torch.ones(1, device=_device(process)))
        if bool((end.alpha == 0).any()):
            raise UserError(
                "eps-prediction divides by alpha, which is 0 at t = 1 of this schedule; use"
                " target='v' or 'x'"
            )

    def two(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return both predictions, each ``(B, *event)``, of a network with two outputs.

        The network returns ``(B, 2, *event)``.
        """
        first, second = self.two_outputs(z, level)
        first, second = self.read(first, z, level), self.read(second, z, level)
        return self.with_known(first), self.with_known(second)

    def two_outputs(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return both outputs of such a network, each ``(B, *event)``, before :meth:`read`."""
        first, second = self._output(z, level, torch.Size((z.shape[0], 2, *z.shape[1:]))).unbind(1)
        return first, second

    def _output(self, z: Tensor, level: NoiseLevel, shape: torch.Size) -> Tensor:
        output = self.call(masked(z, self.missing), level.t)
        if not isinstance(output, Tensor) or output.shape != shape:
            found = describe_output(output)
            advice = (
                "for reverse=direct-score or learned_variance give a network of this library"
                " outputs=2"
            )
            if shape == z.shape:
                advice = (
                    "give it as many output channels as input channels, or wrap a diffusers model"
                    " in ndm.nn.FromDiffusers"
                )
            raise UserError(
                f"the predictor's network maps {tuple(z.shape)} to {found}; it must return"
                f" {tuple(shape)}: {advice}"
            )
        return output.to(z.dtype)

    def read(self, output: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """Convert the network's output to x̂ according to the target; ``(B, *event)``."""
        at = level.expand(z)
        if self.target == "v":
            return (at.alpha * z - at.sigma * output) / (at.alpha**2 + at.sigma**2)
        if self.target == "x":
            return output
        return (z - at.sigma * output) / at.alpha


def _device(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)
