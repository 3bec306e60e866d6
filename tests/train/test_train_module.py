"""The training module: parameter groups, the moving average, and shared data."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

import ndm
from ndm.data import Digits
from ndm.errors import UserError
from ndm.nn import MLP
from ndm.train.callbacks import EMA
from ndm.train.module import TrainingModule
from ndm.train.settings import TrainSettings
from oracles import Points


class Linear(nn.Linear):
    """A linear network that ignores the time."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_the_moving_average_is_exponential_after_its_warm_up() -> None:
    model = ndm.NDM(
        ndm.LinearLogSNRSchedule(),
        ndm.Identity(),
        ndm.Predictor(Linear(1, 1)),
        ndm.GaussianDecoder(),
    )
    module, average = TrainingModule(model, TrainSettings(), 0, Points(torch.zeros(4, 1))), EMA(0.9)
    average.setup(Trainer(accelerator="cpu", logger=False), module, "fit")
    weight, seen = model.predictor.network.weight.data, []
    for count in range(400):
        weight.fill_(count)
        for _ in range(2):  # one update per step, also with accumulated batches
            average.on_train_batch_end(SimpleNamespace(global_step=count + 1), module)
        seen.append(float(average._average_model.module.model.predictor.network.weight.detach()))
    # The average of a ramp lags behind it by decay/(1 - decay).
    assert seen[-1] == pytest.approx(399 - 0.9 / 0.1, abs=1e-3)
    assert seen[0] == 0.0 and seen[1] == pytest.approx(1 - 2 / 11)


def test_a_copy_of_a_data_split_is_the_same_object() -> None:
    data = Digits().split("train")
    assert copy.deepcopy(data) is data


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_parameter_groups_have_their_own_rate_and_decay(optimizer: str) -> None:
    """The rate of F is zero, and only matrices decay.

    The first step of SOAP initializes its basis and changes no weights.
    """
    model = ndm.NDM(
        ndm.LearnedSchedule(),
        ndm.NetworkTransform(MLP(2, hidden=4, blocks=1)),
        ndm.Predictor(MLP(2, hidden=4, blocks=1)),
        ndm.GaussianDecoder(),
    )
    settings = TrainSettings(
        steps=10,
        optimizer=optimizer,
        learning_rate=0.1,
        transform_rate=0.0,
        weight_decay=0.5,
        warmup=0,
        decay="constant",
    )  # type: ignore[arg-type]
    module = TrainingModule(model, settings, 0, Points(torch.zeros(4, 2)))
    stepper = module.configure_optimizers()["optimizer"]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(2):
        for value in model.parameters():
            value.grad = torch.zeros_like(value)
        stepper.step()
    for name, value in model.named_parameters():
        decays = value.dim() >= 2 and ".transform." not in name
        factor = 0.95 ** (2 if optimizer == "adamw" else 1) if decays else 1.0
        torch.testing.assert_close(value.detach(), factor * before[name], msg=name)


def test_no_weight_decay_of_a_module_is_respected() -> None:
    """Networks of timm list names for all their sizes, so some names may not exist."""

    class Network(Linear):
        def no_weight_decay(self) -> set[str]:
            return {"weight", "position"}

    model = ndm.NDM(
        ndm.LinearLogSNRSchedule(),
        ndm.Identity(),
        ndm.Predictor(Network(2, 2)),
        ndm.GaussianDecoder(),
    )
    module = TrainingModule(model, TrainSettings(weight_decay=0.5), 0, Points(torch.zeros(4, 2)))
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 2


def test_soap_with_sharded_weights_is_rejected() -> None:
    with pytest.raises(UserError, match="optimizer=adamw"):
        TrainSettings(optimizer="soap", strategy="fsdp", ema=0, gradient_clip=0)
