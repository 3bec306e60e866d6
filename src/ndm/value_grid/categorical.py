r"""A predictor for data on a grid: a network's probabilities of every value, and Bayes' rule.

Given the rest of the example, a place i of x holds one of L values. The network gives the logits l
of these values, the latent z_i gives their likelihood, and x̂ is the posterior mean,

.. math::
    \hat x_i
    = \sum_k v_k\, \operatorname{softmax}_k\Bigl(\ell_{ik}(z, t)
    - \frac{(z_i/\alpha - v_k)^2}{2 s^2}\Bigr), \qquad
    s = \frac{\sigma}{\alpha}, \qquad v_k = \frac{2k + 1}{L} - 1 .

By Bayes' rule, the network need not learn to weigh its logits against z_i, whose noise ranges over
many powers of ten. If it returned log p(x_i = v_k | z without z_i), x̂ would be E[x | z], the best
possible prediction.

For each place the network sees z_i and a learned embedding e_i of the values that are likely given
z_i alone. For the whole example it sees how often each value is likely to occur, n:

.. math::
    r_{ik} = \operatorname{softmax}_k\Bigl(-\frac{(z_i/\alpha - v_k)^2}{2 s^2}\Bigr), \qquad
    e_i = \sum_k r_{ik} E_k, \qquad
    n_k = \sum_i r_{ik}, \qquad A \log(1 + n) + a .

At low noise e_i is one row of the table E; at high noise r is flat. Values repeat within an example
more often than by chance (images have flat parts and few colors), so log(1 + c (n_k - r_ik)) is
added to the logits, as in a Pólya urn, with a learned c.

r treats z as noisy x, so F(x, t) must be close to x at low noise, as it is in the log-SNR gated and
the time-separable form. The loss is still the variational bound; there is no cross entropy.
"""

import torch
from torch import Tensor, nn

from ndm.decoder import Decoder, bin_centers
from ndm.device import autocast_dtype, full_precision
from ndm.errors import UserError, check_whole
from ndm.forward import NoisingProcess
from ndm.predictor import DataPredictor
from ndm.schedule import NoiseLevel
from ndm.transform import GatedTransform, Identity, SeparableTransform
from ndm.value_grid.kernels import posterior_mean, value_posteriors
from ndm.value_grid.rounding import check_grid


class CategoricalPredictor(DataPredictor):
    """A predictor x̂ that is a posterior mean over the grid, for images ``(B, C, H, W)``.

    It computes L numbers for each dimension of the data, in blocks of examples
    (:mod:`ndm.value_grid.kernels`). Within torch.func, forward mode and compiled code it stores
    them for the whole batch, about a dozen times for a gradient: 0.8 MB each time for one 28x28
    image of 256 gray values. It treats z as noisy x, so F may change x only where there is noise:
    use the identity, :class:`ndm.GatedTransform` or :class:`ndm.SeparableTransform` with its
    default gate.

    Args:
        network: maps ``(B, C + C embedding + histogram, H, W)`` to K features for each dimension,
            ``(B, K, C, H, W)``, as :class:`ndm.nn.UNet` does with ``outputs`` = K and ``context`` =
            C embedding + histogram; a linear layer maps the features to logits.
        num_values: L, at least 2; the same as the decoder's.
        embedding: length of e_i, the embedding of a value.
        histogram: length of a, the embedding of the histogram of values in the example.
    """

    takes_masks = False

    def __init__(
        self, network: nn.Module, num_values: int, embedding: int = 16, histogram: int = 16
    ):
        features = getattr(network, "outputs", None)
        if not isinstance(network, nn.Module) or not isinstance(features, int):
            raise UserError(
                "CategoricalPredictor needs an nn.Module with an attribute outputs, its number of"
                " features for each pixel: give a network of this library outputs, for example 64"
            )
        check_whole("num_values", num_values, 2)
        check_whole("embedding", embedding, 1)
        check_whole("histogram", histogram, 1)
        super().__init__()
        self.network = network
        self.num_values, self.embedding, self.histogram = num_values, embedding, histogram
        self.values = nn.Linear(num_values, embedding, bias=False)
        self.frequencies = nn.Linear(num_values, histogram)
        self.logits = nn.Linear(features, num_values)
        self.copies = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.values.weight)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Return x̂ for ``z`` ``(B, C, H, W)`` at times ``(B,)``, in the shape and dtype of z.

        Half precision is weighed in float32.
        """
        if z.dim() != 4:
            raise UserError(
                "CategoricalPredictor predicts images (C, H, W), but an example has the shape"
                f" {tuple(z.shape[1:])}; use ndm.Predictor"
            )
        full = torch.promote_types(z.dtype, torch.float32)
        with full_precision(z):
            alpha, unit = level.alpha.to(full), level.sigma.to(full).clamp(min=_SMALLEST) * 2**0.5
            v = bin_centers(self.logits.out_features, full, z.device)
            s, w = z.to(full).flatten(1) / unit[:, None], (alpha / unit)[:, None] * v
        embedded, counts = value_posteriors(s, w, self.values.weight.T.to(full))
        embedded = embedded.unflatten(1, z.shape[1:])
        features = self._features(z, embedded, counts, level).movedim(1, -1).flatten(1, -2)
        if features.dtype != torch.float64:
            features = features.to(autocast_dtype(z) or features.dtype)
        with full_precision(z):
            c = torch.exp(_UNIT * self.copies.to(full))
            weight, bias = self.logits.weight.to(full), self.logits.bias.to(full)
            x = posterior_mean(s, w, counts, c, v, features, weight, bias)
            return x.view_as(z).to(z.dtype)

    def _features(self, z: Tensor, embedded: Tensor, counts: Tensor, level: NoiseLevel) -> Tensor:
        """Return the network's features ``(B, K, C, H, W)`` of z, e ``(B, C, H, W, E)`` and n."""
        histogram = self.frequencies(torch.log1p(counts).to(self.frequencies.weight.dtype))
        everywhere = histogram[:, :, None, None].expand(-1, -1, *z.shape[2:])
        embedded = embedded.movedim(-1, 2).flatten(1, 2)
        seen = torch.cat([z, embedded.to(z.dtype), everywhere.to(z.dtype)], dim=1)
        features = self.call(seen, level.t)
        expected = (z.shape[0], self.logits.in_features, *z.shape[1:])
        if not isinstance(features, Tensor) or features.shape != expected:
            is_tensor = isinstance(features, Tensor)
            found = tuple(features.shape) if is_tensor else type(features).__name__
            raise UserError(
                f"the predictor's network maps {tuple(seen.shape)} to {found}; it must return"
                f" {expected}"
            )
        return features

    def check(self, process: NoisingProcess, decoder: Decoder, reverse: str) -> None:
        super().check(process, decoder, reverse)
        check_grid(self.num_values, process, decoder)
        transform = process.transform
        plain = isinstance(transform, Identity)
        gated = isinstance(transform, GatedTransform) or (
            isinstance(transform, SeparableTransform) and transform.gate == "noise"
        )
        if not plain and not gated:
            raise UserError(
                f"CategoricalPredictor treats z as noisy x, but {type(transform).__name__} moves"
                " data where there is little noise; use Identity, GatedTransform or"
                " SeparableTransform with gate=noise, or ndm.Predictor"
            )
        if reverse not in (("tied", "direct") if plain else ("tied",)):
            raise UserError(
                f"CategoricalPredictor predicts x on its grid, but reverse={reverse} needs another"
                " prediction; use reverse=tied, or ndm.Predictor"
            )


_UNIT = 5.0  # of log c, in nats: optimizers take the same step in every parameter
_SMALLEST = 1e-6  # of sigma, which is 0 at t = 0 of some schedules
