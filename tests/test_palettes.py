"""Palettes: expectation maximisation against known kinds, and its objective, which no round may lower."""

import pytest
import torch

import ndm.palettes as module
from ndm.palettes import Palettes
from oracles import F64

KINDS = torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.5, 0.0, 0.1, 0.4], [0.9, 0.05, 0.0, 0.05]], dtype=F64)


def counts(examples: int, places: int) -> torch.Tensor:
    """One example in ten of the first kind, three of the second and six of the third."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2, 2]).repeat(examples // 10)
    drawn = torch.multinomial(KINDS[kind], places, True, generator=generator)
    return torch.nn.functional.one_hot(drawn, 4).sum(1).double()


def found(x: torch.Tensor, kinds: int = 3, seed: int = 0) -> Palettes:
    palettes = Palettes(kinds, 4).double()
    palettes.initialise(x, seed)
    return palettes


def test_kinds_are_found() -> None:
    """With more palettes than there are kinds, since one may be found twice: each example's palette has the frequencies of its kind."""
    x = counts(3000, 40)
    for seed in range(3):
        with torch.no_grad():
            palettes = found(x, kinds=8, seed=seed)
            q = palettes.odds(F64) / 4
            belongs = palettes.posterior(x @ q.log().T)
            torch.testing.assert_close(belongs.mean(0), palettes.shares.softmax(0), rtol=0, atol=0.01)
            seen = belongs @ q
            for kind, part in ((0, seen[::10]), (1, seen[1::10]), (2, seen[9::10])):
                torch.testing.assert_close(part.mean(0), KINDS[kind], rtol=0, atol=0.02)
                assert float((part - KINDS[kind]).abs().sum(1).median()) < 0.15


def test_no_round_lowers_the_posterior_density_of_frequencies_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-likelihood and the logarithm of the Dirichlet densities, which expectation maximisation raises in each round."""
    x, last = counts(500, 12), -float("inf")
    prior = x.sum(0) + 1
    prior *= 20 / prior.sum()
    for rounds in range(1, 12):
        monkeypatch.setattr(module, "_ROUNDS", rounds)
        palettes = found(x, kinds=4)
        log_q, log_shares = palettes.frequencies.detach(), palettes.shares.detach().log_softmax(0)
        objective = float(torch.logsumexp(x @ log_q.T + log_shares, 1).sum() + (log_q @ prior).sum() + log_shares.sum())
        assert objective > last + 1e-6
        last = objective


def test_fewer_examples_than_kinds_and_values_that_do_not_occur() -> None:
    palettes = found(torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0]]), kinds=5)
    odds = palettes.odds(F64).detach()
    assert bool(palettes.frequencies.isfinite().all()) and float(odds.min()) > 0
    seen = (palettes.posterior(2 * odds[:, 2:3].T.log()).detach() @ odds)[0]
    assert float(seen[2]) > 1.5 > float(seen[0]), "two places with the second example's value"
