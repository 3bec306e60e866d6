"""Learned noise in use: saving, loading, evaluation, sampling and unsupported uses."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ndm.apps.compress.chain import make_plan
from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.discrete_time import path_log_weight
from ndm.errors import UserError
from ndm.evaluation.calibrate import best_eta, best_variance_ratio
from ndm.evaluation.evaluate import Evaluation
from ndm.model import NDM
from ndm.nn import UNet
from ndm.ode import OdeSettings
from ndm.predictor import Predictor
from ndm.schedule import FlowMatchingSchedule, LearnedSchedule, LinearLogSNRSchedule
from ndm.transform import SeparableTransform
from ndm.variants.nfdm import NFDM, NetworkScale
from oracles import F64, Points, randomized
from variants.test_nfdm import batch, learned_scale, model, network

COARSE = OdeSettings(rtol=1e-3, atol=1e-3, nodes=16)


@pytest.mark.slow
def test_bound_and_likelihood_of_a_data_set_are_evaluated() -> None:
    ours, data = model(), Points(batch(12)[0])
    measured = Evaluation(ours, data)
    bound = measured.nelbo(draws=16)
    assert bound.name == "nelbo" and math.isfinite(bound.nats)
    many, generator = data.x.repeat(64, 1), torch.Generator().manual_seed(0)
    terms = ours.bound(many, draws=8, generator=generator).total
    error = bound.stderr + terms.std().item() / math.sqrt(len(terms))
    assert abs(bound.nats - terms.mean().item()) < 5 * error
    likelihood = measured.nll(settings=COARSE, reverse_check=4)
    expected = -ours.log_likelihood(data.x, settings=COARSE).log_p
    assert likelihood.nats == pytest.approx(expected.mean().item(), rel=1e-6)
    assert likelihood.protocol.reversibility["rms_error"] < 0.1


@pytest.mark.slow
def test_a_fitted_eta_lowers_the_bound() -> None:
    ours, data = model(), Points(batch(64)[0])
    eta = best_eta(ours, data, bins=4)

    def bound(eta: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        return ours.bound(data.x, eta=eta, draws=32, generator=generator).diffusion.mean().item()

    assert all(bound(eta) < bound(other) for other in (1.0, 0.8, 1.25))


def test_a_model_of_discrete_images_saves_loads_and_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = lambda **more: UNet(1, 8, (1, 2), max_frequency=2.0, **more)  # noqa: E731
    transform, scale = SeparableTransform(net(outputs=3)), NetworkScale(net(), "bridge")
    parts = LearnedSchedule(-8.0, 4.0), transform, scale, Predictor(net())
    ours = NFDM(*parts, DiscretizedGaussian(4), eta=0.9)
    randomized(ours, 0.05).float().eval()
    x = DiscretizedGaussian(4).values[torch.randint(4, (3, 1, 6, 6))].float()
    ours.save_pretrained(tmp_path / "model")
    back = NFDM.from_pretrained(tmp_path / "model")
    assert type(back) is NFDM
    assert (back.eta, back.scale.gate, back.scale.one_at_end) == (0.9, "bridge", True)
    with pytest.raises(UserError, match="holds a model of class NFDM, not NDM"):
        NDM.from_pretrained(tmp_path / "model")
    first, second = (
        m.bound(x, draws=2, generator=torch.Generator().manual_seed(0)).total for m in (ours, back)
    )
    assert torch.equal(first, second) and bool(first.isfinite().all())
    for method in ("sde", "ode"):
        first, second = (m.sample((2, 1, 6, 6), method, steps=4, seed=0) for m in (ours, back))
        assert torch.equal(first, second)


class Twice(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, x], 1)


def bridge_without_signal() -> NFDM:
    return model(FlowMatchingSchedule(0.05, 0.0), learned_scale("bridge"))


X = torch.zeros(2, 2, dtype=F64)
REJECTED: dict[str, Callable[[], object]] = {
    "steps of the bound": lambda: model().bound(X, steps=10),
    "one step of the bound": lambda: model().bound(X, steps=1),
    "a reverse variance": lambda: best_variance_ratio(model(), Points(X), 4),
    "paths": lambda: path_log_weight(model().reverse_process, GaussianDecoder(), X, 3),
    "ancestral": lambda: model().sample((2, 2), "ancestral"),
    "ddim": lambda: model().sample((2, 2), "ddim"),
    "compression": lambda: make_plan(model(), 4, 1),
    "gate": lambda: NetworkScale(network(1), "noise"),  # type: ignore[arg-type]
    "network": lambda: NetworkScale(3),  # type: ignore[arg-type]
    "shape": lambda: NetworkScale(Twice())(X, LinearLogSNRSchedule()(X[:, 0])),
    "no signal": lambda: model(FlowMatchingSchedule(0.05, 0.0)),
    "the SDE without signal": lambda: bridge_without_signal().sample((2, 2), "sde"),
    "eta": lambda: model(eta=0.0),
}


@pytest.mark.parametrize("use", REJECTED)
def test_unsupported_uses_are_rejected_in_one_line(use: str) -> None:
    with pytest.raises(UserError) as caught:
        REJECTED[use]()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 30


def test_without_signal_a_bridge_has_a_bound_and_an_ode() -> None:
    ours, generator = bridge_without_signal(), torch.Generator().manual_seed(0)
    assert bool(ours.bound(batch()[0], draws=8, generator=generator).total.isfinite().all())
    assert bool(ours.sample((2, 2), "ode", steps=5, seed=0).isfinite().all())
