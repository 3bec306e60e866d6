"""A training step asks the device for no number: what it costs is paid per log, not per step."""

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
    """Counts what makes a host wait for a device: every number that Python asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def model() -> ndm.NDM:
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


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}])
def test_more_steps_wait_no_more(
    more: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "MOVES_EVERY", math.inf)
    monkeypatch.setattr(ndm.GaussianDecoder, "check", lambda *_: None)
    counts = []
    for steps in (2, 12):
        with Waits() as waits:
            settings = TrainSettings(steps=steps, batch_size=16, **OPTIONS, **more)
            fit(RunParts(model(), DATA, settings), Run(tmp_path / str(steps)), 0)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("what", ["bound", "gradient"])
def test_what_is_not_finite_is_found_late_and_named_early(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is the first one, whenever it is read; no checkpoint is written after it."""
    broken, step = model(), []
    if what == "bound":
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
    settings = TrainSettings(
        steps=40, batch_size=16, **{**OPTIONS, "checkpoint_every": 4, "log_every": 10}
    )
    with pytest.raises(UserError, match=rf"the {what} is not finite at step 5;"):
        fit(RunParts(broken, DATA, settings), Run(tmp_path), 0)
    kept = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    assert all(
        bool(value.isfinite().all())
        for value in kept["current_model_state"].values()
        if value.is_floating_point()
    )
