"""One model of any part of x given any other: laws against Gaussians, where all are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import ndm
from cli.commands import run_command
from ndm.condition import ClassCondition, MaskCondition
from ndm.curve import Curve
from ndm.elbo import BoundDraw
from ndm.errors import UserError
from ndm.ode import OdeSettings
from ndm.schedule import LinearLogSNRSchedule, NoiseLevel
from ndm.serialize import read_json
from ndm.train.run import Run
from ndm.transform import GatedTransform, NetworkTransform, SeparableTransform, Transform
from oracles import F64, FormulaCurve, gauss_times, randomized

SCHEDULE = LinearLogSNRSchedule(-6.0, 14.0)
MEAN = torch.tensor([0.4, -0.9, 0.2], dtype=F64)
COVARIANCE = torch.tensor([[2.0, 1.1, -0.4], [1.1, 0.9, 0.1], [-0.4, 0.1, 0.6]], dtype=F64)
MASKS = [[True, False, True], [False, True, False], [True, True, True], [False, False, True]]
"""Where values are missing."""


class Scaled(Transform):
    """F(x, t) = (1 + t A) x with A mixing all dimensions, or without A, x."""

    def __init__(self, mix: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = mix
        self.a = 0.5 * torch.randn(3, 3, dtype=F64, generator=generator) * mix

    def curve(self, x: Tensor) -> Curve:
        def value(level: NoiseLevel) -> Tensor:
            return x + level.t[:, None] * (x @ self.a.T)

        return FormulaCurve(x, value, lambda level: x @ self.a.T)


class Exact(ndm.DataPredictor):
    """E[x|z_m, x_o] of a Gaussian for F = x + t A x."""

    def __init__(self, a: Tensor):
        super().__init__()
        self.a = a

    @property
    def conditional(self) -> bool:
        return True

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        missing = self.missing
        assert missing is not None
        rows = []
        for i in range(len(z)):
            m = missing[i % len(missing)].bool()
            known = self.known[i % len(missing)]
            matrix = (torch.eye(3, dtype=F64) + level.t[i] * self.a)[m] * level.alpha[i]
            # What is observed: the known values, and z in the missing dimensions.
            observe = torch.cat([torch.eye(3, dtype=F64)[~m], matrix])
            noise = torch.cat([torch.full((int((~m).sum()),), 1e-12), torch.ones(int(m.sum()))])
            noise = noise.double() * torch.where(noise > 0.5, level.sigma[i] ** 2, 1.0)
            spread = observe @ COVARIANCE @ observe.T + noise.diag()
            seen = torch.cat([known[~m].double(), z[i][m]])
            gain = COVARIANCE @ observe.T @ torch.linalg.inv(spread)
            rows.append(MEAN + gain @ (seen - observe @ MEAN))
        return torch.stack(rows)


def exact(mix: bool) -> ndm.NDM:
    transform = Scaled(mix)
    parts = SCHEDULE, transform, Exact(transform.a), ndm.GaussianDecoder()
    return ndm.NDM(*parts, condition=MaskCondition([3])).double()


def examples(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, dtype=F64, generator=generator)
    return MEAN + noise @ torch.linalg.cholesky(COVARIANCE).T


def conditional(x: Tensor, missing: list[bool]) -> tuple[Tensor, Tensor]:
    """Mean ``(B, M)`` and covariance of x_m given x_o."""
    m = torch.tensor(missing)
    if bool(m.all()):
        return MEAN.expand(len(x), 3), COVARIANCE
    gain = COVARIANCE[m][:, ~m] @ torch.linalg.inv(COVARIANCE[~m][:, ~m])
    mean = MEAN[m] + (x[:, ~m] - MEAN[~m]) @ gain.T
    return mean, COVARIANCE[m][:, m] - gain @ COVARIANCE[~m][:, m]


def log_density(x: Tensor, missing: list[bool]) -> Tensor:
    mean, covariance = conditional(x, missing)
    return MultivariateNormal(mean, covariance).log_prob(x[:, torch.tensor(missing)])


@pytest.mark.parametrize("missing", MASKS)
def test_the_likelihood_is_the_conditional_density(missing: list[bool]) -> None:
    """Whatever values are given in the place of those that are missing."""
    model, x = exact(mix=False), examples(3)
    settings = OdeSettings("rk4", probes="exact", nodes=64)
    hidden = torch.where(torch.tensor(missing), 1e3, x)
    given = model.given((hidden, torch.tensor(missing)))
    found = given.log_likelihood(x, dequantization="none", settings=settings).log_p
    # x is z_0/alpha_0 and so has a little noise.
    torch.testing.assert_close(found, log_density(x, missing), rtol=0, atol=0.05)


def test_parts_of_a_gaussian_add_up_to_the_whole() -> None:
    """log p(x_1) + log p(x_2|x_1) = log p(x_2) + log p(x_1|x_2) = log p(x_1, x_2)."""
    model, x = exact(mix=False), examples(4)
    settings = OdeSettings("rk4", probes="exact", nodes=64)

    def log_p(missing: list[bool], known: list[bool]) -> Tensor:
        """log p of the missing dimensions given the known; the rest is averaged out."""
        given = model.given((x, ~torch.tensor(known)))
        everything = given.log_likelihood(x, dequantization="none", settings=settings).log_p
        rest = [not (m or k) for m, k in zip(missing, known, strict=True)]
        if not any(rest):
            return everything
        and_known = model.given((x, torch.tensor(rest)))
        return (
            everything - and_known.log_likelihood(x, dequantization="none", settings=settings).log_p
        )

    none, first = [False] * 3, [True, False, False]
    others = [False, True, True]
    whole = log_p([True] * 3, none)
    one = log_p(first, none) + log_p(others, first)
    two = log_p(others, none) + log_p(first, others)
    torch.testing.assert_close(one, whole, rtol=0, atol=0.02)
    torch.testing.assert_close(two, whole, rtol=0, atol=0.02)


@pytest.mark.parametrize("missing", MASKS)
@pytest.mark.parametrize("steps", [None, 40])
def test_the_bound_is_that_of_the_missing_dimensions(
    missing: list[bool], steps: int | None
) -> None:
    """For F = x, E[NELBO(x_m|x_o)] = H(x_m|x_o) and the price of prior, decoder and steps."""
    model, x = exact(mix=False), examples(40)
    given = model.given((x, torch.tensor(missing)))
    times = gauss_times(20)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = given.bound(x, steps=steps, draws=40, generator=generator).total
    assert len(times) == 40
    gap = float((found + log_density(x, missing)).mean())
    error = float((found + log_density(x, missing)).std()) / 40**0.5
    count = sum(missing)
    least, most = (0.0, 0.02 * count) if steps is None else (0.0, 0.4 * count)
    assert least - 4 * error <= gap <= most + 4 * error


@pytest.mark.parametrize("method", ["ancestral", "ode", "sde", "ddim"])
def test_imputing_a_gaussian_has_its_conditional_moments(method: str) -> None:
    model, missing = exact(mix=False), MASKS[0]
    x = examples(1).expand(700, 3)
    found = model.impute(x, torch.tensor(missing), method=method, steps=20, seed=0)
    mean, covariance = conditional(x[:1], missing)
    m = torch.tensor(missing)
    assert torch.equal(found[:, ~m], x[:, ~m])
    torch.testing.assert_close(found[:, m].mean(0), mean[0], rtol=0, atol=0.15)
    torch.testing.assert_close(found[:, m].T.cov(), covariance, rtol=0, atol=0.25)


def test_f_may_mix_known_and_missing_dimensions() -> None:
    model, missing = exact(mix=True), MASKS[0]
    x = examples(1).expand(500, 3)
    found = model.impute(x, torch.tensor(missing), method="ode", steps=30, seed=0)
    mean, covariance = conditional(x[:1], missing)
    m = torch.tensor(missing)
    torch.testing.assert_close(found[:, m].mean(0), mean[0], rtol=0, atol=0.15)
    torch.testing.assert_close(found[:, m].T.cov(), covariance, rtol=0, atol=0.25)


def random_model(
    form: str, reverse: Any = "tied", steps: int | None = None, learned: bool = False
) -> ndm.NDM:
    def mlp(seed: int, outputs: int | None = None) -> ndm.nn.MLP:
        torch.manual_seed(seed)
        net = ndm.nn.MLP(3, 12, 1, max_frequency=2.0, outputs=outputs, masked=True)
        return randomized(net, 0.3, seed)

    forms = {
        "paper": lambda: NetworkTransform(mlp(3)),
        "gated": lambda: GatedTransform(mlp(3)),
        "separable": lambda: SeparableTransform(mlp(3, 2)),
    }
    outputs = 2 if learned or reverse == "direct-score" else None
    return ndm.NDM(
        LinearLogSNRSchedule(-5.0, 3.0),
        randomized(forms[form](), 0.1),
        ndm.Predictor(mlp(4, outputs), learned_variance=learned),
        ndm.DiscretizedGaussian(6),
        steps=steps,
        reverse=reverse,
        condition=MaskCondition([3]),
    ).double()


CASES = [
    ("paper", "tied", None, False),
    ("gated", "tied", 6, True),
    ("gated", "tied", None, False),
    ("separable", "tied", 6, False),
    ("gated", "direct", 6, True),
    ("gated", "diffenc", None, False),
    ("gated", "direct-score", None, False),
]


@pytest.mark.parametrize(("form", "reverse", "steps", "learned"), CASES)
def test_a_known_example_costs_nothing_and_mixed_masks_are_single_ones(
    form: str, reverse: str, steps: int | None, learned: bool
) -> None:
    model = random_model(form, reverse, steps, learned)
    x = ndm.DiscretizedGaussian(6).values[
        torch.tensor([[0, 3, 5], [1, 1, 2], [4, 0, 0], [5, 5, 1]])
    ]
    missing = torch.tensor([[True, False, True], [True] * 3, [False, True, False], [False] * 3])
    draw = model.draw(x, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.given((x, missing)).bound_at(x, draw)
        for term in found.terms().values():
            assert float(term[3].abs()) < 1e-12
        for i in range(4):
            here = slice(i, i + 1)
            assert draw.weight is not None and draw.noise_0 is not None
            one = BoundDraw(
                draw.u[here], draw.noise[here], None, draw.weight[here], draw.noise_0[here]
            )
            alone = model.given((x[here], missing[here])).bound_at(x[here], one)
            torch.testing.assert_close(found.total[here], alone.total, rtol=1e-9, atol=1e-9)
            # Values in missing places of the condition, and noise in known ones, are unseen.
            hidden = torch.where(missing[here], 0.123, x[here])
            noisy = BoundDraw(
                one.u, torch.where(missing[here], one.noise, 9.0), None, one.weight, one.noise_0
            )
            again = model.given((hidden, missing[here])).bound_at(x[here], noisy)
            torch.testing.assert_close(again.total, alone.total, rtol=1e-9, atol=1e-9)
        everything = model.bound_at(x, draw).total
        null = model.given((x, torch.ones(4, 3, dtype=torch.bool))).bound_at(x, draw).total
        torch.testing.assert_close(everything, null)


@pytest.mark.parametrize("steps", [3, 6])
def test_paths_of_the_missing_dimensions_have_the_mean_of_the_bound(steps: int) -> None:
    """The importance-weighted bound with one path is the NELBO, also with masks."""
    from ndm.discrete_time import path_log_weight

    model = random_model("gated", "tied", steps, True)
    x = ndm.DiscretizedGaussian(6).values[torch.tensor([[0, 3, 5], [4, 0, 0]])].repeat(3000, 1)
    missing = torch.tensor([[True, False, True], [False, True, False]]).repeat(3000, 1)
    given = model.given((x, missing))
    with torch.no_grad():
        log_w = path_log_weight(
            given.reverse_process, given.decoder, x, steps, torch.Generator().manual_seed(0)
        )
        bound = given.bound(x, draws=steps, generator=torch.Generator().manual_seed(1)).total
    for row in range(2):
        a, b = -log_w[row::2], bound[row::2]
        error = (a.var() / len(a) + b.var() / len(b)).sqrt()
        assert float((a.mean() - b.mean()).abs()) < 4 * float(error)


def test_random_masks_know_every_share_and_sometimes_nothing() -> None:
    condition, x = MaskCondition([1, 6, 6], dropout=0.5), torch.rand(4000, 1, 6, 6)
    c = condition.random(x, torch.Generator().manual_seed(0))
    known = c[:, 1:]
    assert torch.equal(c[:, :1], x * known)
    share = known.flatten(1).mean(1)
    assert float(share.mean()) == pytest.approx(0.5, abs=0.03) and float(share.std()) > 0.2
    dropped = condition.dropped(c, torch.Generator().manual_seed(1))
    nothing = (dropped == 0).flatten(1).all(1)
    assert 0.48 < float(nothing.float().mean()) < 0.6
    rows = MaskCondition([5]).random(torch.rand(4000, 5), torch.Generator().manual_seed(0))[:, 5:]
    assert torch.allclose(rows.mean(0), torch.full((5,), 0.5), atol=0.03)


@pytest.mark.parametrize(
    "network",
    [
        ndm.nn.UNet(2, 4, (1, 1), masked=True),
        ndm.nn.DiT(2, 2, 8, 1, 2, masked=True),
        ndm.nn.MLP(32, 8, 1, masked=True),
    ],
)
def test_networks_take_masks_of_images(network: ndm.nn.UNet) -> None:
    condition = MaskCondition([2, 4, 4])
    parts = LinearLogSNRSchedule(), ndm.Identity(), ndm.Predictor(network)
    model = ndm.NDM(*parts, ndm.GaussianDecoder(), condition=condition)
    x, missing = torch.rand(2, 2, 4, 4), torch.rand(4, 4) < 0.5
    found = model.impute(x, missing, steps=2, seed=0)
    assert torch.equal(found[:, :, ~missing], x[:, :, ~missing])
    assert bool((found[:, :, missing] != x[:, :, missing]).all())
    model.bound(x).total.sum().backward()


def test_a_trained_model_imputes_a_column(tmp_path: Path) -> None:
    """From the command line to imputation, against the exact conditional of the data."""
    np.save(tmp_path / "rows.npy", examples(4000).numpy())
    net = "network.masked true --model.{}.network.dims 3"
    run_command(
        "train --config table --data.path", tmp_path / "rows.npy",
        "--model.condition ndm.MaskCondition --model.condition.event_shape [3]",
        f"--model.predictor.{net.format('predictor')} --model.predictor.network.hidden 64",
        f"--model.transform.{net.format('transform')}",
        "--train.steps 500 --train.batch_size 256 --train.learning_rate 4e-3",
        "--train.evaluation_draws 4 --out", tmp_path / "run",
    )  # fmt: skip
    metrics = read_json(tmp_path / "run/metrics.json")
    assert metrics["condition"] == "none" and "nelbo_unconditional_bpd" not in metrics
    run = Run(tmp_path / "run")
    model, source = run.model(), run.data()
    test = source.split("test")[:300]
    missing = torch.tensor([False, True, False])
    found = source.to_source_units(model.impute(test, missing, steps=50, seed=0)).double()
    x = source.to_source_units(test).double()
    torch.testing.assert_close(found[:, [0, 2]], x[:, [0, 2]])
    mean, covariance = conditional(x, missing.tolist())
    error = (found[:, 1] - mean[:, 0]) / covariance[0, 0].sqrt()
    assert float(error.mean().abs()) < 0.35 and 0.7 < float(error.std()) < 1.6
    spread = float(COVARIANCE[1, 1].sqrt() / covariance[0, 0].sqrt())
    assert spread > 2.5, "the known columns say much about the missing one"


def test_requests_that_make_no_sense_are_rejected() -> None:
    model, x = random_model("gated"), torch.zeros(2, 3, dtype=F64)
    plain = ndm.NDM(
        SCHEDULE,
        ndm.Identity(),
        ndm.Predictor(ndm.nn.MLP(3, classes=3)),
        ndm.GaussianDecoder(),
        condition=ClassCondition(3),
    )
    cases: list[tuple[str, Any]] = [
        ("pair", lambda: model.given(3)),
        ("bool tensor", lambda: model.given((x, x))),
        ("give examples", lambda: model.given((x[:, :2], x[:, :2] > 0))),
        ("missing has shape", lambda: model.given((x, torch.zeros(2, 2) > 0))),
        ("class indices", lambda: plain.impute(x.float(), x > 0)),
        ("not finite", lambda: model.given((x / 0, x > 1))),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message):
            call()
    assert torch.equal(model.given((x / 0, x == 0)).c[:, :3], x)  # missing values may be NaN
