r"""The predictor x̂(z, t) of the data: a network with preconditioning.

With z = alpha F(x, t) + sigma eps, the network's output is read as one of

.. math::
    v: \; \hat x = \frac{\alpha z - \sigma \hat v}{\alpha^2 + \sigma^2}, \qquad
    \epsilon: \; \hat x = \frac{z - \sigma \hat\epsilon}{\alpha}, \qquad
    x: \; \hat x = \text{network}(z, t).

The v-form (Salimans & Ho 2022) tends to z as t tends to 0, so errors of the network are scaled by sigma. The eps-form estimates F(x, t)
rather than x once F is not the identity (the network has to make up the difference) and divides by alpha at t = 1. Where the reverse
process is direct, x̂ stands for ŷ, see :mod:`ndm.reverse`.

Data on a grid of L values in [-1, 1] have a finest digit that a network hardly learns to round to: where noise is low, x̂ = z/alpha is a good
answer, and a rounded one is much better. With ``levels`` the network's reading m is rounded softly, at the width that the noise leaves,

.. math::
    \hat x = \sum_k v_k\, \operatorname{softmax}_k\Bigl(-\frac{(m - v_k)^2}{2 s^2} + \bigl(1 - \tfrac{s^2}{\Delta^2}\bigr)_+ \log w_k\Bigr), \qquad
    s = \frac{\sigma}{\alpha}, \qquad v_k = \frac{2k + 1}{L} - 1, \qquad \Delta = \frac{2}{L},

with learned weights w of the values, at first equal. For m = z/alpha and small s it is the posterior mean of a pixel whose values have the frequencies w; once s reaches the
spacing it is m itself (to 1e-7 of it). The grid goes on a little beyond [-1, 1]: that no data lie there is learned.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ndm.errors import UserError
from ndm.schedule import NoiseLevel

Target = Literal["v", "eps", "x"]


class Predictor(nn.Module):
    """x̂(z, t) from any network called as ``network(z, t)``.

    Args:
        network: an ``nn.Module`` that maps ``(B, *event)`` and ``(B,)`` to ``(B, *event)``.
        target: what the network's output means: ``"v"``, ``"eps"`` or ``"x"``.
        levels: round softly to the grid of data with so many levels, as many as the decoder has; None for data that lie on none.
    """

    def __init__(self, network: nn.Module, target: Target = "v", levels: int | None = None):
        super().__init__()
        if target not in get_args(Target):
            raise UserError(f"target={target!r} is not known: choose one of {', '.join(get_args(Target))}")
        if not isinstance(network, nn.Module):
            raise UserError(f"network is a {type(network).__name__}: a predictor needs an nn.Module called as network(z, t)")
        if levels is not None and levels < 2:
            raise UserError(f"levels={levels}: give the number of values of the data, at least 2, or leave it out")
        self.network, self.target, self.levels = network, target, levels
        self.weights = None if levels is None else nn.Parameter(torch.zeros(levels + 2 * _REACH))

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """x̂ for latents ``z`` ``(B, *event)`` at times ``(B,)``; ``(B, *event)`` in the dtype of z."""
        return self.read(self._output(z, level, z.shape), z, level)

    def two(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Both outputs of a network that returns ``(B, 2, *event)``, each read as the target says; each ``(B, *event)``."""
        first, second = self.two_outputs(z, level)
        return self.read(first, z, level), self.read(second, z, level)

    def two_outputs(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Both outputs of such a network as they are; each ``(B, *event)``."""
        first, second = self._output(z, level, torch.Size((z.shape[0], 2, *z.shape[1:]))).unbind(1)
        return first, second

    def _output(self, z: Tensor, level: NoiseLevel, shape: torch.Size) -> Tensor:
        output = self.network(z, level.t)
        if not isinstance(output, torch.Tensor) or output.shape != shape:
            found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            mend = (
                "give it as many output channels as input channels, or wrap a diffusers model in ndm.nn.FromDiffusers"
                if shape == z.shape
                else "for reverse=direct-score give a network of this library outputs=2"
            )
            raise UserError(f"the predictor's network maps {tuple(z.shape)} to {found}; it must return {tuple(shape)}: {mend}")
        return output.to(z.dtype)

    def read(self, output: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """What an output of the network says by the target, ``(B, *event)``."""
        reading = self._read(output, z, level)
        if self.levels is None or self.weights is None:
            return reading
        at = level.expand(z)
        return soft_round(reading, at.sigma / at.alpha, self.levels, _UNIT * self.weights.to(z.dtype))

    def _read(self, output: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        at = level.expand(z)
        if self.target == "v":
            return (at.alpha * z - at.sigma * output) / (at.alpha**2 + at.sigma**2)
        if self.target == "x":
            return output
        if bool((level.alpha == 0).any()):
            raise UserError("eps-prediction divides by alpha, which is 0 at t = 1 of this schedule; use target='v' or 'x'")
        return (z - at.sigma * output) / at.alpha


def soft_round(m: Tensor, scale: Tensor, levels: int, log_weights: Tensor) -> Tensor:
    """The mean of the grid's values near m, weighted by N(m, scale²) and by their own weights; in the shape of ``m``.

    Args:
        m: any values.
        scale: the width s, positive, broadcast to m; at alpha = 0 it may be infinite.
        levels: L; values lie at (2k + 1)/L - 1.
        log_weights: log w of the values k = -5 ... L + 4, ``(L + 10,)``; values beyond have the weight of the last.
    """
    spacing = 2 / levels
    position = (m + 1) / spacing - 0.5  # in units of the spacing: values lie at whole numbers
    nearest = position.detach().round()
    near = torch.arange(-_REACH, _REACH + 1, dtype=m.dtype, device=m.device)
    width = (scale / spacing).clamp(max=1.0)[..., None]
    index = (nearest[..., None] + near + _REACH).clamp(0, len(log_weights) - 1).long()
    logits = -0.5 * (((position - nearest)[..., None] - near) / width) ** 2 + (1 - width**2) * log_weights[index]
    rounded = (nearest + (torch.softmax(logits, dim=-1) * near).sum(-1) + 0.5) * spacing - 1
    return torch.where(scale < spacing, rounded, m)


_REACH = 5  # values to either side of the nearest that are looked at
_UNIT = 5.0  # of the learned log-weights, nats: optimisers step alike in all parameters, and weights range over many powers of ten
