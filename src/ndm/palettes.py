r"""Palettes: kinds of examples, each with its own frequencies of the L values of a grid, as a mixture of multinomials.

An example is of kind h with probability pi_h, and holds the value k at a place with probability q_hk, whatever is at other places. With r_ik the
likelihood of the latent of place i for each value, normalised over k (:mod:`ndm.weighing`), the latents of an example say

.. math::
    p(h \mid z) \propto \pi_h \prod_i \sum_k r_{ik} q_{hk}, \qquad b_k = L \sum_h p(h \mid z)\, q_{hk},

so that b averages 1 over k, and is what all examples have where the latents know nothing. Images that were scaled, stretched in contrast or
saved with few colours have values that depend on how that was done, alike in the whole image.

Gradients alone find no palettes: from a random start, one is a little better than all others and takes all examples. They are found before training by
expectation maximisation on how often the values occur in each example (Dempster, Laird and Rubin, 1977), with a Dirichlet prior around the
frequencies in all examples, and trained from there.
"""

import math

import torch
from torch import Tensor, nn

_ROUNDS = 40  # of expectation maximisation; most is found after ten
_UNIFORM = 1e-6  # well above the rounding of n - r, whose logarithm is taken with it
_PRIOR = 20.0  # places with the frequencies of all examples, that each palette starts from


class Palettes(nn.Module):
    """Kinds of examples and their frequencies of values; all alike until they are initialised.

    Args:
        kinds: number of kinds, H.
        levels: number of values, L.
    """

    no_weight_decay = ("frequencies",)  # it would make all values alike

    def __init__(self, kinds: int, levels: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.zeros(kinds, levels))
        self.shares = nn.Parameter(torch.zeros(kinds))

    def odds(self, dtype: torch.dtype) -> Tensor:
        """L q, ``(H, L)``: frequencies over those of a uniform distribution, which is mixed in a little: no value is impossible."""
        return torch.softmax(self.frequencies.to(dtype), dim=1) * self.frequencies.shape[1] * (1 - _UNIFORM) + _UNIFORM

    def posterior(self, u: Tensor) -> Tensor:
        """p(h | z) ``(B, H)`` of u_h, the logarithm of the product over places of sum_k r_ik L q_hk, ``(B, H)``; zero for less than eps^2 of the largest."""
        logits = u + self.shares.to(u.dtype)
        least = logits.detach().amax(1, keepdim=True) + 2 * math.log(torch.finfo(u.dtype).eps)
        return torch.softmax(logits.masked_fill(logits < least, -math.inf), dim=1)  # slow denormal numbers otherwise, in the gradients, too

    @torch.no_grad()
    def initialise(self, counts: Tensor, seed: int = 0) -> None:
        """Find the palettes by expectation maximisation.

        Args:
            counts: how often each value occurs in each example, ``(N, L)``.
            seed: of the examples that the palettes start from.
        """
        x = counts.to(self.frequencies.device, torch.float64)
        kinds = len(self.frequencies)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randperm(len(x), generator=generator)[torch.arange(kinds) % len(x)]
        prior = x.sum(0) + 1  # no value is impossible
        prior *= _PRIOR / prior.sum()
        q, shares = _normalised(x[start] + prior), x.new_full((kinds,), 1 / kinds)
        for _ in range(_ROUNDS):
            belongs = torch.softmax(x @ q.log().T + shares.log(), dim=1)
            q, shares = _normalised(belongs.T @ x + prior), (belongs.sum(0) + 1) / (len(x) + kinds)
        self.frequencies.copy_(q.log())
        self.shares.copy_(shares.log())


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True)
