"""Training steps never wait for the device; only logging does."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ndm
from ndm.data import Mixture
from ndm.errors import UserError
from ndm.train import callbacks
from ndm.train.config import RunParts
from ndm.train.fit import fit
from ndm.train.run import Run
from ndm.train.settings import TrainSettings


class Waits(TorchDispatchMode):
    """Count operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func in (aten._local_scalar_dense.default, aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def make_model() -> ndm.NDM:
    torch.manual_seed(0)
    transform = ndm.GatedTransform(ndm.nn.MLP(2, hidden=8, blocks=1))
    predictor = ndm.Predictor(ndm.nn.MLP(2, hidden=8, blocks=1))
    return ndm.NDM(
        ndm.LearnedSchedule(-6, 4),
        transform,
        predictor,
        ndm.GaussianDecoder(),
        time_sampler=ndm.ImportanceTimeSampler(bins=4),
    )


DATA = Mixture(means=[[-1.0, 0.5]], stds=[0.3], train_size=64, test_size=16)
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "checkpoint_every": 10**6,
    "log_every": 10**6,
}


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_the_number_of_waits_does_not_depend_on_the_number_of_steps(
    options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "MOVES_EVERY", math.inf)
    monkeypatch.setattr(ndm.GaussianDecoder, "check", lambda *_: None)
    counts = []
    for steps in (2, 12):
        with Waits() as waits:
            settings = TrainSettings(steps=steps, batch_size=16, **OPTIONS, **options)
            fit(RunParts(make_model(), DATA, settings), Run(tmp_path / str(steps)), 0)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("quantity", ["bound", "gradient"])
def test_a_non_finite_value_is_reported_with_its_first_step(
    quantity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint is written after that step."""
    broken, step = make_model(), []
    if quantity == "bound":
        original = broken.bound_at

        def bound_at(x: torch.Tensor, draw: Any) -> Any:
            bound = original(x, draw)
            step.append(len(step))
            if len(step) - 1 in (5, 7):
                bound.prior.mul_(math.inf)
            return bound

        monkeypatch.setattr(broken, "bound_at", bound_at)
    else:

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            step.append(len(step))
            return gradient * math.nan if len(step) - 1 == 5 else gradient

        broken.schedule.log_slope.register_hook(spoil)
    options = {**OPTIONS, "checkpoint_every": 4, "log_every": 10}
    settings = TrainSettings(steps=40, batch_size=16, **options)
    with pytest.raises(UserError, match=rf"the {quantity} is not finite at step 5;"):
        fit(RunParts(broken, DATA, settings), Run(tmp_path), 0)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    for value in checkpoint["current_model_state"].values():
        assert not value.is_floating_point() or bool(value.isfinite().all())
