r"""Rounding a prediction to the grid of the data, as softly as the noise demands.

Networks rarely learn to round to the grid of the data. Where noise is low, x̂ = z/alpha is a good
prediction, and a rounded one is much better. With L values in [-1, 1], a prediction m is rounded at
the width s that the noise leaves,

.. math::
    \hat x_i = \sum_k v_k\, \operatorname{softmax}_k\Bigl(-\frac{(m_i - v_k)^2}{2 s^2} + \bigl(1 - \tfrac{s^2}{\Delta^2}\bigr) \log w_k\Bigr), \qquad
    s = \frac{\sigma}{\alpha} < \Delta, \qquad v_k = \frac{2k + 1}{L} - 1, \qquad \Delta = \frac{2}{L},

with learned weights w of the values, at first equal; once s reaches the spacing, x̂ is m itself
(which the formula tends to, to 1e-7 of the spacing). For m = z/alpha and small s, x̂ is the
posterior mean of a number whose values have the frequencies w. The grid goes on a little beyond
[-1, 1]: that no data lie there is learned. :class:`ndm.CategoricalPredictor` weighs values by what
the rest of the example says, too.
"""

import torch
from torch import Tensor, nn

from ndm.decoder import Decoder, bin_centers
from ndm.errors import UserError
from ndm.forward import NoisingProcess
from ndm.predictor import Predictor, Target
from ndm.schedule import NoiseLevel
from ndm.shapes import expand


class RoundingPredictor(Predictor):
    """x̂ from a network, rounded softly to the grid of the data where noise is low.

    Args:
        network: see :class:`ndm.Predictor`.
        num_values: L, as many as the decoder has.
        target: see :class:`ndm.Predictor`.
    """

    def __init__(self, network: nn.Module, num_values: int, target: Target = "v"):
        super().__init__(network, target)
        self.num_values = num_values
        self.rounding = Rounding(num_values)

    def check(self, process: NoisingProcess, decoder: Decoder, reverse: str) -> None:
        super().check(process, decoder, reverse)
        check_grid(self.num_values, process, decoder)

    def read(self, output: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        return self.rounding(super().read(output, z, level), level)


class Rounding(nn.Module):
    """x̂ from a reading m of it, for data on the grid.

    Args:
        num_values: L, at least 2.
    """

    def __init__(self, num_values: int):
        super().__init__()
        if num_values < 2:
            raise UserError(
                f"num_values={num_values}: give the number of values of the data, at least 2, or"
                " leave it out"
            )
        self.num_values = num_values
        self.weights = nn.Parameter(torch.zeros(num_values + 2 * _REACH))

    def forward(self, m: Tensor, level: NoiseLevel) -> Tensor:
        """Round.

        Args:
            m: the reading, ``(B, *event)``.
            level: the noise of the latents that it is of.

        Returns:
            x̂, ``(B, *event)``, in the dtype of m; half precision is rounded in float32.
        """
        full, nothing = torch.promote_types(m.dtype, torch.float32), level.alpha == 0
        width = level.sigma.to(full) / torch.where(nothing, 1, level.alpha).to(full)
        width = expand(
            torch.where(nothing, torch.inf, width) * (0.5 * self.num_values), m
        )  # in spacings
        rounded = self._round(m.to(full), width.clamp(_NARROWEST, 1.0))
        return torch.where(width < 1, rounded.to(m.dtype), m)

    def _round(self, m: Tensor, width: Tensor) -> Tensor:
        position, width = (
            (m + 1) * (0.5 * self.num_values) - 0.5,
            width[..., None],
        )  # values lie at whole numbers
        nearest = position.detach().round()
        near = torch.arange(-_REACH, _REACH + 1, dtype=m.dtype, device=m.device)
        # Values beyond have the weight of the last.
        index = (
            (nearest[..., None] + near + _REACH)
            .nan_to_num(0.0)
            .clamp(0, len(self.weights) - 1)
            .long()
        )
        log_weights = (_UNIT * self.weights.to(m.dtype))[index]
        logits = (
            -0.5 * (((position - nearest)[..., None] - near) / width) ** 2
            + (1 - width**2) * log_weights
        )
        mean = nearest + (torch.softmax(logits, dim=-1) * near).sum(-1)
        return (mean + 0.5) * (2 / self.num_values) - 1


def check_grid(num_values: int, process: NoisingProcess, decoder: Decoder) -> None:
    """Check that the data, the latents and the decoder lie on the grid of a predictor.

    Raises:
        UserError: they do not.
    """
    keeps, values = process.transform.keeps_shape, decoder.values
    many = values is not None and len(values) == num_values
    if keeps and values is not None and many and torch.allclose(values, bin_centers(num_values)):
        return
    if not keeps:
        have = "latents of another shape than the data"
    else:
        have = "no grid" if values is None else f"another grid, of {len(values)} values"
    raise UserError(
        f"predictor.num_values={num_values} is the grid of the centers of {num_values} equal bins"
        f" of [-1, 1], but the model has {have}; give the decoder as many values, or use"
        " ndm.Predictor"
    )


_REACH = 5  # values to either side of the nearest that are looked at
# of the learned log-weights, nats: optimizers step alike in all parameters, and weights range over
# many powers of ten
_UNIT = 5.0
_NARROWEST = 1e-4  # width in spacings, where the noise is 0
