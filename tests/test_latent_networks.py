"""Latent diffusion with networks: decoders, training, evaluation and errors."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ndm.apps.compress.chain import Chain, Plan
from ndm.data import Digits
from ndm.decoder import Decoder, DiscretizedGaussian, GaussianDecoder, NetworkDecoder
from ndm.elbo import diffusion_integrand
from ndm.errors import UserError
from ndm.evaluation.calibrate import best_variance_ratio
from ndm.evaluation.evaluate import Evaluation
from ndm.model import NDM
from ndm.nn import MLP, ConvDecoder, ConvEncoder, Dense, UNet
from ndm.ode import EXACT_UP_TO, OdeSettings
from ndm.predictor import Predictor
from ndm.random import ExampleGenerators, standard_normal, uniform
from ndm.reverse import ReverseProcess
from ndm.schedule import LinearLogSNRSchedule, NoiseLevel
from ndm.time_sampling import Draw, PiecewiseConstant
from ndm.train.checks import check_parts
from ndm.train.config import RunParts
from ndm.train.settings import TrainSettings
from ndm.transform import Encoder, Identity
from ndm.viz import write_transform
from oracles import (
    F64,
    Points,
    randomized,
)
from test_latent import affine


class Fixed(nn.Module):
    """A network with a fixed output."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, m: Tensor) -> Tensor:
        return self.output + 0 * m.sum()


LEVEL = LinearLogSNRSchedule(-2.0, 3.0)(torch.zeros(4, dtype=F64))


def test_a_decoder_network_gives_the_mean_of_its_base_distribution() -> None:
    """Matches torch.distributions and the explicit softmax; the noise level enters only by
    z_0/alpha_0.
    """
    generator = torch.Generator().manual_seed(0)
    mean, z = torch.randn(2, 4, 2, dtype=F64, generator=generator)
    weight = torch.tensor([[2.0, 1.0], [0.5, -1.0], [0.3, 0.2]], dtype=F64)
    decoder = NetworkDecoder(affine(weight), GaussianDecoder(), 0.4).double()
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
            x = torch.tensor([[first, second]], dtype=F64).expand(4, 2)
            found = discrete.log_prob(x, z, LEVEL)
            expected = (probability[:, 0, i] * probability[:, 1, j]).log()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            total += found.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    assert discrete.discrete and not decoder.discrete
    assert discrete.values is not None and discrete.values.tolist() == grid


def test_samples_of_a_decoder_network_follow_its_probabilities() -> None:
    count = 20_000
    level = LinearLogSNRSchedule(-2.0, 3.0)(torch.zeros(count, dtype=F64))
    z, generator = torch.zeros(count, 1, dtype=F64), torch.Generator().manual_seed(0)
    network = Fixed(torch.full((count, 1), 0.7, dtype=F64))
    drawn = NetworkDecoder(network, GaussianDecoder(), 0.5).sample(z, level, generator)
    assert drawn.mean().item() == pytest.approx(0.7, abs=0.015)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.01)
    grid = [-1.0, 0.0, 0.5]
    network = Fixed(torch.full((count, 1), 0.2, dtype=F64))
    drawn = NetworkDecoder(network, DiscretizedGaussian(grid), 0.6).sample(z, level, generator)
    logits = torch.tensor([-((0.2 - value) ** 2) / 0.72 for value in grid], dtype=F64)
    expected = torch.softmax(logits, 0)
    found = torch.stack([(drawn == value).double().mean() for value in grid])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.015)


def digits_model(steps: int | None = None) -> NDM:
    torch.manual_seed(0)
    schedule, encoder = LinearLogSNRSchedule(-6.0, 4.0), Encoder(ConvEncoder(1, 2, 8, 2))
    predictor = Predictor(UNet(2, 8, (1,)))
    decoder = NetworkDecoder(ConvDecoder(1, 2, 8, 2), DiscretizedGaussian(17))
    return NDM(schedule, encoder, predictor, decoder, reverse="direct", steps=steps)


@pytest.mark.slow
def test_a_latent_model_of_digits_works_end_to_end(tmp_path: Path) -> None:
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
    assert sum(totals[-10:]) / 10 < 0.8 * sum(totals[:5]) / 5
    assert totals[-1] < 4.2, "a uniform model costs log2(17) = 4.09"
    for part in (model.transform, model.predictor, model.decoder):
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in part.parameters())
    write_transform(tmp_path / "transform.png", model, x[:2])  # latents have two channels
    model.save_pretrained(tmp_path)
    back = NDM.from_pretrained(tmp_path)
    for method in ("ancestral", "ode"):
        options: dict[str, Any] = {"method": method, "steps": 4, "seed": 2}
        first, second = (m.sample((3, 1, 8, 8), **options) for m in (model.eval(), back))
        assert first.shape == (3, 1, 8, 8) and first.equal(second)
        DiscretizedGaussian(17).check(first)  # raises unless every value is on the grid
    evaluation = Evaluation(back, test, limit=8, batch_size=4)
    nelbo = evaluation.nelbo(draws=2)
    nll = evaluation.nll(settings=OdeSettings(solver="rk4", nodes=8, probes=1))
    assert nelbo.values.shape == (8,)
    assert nelbo.protocol.scale == "probability of integers, 17 values"
    assert nelbo.dims == 64 and bool(nll.values.isfinite().all())


def test_errors_name_the_config_key_of_the_grid() -> None:
    """In a decoder network it is a key of the base decoder."""
    data, model = Digits(), digits_model()
    assert isinstance(model.decoder, NetworkDecoder)
    base = "model.decoder.init_args.base"
    for decoder, key in (
        (DiscretizedGaussian(5), f"{base}.init_args.num_values=17"),
        (GaussianDecoder(), f"{base}=ndm.DiscretizedGaussian"),
    ):
        network = NetworkDecoder(model.decoder.network, decoder)
        latent = NDM(model.schedule, model.transform, model.predictor, network, reverse="direct")
        with pytest.raises(UserError, match=re.escape(key)):
            check_parts(RunParts(latent, data, TrainSettings()))
    plain = NDM(model.schedule, Identity(), model.predictor, DiscretizedGaussian(5))
    with pytest.raises(UserError, match=r"set model\.decoder\.init_args\.num_values=17"):
        check_parts(RunParts(plain, data, TrainSettings()))


def test_a_latent_model_of_vectors_trains_in_discrete_time_and_with_the_second_head() -> None:
    torch.manual_seed(0)
    schedule, encoder = LinearLogSNRSchedule(-5.0, 3.0), Encoder(Dense([5], [2], 16))
    decoder = NetworkDecoder(Dense([2], [5], 16), GaussianDecoder())
    x = torch.randn(8, 5)
    for reverse, outputs in (("direct", None), ("direct-score", 2)):
        predictor = Predictor(MLP(2, 16, 1, outputs=outputs))
        model = NDM(schedule, encoder, predictor, decoder, steps=5, reverse=reverse)  # type: ignore[arg-type]
        model.bound(x).loss.mean().backward()
        assert model.sample((3, 5), method="ddim", seed=0).shape == (3, 5)
        assert model.noised(x, 0.5).shape == model.transformed(x, 0.2).shape == (8, 2)


def wide_data_model(dims: int, steps: int | None = None) -> NDM:
    """A model of 2 latent dimensions for data of ``dims``, with an inexact predictor."""
    torch.manual_seed(0)
    encoder = Dense([dims], [2], 16)
    decoder = NetworkDecoder(Dense([2], [dims], 16), GaussianDecoder())
    predictor = Predictor(randomized(MLP(2, 16, 1), 0.3))
    schedule = LinearLogSNRSchedule(-5.0, 3.0)
    model = NDM(schedule, Encoder(encoder), predictor, decoder, steps=steps, reverse="direct")
    return model.double()


def test_fitted_variance_of_a_latent_model_minimizes_the_bound() -> None:
    """The fit divides by the latent dimensions; by the 40 of the data it would stay near 1."""
    model, steps = wide_data_model(40), 4
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
            terms = [
                diffusion_integrand(model.reverse_process, curve, draw, steps, 1.0, scale).bound
                for scale in scales
            ]
            assert int(torch.stack(terms).mean(1).argmin()) == 3, f"step {part}"
    assert float(fitted.values.max()) > 1.5


@pytest.mark.parametrize(("probes", "expected"), [("auto", "exact"), (3, 3)])
def test_automatic_probes_depend_on_the_latent_dimensions(probes: Any, expected: object) -> None:
    dims = EXACT_UP_TO + 1
    evaluation = Evaluation(wide_data_model(dims), Points(torch.randn(3, dims, dtype=F64)))
    settings = OdeSettings(solver="rk4", nodes=8, probes=probes)
    measured = evaluation.nll(settings=settings, reverse_check=0)
    assert measured.protocol.probes == expected
    assert measured.protocol.probe == (None if expected == "exact" else "rademacher")


class CustomDecoder(Decoder):
    """A user's decoder, which does not check shapes."""

    discrete = False

    def log_prob(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        return -(x**2).sum(1) - (z**2).sum(1)

    def sample(
        self, z: Tensor, level: NoiseLevel, generator: torch.Generator | None = None
    ) -> Tensor:
        return z.repeat(1, 2)


def test_parts_that_do_not_fit_a_latent_model_are_rejected_in_one_line() -> None:
    schedule = LinearLogSNRSchedule(-5.0, 3.0)
    encoder = Encoder(Dense([4], [2], 8))
    predictor = Predictor(MLP(2, 8, 1))
    decoder = NetworkDecoder(Dense([2], [4], 8), GaussianDecoder())
    model = NDM(schedule, encoder, predictor, decoder, reverse="direct")
    x = torch.randn(3, 4)
    narrow = NetworkDecoder(nn.Linear(2, 3), GaussianDecoder())
    plan = Plan((0.0, 1.0), 1, 1.0, (1.0, 1.0), (0.0,), (1.0,), 1.0, 1.0)

    def build(decoder: Decoder, reverse: Any = "direct") -> NDM:
        return NDM(schedule, encoder, predictor, decoder, reverse=reverse)

    cases = [
        (lambda: NDM(schedule, encoder, predictor, decoder), "tied.*Encoder.*reverse=direct"),
        (lambda: build(decoder, "diffenc"), "diffenc.*Encoder.*reverse=direct"),
        (lambda: ReverseProcess(model.process, predictor), "tied"),
        (lambda: build(GaussianDecoder()), r"decoder=NetworkDecoder\(network, GaussianDecoder"),
        (lambda: build(DiscretizedGaussian(4)), "NetworkDecoder"),
        (lambda: model.log_likelihood(x, dequantization="none"), "variational"),
        (
            lambda: NDM(schedule, Identity(), Predictor(MLP(4, 8, 1)), decoder).bound(x),
            "Dense takes",
        ),
        (lambda: narrow.log_prob(x, x[:, :2], schedule(torch.zeros(3))), r"\(3, 2\) to \(3, 3\)"),
        (lambda: NetworkDecoder(lambda m: m, GaussianDecoder()), "nn.Module"),
        (lambda: NetworkDecoder(nn.Linear(2, 3), decoder), "base is a NetworkDecoder"),
        (lambda: NetworkDecoder(nn.Linear(2, 3), GaussianDecoder(), 0.0), "std=0"),
        (lambda: Dense([4], [0]), r"outputs=\[0\]"),
        (lambda: ConvEncoder(1, 2, 8, 2)(torch.zeros(1, 1, 8, 6)), r"multiples of 4.*8, 6"),
        (lambda: ConvDecoder(1, 2, 8, 2)(torch.zeros(1, 1, 2, 2)), "latent_channels"),
        (lambda: ConvEncoder(0), "image_channels=0"),
        (lambda: Chain(model, plan, (4,)), "decoder network"),
    ]
    for call, pattern in cases:
        with pytest.raises(UserError, match=pattern) as caught:
            call()  # type: ignore[no-untyped-call]
        assert "\n" not in str(caught.value)
    custom = NDM(schedule, encoder, predictor, CustomDecoder(), reverse="direct")
    assert custom.sample((3, 4), steps=2).shape == (3, 4)
    assert custom.bound(x).total.shape == (3,)
