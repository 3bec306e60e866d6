r"""The log-likelihood of data under the generative ODE, for continuous and discrete data.

**Density of z_0.** The reverse process computes log p(z_0) with the generative ODE
(:mod:`ndm.ode`), or exactly if it is a transport map.

**From z_0 to x.** Let :math:`\alpha_0, \sigma_0` be the noise level at t = 0. Each method of the
table has an unbiased weight w, and K weights give a bound that increases to log P(x) with K:

.. math::
    w = p(x, z_0) / q(z_0|x), \qquad \log P(x) \ge E \log w, \qquad
    \log P(x) \ge E \log \tfrac1K \textstyle\sum_k w_k .

===============  ==========================================  =======================================
``variational``  z_0 ~ q(z_0|x), the forward process         w = p(z_0) p(x|z_0) / q(z_0|x): the
                                                             model with its decoder, as in the bound
``uniform``      z_0 = alpha_0 (x + U), U uniform on the     w = p(z_0) alpha_0^D prod(width): x is
                 bin of x; discrete data only                z_0/alpha_0, rounded to the grid
                                                             (Theis et al. 2016)
``none``         z_0 = alpha_0 x; continuous data only       w = p(z_0) alpha_0^D: x is z_0/alpha_0;
                                                             an equality, not a bound
===============  ==========================================  =======================================

**Change of scale.** The factor :math:`\alpha_0^D` is the Jacobian of x -> z_0. The widths of the
bins turn the density of x into the probability of an integer, log P(k) = log p(x) + sum log width:
the "7 bits" of 8-bit images in [-1, 1] (width 2/256). For discrete data all results are
log-probabilities of the original integers, on any grid. For continuous data they are densities of
the preprocessed x; :attr:`ndm.data.DataDescription.log_scale` converts them to the units of the
source.
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
from ndm.parts import frozen, masked
from ndm.random import ExampleGenerators, RandomSource, standard_normal, uniform
from ndm.reverse import Reverse
from ndm.shapes import expand, sum_event

Dequantization = Literal["variational", "uniform", "none"]
_PROBES, _LATENTS = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of data under the ODE model, with K samples of z_0 for each example."""

    log_weights: Tensor
    """log w_k = log p(x, z_0)/q(z_0|x), ``(B, K)``, nats, float64 on the CPU."""
    coarse_log_weights: Tensor
    """``log_weights`` computed with half of the nodes of the quadrature."""
    nfe: float
    """Evaluations of f per sample of z_0."""

    @property
    def log_p(self) -> Tensor:
        """log (1/K) sum_k w_k: the importance-weighted bound on log p(x), ``(B,)``, nats."""
        return torch.logsumexp(self.log_weights, dim=1) - math.log(self.log_weights.shape[1])

    @property
    def single(self) -> Tensor:
        """The mean of log w_k: the bound for K = 1, ``(B,)``, nats."""
        return self.log_weights.mean(1)


def latent(
    process: NoisingProcess,
    decoder: Decoder,
    x: Tensor,
    how: Dequantization,
    source: RandomSource = None,
) -> tuple[Tensor, Tensor]:
    """Draw z_0 for data, and compute log w - log p(z_0); see the table of this module.

    Args:
        process: the forward process.
        decoder: p(x|z_0).
        x: data ``(B, *event)``.
        how: ``variational``, ``uniform`` or ``none``.
        source: source of randomness.

    Returns:
        z_0, and log w - log p(z_0), ``(B,)``, nats.

    Raises:
        UserError: the method does not fit the data, or a value of x is off the decoder's grid.
    """
    decoder.check(x)
    level = process.level(0.0, x)
    if how == "variational":
        q = process.first_marginal(x, level)
        z = q.sample(standard_normal(q.mean, source))
        return z, decoder.log_prob(x, z, level) - q.log_prob(z)
    if not process.transform.keeps_shape or isinstance(decoder, NetworkDecoder):
        raise UserError(
            f"dequantization={how} needs x = z_0/alpha_0, but this model decodes z_0 with a"
            " network; use variational"
        )
    missing = process.missing
    dims = sum_event(masked(torch.ones_like(x), missing))
    scale = dims * torch.log(level.alpha)
    if how == "none":
        if decoder.discrete:
            raise UserError(
                "dequantization=none is for continuous data; use variational or uniform for"
                " discrete data"
            )
        return expand(level.alpha, x) * masked(x, missing), scale
    check_choice("dequantization", how, get_args(Dequantization))
    if not isinstance(decoder, DiscretizedGaussian):
        raise UserError(
            "dequantization=uniform is for discrete data (decoder DiscretizedGaussian); use"
            " variational or none"
        )
    low, width = decoder.bins(x)
    z = masked(expand(level.alpha, x) * (low + width * uniform(x, source)), missing)
    return z, scale + sum_event(masked(torch.log(width), missing))


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
    differentiable: bool = False,
) -> LogLikelihood:
    """Estimate the log-likelihood of data under the ODE model.

    The K samples of an example share its probes. The error of Hutchinson's estimate then shifts
    all its log-weights by about the same amount, as the samples are close, instead of raising the
    mean of the weights. Use the exact trace if the remaining difference matters.

    Args:
        reverse: the reverse process.
        decoder: p(x|z_0).
        x: data ``(B, *event)``.
        samples: K.
        dequantization: from z_0 to x: ``variational``, ``uniform`` or ``none``.
        settings: solver, tolerances, probes.
        seed: seed of latents and probes.
        examples: the numbers of the examples in their data set, which seed their randomness;
            0 ... B-1 by default.
        progress: show progress bars.
        differentiable: keep the graph for gradients in x.

    Raises:
        UserError: the solver cannot reach the tolerances, or an argument does not fit the data.
    """
    check_whole("samples", samples, 1)
    if samples > 1 and dequantization == "none":
        raise UserError(
            f"samples={samples} does not work with dequantization=none, which draws nothing; give"
            " samples=1"
        )
    examples = range(len(x)) if examples is None else examples
    weights, coarse, evaluations = [], [], 0
    keep = differentiable and x.requires_grad
    with frozen(*reverse.parts, decoder), torch.set_grad_enabled(keep):
        for sample in range(samples):
            noise = ExampleGenerators(seed, examples, _LATENTS, sample)
            z, log_ratio = latent(reverse.process, decoder, x, dequantization, noise)
            probes = ExampleGenerators(seed, examples, _PROBES)
            solved = reverse.log_prob(z, settings, probes, progress)
            evaluations += solved.nfe
            weights.append(solved.log_p + log_ratio.cpu().double())
            coarse.append(solved.coarse + log_ratio.cpu().double())
    return LogLikelihood(torch.stack(weights, 1), torch.stack(coarse, 1), evaluations / samples)
