r"""A predictor for data on a grid of values: a network's probabilities of every value, and what
each place's own latent says of it.

Given the example's other places, a place i of x holds one of L values. The network gives it logits
l, the latent z_i has a likelihood, and x̂ is the posterior mean,

.. math::
    \hat x_i = \sum_k v_k\, \operatorname{softmax}_k\Bigl(\ell_{ik}(z, t) - \frac{(z_i/\alpha - v_k)^2}{2 s^2}\Bigr), \qquad
    s = \frac{\sigma}{\alpha}, \qquad v_k = \frac{2k + 1}{L} - 1 .

The network need not know how to weigh its guess against z_i, which depends on noise that ranges
over many powers of ten: that is Bayes' rule. Were it to give log p(x_i = v_k | z without z_i), x̂
would be E[x | z], the best prediction there is.

It sees of each place, beside z_i, what the latent alone says by a learned vector for each value,
and of the whole example how often each value is likely to occur:

.. math::
    r_{ik} = \operatorname{softmax}_k\Bigl(-\frac{(z_i/\alpha - v_k)^2}{2 s^2}\Bigr), \qquad e_i = \sum_k r_{ik} E_k, \qquad
    n_k = \sum_i r_{ik}, \qquad A \log(1 + n) + a :

where noise is low, a table of values is looked up, and where it is high, r is flat. Values repeat
within an example more often than by chance (images have flat parts and few colors), so the logits
get log(1 + c (n_k - r_ik)) on top, as from a Pólya urn, with a learned c.

r takes the latent for one of x, so F(x, t) has to be close to x where noise is low, as it is with
the log-SNR gated and the time-separable form. The loss stays the variational bound; nothing here is
trained by cross entropy.
"""

import torch
from torch import Tensor, nn

from ndm.decoder import Decoder, bin_centers
from ndm.device import autocast_dtype, full_precision
from ndm.errors import UserError, check_whole
from ndm.forward import NoisingProcess
from ndm.grid.kernels import posterior_mean, value_posteriors
from ndm.grid.rounding import check_grid
from ndm.predictor import DataPredictor
from ndm.schedule import NoiseLevel
from ndm.transform import GatedTransform, Identity, SeparableTransform


class CategoricalPredictor(DataPredictor):
    """x̂ as the posterior mean over the values of the grid, for images ``(B, C, H, W)``.

    Computes with L numbers for each dimension of the data, some examples at a time
    (:mod:`ndm.grid.kernels`); within torch.func, forward mode and compiled code it holds them for
    the whole batch, a dozen of them for a gradient: 0.8 MB each for one 28x28 image of 256 gray
    values. It takes latents for noisy data, so F may leave x only where there is noise: the
    identity, :class:`ndm.GatedTransform` and :class:`ndm.SeparableTransform` as it comes.

    Args:
        network: gives K features for each dimension, ``(B, K, C, H, W)``, of ``(B, C + C embedding
            + histogram, H, W)``, as :class:`ndm.nn.UNet` does with ``outputs`` = K and ``context``
            = C embedding + histogram; a linear layer makes logits of them.
        num_values: L, at least 2, as many as the decoder has.
        embedding: numbers that the network sees of each value, the length of E_k.
        histogram: numbers that the network sees of the histogram of values in the example, the
            length of a.
    """

    def __init__(
        self, network: nn.Module, num_values: int, embedding: int = 16, histogram: int = 16
    ):
        features = getattr(network, "outputs", None)
        if not isinstance(network, nn.Module) or not isinstance(features, int):
            raise UserError(
                "CategoricalPredictor needs an nn.Module whose attribute outputs says how many"
                " features it gives for each pixel: give a network of this library outputs, for"
                " example 64"
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
        """x̂ for latents ``z`` ``(B, C, H, W)`` at times ``(B,)``; ``(B, C, H, W)`` in the dtype of
        z; half precision is weighed in float32.
        """
        if z.dim() != 4:
            raise UserError(
                "CategoricalPredictor looks at images (C, H, W), and an example has the shape"
                f" {tuple(z.shape[1:])}; use ndm.Predictor"
            )
        full = torch.promote_types(z.dtype, torch.float32)
        with full_precision(z):
            alpha, unit = level.alpha.to(full), level.sigma.to(full).clamp(min=_SMALLEST) * 2**0.5
            v = bin_centers(self.logits.out_features, full, z.device)
            s, w = z.to(full).flatten(1) / unit[:, None], (alpha / unit)[:, None] * v
        embedded, counts = value_posteriors(s, w, self.values.weight.T.to(full))
        features = (
            self._features(z, embedded.unflatten(1, z.shape[1:]), counts, level)
            .movedim(1, -1)
            .flatten(1, -2)
        )
        if features.dtype != torch.float64:
            features = features.to(autocast_dtype(z) or features.dtype)
        with full_precision(z):
            c = torch.exp(_UNIT * self.copies.to(full))
            x = posterior_mean(
                s, w, counts, c, v, features, self.logits.weight.to(full), self.logits.bias.to(full)
            )
            return x.view_as(z).to(z.dtype)

    def _features(self, z: Tensor, embedded: Tensor, counts: Tensor, level: NoiseLevel) -> Tensor:
        """What the network says of z, of e ``(B, C, H, W, E)`` and of n; ``(B, K, C, H, W)``."""
        histogram = self.frequencies(torch.log1p(counts).to(self.frequencies.weight.dtype))
        everywhere = histogram[:, :, None, None].expand(-1, -1, *z.shape[2:])
        seen = torch.cat(
            [z, embedded.movedim(-1, 2).flatten(1, 2).to(z.dtype), everywhere.to(z.dtype)], dim=1
        )
        features = self.network(seen, level.t)
        expected = (z.shape[0], self.logits.in_features, *z.shape[1:])
        if not isinstance(features, Tensor) or features.shape != expected:
            found = (
                tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            )
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
                f"CategoricalPredictor takes latents for noisy data, and {type(transform).__name__}"
                " moves data where there is little noise; use Identity, GatedTransform or"
                " SeparableTransform with gate=noise, or ndm.Predictor"
            )
        if reverse not in (("tied", "direct") if plain else ("tied",)):
            raise UserError(
                f"CategoricalPredictor predicts x on its grid, and with reverse={reverse} the"
                " predictor stands for something else; use reverse=tied, or ndm.Predictor"
            )


_UNIT = 5.0  # of log c, nats: optimizers step alike in all parameters
_SMALLEST = 1e-6  # of sigma, which is 0 at t = 0 of some schedules
