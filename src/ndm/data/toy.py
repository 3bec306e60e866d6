r"""Toy data with a known density, to check learned likelihoods against the truth.

.. math::
    \text{mixture: } p(x) = \textstyle\sum_k w_k N(x; \mu_k, s_k^2 I), \qquad
    \text{checkerboard: } p(x) = \frac{1}{8 c^2} \text{ on eight cells of side } c, \qquad
    \text{moons: } p(x) =
    \frac{1}{2\pi} \sum_{j=1}^{2} \int_0^\pi N(x; m_j(\theta), s^2 I) \, d\theta .

The pinwheel is a mixture of elongated Gaussians, rotated by an angle that grows with the radius r.
This rotation preserves areas, so p(x) is the mixture's density at the point rotated back. (The
usual pinwheel rotates by a function of the first coordinate instead of r; it looks much the same
and has no closed-form density.) Entropies are exact for the checkerboard and otherwise integrals
over a grid. Toy data are not standardized: x is in the source's units.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ndm.data.arrays import continuous
from ndm.data.source import DataSource, Loaded
from ndm.errors import UserError, check_whole, describe_value

_GRID_POINTS = 2**24  # most points of a grid for the entropy
_ROWS = 4096  # points evaluated at a time


class ToySource(DataSource):
    """A density that can be sampled and evaluated; its splits are samples with a fixed seed.

    Neither split depends on the size of the other.
    """

    def __init__(self, train_size: int, test_size: int, seed: int):
        check_whole("train_size", train_size, 1)
        check_whole("test_size", test_size, 1)
        check_whole("seed", seed, 0)
        self.train_size, self.test_size, self.seed = train_size, test_size, seed

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n examples, ``(n, D)``, float32."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats, ``(B,)``, for x ``(B, D)``.

        It is computed in float64 and returned in the dtype of x.
        """

    @abstractmethod
    def entropy(self) -> float:
        """Return -E log p(x) in nats."""

    def load(self) -> Loaded:
        arrays = {}
        sizes = {"train": self.train_size, "test": self.test_size}
        for index, (split, size) in enumerate(sizes.items()):
            generator = torch.Generator().manual_seed(2 * self.seed + index)
            arrays[split] = self.sample(size, generator).numpy()
        version = f"{self._describe_arguments()}; samples with seed {self.seed}"
        return continuous(type(self).__name__.lower(), version, arrays, standardize=False)

    def _describe_arguments(self) -> str:
        """Describe the arguments of the density, for a description's version."""
        arguments = {
            key: value
            for key, value in self.__getstate__().items()
            if key not in ("train_size", "test_size", "seed")
        }
        return ", ".join(f"{key}={value}" for key, value in arguments.items())


class Mixture(ToySource):
    """A mixture of isotropic Gaussians in any dimension; by default two on a line.

    Args:
        means: one list of D numbers per component.
        stds: standard deviation: one number for all components, or a list with one for each.
        weights: relative weights of the components; equal by default.
        train_size: number of train examples.
        test_size: number of test examples.
        seed: seed of the samples.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]] = ((-1.0,), (1.5,)),
        stds: float | Sequence[float] = 0.5,
        weights: Sequence[float] | None = None,
        train_size: int = 50_000,
        test_size: int = 10_000,
        seed: int = 0,
    ):
        super().__init__(train_size, test_size, seed)
        self.means, self.stds, self.weights = means, stds, weights
        if (
            len({np.shape(mean) for mean in means}) != 1
            or np.ndim(means) != 2
            or not np.size(means)
            or not np.isfinite(means).all()
        ):
            raise UserError(
                f"means={describe_value(means)}: give one list of finite numbers for each"
                " component, all of the same length"
            )
        for name, values in (("stds", self._std_list()), ("weights", self._weight_list())):
            if len(values) != len(means) or not all(0 < value < math.inf for value in values):
                value = describe_value(getattr(self, name))
                raise UserError(
                    f"{name}={value}: give positive finite numbers, one for each of the"
                    f" {len(means)} components"
                )

    @classmethod
    def ring(cls, components: int = 8, radius: float = 1.0, std: float = 0.1) -> "Mixture":
        """Return a mixture of equal Gaussians at equal angles on a circle in the plane."""
        angles = [2 * math.pi * k / components for k in range(components)]
        return cls([[radius * math.cos(angle), radius * math.sin(angle)] for angle in angles], std)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        means, stds, weights = self._parameters()
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, means.shape[1], dtype=torch.float64, generator=generator)
        return (means[chosen] + stds[chosen, None] * noise).float()

    def log_prob(self, x: Tensor) -> Tensor:
        means, stds, weights = (value.to(x.device) for value in self._parameters())
        _check_dimension(x, means.shape[1])
        standardized = (x.double()[:, None] - means) / stds[:, None]
        log_scale = means.shape[1] * torch.log(stds * math.sqrt(2 * math.pi))
        log_normal = -0.5 * (standardized**2).sum(-1) - log_scale
        return torch.logsumexp(weights.log() + log_normal, dim=-1).to(x.dtype)

    def entropy(self) -> float:
        """Return -E log p(x) in nats by quadrature, in one or two dimensions.

        Raises:
            UserError: the mixture has more than two dimensions, or is too fine for the grid;
                average ``-log_prob(sample(n))`` instead.
        """
        means, stds, _ = self._parameters()
        reach = 10 * stds[:, None]
        low, high = (means - reach).amin(0), (means + reach).amax(0)
        return _grid_entropy(self.log_prob, low, high, float(stds.min()) / 5)

    def _std_list(self) -> list[float]:
        if isinstance(self.stds, (int, float)):
            return [float(self.stds)] * len(self.means)
        return [float(std) for std in self.stds]

    def _weight_list(self) -> list[float]:
        if self.weights is None:
            return [1.0] * len(self.means)
        return [float(weight) for weight in self.weights]

    def _parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        means, stds, weights = (
            torch.tensor(v, dtype=torch.float64)
            for v in (self.means, self._std_list(), self._weight_list())
        )
        return means, stds, weights / weights.sum()


class Checkerboard(ToySource):
    """Uniform on eight alternating cells of a 4 x 4 board centered at 0.

    Args:
        cell: side of a cell; with 1/1.2 the entropy is log(8 / 1.44) = 1.715 nats.
        train_size: number of train examples.
        test_size: number of test examples.
        seed: seed of the samples.
    """

    def __init__(
        self,
        cell: float = 1 / 1.2,
        train_size: int = 50_000,
        test_size: int = 10_000,
        seed: int = 0,
    ):
        super().__init__(train_size, test_size, seed)
        self.cell = _positive("cell", cell)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        accepted = torch.empty(0, 2)
        # Rejection in float32, so that rounding never moves a sample into an empty cell.
        while len(accepted) < n:
            x = (4 * torch.rand(2 * n + 16, 2, generator=generator) - 2) * self.cell
            accepted = torch.cat([accepted, x[self._filled(x)]])
        return accepted[:n]

    def log_prob(self, x: Tensor) -> Tensor:
        _check_dimension(x, 2)
        return torch.full_like(x[:, 0], -self.entropy()).masked_fill(~self._filled(x), -math.inf)

    def entropy(self) -> float:
        return math.log(8 * self.cell**2)

    def _filled(self, x: Tensor) -> Tensor:
        index = torch.floor(x.double() / self.cell) + 2
        return ((index >= 0) & (index < 4)).all(-1) & (index.sum(-1) % 2 == 0)


class TwoMoons(ToySource):
    """Two interleaved half circles of radius 1 with Gaussian noise.

    The curves are m_1 = (cos, sin) and m_2 = (1 - cos, 1/2 - sin), with angles uniform on [0, pi].
    scikit-learn's ``make_moons`` uses the same curves, but spaces the angles evenly. ``log_prob``
    is a Gauss-Legendre quadrature over the angle, accurate to about ten digits for points within a
    few ``noise`` of the moons.

    Args:
        noise: standard deviation of the noise, at least 0.005.
        train_size: number of train examples.
        test_size: number of test examples.
        seed: seed of the samples.
    """

    def __init__(
        self, noise: float = 0.1, train_size: int = 50_000, test_size: int = 10_000, seed: int = 0
    ):
        super().__init__(train_size, test_size, seed)
        self.noise = _positive("noise", noise, least=0.005)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        angle = math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
        second = torch.rand(n, generator=generator) < 0.5
        noise = torch.randn(n, 2, dtype=torch.float64, generator=generator)
        first_moon, second_moon = self._moons(angle)
        return (torch.where(second[:, None], second_moon, first_moon) + self.noise * noise).float()

    def log_prob(self, x: Tensor) -> Tensor:
        _check_dimension(x, 2)
        # 16 nodes on every panel of at most two standard deviations.
        panels = math.ceil(math.pi / (2 * self.noise))
        node, weight = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(16))
        start = torch.arange(panels, dtype=torch.float64)[:, None]
        angle = ((start + (node + 1) / 2) * (math.pi / panels)).flatten()
        log_weight = (weight / 2 / panels).log().repeat(2 * panels).to(x.device) - math.log(2)
        points = torch.cat(self._moons(angle)).to(x.device)
        parts = []
        for rows in x.double().split(_ROWS):
            square = ((rows[:, None] - points) ** 2).sum(-1)
            parts.append(torch.logsumexp(log_weight - square / (2 * self.noise**2), dim=-1))
        return (torch.cat(parts) - math.log(2 * math.pi * self.noise**2)).to(x.dtype)

    def entropy(self) -> float:
        """Return -E log p(x) in nats by quadrature.

        This takes a second for a noise of 0.1, and eight times as long for half the noise.
        """
        reach = 9 * self.noise
        low, high = torch.tensor([-1 - reach, -0.5 - reach]), torch.tensor([2 + reach, 1 + reach])
        return _grid_entropy(self.log_prob, low, high, self.noise / 3)

    @staticmethod
    def _moons(angle: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = torch.cos(angle), torch.sin(angle)
        return torch.stack([cos, sin], -1), torch.stack([1 - cos, 0.5 - sin], -1)


class Pinwheel(ToySource):
    """Arms of elongated Gaussians at radius 1, rotated by ``rate`` * exp(radius).

    Args:
        arms: number of arms.
        radial_std: standard deviation along an arm.
        tangential_std: standard deviation across an arm.
        rate: strength of the rotation; 0 for straight arms.
        train_size: number of train examples.
        test_size: number of test examples.
        seed: seed of the samples.
    """

    def __init__(
        self,
        arms: int = 5,
        radial_std: float = 0.3,
        tangential_std: float = 0.1,
        rate: float = 0.25,
        train_size: int = 50_000,
        test_size: int = 10_000,
        seed: int = 0,
    ):
        super().__init__(train_size, test_size, seed)
        check_whole("arms", arms, 1)
        self.arms, self.rate = arms, rate
        self.radial_std = _positive("radial_std", radial_std)
        self.tangential_std = _positive("tangential_std", tangential_std)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        arm = torch.randint(self.arms, (n,), generator=generator)
        noise = torch.randn(n, 2, dtype=torch.float64, generator=generator)
        straight = noise * torch.tensor([self.radial_std, self.tangential_std])
        straight[:, 0] += 1
        angle = arm * (2 * math.pi / self.arms) + self.rate * straight.norm(dim=-1).exp()
        return _rotate(straight, angle).float()

    def log_prob(self, x: Tensor) -> Tensor:
        _check_dimension(x, 2)
        straight = _rotate(x.double(), -self.rate * x.double().norm(dim=-1).exp())
        return self._log_prob_straight(straight).to(x.dtype)

    def entropy(self) -> float:
        """Return -E log p(x) in nats by quadrature.

        The grid covers the straight arms, because the rotation preserves areas and thus entropy.
        """
        stds = (self.radial_std, self.tangential_std)
        reach = torch.full((2,), 1 + 10 * max(stds))
        return _grid_entropy(self._log_prob_straight, -reach, reach, min(stds) / 5)

    def _log_prob_straight(self, x: Tensor) -> Tensor:
        arms = []
        for arm in range(self.arms):
            angle = torch.full_like(x[:, 0], -2 * math.pi * arm / self.arms)
            along, across = _rotate(x, angle).unbind(-1)
            square = ((along - 1) / self.radial_std) ** 2 + (across / self.tangential_std) ** 2
            arms.append(-0.5 * square)
        scale = self.arms * 2 * math.pi * self.radial_std * self.tangential_std
        return torch.logsumexp(torch.stack(arms), dim=0) - math.log(scale)


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], -1)


def _positive(name: str, value: float, least: float = 0.0) -> float:
    if not isinstance(value, (int, float)) or not max(least, 0) <= value < math.inf or value == 0:
        raise UserError(
            f"{name}={describe_value(value)}: give a finite number "
            + (f"of at least {least:g}" if least else "above 0")
        )
    return value


def _check_dimension(x: Tensor, dimension: int) -> None:
    if x.ndim != 2 or x.shape[1] != dimension:
        raise UserError(f"x has shape {tuple(x.shape)}; give points of shape (B, {dimension})")


def _grid_entropy(
    log_prob: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, step: float
) -> float:
    """Return -sum p log p on a regular grid over a box of one or two dimensions.

    For smooth p it converges faster than any power of ``step``.
    """
    counts = torch.ceil((high - low) / step).long() + 1
    if len(low) > 2 or math.prod(counts.tolist()) > _GRID_POINTS:
        raise UserError(
            f"no grid of at most {_GRID_POINTS} points resolves this density in {len(low)}"
            " dimensions (possible: 1 or 2); average -log_prob(sample(n)) instead"
        )
    axes = [
        float(a) + step * torch.arange(int(count), dtype=torch.float64)
        for a, count in zip(low, counts, strict=True)
    ]
    total = 0.0
    for first in axes[0].split(max(1, 2**18 // math.prod(counts[1:].tolist()))):
        log_p = log_prob(torch.cartesian_prod(first, *axes[1:]).reshape(-1, len(low)))
        total -= float((log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum())
    return total * step ** len(low)
