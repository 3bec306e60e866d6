"""Compiled networks: the same training, and a way back where the compiler fails."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ndm
from ndm.cli import main
from ndm.train.compilation import compile_networks, compiled_parts
from ndm.transform import Transform

ConfigWriter = Callable[..., Path]


def tiny(transform: Transform) -> ndm.NDM:
    torch.manual_seed(0)
    return ndm.NDM(ndm.LinearLogSNR(-6, 4), transform, ndm.Predictor(ndm.nn.MLP(2, hidden=8, blocks=1)), ndm.GaussianDecoder())


def broken(*_: object, **__: object) -> Callable[[nn.Module], nn.Module]:
    def call(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no C++ compiler\nwas found")

    return call  # type: ignore[return-value]


def test_networks_that_are_differentiated_in_time_are_left_alone() -> None:
    network = ndm.nn.MLP(2, hidden=8, outputs=3)
    model = tiny(ndm.SeparableTransform(network))
    assert compiled_parts(model) == [model.predictor.network, network]
    model = tiny(ndm.NetworkTransform(ndm.nn.MLP(2, hidden=8)))
    assert compiled_parts(model) == [model.predictor.network]


def test_where_the_compiler_fails_training_goes_on_with_one_line(
    write_config: ConfigWriter, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = write_config(), []
    monkeypatch.setattr(torch, "compile", broken)
    for name, flag in (("without", "false"), ("with", "true")):
        capfd.readouterr()
        assert main(["train", "--config", str(config), "--out", str(tmp_path / name), "--train.compile", flag]) == 0
        said = [line for line in capfd.readouterr().err.splitlines() if "compile" in line]
        assert len(said) == (flag == "true")
        assert all("RuntimeError: no C++ compiler was found" in line and "goes on uncompiled" in line for line in said)
        weights.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_failing_trial_leaves_no_trace_and_an_error_of_the_model_passes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny(ndm.Identity())
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(torch, "compile", broken)
    assert not compile_networks(model, lambda: model.bound(torch.ones(4, 2)).total.mean())
    assert "goes on uncompiled" in capfd.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ndm.UserError, match="events of 2 dimensions"):
        compile_networks(model, lambda: model.bound(torch.ones(4, 3)).total.mean())


class Counting(nn.Module):
    """Counts its calls in a buffer, as batch norm does."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = ndm.nn.MLP(2, hidden=8, blocks=1)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.count += 1
        return self.inner(x, t)


@pytest.mark.parametrize("works", [True, False])
def test_a_trial_leaves_buffers_as_they_were_and_clears_gradients(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", (lambda network, **_: network) if works else broken)
    torch.manual_seed(0)
    network = Counting()
    model = ndm.NDM(ndm.LinearLogSNR(-6, 4), ndm.Identity(), ndm.Predictor(network), ndm.GaussianDecoder())

    def loss() -> Tensor:
        return model.bound(torch.ones(4, 2)).loss.mean()

    loss().backward()
    before, calls = copy.deepcopy(model.state_dict()), int(network.count)
    ran = []
    assert compile_networks(model, lambda: (loss(), ran.append(int(network.count)))[0], speak=False) == works
    assert calls == 1 and ran == [2], "the trial went through the network"
    assert int(network.count) == calls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the tracer looks at every input
def test_compiled_networks_keep_their_names_and_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that only traces: a real one takes half a minute."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiler(network, backend="aot_eager"))
    model = tiny(ndm.SeparableTransform(ndm.nn.MLP(2, hidden=8, outputs=3)))
    plain, x = copy.deepcopy(model), torch.randn(6, 2, generator=torch.Generator().manual_seed(1))

    def gradients(model: ndm.NDM) -> dict[str, Tensor]:
        model.zero_grad()
        model.bound(x, draws=1, generator=torch.Generator().manual_seed(2)).total.mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    assert compile_networks(model, lambda: model.bound(x, draws=1).total.mean())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert copy.deepcopy(model).state_dict().keys() == plain.state_dict().keys()
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
