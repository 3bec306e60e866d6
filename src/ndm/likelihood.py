r"""The log-likelihood of data under the generative ODE: of densities, and of values on a grid.

**Density of z_0.** The reverse process gives log p(z_0): by the generative ODE (:mod:`ndm.ode`), or
exactly where it is a transport map.

**From z_0 to x.** Let :math:`\alpha_0, \sigma_0` be the noise level at t = 0. Every way below gives
an unbiased
:math:`w = p(x, z_0) / q(z_0|x)`, so that :math:`\log P(x) \ge E \log w`, and with K of them :math:`\log P(x) \ge E \log \frac1K \sum_k w_k`,
which increases to log P(x) with K.

=================  ==========================================  ======================================================================
``variational``    z_0 ~ q(z_0|x), the forward process         w = p(z_0) p(x|z_0) / q(z_0|x): the model with its own decoder, as in
                                                               the bound
``uniform``        z_0 = alpha_0 (x + U), U uniform on the     w = p(z_0) alpha_0^D prod(width): x is z_0/alpha_0, rounded to the
                   bin of x; discrete data only                grid (Theis et al. 2016)
``none``           z_0 = alpha_0 x; continuous data only       w = p(z_0) alpha_0^D: x is z_0/alpha_0 itself; no bound but equality
=================  ==========================================  ======================================================================

**Change of scale.** The factor :math:`\alpha_0^D` is the Jacobian of x -> z_0; the widths of the
bins turn the density of x into the probability of an integer, log P(k) = log p(x) + sum log width,
which is where the "7 bits" of 8-bit images in [-1, 1] come from (width 2/256). For discrete data
all results are log-probabilities of the original integers, on any grid. For continuous data they
are densities of x as the model sees it; :attr:`ndm.data.DataDescription.log_scale` moves them to
the units of the source.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ndm.decoder import Decoder, DiscretizedGaussian, NetworkDecoder
from ndm.errors import UserError, check_choice, check_whole
from ndm.forward import NoisingProcess
from ndm.ode import OdeSettings
from ndm.random import ExampleGenerators, RandomSource, standard_normal, uniform
from ndm.reverse import Reverse
from ndm.shapes import event_size, expand, sum_event

Dequantization = Literal["variational", "uniform", "none"]
_PROBES, _LATENTS = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of data under the ODE model, with K samples of z_0 for each example."""

    log_weights: Tensor
    """log w_k = log p(x, z_0)/q(z_0|x), ``(B, K)``, nats, float64 on the CPU."""
    coarse_log_weights: Tensor
    """The same with half of the nodes of the quadrature."""
    nfe: float
    """Evaluations of f for one sample of one example."""

    @property
    def log_p(self) -> Tensor:
        """log (1/K) sum_k w_k: the importance-weighted bound on log p(x), ``(B,)``, nats."""
        return torch.logsumexp(self.log_weights, dim=1) - math.log(self.log_weights.shape[1])

    @property
    def single(self) -> Tensor:
        """The mean of log w_k: the bound for one sample, ``(B,)``, nats."""
        return self.log_weights.mean(1)


def latent(
    process: NoisingProcess,
    decoder: Decoder,
    x: Tensor,
    how: Dequantization,
    source: RandomSource = None,
) -> tuple[Tensor, Tensor]:
    """z_0 for data ``x`` ``(B, *event)``, and log w - log p(z_0), ``(B,)``, nats; see the table of
    this module.

    Raises:
        UserError: the way does not fit the data, or a value of x is off the decoder's grid.
    """
    decoder.check(x)
    level = process.level(0.0, x)
    if how == "variational":
        q = process.first_marginal(x, level)
        z = q.sample(standard_normal(q.mean, source))
        return z, decoder.log_prob(x, z, level) - q.log_prob(z)
    if not process.transform.keeps_shape or isinstance(decoder, NetworkDecoder):
        raise UserError(
            f"dequantization={how} takes z_0/alpha_0 for data, but here a network leads from z_0 to"
            " x; use variational"
        )
    scale = event_size(x) * torch.log(level.alpha)
    if how == "none":
        if decoder.discrete:
            raise UserError(
                "dequantization=none is for continuous data; the probability of a value on a grid"
                " needs variational or uniform"
            )
        return expand(level.alpha, x) * x, scale
    check_choice("dequantization", how, get_args(Dequantization))
    if not isinstance(decoder, DiscretizedGaussian):
        raise UserError(
            "dequantization=uniform is for values on a grid (decoder DiscretizedGaussian); use"
            " variational or none"
        )
    low, width = decoder.bins(x)
    return expand(level.alpha, x) * (low + width * uniform(x, source)), scale + sum_event(
        torch.log(width)
    )


@torch.no_grad()
def log_likelihood(
    reverse: Reverse,
    decoder: Decoder,
    x: Tensor,
    *,
    samples: int = 1,
    dequantization: Dequantization = "variational",
    settings: OdeSettings | None = None,
    seed: int = 0,
    examples: Sequence[int] | None = None,
    progress: bool = False,
) -> LogLikelihood:
    """Log-likelihood of data under the ODE model.

    The K samples of an example share its probes: what Hutchinson's estimate gets wrong then shifts
    all of its log-weights alike, up to the distance of the samples, instead of raising the mean of
    the weights. Take the exact trace where that difference matters.

    Args:
        reverse: the reverse process.
        decoder: p(x|z_0).
        x: data ``(B, *event)``.
        samples: K.
        dequantization: from z_0 to x: ``variational``, ``uniform`` or ``none``.
        settings: solver, tolerance, probes.
        seed: seed of latents and probes.
        examples: numbers of the examples in their data set, which decide on their random numbers; 0
            ... B-1 by default.
        progress: show progress bars.

    Raises:
        UserError: the tolerances cannot be reached, or an argument does not fit the data.
    """
    check_whole("samples", samples, 1)
    if samples > 1 and dequantization == "none":
        raise UserError(
            f"samples={samples} does not go with dequantization=none, which draws nothing: give one"
            " sample"
        )
    examples = range(len(x)) if examples is None else examples
    weights, coarse, evaluations = [], [], 0
    for sample in range(samples):
        z, log_ratio = latent(
            reverse.process,
            decoder,
            x,
            dequantization,
            ExampleGenerators(seed, examples, _LATENTS, sample),
        )
        solved = reverse.log_prob(z, settings, ExampleGenerators(seed, examples, _PROBES), progress)
        evaluations += solved.nfe
        weights.append(solved.log_p + log_ratio.cpu().double())
        coarse.append(solved.coarse + log_ratio.cpu().double())
    return LogLikelihood(torch.stack(weights, 1), torch.stack(coarse, 1), evaluations / samples)
