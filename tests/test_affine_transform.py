"""Learned gains and offsets: their definition, and the bound in few steps by a formula."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.optimize
import torch
from torch import Tensor

from ndm.decoder import GaussianDecoder
from ndm.errors import UserError
from ndm.linear_transform import AffineTransform, Blur
from ndm.model import NDM
from ndm.nn import MLP, Dense
from ndm.predictor import DataPredictor, Predictor
from ndm.schedule import CosineSchedule, LinearLogSNRSchedule, NoiseLevel
from ndm.transform import Encoder, GatedTransform, Identity, SumTransform
from oracles import F64, randomized

SCHEDULE = LinearLogSNRSchedule(-6.0, 4.0)
DEVIATIONS = np.array([1.6, 0.9, 0.5, 0.12])
"""Standard deviations of independent Gaussian dimensions, as in the spectrum of an image."""
STEPS, TERMS = 5, 3


@pytest.mark.parametrize("event", [(5,), (3, 4, 6)])
@pytest.mark.parametrize("basis", ["dimensions", "cosines"])
def test_gains_and_offsets_have_their_definition(basis: str, event: tuple[int, ...]) -> None:
    transform = AffineTransform(event, basis, terms=3)  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in transform.parameters()) == 6 * math.prod(event)
    x, t = torch.randn(2, *event, dtype=F64), torch.tensor([0.2, 0.9], dtype=F64)
    assert torch.equal(transform.double()(x, SCHEDULE(t)), x), "it starts at the identity"
    randomized(transform)
    gains, offsets = transform.gains.detach().numpy(), transform.offsets.detach().numpy()
    expected = x.clone().numpy()
    for index, (one, time) in enumerate(zip(x.numpy(), t.tolist(), strict=True)):
        variance = float(SCHEDULE(t[index : index + 1]).sigma) ** 2
        for k in range(3):
            if basis == "cosines":
                term = scipy.fft.idctn(gains[k] * scipy.fft.dctn(one, norm="ortho"), norm="ortho")
            else:
                term = gains[k] * one
            expected[index] += variance * math.cos(math.pi * k * time) * (term + offsets[k])
    torch.testing.assert_close(transform(x, SCHEDULE(t)).detach(), torch.from_numpy(expected))


def test_a_sum_adds_displacements() -> None:
    torch.manual_seed(0)
    parts = [randomized(GatedTransform(MLP(12, 8, 1))), Blur(2.0), AffineTransform((3, 4))]
    total, level = SumTransform(parts), CosineSchedule()(torch.tensor([0.3, 0.8], dtype=F64))  # type: ignore[arg-type]
    x = torch.randn(2, 3, 4, dtype=F64)
    expected = x + sum(part(x, level) - x for part in parts)
    torch.testing.assert_close(total(x, level), expected)
    assert not total.data_at_zero and SumTransform([Blur(), Identity()]).data_at_zero
    assert SumTransform([Identity()]).constant and not total.constant


def test_wrong_arguments_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"events of shape \[3\].*shape=\[4\]"):
        AffineTransform([4])(torch.randn(2, 3), SCHEDULE(torch.rand(2)))
    with pytest.raises(UserError, match="basis"):
        AffineTransform([4], "wavelets")  # type: ignore[arg-type]
    for shape, terms in (([], 1), ([0], 1), ([4], 0)):
        with pytest.raises(UserError, match="shape of an event"):
            AffineTransform(shape, terms=terms)
    with pytest.raises(UserError, match="one or more"):
        SumTransform([])
    with pytest.raises(UserError, match="Encoder"):
        SumTransform([Encoder(Dense([3], [2], 8))])


class Exact(DataPredictor):
    """E[x | z_t] of the independent Gaussians, for the gains of a transform without offsets."""

    def __init__(self, transform: AffineTransform):
        super().__init__()
        self.transform = transform

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        one = torch.ones(len(z), len(DEVIATIONS), dtype=F64)
        gain = level.alpha[:, None] * self.transform(one, level)
        variance = torch.from_numpy(DEVIATIONS) ** 2
        return variance * gain / (level.sigma[:, None] ** 2 + gain**2 * variance) * z


def formula(gains: np.ndarray) -> float:
    """The bound in T steps of the exact predictor, nats, from the variances of each dimension.

    .. math::
        \\Delta\\mu = (\\alpha_s c_s - k \\alpha_t c_t)(x - \\hat x), \\qquad
        E (x - \\hat x)^2 = (1/s^2 + \\alpha_t^2 c_t^2/\\sigma_t^2)^{-1}
    """
    gains = gains.reshape(TERMS, len(DEVIATIONS))
    variance, times = DEVIATIONS**2, np.arange(STEPS + 1) / STEPS
    gamma = -6.0 + 10.0 * times
    sigma2 = 1 / (1 + np.exp(-gamma))
    alpha = np.sqrt(1 - sigma2)
    waves = np.cos(math.pi * np.outer(times, np.arange(TERMS)))
    c = 1 + sigma2[:, None] * waves @ gains
    last = alpha[-1] ** 2 * c[-1] ** 2 * variance
    prior = 0.5 * (last + sigma2[-1] - 1 - math.log(sigma2[-1])).sum()
    first = (c[0] - 1) ** 2 * variance * math.exp(6.0)
    reconstruction = 0.5 * (1 + first + math.log(2 * math.pi) - 6.0).sum()
    steps = 0.0
    for s, t in zip(range(STEPS), range(1, STEPS + 1), strict=True):
        v = sigma2[s] * (1 - math.exp(gamma[s] - gamma[t]))
        k = math.sqrt(sigma2[s] - v) / math.sqrt(sigma2[t])
        error = 1 / (1 / variance + alpha[t] ** 2 * c[t] ** 2 / sigma2[t])
        steps += float(((alpha[s] * c[s] - k * alpha[t] * c[t]) ** 2 * error).sum() / (2 * v))
    return float(prior + reconstruction + steps)


def examples(count: int, seed: int = 0) -> Tensor:
    noise = torch.randn(count, 4, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(DEVIATIONS) * noise


def gaussian_model(gains: Sequence[float] | np.ndarray | None = None) -> NDM:
    transform = AffineTransform([4], terms=TERMS).double()
    if gains is not None:
        transform.gains.data = torch.as_tensor(gains).reshape(TERMS, 4)
    return NDM(SCHEDULE, transform, Exact(transform), GaussianDecoder(), steps=STEPS)


def test_the_bound_of_gains_is_the_formula() -> None:
    gains = 0.1 * np.random.default_rng(0).standard_normal(TERMS * 4)
    model = gaussian_model(gains)
    with torch.no_grad():
        bound = model.bound(examples(200_000), generator=torch.Generator().manual_seed(1)).total
    error = float(bound.std()) / math.sqrt(len(bound))
    assert abs(float(bound.mean()) - formula(gains)) < 4 * error < 0.02 * formula(gains)


@pytest.mark.slow
def test_training_reaches_the_optimum_of_the_formula() -> None:
    """The gains remove a good part of the cost of five steps, and no gains do better."""
    entropy = float(0.5 * np.log(2 * math.pi * math.e * DEVIATIONS**2).sum())
    start = np.zeros(TERMS * 4)
    plain, best = formula(start), scipy.optimize.minimize(formula, start, method="BFGS").fun
    model, generator = gaussian_model(), torch.Generator().manual_seed(2)
    assert isinstance(model.transform, AffineTransform)
    model.transform.offsets.requires_grad_(False)
    optimizer = torch.optim.Adam([model.transform.gains], lr=0.2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        optimizer.zero_grad()
        model.bound(examples(1000, step), generator=generator).loss.mean().backward()
        optimizer.step()
        decay.step()
    found = formula(model.transform.gains.detach().numpy().ravel())
    assert best - 1e-6 < found < best + 0.02 * (plain - best)
    assert plain - best > 0.2 * (plain - entropy), (plain, best, entropy)


def test_a_saved_sum_loads_bit_by_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transform = SumTransform([GatedTransform(MLP(4, 8, 1)), AffineTransform([2, 2], "cosines", 2)])
    model = NDM(SCHEDULE, transform, Predictor(MLP(4, 8, 1)), GaussianDecoder())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    loaded, x = NDM.from_pretrained(tmp_path / "model"), torch.randn(3, 2, 2)
    level = SCHEDULE(torch.tensor([0.1, 0.5, 0.9]))
    assert torch.equal(loaded.transform(x, level), model.transform(x, level))
    assert not torch.equal(loaded.transform(x, level), x)
