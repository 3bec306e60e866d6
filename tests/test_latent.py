"""Latent diffusion: a linear-Gaussian one in closed form, and a small one of images from end to
end.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from ndm.apps.compress.chain import Chain, Plan
from ndm.data import Digits
from ndm.decoder import Decoder, DiscretizedGaussian, GaussianDecoder, NetworkDecoder
from ndm.elbo import Draw, diffusion_integrand, prior_term, reconstruction_term
from ndm.errors import UserError
from ndm.evaluation.calibrate import best_variance_ratio
from ndm.evaluation.evaluate import Evaluation
from ndm.model import NDM
from ndm.nn import MLP, ConvDecoder, ConvEncoder, Dense, UNet
from ndm.ode import EXACT_UP_TO, OdeSettings
from ndm.predictor import Predictor
from ndm.random import ExampleGenerators, standard_normal, uniform
from ndm.reverse import ReverseProcess
from ndm.schedule import FlowMatchingSchedule, LinearLogSNRSchedule, NoiseLevel, Schedule
from ndm.time_sampling import PiecewiseConstant
from ndm.train.checks import check_parts
from ndm.train.config import RunParts
from ndm.train.settings import TrainSettings
from ndm.transform import Encoder, Identity
from ndm.viz import write_transform
from oracles import F64, GaussianProblem, Points, constant, gaussian_kl, randomized

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


class Linear:
    """x in 3 dimensions, E x = W x in 2, the exact predictor of the latent y ~ N(m_y, S_y), and the
    decoder N(A z_0/alpha_0 + b, s² I).

    A and b are those for which the model's own p(z_0|x) is N(alpha_0 W x, sigma_0² I), the
    encoder's q(z_0|x), at every x.
    """

    @torch.no_grad()
    def __init__(self, schedule: Schedule):
        self.latent = GaussianProblem(schedule, constant(torch.eye(2, dtype=F64)))
        level = schedule(torch.zeros(1, dtype=F64))
        self.alpha, self.sigma = float(level.alpha), float(level.sigma)
        (start_mean, start), (end_mean, end) = self.latent.marginal(0.0), self.latent.marginal(1.0)
        root = self.power(start, 0.5) @ self.power(
            end, -0.5
        )  # the ODE's z_0 = mean_0 + root (z_1 - mean_1), z_1 ~ N(0, I)
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
        """P(x) of the whole model, by the ODE."""
        mean = self.a @ self.z_mean / self.alpha + self.b
        covariance = self.a @ self.z_covariance @ self.a.T / self.alpha**2 + SCALE**2 * torch.eye(
            3, dtype=F64
        )
        return MultivariateNormal(mean.detach(), covariance.detach())


@every_schedule
def test_the_likelihood_of_a_linear_latent_model_is_that_of_its_gaussian(schedule: str) -> None:
    problem = Linear(SCHEDULES[schedule])
    x = 2 * torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = problem.model.log_likelihood(x, samples=2, settings=SETTINGS)
    expected = problem.marginal().log_prob(x)
    assert float(expected.std()) > 1
    torch.testing.assert_close(
        found.log_weights, expected[:, None].expand(6, 2), rtol=0, atol=1e-4
    )  # every single sample is exact


@every_schedule
@pytest.mark.parametrize(
    ("method", "tolerance"), [("ode", 0.03), ("ddim", 0.06)]
)  # DDIM's steps are of first order
def test_samples_of_it_are_distributed_like_the_model(
    schedule: str, method: str, tolerance: float
) -> None:
    problem = Linear(SCHEDULES[schedule])
    found = problem.model.sample((20_000, 3), method=method, steps=100, seed=1)  # type: ignore[arg-type]
    expected = problem.marginal()
    spread = expected.covariance_matrix.diagonal().sqrt()
    assert float(((found.mean(0) - expected.mean) / spread).abs().max()) < tolerance
    assert (
        float(((found.T.cov() - expected.covariance_matrix) / spread[:, None] / spread).abs().max())
        < 2 * tolerance
    )


@every_schedule
@pytest.mark.parametrize("steps", [None, 4000])
def test_the_bound_of_it_is_its_closed_form(schedule: str, steps: int | None) -> None:
    """Data with W x ~ N(m_y, S_y): E NELBO = E[-log p(x|z_0)] + I(x; z_0) + KL(q(z_1) || N(0, I)),
    a whole Markov chain undone.
    """
    problem = Linear(SCHEDULES[schedule])
    model, latent = problem.model, problem.latent
    inverse = torch.linalg.pinv(problem.w)
    left = torch.eye(3, dtype=F64) - inverse @ problem.w  # what the encoder does not see
    mean = inverse @ latent.means[0] + left @ torch.tensor([0.3, -0.2, 0.5], dtype=F64)
    covariance = inverse @ latent.covariances[0] @ inverse.T + 0.2 * left @ left.T
    size = 5  # x and noise: exact for quadratics
    points = math.sqrt(size) * torch.cat([torch.eye(size, dtype=F64), -torch.eye(size, dtype=F64)])
    x, noise = mean + points[:, :3] @ torch.linalg.cholesky(covariance).T, points[:, 3:]
    curve = model.transform.curve(x)
    with torch.no_grad():
        found = (
            prior_term(model.process, x, curve)
            + reconstruction_term(model.process, model.decoder, x, noise, curve)
        ).mean()
        panels = 200
        for t in (
            torch.arange(panels, dtype=F64)[:, None]
            + 0.5
            + torch.tensor([-1, 1], dtype=F64) / math.sqrt(12)
        ).flatten() / panels:
            draw = Draw(t.expand(len(x)), noise)
            found = found + diffusion_integrand(
                model.reverse_process, curve, draw, steps
            ).bound.mean() / (2 * panels)

    zero, eye = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    _, start = latent.marginal(0.0)
    information = 0.5 * torch.logdet(start / problem.sigma**2)
    miss_mean = mean - problem.a @ (problem.w @ mean) - problem.b
    reach = torch.eye(3, dtype=F64) - problem.a @ problem.w
    width = problem.a * problem.sigma / problem.alpha
    miss = (
        miss_mean @ miss_mean
        + torch.trace(reach @ covariance @ reach.T)
        + torch.trace(width @ width.T)
    )
    reconstruction = 0.5 * miss / SCALE**2 + 3 * (math.log(SCALE) + 0.5 * math.log(2 * math.pi))
    expected = reconstruction + information + gaussian_kl(*latent.marginal(1.0), zero, eye)
    assert found.item() == pytest.approx(expected.item(), abs=2e-4 if steps is None else 2e-2)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance)
    assert expected.item() > entropy.item()


class Fixed(nn.Module):
    """A network with a fixed output."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, m: Tensor) -> Tensor:
        return self.output + 0 * m.sum()


LEVEL = LinearLogSNRSchedule(-2.0, 3.0)(torch.zeros(4, dtype=F64))


def test_a_decoder_network_gives_the_mean_of_its_base_distribution() -> None:
    """Against torch.distributions and against the softmax written out; the noise level of z_0 plays
    no part but in z_0/alpha_0.
    """
    generator = torch.Generator().manual_seed(0)
    mean, z = torch.randn(2, 4, 2, dtype=F64, generator=generator)
    decoder = NetworkDecoder(
        affine(torch.tensor([[2.0, 1.0], [0.5, -1.0], [0.3, 0.2]], dtype=F64)),
        GaussianDecoder(),
        0.4,
    ).double()
    x = torch.randn(4, 3, dtype=F64, generator=generator)
    center = decoder.network(z / torch.sigmoid(torch.tensor(2.0, dtype=F64)).sqrt())
    expected = torch.distributions.Normal(center, 0.4).log_prob(x).sum(1)
    torch.testing.assert_close(decoder.log_prob(x, z, LEVEL), expected, rtol=1e-6, atol=1e-6)
    grid = [-1.0, -0.2, 0.1, 0.9]
    discrete = NetworkDecoder(Fixed(mean), DiscretizedGaussian(grid), 0.25)
    values = torch.tensor(grid, dtype=F64)
    probability = torch.softmax(-((mean[..., None] - values) ** 2) / (2 * 0.25**2), -1)
    total = torch.zeros(4, dtype=F64)
    for i, first in enumerate(grid):
        for j, second in enumerate(grid):
            found = discrete.log_prob(
                torch.tensor([[first, second]], dtype=F64).expand(4, 2), z, LEVEL
            )
            torch.testing.assert_close(
                found, (probability[:, 0, i] * probability[:, 1, j]).log(), rtol=1e-5, atol=1e-5
            )
            total += found.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    assert (
        discrete.discrete
        and not decoder.discrete
        and discrete.values is not None
        and discrete.values.tolist() == grid
    )


def test_samples_of_a_decoder_network_follow_its_probabilities() -> None:
    count = 20_000
    level = LinearLogSNRSchedule(-2.0, 3.0)(torch.zeros(count, dtype=F64))
    z, generator = torch.zeros(count, 1, dtype=F64), torch.Generator().manual_seed(0)
    drawn = NetworkDecoder(
        Fixed(torch.full((count, 1), 0.7, dtype=F64)), GaussianDecoder(), 0.5
    ).sample(z, level, generator)
    assert drawn.mean().item() == pytest.approx(
        0.7, abs=0.015
    ) and drawn.std().item() == pytest.approx(0.5, abs=0.01)
    grid = [-1.0, 0.0, 0.5]
    drawn = NetworkDecoder(
        Fixed(torch.full((count, 1), 0.2, dtype=F64)), DiscretizedGaussian(grid), 0.6
    ).sample(z, level, generator)
    expected = torch.softmax(
        torch.tensor([-((0.2 - value) ** 2) / 0.72 for value in grid], dtype=F64), 0
    )
    found = torch.stack([(drawn == value).double().mean() for value in grid])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.015)


def digits_model(steps: int | None = None) -> NDM:
    torch.manual_seed(0)
    return NDM(
        LinearLogSNRSchedule(-6.0, 4.0),
        Encoder(ConvEncoder(1, 2, 8, 2)),
        Predictor(UNet(2, 8, (1,))),
        NetworkDecoder(ConvDecoder(1, 2, 8, 2), DiscretizedGaussian(17)),
        reverse="direct",
        steps=steps,
    )


def test_a_latent_model_of_digits_from_end_to_end(tmp_path: Path) -> None:
    data = Digits()
    train, test = data.split("train"), data.split("test")
    model = digits_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    totals = []
    for _ in range(60):
        x = train.__getitems__(torch.randint(len(train), (64,), generator=generator).tolist())
        bound = model.bound(x)
        optimizer.zero_grad()
        bound.loss.mean().backward()
        optimizer.step()
        totals.append(float(bound.total.detach().mean()) / (64 * math.log(2)))
    assert (
        sum(totals[-10:]) / 10 < 0.8 * sum(totals[:5]) / 5 and totals[-1] < 4.2
    )  # a uniform model has log2(17) = 4.09
    for part in (model.transform, model.predictor, model.decoder):
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in part.parameters())
    write_transform(
        tmp_path / "transform.png", model, x[:2]
    )  # latents of two channels are no pictures
    model.save_pretrained(tmp_path)
    back = NDM.from_pretrained(tmp_path)
    for method in ("ancestral", "ode"):
        samples = [
            m.sample((3, 1, 8, 8), method=method, steps=4, seed=2) for m in (model.eval(), back)
        ]  # type: ignore[arg-type]
        assert samples[0].shape == (3, 1, 8, 8) and samples[0].equal(samples[1])
        DiscretizedGaussian(17).check(samples[0])  # raises unless every value is on the grid
    evaluation = Evaluation(back, test, limit=8, batch_size=4)
    nelbo, nll = (
        evaluation.nelbo(draws=2),
        evaluation.nll(settings=OdeSettings(solver="rk4", nodes=8, probes=1)),
    )
    assert (
        nelbo.values.shape == (8,) and nelbo.protocol.scale == "probability of integers, 17 values"
    )
    assert nelbo.dims == 64 and bool(nll.values.isfinite().all())


def test_the_key_of_the_grid_is_named_where_it_is() -> None:
    """Beneath the decoder network lies the base decoder that knows the values."""
    data, model = Digits(), digits_model()
    assert isinstance(model.decoder, NetworkDecoder)
    base = "model.decoder.init_args.base"
    for decoder, key in (
        (DiscretizedGaussian(5), f"{base}.init_args.num_values=17"),
        (GaussianDecoder(), f"{base}=ndm.DiscretizedGaussian"),
    ):
        latent = NDM(
            model.schedule,
            model.transform,
            model.predictor,
            NetworkDecoder(model.decoder.network, decoder),
            reverse="direct",
        )
        with pytest.raises(UserError, match=f"{re.escape(key)}"):
            check_parts(RunParts(latent, data, TrainSettings()))
    plain = NDM(model.schedule, Identity(), model.predictor, DiscretizedGaussian(5))
    with pytest.raises(UserError, match=r"set model\.decoder\.init_args\.num_values=17"):
        check_parts(RunParts(plain, data, TrainSettings()))


def test_a_latent_model_of_vectors_trains_in_discrete_time_and_with_the_second_head() -> None:
    torch.manual_seed(0)
    parts = Encoder(Dense([5], [2], 16)), NetworkDecoder(Dense([2], [5], 16), GaussianDecoder())
    x = torch.randn(8, 5)
    for reverse, outputs in (("direct", None), ("direct-score", 2)):
        predictor = Predictor(MLP(2, 16, 1, outputs=outputs))
        model = NDM(
            LinearLogSNRSchedule(-5.0, 3.0), parts[0], predictor, parts[1], steps=5, reverse=reverse
        )  # type: ignore[arg-type]
        model.bound(x).loss.mean().backward()
        assert model.sample((3, 5), method="ddim", seed=0).shape == (3, 5)
        assert model.noised(x, 0.5).shape == model.transformed(x, 0.2).shape == (8, 2)


def few_of_many(dims: int, steps: int | None = None) -> NDM:
    """Latents of 2 dimensions for data of many, with a predictor that is off."""
    torch.manual_seed(0)
    encoder, decoder = (
        Dense([dims], [2], 16),
        NetworkDecoder(Dense([2], [dims], 16), GaussianDecoder()),
    )
    predictor = Predictor(randomized(MLP(2, 16, 1), 0.3))
    return NDM(
        LinearLogSNRSchedule(-5.0, 3.0),
        Encoder(encoder),
        predictor,
        decoder,
        steps=steps,
        reverse="direct",
    ).double()


def test_the_fitted_variance_of_a_latent_model_is_at_the_minimum_of_the_bound() -> None:
    """r counts the dimensions of the latent: with those of the data, 40 here, it would stay near 1."""
    model, steps = few_of_many(40), 4
    data = Points(torch.randn(150, 40, dtype=F64, generator=torch.Generator().manual_seed(2)))
    fitted = best_variance_ratio(model, data, steps)
    source = ExampleGenerators(0, range(len(data)), 20)  # the noise of the fit
    curve = model.process.curve(data.x)
    factors = torch.tensor([0.7, 0.9, 0.97, 1.0, 1.03, 1.1, 1.4], dtype=F64)
    with torch.no_grad():
        for part in range(steps):
            u = (part + uniform(data.x[:, 0], source)) / steps
            draw = Draw(u, standard_normal(curve.like, source))
            scales = [PiecewiseConstant(factor * fitted.values) for factor in factors]
            found = [
                diffusion_integrand(
                    model.reverse_process, curve, draw, steps, 1.0, scale
                ).bound.mean()
                for scale in scales
            ]
            assert int(torch.stack(found).argmin()) == 3, f"step {part}"
    assert float(fitted.values.max()) > 1.5


@pytest.mark.parametrize(("asked", "expected"), [("auto", "exact"), (3, 3)])
def test_the_protocol_counts_probes_by_the_dimensions_of_the_latent(
    asked: Any, expected: object
) -> None:
    dims = EXACT_UP_TO + 1
    evaluation = Evaluation(few_of_many(dims), Points(torch.randn(3, dims, dtype=F64)))
    measured = evaluation.nll(
        settings=OdeSettings(solver="rk4", nodes=8, probes=asked), reverse_check=0
    )
    assert measured.protocol.probes == expected
    assert measured.protocol.probe == (None if expected == "exact" else "rademacher")


class Shapeless(Decoder):
    """A decoder of a user's own."""

    discrete = False

    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        return -(x**2).sum(1) - (z**2).sum(1)

    def sample(
        self, z: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        return z.repeat(1, 2)


def test_what_does_not_fit_a_latent_is_refused_in_one_line() -> None:
    schedule, encoder, predictor = (
        LinearLogSNRSchedule(-5.0, 3.0),
        Encoder(Dense([4], [2], 8)),
        Predictor(MLP(2, 8, 1)),
    )
    decoder = NetworkDecoder(Dense([2], [4], 8), GaussianDecoder())
    model = NDM(schedule, encoder, predictor, decoder, reverse="direct")
    x = torch.randn(3, 4)
    cases = [
        (lambda: NDM(schedule, encoder, predictor, decoder), "tied.*Encoder.*reverse=direct"),
        (
            lambda: NDM(schedule, encoder, predictor, decoder, reverse="diffenc"),
            "diffenc.*Encoder.*reverse=direct",
        ),
        (lambda: ReverseProcess(model.process, predictor), "tied"),
        (
            lambda: NDM(schedule, encoder, predictor, GaussianDecoder(), reverse="direct"),
            r"decoder=NetworkDecoder\(network, GaussianDecoder",
        ),
        (
            lambda: NDM(schedule, encoder, predictor, DiscretizedGaussian(4), reverse="direct"),
            "NetworkDecoder",
        ),
        (lambda: model.log_likelihood(x, dequantization="none"), "variational"),
        (
            lambda: NDM(schedule, Identity(), Predictor(MLP(4, 8, 1)), decoder).bound(x),
            "Dense takes",
        ),
        (
            lambda: NetworkDecoder(nn.Linear(2, 3), GaussianDecoder()).log_prob(
                x, x[:, :2], schedule(torch.zeros(3))
            ),
            r"\(3, 2\) to \(3, 3\)",
        ),
        (lambda: NetworkDecoder(lambda m: m, GaussianDecoder()), "nn.Module"),
        (lambda: NetworkDecoder(nn.Linear(2, 3), decoder), "base is a NetworkDecoder"),
        (lambda: NetworkDecoder(nn.Linear(2, 3), GaussianDecoder(), 0.0), "std=0"),
        (lambda: Dense([4], [0]), r"outputs=\[0\]"),
        (lambda: ConvEncoder(1, 2, 8, 2)(torch.zeros(1, 1, 8, 6)), r"multiples of 4.*8, 6"),
        (lambda: ConvDecoder(1, 2, 8, 2)(torch.zeros(1, 1, 2, 2)), "latent_channels"),
        (lambda: ConvEncoder(0), "image_channels=0"),
        (
            lambda: Chain(model, Plan(1, 1, 1.0, (1.0, 1.0), (0.0,), (1.0,), 1.0, 1.0), (4,)),
            "decoder network",
        ),
    ]
    for act, pattern in cases:
        with pytest.raises(UserError, match=pattern) as caught:
            act()  # type: ignore[no-untyped-call]
        assert "\n" not in str(caught.value)
    own = NDM(schedule, encoder, predictor, Shapeless(), reverse="direct")
    assert own.sample((3, 4), steps=2).shape == (3, 4) and own.bound(x).total.shape == (3,)
