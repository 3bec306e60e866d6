r"""Soft rounding of a prediction to the grid of the data, at the width of the noise.

Networks rarely learn to round to the grid of the data. At low noise x̂ = z/alpha is a good
prediction, and rounding makes it much better. With L values in [-1, 1], a prediction m is rounded
with the width s of the noise,

.. math::
    \hat x_i = \sum_k v_k\, \operatorname{softmax}_k\Bigl(-\frac{(m_i - v_k)^2}{2 s^2}
    + \bigl(1 - \tfrac{s^2}{\Delta^2}\bigr) \log w_k\Bigr), \qquad
    s = \frac{\sigma}{\alpha} < \Delta, \qquad v_k = \frac{2k + 1}{L} - 1, \qquad
    \Delta = \frac{2}{L},

with learned weights w of the values, equal at first. Once s reaches the spacing, x̂ is m (the
formula's limit, to 1e-7 of the spacing). For m = z/alpha and small s, x̂ is the posterior mean of a
number whose values have frequencies w. The grid extends a little beyond [-1, 1]; the weights learn
that no data are there. :class:`ndm.CategoricalPredictor` also uses the rest of the example to weigh
the values.
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
    """A predictor whose x̂ is softly rounded to the grid of the data at low noise.

    Args:
        network: see :class:`ndm.Predictor`.
        num_values: L, the same as the decoder's.
        target: see :class:`ndm.Predictor`.
        learned_variance: see :class:`ndm.Predictor`; s² is that of the rounded prediction.
    """

    def __init__(
        self,
        network: nn.Module,
        num_values: int,
        target: Target = "v",
        learned_variance: bool = False,
    ):
        super().__init__(network, target, learned_variance)
        self.num_values = num_values
        self.rounding = Rounding(num_values)

    def check(self, process: NoisingProcess, decoder: Decoder, reverse: str) -> None:
        super().check(process, decoder, reverse)
        check_grid(self.num_values, process, decoder)

    def read(self, output: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        return self.rounding(super().read(output, z, level), level)


class Rounding(nn.Module):
    """Soft rounding of a prediction m to the grid.

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
        """Round the prediction.

        Args:
            m: the prediction, ``(B, *event)``.
            level: the noise level of the latents.

        Returns:
            x̂, ``(B, *event)``, in the dtype of m; half precision is rounded in float32.
        """
        full = torch.promote_types(m.dtype, torch.float32)
        no_signal = level.alpha == 0
        s = level.sigma.to(full) / torch.where(no_signal, 1, level.alpha).to(full)
        spacings = torch.where(no_signal, torch.inf, s) * (0.5 * self.num_values)
        width = expand(spacings, m)
        rounded = self._round(m.to(full), width.clamp(_NARROWEST, 1.0))
        return torch.where(width < 1, rounded.to(m.dtype), m)

    def _round(self, m: Tensor, width: Tensor) -> Tensor:
        """Round m, ``(B, *event)``, with the width in spacings."""
        position = (m + 1) * (0.5 * self.num_values) - 0.5  # the values are at integers
        width = width[..., None]
        nearest = position.detach().round()
        near = torch.arange(-_REACH, _REACH + 1, dtype=m.dtype, device=m.device)
        # Values outside the table have the weight of its first or last entry.
        index = (nearest[..., None] + near + _REACH).nan_to_num(0.0)
        index = index.clamp(0, len(self.weights) - 1).long()
        log_weights = (_UNIT * self.weights.to(m.dtype))[index]
        distance = (position - nearest)[..., None] - near
        logits = -0.5 * (distance / width) ** 2 + (1 - width**2) * log_weights
        mean = nearest + (torch.softmax(logits, dim=-1) * near).sum(-1)
        return (mean + 0.5) * (2 / self.num_values) - 1


def check_grid(num_values: int, process: NoisingProcess, decoder: Decoder) -> None:
    """Check that the data, the latents and the decoder share the grid of a predictor.

    Raises:
        UserError: they do not.
    """
    values, expected = decoder.values, bin_centers(num_values)
    if not process.transform.keeps_shape:
        found = "latents of another shape than the data"
    elif values is None:
        found = "no grid"
    elif len(values) != num_values or not torch.allclose(values, expected):
        found = f"another grid, of {len(values)} values"
    else:
        return
    raise UserError(
        f"predictor.num_values={num_values} means the centers of {num_values} equal bins of"
        f" [-1, 1], but the model has {found}; give the decoder as many values, or use"
        " ndm.Predictor"
    )


_REACH = 5  # values on either side of the nearest that are summed over
# Unit of the learned log-weights, in nats: optimizers take the same step in every parameter, and
# the weights range over many powers of ten.
_UNIT = 5.0
_NARROWEST = 1e-4  # width in spacings, used where the noise is 0
