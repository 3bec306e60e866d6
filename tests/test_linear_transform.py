"""Fixed linear transformations: against scipy, in closed form, and in whole models."""

import math
from collections.abc import Callable

import pytest
import scipy.fft
import torch
from torch import Tensor

from ndm.decoder import GaussianDecoder
from ndm.elbo import diffusion_integrand, prior_term, reconstruction_term
from ndm.errors import UserError
from ndm.forward import ForwardProcess
from ndm.linear_transform import Blur, Downsample, FadingMask, cosines
from ndm.model import NDM
from ndm.nn import UNet
from ndm.ode import OdeSettings, ode_log_prob
from ndm.predictor import DataPredictor, Predictor
from ndm.reverse import ReverseProcess
from ndm.schedule import CosineSchedule, LinearLogSNRSchedule, NoiseLevel, Schedule
from ndm.time_sampling import Draw
from ndm.transform import Transform
from oracles import F64, cubature_points, gauss_times, gaussian_kl

OPERATORS: dict[str, Callable[[], Transform]] = {
    "blur": lambda: Blur(1.5, 0.05),
    "mask": lambda: FadingMask(3.0, 0.4),
    "downsample": lambda: Downsample((0.4, 0.75)),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)
SCHEDULE = LinearLogSNRSchedule(-4.0, 3.0)
TIMES = torch.tensor([0.0, 0.13, 0.5, 0.72, 1.0], dtype=F64)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("event", [(3, 5, 8), (7, 4), (1, 1, 6), (2, 3, 4, 4)])
def test_blur_matches_the_published_operator_by_scipys_cosine_transform(
    event: tuple[int, ...],
) -> None:
    """Hoogeboom & Salimans 2023, appendix.

    scaling = exp(-lambda tau) (1 - min_scale) + min_scale, alpha = a_t scaling.
    """
    sigma_max, d_min = 3.0, 0.02
    process = ForwardProcess(CosineSchedule(-6.0, 4.0), Blur(sigma_max, d_min))
    x = images(5, *event)
    marginal = process.marginal(x, process.schedule(TIMES))
    for row, t in enumerate(TIMES.tolist()):
        dissipation = (sigma_max * math.sin(t * math.pi / 2) ** 2) ** 2 / 2
        height, width = (math.pi * torch.arange(n, dtype=F64) / n for n in event[-2:])
        decay = torch.exp(-(height[:, None] ** 2 + width[None] ** 2) * dissipation)
        scaling = (decay * (1 - d_min) + d_min).numpy()
        level = process.schedule(torch.tensor([t], dtype=F64))
        frequencies = scipy.fft.dctn(x[row].numpy(), axes=(-2, -1), norm="ortho")
        scaled = float(level.alpha) * scaling * frequencies
        expected = torch.from_numpy(scipy.fft.idctn(scaled, axes=(-2, -1), norm="ortho"))
        torch.testing.assert_close(marginal.mean[row], expected, rtol=1e-10, atol=1e-12)


def test_blur_far_from_the_edges_is_the_heat_kernel() -> None:
    """A point becomes a Gaussian of standard deviation sigma_B pixels, and the sum is preserved."""
    x = torch.zeros(2, 41, 41, dtype=F64)
    x[:, 20, 20] = 1.0
    t = torch.tensor([0.5, 2 / 3], dtype=F64)
    found = Blur(4.0, 0.0)(x, SCHEDULE(t))
    away = torch.arange(41, dtype=F64) - 20
    for row, width in enumerate((2.0, 3.0)):
        bell = torch.exp(-0.5 * (away / width) ** 2) / (width * math.sqrt(2 * math.pi))
        torch.testing.assert_close(found[row], bell[:, None] * bell, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2, dtype=F64))


def test_blur_solves_the_heat_equation_of_the_whole_image() -> None:
    """For a cosine, an eigenfunction of the Laplacian between insulated edges: the chain rule."""
    rows, columns = ((torch.arange(n, dtype=F64) + 0.5) / n for n in (6, 9))
    wave = (torch.cos(math.pi * 2 * rows)[:, None] * torch.cos(math.pi * 3 * columns))[None]
    t, sigma_max = torch.tensor([0.3], dtype=F64), 2.5
    value, derivative = Blur(sigma_max, 0.0).with_derivative(wave, SCHEDULE(t))
    tau_rate = sigma_max**2 * math.pi * math.sin(0.15 * math.pi) ** 3 * math.cos(0.15 * math.pi)
    laplacian = -(math.pi**2) * (4 / 36 + 9 / 81) * value
    torch.testing.assert_close(derivative, tau_rate * laplacian, rtol=1e-6, atol=1e-9)
    assert float(derivative.abs().max()) > 0.05


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_cosines_are_orthonormal_and_can_be_built_in_inference_mode(size: int) -> None:
    cosines.cache_clear()
    with torch.inference_mode():
        matrix = cosines(size, F64, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=F64))
    x = images(1, size, size).requires_grad_()
    blurred = Blur()(x, SCHEDULE(torch.ones(1, dtype=F64)))
    blurred.square().sum().backward()  # fails for cached inference tensors


def test_the_mask_is_a_gaussian_that_deepens_and_grows() -> None:
    mask, ones = FadingMask(50.0, 0.2), torch.ones(3, 1, 21, 31, dtype=F64)
    left = mask(ones, SCHEDULE(torch.tensor([0.01, 0.3, 1.0], dtype=F64)))[:, 0]
    down = ((torch.arange(21, dtype=F64) - 10) / 21)[:, None]
    right = (torch.arange(31, dtype=F64) - 15) / 31
    gaussian = torch.exp(-(down**2 + right**2) / (2 * 0.2**2))
    torch.testing.assert_close(1 - left[0], 50 * 0.01**2 * gaussian, rtol=3e-3, atol=0)
    for row, weight in ((1, 4.5), (2, 50.0)):
        torch.testing.assert_close(left[row], torch.exp(-weight * gaussian))
    assert left[2, 10, 15].item() == pytest.approx(math.exp(-50))
    half = [(left[row, 10] < 0.5).sum().item() for row in range(3)]
    assert half[0] == 0 and 10 < half[1] < half[2]


def test_downsampling_interpolates_between_block_averages() -> None:
    """f-DM: stage k is linear from x^k to the upsampled means of its 2 x 2 blocks; by loops."""
    x, down = images(2, 3, 8, 4), Downsample((0.4, 0.75))

    def averaged(image: Tensor) -> Tensor:
        out = image.clone()
        for i in range(0, image.shape[-2], 2):
            for j in range(0, image.shape[-1], 2):
                block = image[..., i : i + 2, j : j + 2]
                out[..., i : i + 2, j : j + 2] = block.sum((-2, -1), keepdim=True) / 4
        return out

    first = averaged(x)
    small = first[..., ::2, ::2]
    second = averaged(small).repeat_interleave(2, -1).repeat_interleave(2, -2)
    for t, expected, slope in [
        (0.0, x, (first - x) / 0.4),
        (0.1, 0.75 * x + 0.25 * first, (first - x) / 0.4),
        (0.4, first, (second - first) / 0.35),
        (0.54, 0.6 * first + 0.4 * second, (second - first) / 0.35),
        (0.75, second, torch.zeros_like(x)),
        (1.0, second, torch.zeros_like(x)),
    ]:
        value, derivative = down.with_derivative(x, SCHEDULE(torch.full((2,), t, dtype=F64)))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(derivative, slope)
    _, at_end = Downsample((1.0,)).with_derivative(x, SCHEDULE(torch.ones(2, dtype=F64)))
    torch.testing.assert_close(at_end, first - x)


class Problem(DataPredictor):
    """Gaussian pixels and a linear F as dense matrices; as a module it is the exact predictor."""

    def __init__(self, schedule: Schedule, transform: Transform, event: tuple[int, ...] = (4, 4)):
        super().__init__()
        self.process, self.event = ForwardProcess(schedule, transform), event
        self.dims = math.prod(event)
        generator = torch.Generator().manual_seed(5)
        factor = 0.4 * torch.randn(self.dims, self.dims, dtype=F64, generator=generator)
        self.covariance = factor @ factor.T + 0.1 * torch.eye(self.dims, dtype=F64)
        self.mean = torch.randn(self.dims, dtype=F64, generator=generator)

    @property
    def reverse(self) -> ReverseProcess:
        return ReverseProcess(self.process, self)  # type: ignore[arg-type]

    def matrices(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """C_t and its derivative ``(N, D, D)`` from unit images."""
        units = torch.eye(self.dims, dtype=F64).repeat(len(t), 1).reshape(-1, *self.event)
        level = self.process.schedule(t.repeat_interleave(self.dims))
        value, derivative = self.process.transform.with_derivative(units, level)
        shape = (len(t), self.dims, self.dims)
        return value.reshape(shape).mT, derivative.reshape(shape).mT

    def latent(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level, (matrix, _) = self.process.schedule(t), self.matrices(t)
        alpha, sigma = level.alpha[:, None, None], level.sigma[:, None, None]
        covariance = alpha**2 * matrix @ self.covariance @ matrix.mT
        covariance += sigma**2 * torch.eye(self.dims, dtype=F64)
        return level.alpha[:, None] * (matrix @ self.mean), covariance

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        times, inverse = level.t.unique(return_inverse=True)
        mean, covariance = self.latent(times)
        alpha = self.process.schedule(times).alpha[:, None, None]
        gain = alpha * self.covariance @ self.matrices(times)[0].mT @ torch.linalg.inv(covariance)
        away = z.flatten(1) - mean[inverse]
        return (self.mean + (gain[inverse] @ away[..., None])[..., 0]).reshape(z.shape)


# Not downsampling: its Markov process has infinite noise where C_t is singular.
@pytest.mark.parametrize("name", ["blur", "mask"])
def test_the_generative_ode_is_the_published_probability_flow(name: str) -> None:
    """Song et al.'s flow f z - ½ g² score of the Markov SDE with the same marginals.

    f = (alpha C)' (alpha C)^-1, g² = 2 sigma sigma' - 2 f sigma².
    """
    problem = Problem(SCHEDULE, OPERATORS[name]())
    t = torch.tensor([0.2, 0.35, 0.9], dtype=F64)
    level, (matrix, slope) = problem.process.schedule(t), problem.matrices(t)
    alpha, dalpha = level.alpha[:, None, None], level.dalpha[:, None, None]
    f = (dalpha * matrix + alpha * slope) @ torch.linalg.inv(alpha * matrix)
    eye = torch.eye(problem.dims, dtype=F64)
    sigma, dsigma = level.sigma[:, None, None], level.dsigma[:, None, None]
    g_squared = 2 * sigma * dsigma * eye - sigma**2 * (f + f.mT)
    z = images(3, 4, 4, seed=2)
    mean, covariance = problem.latent(t)
    away = (z.flatten(1) - mean)[..., None]
    score = -torch.linalg.solve(covariance, away)
    expected = (f @ z.flatten(1)[..., None] - 0.5 * g_squared @ score)[..., 0]
    found = problem.reverse.drift(z, level, 0.0).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@every_operator
def test_the_soft_score_is_the_score_of_the_marginal(name: str) -> None:
    """Daras et al. 2023: grad log q_t(z) = (C_t E[x|z] - z)/s_t²; their C_t is our alpha_t C_t."""
    problem = Problem(SCHEDULE, OPERATORS[name]())
    level = problem.process.schedule(torch.full((3,), 0.6, dtype=F64))
    z = images(3, 4, 4, seed=2)
    corrupted = level.alpha[:, None, None] * problem.process.transform(problem(z, level), level)
    mean, covariance = problem.latent(level.t)
    density = torch.distributions.MultivariateNormal(mean, covariance)
    leaf = z.flatten(1).requires_grad_()
    (score,) = torch.autograd.grad(density.log_prob(leaf).sum(), leaf)
    soft_score = ((corrupted - z) / level.sigma[:, None, None] ** 2).flatten(1)
    torch.testing.assert_close(soft_score, score, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@every_operator
def test_the_ode_has_the_density_of_the_forward_process(name: str) -> None:
    schedule = LinearLogSNRSchedule(-3.0, 20.0)  # without signal at t = 1
    problem = Problem(schedule, OPERATORS[name]())
    z = images(3, 4, 4, seed=3)
    nodes, atol = (64, 2e-3) if name != "downsample" else (512, 2e-2)
    settings = OdeSettings(rtol=1e-6, atol=1e-6, nodes=nodes, probes="exact")
    found = ode_log_prob(problem.reverse, z, settings)
    mean, covariance = problem.latent(torch.zeros(1, dtype=F64))
    expected = torch.distributions.MultivariateNormal(mean[0], covariance[0]).log_prob(z.flatten(1))
    torch.testing.assert_close(found.log_p, expected, rtol=0, atol=atol)


@pytest.mark.slow
@every_operator
def test_the_bound_of_the_exact_predictor_matches_its_closed_form(name: str) -> None:
    """Entropy, gaps of prior and decoder, and ½ ∫ e^-gamma tr P^-1 C'ᵀ C'/gamma' for a moving F."""
    problem = Problem(SCHEDULE, OPERATORS[name]())
    size, eye = problem.dims, torch.eye(problem.dims, dtype=F64)
    points = cubature_points(2 * size)
    factor = torch.linalg.cholesky(problem.covariance)
    x = (problem.mean + points[:, :size] @ factor.T).reshape(-1, *problem.event)
    noise = points[:, size:].reshape(x.shape)
    curve, process = problem.process.transform.curve(x), problem.process
    found = prior_term(process, x, curve).mean()
    found += reconstruction_term(process, GaussianDecoder(), x, noise).mean()
    times = gauss_times(40)
    for t in times:
        draw = Draw(t.expand(len(x)), noise)
        found += diffusion_integrand(problem.reverse, curve, draw).bound.mean() / len(times)

    level, (matrix, slope) = process.schedule(times), problem.matrices(times)
    snr, dgamma = torch.exp(-level.gamma)[:, None, None], level.dgamma[:, None, None]
    precision = torch.linalg.inv(problem.covariance) + snr * matrix.mT @ matrix
    inner = torch.linalg.solve(precision, snr * slope.mT @ slope / dgamma)
    path = 0.5 * inner.diagonal(dim1=-2, dim2=-1).sum(-1).mean()
    zero = torch.zeros(size, dtype=F64)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * problem.covariance)
    ends = [torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)]
    end_mean, end_covariance = problem.latent(ends[1])
    start = process.schedule(ends[0])
    # C_0 = I: the decoder N(z_0/alpha_0, e^gamma_0) against q(x|z_0).
    width = torch.exp(start.gamma) * eye
    posterior = torch.linalg.inv(torch.linalg.inv(problem.covariance) + torch.linalg.inv(width))
    _, start_covariance = problem.latent(ends[0])
    gain = start.alpha * problem.covariance @ torch.linalg.inv(start_covariance[0])
    gain -= eye / start.alpha
    decoder = gaussian_kl(zero, posterior, zero, width)
    decoder += 0.5 * torch.trace(gain @ start_covariance[0] @ gain.T) / torch.exp(start.gamma)[0]
    expected = entropy + gaussian_kl(end_mean[0], end_covariance[0], zero, eye) + decoder + path
    assert path > 0.02
    assert found.item() == pytest.approx(expected.item(), abs=2e-3)


@every_operator
def test_a_model_with_an_operator_trains_and_samples(name: str) -> None:
    torch.manual_seed(0)
    schedule, predictor = LinearLogSNRSchedule(-5.0, 4.0), Predictor(UNet(1, 8, (1,)))
    model = NDM(schedule, OPERATORS[name](), predictor, GaussianDecoder())
    x = torch.randn(4, 1, 8, 12)
    for steps in (None, 10):
        bound = model.bound(x, steps=steps)
        bound.total.mean().backward()
        assert all(bool(term.isfinite().all()) for term in bound.terms().values())
    assert model.sample((2, 1, 8, 12), steps=3, seed=0).isfinite().all()


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: Blur(0.0), "sigma_max=0"),
        (lambda: Blur(d_min=1.0), r"d_min=1.*\[0, 1\)"),
        (lambda: FadingMask(strength=-1.0), "strength=-1"),
        (lambda: FadingMask(width=0.0), "width=0"),
        (lambda: Downsample(()), "ends="),
        (lambda: Downsample((0.5, 0.5)), "ends="),
        (lambda: Downsample((0.5, 1.1)), "ends="),
        (lambda: Downsample((0.0, 0.5)), "ends="),
        (
            lambda: Downsample()(torch.zeros(1, 1, 8, 6), SCHEDULE(torch.zeros(1))),
            "4 x 4.*8 x 6.*fewer ends",
        ),
        (lambda: Blur()(torch.zeros(2, 3), SCHEDULE(torch.zeros(2))), r"images.*\(2, 3\)"),
        (lambda: Downsample()(torch.zeros(2, 3), SCHEDULE(torch.zeros(2))), r"images.*\(2, 3\)"),
    ],
)
def test_invalid_arguments_and_shapes_are_rejected_in_one_line(
    make: Callable[[], object], pattern: str
) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        make()
    assert "\n" not in str(caught.value)
