"""Guidance: for F = c(t) x it must be that of a plain diffusion with alpha c in place of alpha."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ndm
from ndm.condition import ClassCondition
from ndm.curve import Curve
from ndm.errors import UserError
from ndm.guidance import GuidedReverse, guided
from ndm.reverse import ReverseProcess
from ndm.schedule import NoiseLevel
from ndm.transform import GatedTransform, Transform
from oracles import F64, FormulaCurve, LinearTransform
from test_condition import LABELS, SCHEDULE, data, exact_parts, mlp, model

WEIGHTS = [0.5, 2.0, 4.0]


class Scaled(Transform):
    """F(x, t) = c(t) x with c = 1 / (1 + t)."""

    def curve(self, x: Tensor) -> Curve:
        def value(level: NoiseLevel) -> Tensor:
            return x / (1 + level.t[:, None])

        return FormulaCurve(x, value, lambda level: -x / (1 + level.t[:, None]) ** 2)


class Exact(ndm.DataPredictor):
    """E[x|z, c] of the mixture of test_condition for F = c(t) x, at the noise of alpha c."""

    @property
    def conditional(self) -> bool:
        return True

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        whole, components = exact_parts(LinearTransform(torch.zeros(2, 2, dtype=F64)))
        shrunk = NoiseLevel(
            t=0 * level.t,
            gamma=level.gamma,
            alpha=level.alpha / (1 + level.t),
            sigma=level.sigma,
            dalpha=level.dalpha,
            dsigma=level.dsigma,
        )
        assert self.c is not None
        each = torch.stack([problem(z, shrunk) for problem in (*components, whole)])
        return each[self.c.expand(len(z)), torch.arange(len(z))]


def exact_model() -> ndm.NDM:
    return ndm.NDM(
        SCHEDULE, Scaled(), Exact(), ndm.GaussianDecoder(), condition=ClassCondition(2)
    ).double()


def place() -> tuple[Tensor, Tensor]:
    """Latents and times in the middle of the process, where classes are in doubt."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(40, 2, dtype=F64, generator=generator), torch.linspace(0.2, 0.6, 40).double()


def labels() -> Tensor:
    return torch.arange(40) % 2


@pytest.mark.parametrize("guide", ["curve", "x"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_guidance_is_that_of_the_plain_diffusion(guide: Any, weight: float, eta: float) -> None:
    exact = exact_model()
    given = exact.given(labels())
    reverse = guided(given.reverse_process, given.condition, weight, guide)
    assert isinstance(reverse, (GuidedReverse, ReverseProcess))
    z, times = place()
    t, s = SCHEDULE(times), SCHEDULE(times - 0.1)
    x = weight * given.predict(z, times) + (1 - weight) * exact.predict(z, times)

    def shrunk(level: NoiseLevel) -> tuple[Tensor, Tensor]:
        c = 1 / (1 + level.t[:, None])
        alpha = level.alpha[:, None] * c
        return alpha, level.dalpha[:, None] * c - alpha * c

    at, slope = shrunk(t)
    pull = t.dsigma / t.sigma + 0.5 * eta**2 * t.dgamma
    drift = slope * x + pull[:, None] * (z - at * x)
    torch.testing.assert_close(reverse.drift(z, t, eta), drift, rtol=1e-9, atol=1e-9)
    v = eta**2 * s.sigma**2 * (1 - torch.exp(s.gamma - t.gamma))
    k = ((s.sigma**2 - v).sqrt() / t.sigma)[:, None]
    mean = shrunk(s)[0] * x + k * (z - at * x)
    posterior = reverse.posterior(z, s, t, eta)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.std.expand_as(z), v.sqrt()[:, None].expand_as(z))
    torch.testing.assert_close(reverse.predict(z, t), x, rtol=1e-9, atol=1e-9)
    # The score alone: F is guided and its derivative is not.
    rate = -given.predict(z, times) / (1 + times[:, None]) ** 2
    alone = t.dalpha[:, None] * x / (1 + times[:, None]) + t.alpha[:, None] * rate
    alone = alone + pull[:, None] * (z - at * x)
    assert float((alone - drift).detach().abs().max()) > 0.05


@pytest.mark.parametrize("reverse", ["tied", "direct", "direct-score", "diffenc"])
@pytest.mark.parametrize("method", ["ancestral", "sde", "ode"])
def test_a_weight_of_one_is_the_condition_and_zero_is_none(reverse: str, method: str) -> None:
    if reverse == "direct" and method == "ode":
        pytest.skip("direct has no ODE")
    ndm_ = model(reverse=reverse, seen_by=("predictor",))
    given, arguments = ndm_.given(LABELS), {"method": method, "steps": 5, "seed": 0}
    shape = (4, 2)
    for guide in ("curve", "x"):
        none = given.sample(shape, guidance=0.0, guide=guide, **arguments)
        torch.testing.assert_close(none, ndm_.sample(shape, **arguments))
        nearly = given.sample(shape, guidance=1 + 1e-9, guide=guide, **arguments)
        torch.testing.assert_close(nearly, given.sample(shape, **arguments), atol=1e-6, rtol=0)
        strong = given.sample(shape, guidance=3.0, guide=guide, **arguments)
        assert not torch.allclose(strong, nearly)


def test_both_ways_differ_for_a_nonlinear_transformation() -> None:
    """x is guided before F or after it; F is evaluated once or twice."""
    ndm_ = model("gated", seen_by=("predictor",))
    calls = {}
    for guide in ("curve", "x"):
        transform = ndm_.transform
        assert isinstance(transform, GatedTransform)
        count = []
        handle = transform.network.register_forward_hook(lambda *_, count=count: count.append(1))
        calls[guide] = ndm_.given(1).sample(
            (3, 2), "ddim", steps=4, guidance=3.0, guide=guide, seed=0
        )
        handle.remove()
        assert len(count) == (8 if guide == "curve" else 4)
    assert not torch.allclose(calls["curve"], calls["x"])


def test_guidance_that_cannot_work_is_rejected() -> None:
    sees, x = model(), data()
    never = ndm.NDM(
        SCHEDULE,
        ndm.Identity(),
        ndm.Predictor(mlp(1, classes=3)),
        ndm.GaussianDecoder(),
        condition=ClassCondition(3, dropout=0.0),
    ).double()
    plain = ndm.NDM(SCHEDULE, ndm.Identity(), ndm.Predictor(mlp(1)), ndm.GaussianDecoder()).double()
    given = model(seen_by=("predictor",)).given(0)
    reverse = guided(given.reverse_process, given.condition, 2.0)
    cases: list[tuple[str, Any]] = [
        ("transformation F", lambda: sees.given(0).sample((2, 2), guidance=2.0)),
        ("dropping its condition", lambda: never.given(0).sample((2, 2), guidance=2.0)),
        ("needs a model with a condition", lambda: plain.sample((2, 2), guidance=2.0)),
        ("guidance=-1", lambda: given.sample((2, 2), guidance=-1.0)),
        ("guidance=nan", lambda: given.sample((2, 2), guidance=float("nan"))),
        ("guide", lambda: given.sample((2, 2), guidance=2.0, guide="score")),  # type: ignore[arg-type]
        ("no likelihood", lambda: reverse.log_prob(x)),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message):
            call()
