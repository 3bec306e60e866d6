r"""Closed-form problems: a Gaussian mixture seen through a linear, time-dependent F.

.. math::
    x \sim \sum_j w_j N(m_j, S_j), \qquad
    F(x, t) = A(t) x + b(t), \quad A(t) = A_0 + t M, \quad b(t) = t c

Every z_t is then a Gaussian mixture, and E[x|z_t] follows by conditioning and responsibilities. F
is affine in x, so f(z, t, E[x|z]) = E[f(z, t, x)|z]: the reverse SDE and ODE with the exact
predictor have the marginals of the forward process for every eta. The bound with the exact
predictor is a different matter. Over the data,

.. math::
    E[\text{NELBO}] - E[-\log p(x)] = KL(q(z_1) \| N(0, I)) + KL(q(z_{<1}|z_1) \| p(z_{<1}|z_1))
    + KL(q(x|z) \| p(x|z_0)) .

The term in the middle is zero only where the forward process, x averaged out, is Markov: eta = 1
and A constant in time. In continuous time :meth:`GaussianProblem.path_gap` has it in closed form;
in discrete time :func:`joint_bound` computes the whole bound from dense joint Gaussians, without
any formula of the bound.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ndm.curve import Curve
from ndm.data import EventDataset
from ndm.elbo import diffusion_integrand, prior_term, reconstruction_term
from ndm.forward import ForwardProcess
from ndm.model import DiffusionModel
from ndm.predictor import DataPredictor
from ndm.reverse import ReverseProcess
from ndm.sample import Step
from ndm.schedule import NoiseLevel, Schedule
from ndm.time_sampling import Draw
from ndm.transform import Transform

F64 = torch.float64
Module = TypeVar("Module", bound=nn.Module)
TILT = torch.tensor([[0.4, -0.7], [0.3, 0.2]], dtype=F64)
"""M: not symmetric, not small."""
OFFSET = torch.tensor([0.5, -0.3], dtype=F64)
SHEAR = torch.tensor([[1.2, 0.5], [-0.3, 0.8]], dtype=F64)
"""A_0 of a transformation that is constant in time but not the identity."""
COVARIANCE = torch.tensor([[2.0, 1.1], [1.1, 0.7]], dtype=F64)
"""Eigenvalues 0.08 and 2.6."""
MEAN = torch.tensor([0.4, -0.9], dtype=F64)


class Constant(nn.Module):
    """A network that returns a fixed output and records its times."""

    def __init__(self, output: object):
        super().__init__()
        self.output, self.seen = output, None

    def forward(self, z: Tensor, t: Tensor) -> object:
        self.seen = t
        return self.output


class FormulaCurve(Curve):
    """A curve given by formulas for its value and its derivative."""

    def __init__(
        self,
        like: Tensor,
        value: Callable[[NoiseLevel], Tensor],
        derivative: Callable[[NoiseLevel], Tensor],
    ):
        self._like, self._value, self._derivative = like, value, derivative

    @property
    def like(self) -> Tensor:
        return self._like

    def at(self, level: NoiseLevel) -> Tensor:
        return self._value(level)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self._value(level), self._derivative(level)


class LinearTransform(Transform):
    """F(x, t) = (A_0 + t M) x + t c."""

    def __init__(self, tilt: Tensor = TILT, offset: Tensor = OFFSET, start: Tensor | None = None):
        super().__init__()
        start = torch.eye(len(tilt), dtype=F64) if start is None else start
        self.start = nn.Parameter(start.clone())
        self.tilt = nn.Parameter(tilt.clone())
        self.offset = nn.Parameter(offset.clone())
        self.data_at_zero = bool((start == torch.eye(len(start), dtype=start.dtype)).all())

    def matrix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """A(t) and b(t) for ``t`` ``(B,)``: ``(B, D, D)`` and ``(B, D)``."""
        return self.start + t[:, None, None] * self.tilt, t[:, None] * self.offset

    def curve(self, x: Tensor) -> Curve:
        def value(level: NoiseLevel) -> Tensor:
            matrix, offset = self.matrix(level.t)
            return (matrix @ x[..., None])[..., 0] + offset

        return FormulaCurve(
            x, value, lambda level: self.rate(level)[:, None] * (x @ self.tilt.T + self.offset)
        )

    def rate(self, level: NoiseLevel) -> Tensor:
        """Speed of A(t) along M and of b(t) along c."""
        return torch.ones_like(level.t)


def constant(start: Tensor) -> LinearTransform:
    """F(x, t) = A_0 x."""
    zero = torch.zeros_like(start)
    return LinearTransform(zero, zero[0], start)


class MixtureProblem(DataPredictor):
    """A Gaussian mixture, a schedule and a linear transformation.

    As a module it is the exact predictor E[x|z_t].
    """

    def __init__(
        self,
        schedule: Schedule,
        transform: LinearTransform,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
    ):
        super().__init__()
        self.process = ForwardProcess(schedule, transform)
        self.weights, self.means, self.covariances = weights, means, covariances
        self.dims = means.shape[1]

    @property
    def linear(self) -> LinearTransform:
        """The transformation."""
        assert isinstance(self.process.transform, LinearTransform)
        return self.process.transform

    @property
    def reverse(self) -> ReverseProcess:
        """The exact reverse process."""
        return ReverseProcess(self.process, self)  # pyright: ignore[reportArgumentType]

    def mean(self) -> Tensor:
        """E[x], ``(D,)``."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """cov x, ``(D, D)``."""
        centered = self.means - self.mean()
        second = self.covariances + centered[:, :, None] * centered[:, None, :]
        return (self.weights[:, None, None] * second).sum(0)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Exact samples of x, ``(count, D)``."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dims, dtype=F64, generator=generator)
        factors = torch.linalg.cholesky(self.covariances)
        return self.means[which] + (factors[which] @ noise[..., None])[..., 0]

    def latent(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Mean ``(B, K, D)`` and covariance ``(B, K, D, D)`` of z_t in each component."""
        matrix, offset = self.linear.matrix(level.t)
        alpha, sigma = level.alpha[:, None, None], level.sigma[:, None, None]
        mean = alpha * (self.means @ matrix.mT + offset[:, None])
        spread = alpha[:, None] ** 2 * (matrix[:, None] @ self.covariances @ matrix[:, None].mT)
        return mean, spread + sigma[:, None] ** 2 * torch.eye(self.dims, dtype=F64)

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        if len(level.t) > 1 and bool((level.t == level.t[0]).all()):  # one time for all: solve once
            level = level.rows(slice(1))
        mean, covariance = self.latent(level)
        matrix, _ = self.linear.matrix(level.t)
        cross = level.alpha[:, None, None, None] * (self.covariances @ matrix[:, None].mT)
        away = z[:, None] - mean
        precision = torch.linalg.inv(covariance)
        conditional = self.means + (cross @ precision @ away[..., None])[..., 0]
        distance = (away[..., None, :] @ precision @ away[..., None])[..., 0, 0]
        logits = self.weights.log() - 0.5 * (distance + torch.logdet(covariance))
        responsibility = torch.softmax(logits, dim=1)
        return (responsibility[..., None] * conditional).sum(1)


class GaussianProblem(MixtureProblem):
    """One correlated Gaussian, far from the identity, with its divergences in closed form."""

    def __init__(
        self,
        schedule: Schedule,
        transform: LinearTransform | None = None,
        mean: Tensor = MEAN,
        covariance: Tensor = COVARIANCE,
    ):
        transform = transform or LinearTransform()
        weights = torch.ones(1, dtype=F64)
        super().__init__(schedule, transform, weights, mean[None], covariance[None])

    def entropy(self) -> Tensor:
        """E[-log p(x)], nats."""
        return 0.5 * torch.logdet(2 * math.pi * math.e * self.covariances[0])

    def marginal(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean ``(D,)`` and covariance ``(D, D)`` of z_t."""
        mean, covariance = self.latent(self.process.schedule(torch.tensor([t], dtype=F64)))
        return mean[0, 0], covariance[0, 0]

    def prior_gap(self) -> Tensor:
        """KL(q(z_1) || N(0, I))."""
        zero, eye = torch.zeros(self.dims, dtype=F64), torch.eye(self.dims, dtype=F64)
        return gaussian_kl(*self.marginal(1.0), zero, eye)

    def decoder_gap(self) -> Tensor:
        """E KL(q(x|z_0) || N(z_0/alpha_0, exp(gamma_0) I)): both Gaussian, and the mean of q(x|z_0)
        is affine in z_0.
        """
        level = self.process.schedule(torch.zeros(1, dtype=F64))
        mean, covariance = self.marginal(0.0)
        matrix = self.linear.matrix(level.t)[0][0]
        gain = level.alpha * self.covariances[0] @ matrix.mT @ torch.linalg.inv(covariance)
        posterior = self.covariances[0] - gain @ (level.alpha * matrix @ self.covariances[0])
        width = torch.exp(level.gamma) * torch.eye(self.dims, dtype=F64)
        slope = gain - torch.eye(self.dims, dtype=F64) / level.alpha
        bias = self.means[0] - mean / level.alpha  # E[x|z_0] - z_0/alpha_0 at z_0 = E z_0
        second = slope @ covariance @ slope.T + torch.outer(bias, bias)
        zero = torch.zeros(self.dims, dtype=F64)
        return gaussian_kl(zero, posterior, zero, width) + 0.5 * torch.trace(second) / width[0, 0]

    def path_gap(self, eta: float, panels: int = 4000) -> Tensor:
        r"""KL(q(z_{<1}|z_1) || p(z_{<1}|z_1)) minus KL(q(x|path) || q(x|z_0)).

        This is the price of a Markov reverse process.
        With the precision of x given z_t, :math:`P = S^{-1} + e^{-\gamma} A^\top A`, the diffusion
        term of the exact predictor is
        :math:`\tfrac12 \log(\det P_0 / \det P_1)` plus

        .. math::
            \tfrac12 \int e^{-\gamma}\, \mathrm{tr}\, P^{-1} \Bigl[
            \tfrac{(1 - \eta^2)^2}{4\eta^2} \gamma' A^\top A
            + \tfrac{\eta^2 - 1}{2\eta^2} (A'^\top A + A^\top A')
            + \tfrac{1}{\eta^2 \gamma'} A'^\top A' \Bigr] dt ,

        which is zero at eta = 1 only where A is constant in time.
        """
        t = (torch.arange(panels, dtype=F64) + 0.5) / panels
        level, slope_of_a = self.process.schedule(t), self.linear.tilt
        matrix, _ = self.linear.matrix(t)
        snr, dgamma = torch.exp(-level.gamma)[:, None, None], level.dgamma[:, None, None]
        precision = torch.linalg.inv(self.covariances) + snr * matrix.mT @ matrix
        mixed = slope_of_a.T @ matrix
        inner = (1 - eta**2) ** 2 / (4 * eta**2) * dgamma * matrix.mT @ matrix
        inner += (eta**2 - 1) / (2 * eta**2) * (mixed + mixed.mT)
        inner += slope_of_a.T @ slope_of_a / (eta**2 * dgamma)
        trace = (torch.linalg.inv(precision) @ (snr * inner)).diagonal(dim1=-2, dim2=-1).sum(-1)
        return 0.5 * trace.mean().detach()

    def cubature(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Data, noise and times whose average integrates quadratics in (x, noise) exactly.

        Returns:
            x and noise ``(P len(times), D)``, times repeated to match, and the mean over the P
            points: ``(N,)`` to ``(len(times),)``.
        """
        points = cubature_points(2 * self.dims)
        x = self.means[0] + points[:, : self.dims] @ torch.linalg.cholesky(self.covariances[0]).T
        noise, count = points[:, self.dims :], len(times)
        return (
            x.repeat(count, 1),
            noise.repeat(count, 1),
            times.repeat_interleave(len(points)),
            lambda v: v.reshape(count, -1).mean(1),
        )


def diffusion(
    process: ForwardProcess,
    predictor: nn.Module,
    x: Tensor,
    u: Tensor,
    noise: Tensor,
    steps: int | None = None,
    eta: float = 1.0,
    **options: Any,
) -> Tensor:
    """The diffusion term of the bound with the tied reverse at u and noise, ``(B,)``."""
    reverse = ReverseProcess(process, predictor)  # type: ignore[arg-type]
    curve, draw = process.transform.curve(x), Draw(u, noise)
    return diffusion_integrand(reverse, curve, draw, steps, eta, **options).bound


def cubature_points(size: int) -> Tensor:
    """Points ``(2 size, size)`` whose average integrates quadratics of N(0, I) exactly."""
    eye = torch.eye(size, dtype=F64)
    return math.sqrt(size) * torch.cat([eye, -eye])


def gauss_times(panels: int) -> Tensor:
    """Two-point Gauss-Legendre nodes ``(2 panels,)`` of [0, 1], of equal weights."""
    middle = torch.arange(panels, dtype=F64)[:, None] + 0.5
    return (middle + torch.tensor([-1, 1], dtype=F64) / math.sqrt(12)).flatten() / panels


def gaussian_kl(
    mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor
) -> Tensor:
    """KL between two Gaussians, by torch.distributions."""
    first = torch.distributions.MultivariateNormal(mean, covariance)
    second = torch.distributions.MultivariateNormal(other_mean, other_covariance)
    return torch.distributions.kl_divergence(first, second)


def joint_bound(problem: GaussianProblem, steps: int, eta: float) -> Tensor:
    """E[NELBO] of the T-step model, E_q[log q(z|x) - log p(z) - log p(x|z_0)], by dense Gaussians.

    q is the chain x, z_1, z_{1-1/T}, ... , z_0 with DDPM's textbook posterior; p runs the same
    steps with E[x|z] in place of x.
    """
    n, eye = problem.dims, torch.eye(problem.dims, dtype=F64)
    level = problem.process.schedule(torch.arange(steps + 1, dtype=F64) / steps)
    matrix, offset = problem.linear.matrix(level.t)
    alpha, sigma = level.alpha.tolist(), level.sigma.tolist()
    size = n * (steps + 2)  # x, then z_1 ... z_0
    # Everything is mean + factor @ white noise.
    mean, factor = torch.zeros(size, dtype=F64), torch.zeros(size, size, dtype=F64)
    mean[:n], factor[:n, :n] = problem.means[0], torch.linalg.cholesky(problem.covariances[0])
    row = n
    mean[row : row + n] = alpha[-1] * (matrix[-1] @ mean[:n] + offset[-1])
    factor[row : row + n] = alpha[-1] * matrix[-1] @ factor[:n]
    factor[row : row + n, row : row + n] = sigma[-1] * eye
    log_ratio = _half_square(mean[row : row + n], factor[row : row + n])
    log_ratio = log_ratio - n * math.log(sigma[-1]) - 0.5 * n
    for i in range(steps, 0, -1):
        ratio = (alpha[i] * sigma[i - 1] / (alpha[i - 1] * sigma[i])) ** 2  # exp(gamma_s - gamma_t)
        variance = eta**2 * sigma[i - 1] ** 2 * (1 - ratio)
        k = math.sqrt(sigma[i - 1] ** 2 - variance) / sigma[i]
        of_x = alpha[i - 1] * matrix[i - 1] - k * alpha[i] * matrix[i]
        bias = alpha[i - 1] * offset[i - 1] - k * alpha[i] * offset[i]
        z_mean, z_factor = mean[row : row + n], factor[row : row + n]
        true_mean = of_x @ mean[:n] + k * z_mean + bias
        true_factor = of_x @ factor[:n] + k * z_factor
        latent_mean, latent_covariance = problem.marginal(i / steps)
        gain = alpha[i] * problem.covariances[0] @ matrix[i].T @ torch.linalg.inv(latent_covariance)
        guess_mean, guess_factor = problem.means[0] + gain @ (z_mean - latent_mean), gain @ z_factor
        model_mean = of_x @ guess_mean + k * z_mean + bias
        model_factor = of_x @ guess_factor + k * z_factor
        gap = _half_square(true_mean - model_mean, true_factor - model_factor)
        log_ratio = log_ratio + gap / variance
        row += n
        mean[row : row + n], factor[row : row + n] = true_mean, true_factor
        factor[row : row + n, row : row + n] = math.sqrt(variance) * eye
    width = (sigma[0] / alpha[0]) ** 2
    z_mean, z_factor = mean[row : row + n], factor[row : row + n]
    miss = _half_square(mean[:n] - z_mean / alpha[0], factor[:n] - z_factor / alpha[0])
    return log_ratio + miss / width + 0.5 * n * math.log(2 * math.pi * width)


def _half_square(mean: Tensor, factor: Tensor) -> Tensor:
    return 0.5 * ((mean**2).sum() + (factor**2).sum())


def repeated(level: NoiseLevel, count: int) -> NoiseLevel:
    """The level ``(1,)`` of one time for ``count`` examples."""
    values = {field.name: getattr(level, field.name).expand(count) for field in fields(level)}
    return NoiseLevel(**values)


def affine_map(
    step: Step, problem: GaussianProblem, t: NoiseLevel, s: NoiseLevel
) -> tuple[Tensor, Tensor, Tensor]:
    """Read a sampler's step off as z_s = a + B z_t + C noise by feeding it unit vectors.

    Returns:
        a ``(D,)``, B and C ``(D, D)``.
    """
    n = problem.dims
    unit, zero = torch.eye(n, dtype=F64), torch.zeros(n, n, dtype=F64)
    z, noise = torch.cat([zero[:1], unit, zero]), torch.cat([zero[:1], zero, unit])
    t, s = repeated(t, 2 * n + 1), repeated(s, 2 * n + 1)
    with torch.no_grad():
        out = step(problem.reverse, z, t, s, noise)
    return out[0], (out[1 : n + 1] - out[0]).T, (out[n + 1 :] - out[0]).T


def mixture_nodes(
    means: Sequence[float] = (-1.5, 1.5), std: float = 0.5, weights: Sequence[float] = (0.4, 0.6)
) -> tuple[Tensor, Tensor]:
    """Points ``(N, 1)`` and weights ``(N,)`` that integrate over a mixture in one dimension."""
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    x = np.array(means)[:, None] + std * node
    share = np.array(weights)[:, None] * weight / weight.sum()
    return torch.from_numpy(x.reshape(-1, 1)), torch.from_numpy(share.ravel())


@torch.no_grad()
def expected_bound(model: DiffusionModel, x: Tensor, share: Tensor) -> float:
    """The mean continuous-time bound over data ``(N, 1)`` with weights ``(N,)``, in nats.

    Integrates over times by Gauss-Legendre and over noise by Gauss-Hermite quadrature.
    """
    node, weight = np.polynomial.hermite_e.hermegauss(20)
    noise = torch.from_numpy(node).repeat(len(x))[:, None]
    weights = torch.from_numpy(weight / weight.sum()).repeat(len(x))
    share = share.repeat_interleave(len(node)) * weights
    x = x.repeat_interleave(len(node), 0)
    curve, total = model.process.curve(x), torch.zeros_like(x[:, 0])
    for place, span in zip(*np.polynomial.legendre.leggauss(64), strict=True):
        draw = Draw(torch.full_like(x[:, 0], (place + 1) / 2), noise)
        integrand = diffusion_integrand(model.reverse_process, curve, draw, None, model.bound_eta)
        total += span / 2 * integrand.bound
    total += prior_term(model.process, x, curve)
    total += reconstruction_term(model.process, model.decoder, x, noise, curve)
    return float(share @ total)


class Points(EventDataset):
    """A data set of the given examples."""

    def __init__(self, x: Tensor):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: object) -> Tensor:
        return self.x[list(indices)]  # type: ignore[call-overload]


def sliced_w2(a: Tensor, b: Tensor, directions: int = 32) -> float:
    """Wasserstein-2 distance of two equally large sets, averaged over fixed 1-D projections."""
    angle = torch.linspace(0, math.pi, directions + 1, dtype=a.dtype)[:-1]
    project = torch.stack([angle.cos(), angle.sin()])
    gap = (a @ project).sort(0).values - (b @ project).sort(0).values
    return float((gap**2).mean().sqrt())


def slope(sizes: list[int], errors: list[float]) -> float:
    """Convergence order: minus the slope of log error against log size."""
    x, y = torch.tensor(sizes, dtype=F64).log(), torch.tensor(errors, dtype=F64).log()
    x = x - x.mean()
    return float(-(x * (y - y.mean())).sum() / (x * x).sum())


def randomized(module: Module, scale: float = 0.3, seed: int = 0) -> Module:
    """Add noise to every parameter, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, dtype=F64, generator=generator))
    return module


class OwnNetwork(nn.Module):
    """A custom network for data ``(B, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.linear(torch.cat([z, t[:, None]], dim=1))
