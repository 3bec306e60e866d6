"""Toy densities: they integrate to one, agree with their samples, and have the right entropy."""

import math

import pytest
import torch

from ndm.data import Checkerboard, Mixture, Pinwheel, TwoMoons
from ndm.errors import UserError

UNEVEN = Mixture([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.0]], [0.3, 0.2, 0.4], [1, 2, 5])
SPIRAL = Pinwheel(arms=3, rate=-0.5)
PLANE = [UNEVEN, Mixture.ring(), Checkerboard(), TwoMoons(), Pinwheel(), SPIRAL]
N = 20_000


def named(source):
    return f"{type(source).__name__}-{len(source._describe_arguments())}"


def square_grid(reach: float, step: float) -> torch.Tensor:
    axis = torch.arange(-reach + step / 2, reach, step, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


@pytest.mark.slow
@pytest.mark.parametrize("source", PLANE, ids=named)
def test_density_integrates_to_one_and_entropy_matches_an_independent_sum(source):
    if isinstance(source, Checkerboard):
        step, reach = source.cell / 20, 4.0 * source.cell
    else:
        step, reach = 0.04, 4.0
    log_p = source.log_prob(square_grid(reach, step))
    assert float(log_p.exp().sum()) * step**2 == pytest.approx(1, abs=1e-5)
    plogp = torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0)
    assert -float(plogp.sum()) * step**2 == pytest.approx(source.entropy(), abs=1e-4)


@pytest.mark.parametrize("source", PLANE, ids=named)
def test_samples_follow_the_density(source):
    x = source.sample(N, torch.Generator().manual_seed(5))
    log_p = source.log_prob(x.double())
    error = float(log_p.std()) / math.sqrt(N)
    assert abs(float(log_p.mean()) + source.entropy()) < 5 * error + 1e-9
    # chi-squared test over 20 x 20 squares
    width = source.cell / 4 if isinstance(source, Checkerboard) else 0.4
    step = width / 8
    fine = square_grid(10 * width, step)
    mass = source.log_prob(fine).exp() * step**2
    empty = torch.zeros(400, dtype=torch.float64)
    expected = N * empty.index_add(0, square_index(fine, width), mass)
    count, large = torch.bincount(square_index(x, width), minlength=400), expected > 10
    freedom = int(large.sum())
    statistic = float(((count - expected) ** 2 / expected)[large].sum())
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def square_index(x: torch.Tensor, width: float) -> torch.Tensor:
    index = torch.floor(x / width + 10).long().clamp(0, 19)
    return index[:, 0] * 20 + index[:, 1]


def test_the_entropy_of_the_checkerboard_is_1_715():
    source = Checkerboard()
    assert source.entropy() == pytest.approx(1.715, abs=5e-4)
    assert float(source.log_prob(torch.tensor([[0.4, 0.4]]))) == pytest.approx(-1.7148, abs=1e-4)
    assert float(source.log_prob(torch.tensor([[0.4, -0.4]]))) == -math.inf
    assert float(source.log_prob(torch.tensor([[9.0, 9.0]]))) == -math.inf
    assert bool(source.log_prob(source.split("train").__getitems__(range(50_000))).isfinite().all())


def test_mixture_moments_match_the_closed_form_in_three_dimensions():
    means = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5]], dtype=torch.float64)
    stds = torch.tensor([0.5, 1.0], dtype=torch.float64)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    source = Mixture(means.tolist(), stds.tolist(), weights.tolist())
    x = source.sample(200_000, torch.Generator().manual_seed(0)).double()
    mean = weights @ means
    within = (weights * stds**2).sum() * torch.eye(3)
    second = torch.einsum("k,ki,kj->ij", weights, means, means) + within
    covariance = second - torch.outer(mean, mean)
    assert torch.allclose(x.mean(0), mean, atol=0.02)
    assert torch.allclose(x.T.cov(), covariance, atol=0.03)
    with pytest.raises(UserError, match="3 dimensions"):
        source.entropy()


def test_one_gaussian_has_the_normal_density_and_entropy():
    source = Mixture([[0.5]], 2.0)
    normal = torch.distributions.Normal(0.5, 2.0)
    x = torch.linspace(-9, 9, 7, dtype=torch.float64)
    assert torch.allclose(source.log_prob(x[:, None]), normal.log_prob(x), atol=1e-12)
    assert source.entropy() == pytest.approx(float(normal.entropy()), abs=1e-6)


def test_the_density_of_the_moons_matches_a_fine_riemann_sum_of_gaussians():
    source = TwoMoons(noise=0.07)
    x = torch.tensor(
        [[0.0, 1.0], [1.0, 0.5], [0.3, -0.4], [2.2, 0.1], [-1.2, -0.1]], dtype=torch.float64
    )
    angle = (torch.arange(200_000, dtype=torch.float64) + 0.5) * math.pi / 200_000
    moons = [
        torch.stack([angle.cos(), angle.sin()], -1),
        torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1),
    ]
    centers = torch.cat(moons)
    for point, log_p in zip(x, source.log_prob(x), strict=True):
        squared = ((point - centers) ** 2).sum(-1)
        density = float(torch.exp(-squared / (2 * 0.07**2)).mean())
        assert float(log_p) == pytest.approx(math.log(density / (2 * math.pi * 0.07**2)), abs=1e-7)


@pytest.mark.parametrize("kind", [Mixture, Checkerboard, TwoMoons, Pinwheel])
def test_each_split_depends_on_the_seed_and_not_on_the_other_split(kind):
    first, again = (kind(train_size=30, test_size=20) for _ in range(2))
    larger = kind(train_size=60, test_size=20)
    other = kind(train_size=30, test_size=20, seed=1)
    test = first.split("test").__getitems__(range(20))
    assert torch.equal(test, larger.split("test").__getitems__(range(20)))
    assert not torch.equal(test, other.split("test").__getitems__(range(20)))
    assert not torch.equal(test, first.split("train").__getitems__(range(20)))
    assert first.describe().sha256 == again.describe().sha256 != other.describe().sha256
    assert first.to_source_units(test) is test and first.describe().log_scale == 0


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: Mixture([[0.0], [1.0, 2.0]]), "means="),
        (lambda: Mixture([]), "means="),
        (lambda: Mixture([1.0, 2.0]), "means=[1.0, 2.0]"),  # type: ignore[list-item]
        (lambda: Mixture([[math.nan]]), "means=[[nan]]"),
        (lambda: Mixture([[0.0], [1.0]], [0.1]), "stds=[0.1]"),
        (lambda: Mixture(stds=-1.0), "stds=-1.0"),
        (lambda: Mixture(weights=[1, 0]), "weights=[1, 0]"),
        (lambda: Mixture(train_size=0), "train_size=0"),
        (lambda: Checkerboard(cell=0.0), "cell=0.0"),
        (lambda: TwoMoons(noise=0.001), "noise=0.001"),
        (lambda: Pinwheel(arms=0), "arms=0"),
        (lambda: Pinwheel().log_prob(torch.zeros(3)), "(3,)"),
        (lambda: Mixture([[0.0, 0.0], [1e4, 1e4]], 1e-3).entropy(), "grid"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(make, culprit):
    with pytest.raises(UserError) as error:
        make()
    assert culprit in str(error.value) and "\n" not in str(error.value)
