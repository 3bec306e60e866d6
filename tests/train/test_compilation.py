"""The compiled training bound: one graph, the same gradients, and a fallback if it fails."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

import ndm
from cli.commands import run_command
from ndm.train.compilation import TrainingTerms, compiled, try_compiling
from ndm.train.config import add_model
from ndm.transform import Transform

ConfigWriter = Callable[..., Path]
ITERATIVE = ("transport",)  # it inverts its map by iterations until convergence
CONFIGS = sorted(
    path
    for path in (Path(ndm.__file__).parent / "configs").glob("*.yaml")
    if "model:" in path.read_text() and path.stem not in ITERATIVE
)
# With small networks, each of these equals another configuration.
ALIKE = (
    *("imagenet32", "imagenet64", "two_moons", "celebahq64"),
    *("images", "images-small", "mnist-small", "photos"),
)
SMALL = {
    "channels": 8,
    "multiples": [1],
    "blocks": 1,
    "hidden": 8,
    "embedding": 2,
    "histogram": 2,
    "context": 4,
    "outputs": 3,
}
# The tracer reads the gradient of every input.
LEAF_GRADIENT_WARNING = "ignore:The .grad attribute of a Tensor that is not a leaf"


def tiny(transform: Transform) -> ndm.NDM:
    torch.manual_seed(0)
    return ndm.NDM(
        ndm.LinearLogSNRSchedule(-6, 4),
        transform,
        ndm.Predictor(ndm.nn.MLP(2, hidden=8, blocks=1)),
        ndm.GaussianDecoder(),
    )


def shrunk(value: Any) -> Any:
    """Return the configuration with smaller networks of the same structure."""
    if not isinstance(value, dict):
        return value
    small = {
        key: SMALL[key] if key in SMALL and item else shrunk(item) for key, item in value.items()
    }
    if "outputs" in small:
        small["outputs"] = min(small["outputs"], value["outputs"])  # a learned variance needs two
    if isinstance(value.get("attention"), list):
        small["attention"] = [True]
    return small


def model_and_examples(path: Path) -> tuple[ndm.NDM, Tensor]:
    """Return a small model of the configuration with random weights, and examples for it."""
    config = yaml.safe_load(path.read_text())
    parser = ArgumentParser(exit_on_error=False)
    add_model(parser)
    torch.manual_seed(0)
    model = parser.instantiate(parser.parse_object({"model": shrunk(config["model"])})).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    shape = _small_shape(model)
    values = model.decoder.values
    x = torch.randn(shape) if values is None else values[torch.randint(len(values), shape)].float()
    return model.eval(), x  # without dropout, which the compiler draws differently


def _small_shape(model: ndm.NDM) -> tuple[int, ...]:
    """Return the shape of four small examples for the model."""
    encoder = isinstance(model.transform, ndm.Encoder)
    network = model.transform.network if encoder else model.predictor.network
    if isinstance(network, ndm.nn.MLP):
        return (4, 1, 8, 8) if network.dims == 64 else (4, network.dims)
    return (4, network.image_channels, 8, 8)


def losses_and_gradients(
    model: ndm.NDM, terms: TrainingTerms, x: Tensor, *c: Tensor
) -> dict[str, Tensor]:
    draw = _draw(model, x)
    model.zero_grad()
    found = terms(x, draw, *c)
    found.loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": found.loss.detach().clone(), "means": found.means.clone(), **gradients}


def _draw(model: ndm.NDM, x: Tensor) -> ndm.elbo.BoundDraw:
    return model.draw(x, torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings(LEAF_GRADIENT_WARNING)
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem not in ALIKE], ids=lambda path: path.stem
)
def test_the_compiled_bound_of_every_configuration_is_one_graph_with_the_same_gradients(
    path: Path,
) -> None:
    """The backend traces forward and backward passes, including dF/dt, without code generation."""
    model, x = model_and_examples(path)
    torch.compiler.reset()
    expected = losses_and_gradients(model, TrainingTerms(model), x)
    found = losses_and_gradients(
        model, compiled(TrainingTerms(model), fullgraph=True, backend="aot_eager"), x
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = 1e-6 + float(value.abs().max())
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=2e-4, msg=name)


@pytest.mark.filterwarnings(LEAF_GRADIENT_WARNING)
def test_one_compiled_graph_serves_every_condition() -> None:
    """Also F sees the condition, at both ends of a step and in its time derivative."""
    config = Path(ndm.__file__).parent / "configs" / "digits-conditional.yaml"
    model, x = model_and_examples(config)
    graphs: list[int] = []

    def backend(graph: Any, _: object) -> Any:
        graphs.append(1)
        return graph.forward

    torch.compiler.reset()
    plain, faster = TrainingTerms(model), compiled(TrainingTerms(model), backend=backend)
    losses = []
    for classes in ([0, 1, 2, 10], [3, 3, 9, 0], [10, 10, 10, 10]):
        c = torch.tensor(classes)
        expected = losses_and_gradients(model, plain, x, c)
        found = losses_and_gradients(model, faster, x, c)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=name)
        losses.append(float(expected["loss"]))
    assert len(set(losses)) == 3 and len(graphs) == 1
    without = losses_and_gradients(model, TrainingTerms(model), x)
    assert float(without["loss"]) == pytest.approx(losses[-1])
    losses_and_gradients(model, plain, x, torch.tensor([1, 2, 3, 4]))
    after = losses_and_gradients(model, plain, x)
    assert float(after["loss"]) == pytest.approx(losses[-1]), "an earlier condition remains"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_training_step_of_every_configuration_does_not_wait_for_the_device(path: Path) -> None:
    """The meta device has no values, so reading one fails."""
    model, x = model_and_examples(path)
    model, x = model.to("meta"), x.to("meta")
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    draw = model.draw(x)
    terms = TrainingTerms(model)(x, draw)
    terms.loss.backward()
    model.learn_times(draw, terms.diffusion)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert terms.loss.device.type == "meta" and terms.loss.shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(terms.loss.isfinite())


@pytest.mark.filterwarnings(LEAF_GRADIENT_WARNING)
def test_a_user_network_runs_uncompiled_inside_the_compiled_bound() -> None:
    """Operations in its time derivative may be replaced only in uncompiled code."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.last(torch.tanh(self.norm(self.first(torch.cat([x, t[:, None]], 1)))))

    model = tiny(ndm.GatedTransform(Own()))
    model.transform.displacement.gain.data.fill_(0.5)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    torch.compiler.reset()
    expected = losses_and_gradients(model, TrainingTerms(model), x)
    found = losses_and_gradients(model, compiled(TrainingTerms(model), backend="aot_eager"), x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_inductor_compiles_forward_mode_derivatives() -> None:
    """The real backend compiles the time derivative of a minimal F."""
    model = tiny(ndm.GatedTransform(ndm.nn.MLP(2, hidden=4, blocks=0)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    torch.compiler.reset()
    expected = losses_and_gradients(model, TrainingTerms(model), x)
    found = losses_and_gradients(model, compiled(TrainingTerms(model), fullgraph=True), x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def failing_compiler(*_: object, **__: object) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no C++ compiler\nwas found")

    return call


def test_training_continues_uncompiled_after_a_compiler_error(
    write_config: ConfigWriter,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, weights = write_config(), []
    monkeypatch.setattr(torch, "compile", failing_compiler)
    for name, flag in (("without", "false"), ("with", "true")):
        capfd.readouterr()
        run_command("train --config", config, "--out", tmp_path / name, "--train.compile", flag)
        messages = [line for line in capfd.readouterr().err.splitlines() if "compile" in line]
        assert len(messages) == (flag == "true")
        for line in messages:
            assert "RuntimeError: no C++ compiler was found" in line
            assert "continues uncompiled" in line
        checkpoint = torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        weights.append(checkpoint["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_failed_trial_changes_nothing_and_errors_of_the_model_are_raised(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny(ndm.Identity())
    before, terms = copy.deepcopy(model.state_dict()), TrainingTerms(model)

    def trial(x: Tensor) -> Callable[[TrainingTerms], Tensor]:
        return lambda terms: terms(x, model.draw(x)).loss

    monkeypatch.setattr(torch, "compile", failing_compiler)
    assert try_compiling(model, terms, trial(torch.ones(4, 2))) is terms
    assert "continues uncompiled" in capfd.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ndm.UserError, match="events of 2 dimensions"):
        try_compiling(model, terms, trial(torch.ones(4, 3)))


class Counting(nn.Module):
    """Count calls in a buffer, as batch norm does."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = ndm.nn.MLP(2, hidden=8, blocks=1)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.count += 1
        return self.inner(x, t)


@pytest.mark.parametrize("works", [True, False])
def test_a_trial_restores_buffers_and_clears_gradients(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager_compiler(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
        return lambda *args: function(*args)

    monkeypatch.setattr(torch, "compile", eager_compiler if works else failing_compiler)
    torch.manual_seed(0)
    network, x = Counting(), torch.ones(4, 2)
    model = ndm.NDM(
        ndm.LinearLogSNRSchedule(-6, 4),
        ndm.Identity(),
        ndm.Predictor(network),
        ndm.GaussianDecoder(),
    )
    terms = TrainingTerms(model)
    terms(x, model.draw(x)).loss.backward()
    before, calls, ran = copy.deepcopy(model.state_dict()), int(network.count), []

    def trial(terms: TrainingTerms) -> Tensor:
        loss = terms(x, model.draw(x)).loss
        ran.append(int(network.count))
        return loss

    assert (try_compiling(model, terms, trial, speak=False) is not terms) == works
    assert calls == 1 and ran == [2], "the trial called the network"
    assert int(network.count) == calls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
