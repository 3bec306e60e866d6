"""Latent diffusion with linear Gaussian networks, in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from ndm.decoder import GaussianDecoder, NetworkDecoder
from ndm.elbo import diffusion_integrand, prior_term, reconstruction_term
from ndm.model import NDM
from ndm.ode import OdeSettings
from ndm.schedule import FlowMatchingSchedule, LinearLogSNRSchedule, Schedule
from ndm.time_sampling import Draw
from ndm.transform import Encoder
from oracles import (
    F64,
    GaussianProblem,
    constant,
    cubature_points,
    gauss_times,
    gaussian_kl,
)

SCALE = 0.3
"""Standard deviation of the linear decoder."""
SETTINGS = OdeSettings(rtol=1e-8, atol=1e-8, nodes=128, probes="exact")
SCHEDULES = {"linear": LinearLogSNRSchedule(-4.0, 3.0), "flow": FlowMatchingSchedule(0.1, 0.1)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def affine(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


class LinearModel:
    """A latent model with a linear encoder and decoder.

    x has 3 dimensions and its encoding W x has 2. The predictor is exact for a latent
    y ~ N(m_y, S_y), and the decoder is N(A z_0/alpha_0 + b, s² I). A and b make the model's
    p(z_0|x) equal to the encoder's q(z_0|x) = N(alpha_0 W x, sigma_0² I) at every x.
    """

    @torch.no_grad()
    def __init__(self, schedule: Schedule):
        self.latent = GaussianProblem(schedule, constant(torch.eye(2, dtype=F64)))
        level = schedule(torch.zeros(1, dtype=F64))
        self.alpha, self.sigma = float(level.alpha), float(level.sigma)
        (start_mean, start), (end_mean, end) = self.latent.marginal(0.0), self.latent.marginal(1.0)
        # The ODE maps z_1 ~ N(0, I) to z_0 = mean_0 + root (z_1 - mean_1).
        root = self.power(start, 0.5) @ self.power(end, -0.5)
        self.z_mean, self.z_covariance = start_mean - root @ end_mean, root @ root.T
        precision = torch.linalg.inv(self.z_covariance)
        frame = torch.linalg.qr(torch.tensor([[1.0, 0.3], [-0.4, 1.0], [0.6, 0.8]], dtype=F64)).Q
        eye = torch.eye(2, dtype=F64)
        self.a = self.alpha * SCALE * frame @ self.power(eye / self.sigma**2 - precision, 0.5)
        self.w = self.sigma**2 / (self.alpha * SCALE) ** 2 * self.a.T
        self.b = torch.linalg.pinv(self.a.T) @ (self.alpha * SCALE**2 * precision @ self.z_mean)
        decoder = NetworkDecoder(affine(self.a, self.b), GaussianDecoder(), SCALE).double()
        self.model = NDM(schedule, Encoder(affine(self.w)), self.latent, decoder, reverse="direct")  # type: ignore[arg-type]

    @staticmethod
    def power(matrix: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values**exponent) @ vectors.T

    def marginal(self) -> MultivariateNormal:
        """p(x) of the model, by the ODE."""
        mean = self.a @ self.z_mean / self.alpha + self.b
        covariance = self.a @ self.z_covariance @ self.a.T / self.alpha**2
        covariance += SCALE**2 * torch.eye(3, dtype=F64)
        return MultivariateNormal(mean.detach(), covariance.detach())


@every_schedule
def test_likelihood_of_a_linear_latent_model_matches_its_closed_form(schedule: str) -> None:
    problem = LinearModel(SCHEDULES[schedule])
    x = 2 * torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = problem.model.log_likelihood(x, samples=2, settings=SETTINGS)
    expected = problem.marginal().log_prob(x)
    assert float(expected.std()) > 1
    # Every single sample is exact.
    torch.testing.assert_close(found.log_weights, expected[:, None].expand(6, 2), rtol=0, atol=1e-4)


@every_schedule
@pytest.mark.parametrize(("method", "tolerance"), [("ode", 0.03), ("ddim", 0.06)])
def test_samples_of_a_linear_latent_model_follow_its_density(
    schedule: str, method: str, tolerance: float
) -> None:
    problem = LinearModel(SCHEDULES[schedule])
    found = problem.model.sample((20_000, 3), method=method, steps=100, seed=1)  # type: ignore[arg-type]
    expected = problem.marginal()
    spread = expected.covariance_matrix.diagonal().sqrt()
    assert float(((found.mean(0) - expected.mean) / spread).abs().max()) < tolerance
    error = (found.T.cov() - expected.covariance_matrix) / spread[:, None] / spread
    assert float(error.abs().max()) < 2 * tolerance


@every_schedule
@pytest.mark.parametrize("steps", [None, 4000])
def test_bound_of_a_linear_latent_model_matches_its_closed_form(
    schedule: str, steps: int | None
) -> None:
    """For data with W x ~ N(m_y, S_y) the process is Markov, and
    E NELBO = E[-log p(x|z_0)] + I(x; z_0) + KL(q(z_1) || N(0, I)).
    """
    problem = LinearModel(SCHEDULES[schedule])
    model, latent = problem.model, problem.latent
    inverse = torch.linalg.pinv(problem.w)
    kernel = torch.eye(3, dtype=F64) - inverse @ problem.w  # projects on W x = 0
    mean = inverse @ latent.means[0] + kernel @ torch.tensor([0.3, -0.2, 0.5], dtype=F64)
    covariance = inverse @ latent.covariances[0] @ inverse.T + 0.2 * kernel @ kernel.T
    points = cubature_points(5)  # for x and noise
    x, noise = mean + points[:, :3] @ torch.linalg.cholesky(covariance).T, points[:, 3:]
    curve = model.transform.curve(x)
    with torch.no_grad():
        found = prior_term(model.process, x, curve).mean()
        found += reconstruction_term(model.process, model.decoder, x, noise, curve).mean()
        times = gauss_times(200)
        for t in times:
            draw = Draw(t.expand(len(x)), noise)
            terms = diffusion_integrand(model.reverse_process, curve, draw, steps).bound
            found += terms.mean() / len(times)

    zero, eye = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    _, start = latent.marginal(0.0)
    information = 0.5 * torch.logdet(start / problem.sigma**2)
    bias = mean - problem.a @ (problem.w @ mean) - problem.b
    residual = torch.eye(3, dtype=F64) - problem.a @ problem.w
    width = problem.a * problem.sigma / problem.alpha
    error = bias @ bias + torch.trace(residual @ covariance @ residual.T)
    error += torch.trace(width @ width.T)
    reconstruction = 0.5 * error / SCALE**2 + 3 * (math.log(SCALE) + 0.5 * math.log(2 * math.pi))
    expected = reconstruction + information + gaussian_kl(*latent.marginal(1.0), zero, eye)
    assert found.item() == pytest.approx(expected.item(), abs=2e-4 if steps is None else 2e-2)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance)
    assert expected.item() > entropy.item()
