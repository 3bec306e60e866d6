"""Tests that need a GPU: agreement with the CPU, CUDA graphs, and steps without waiting."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ndm
from ndm.data import Digits
from ndm.nn import UNet
from ndm.train.compilation import TrainingTerms, compiled
from ndm.train.config import RunParts
from ndm.train.fit import fit
from ndm.train.module import Watch
from ndm.train.run import Run
from ndm.train.settings import TrainSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def separable() -> ndm.NDM:
    network = UNet(1, 16, (1, 2), attention=(False, True), outputs=8, context=8)
    predictor = ndm.CategoricalPredictor(network, num_values=17, embedding=4, histogram=4)
    return ndm.NDM(
        ndm.LearnedSchedule(-6.5, 5.0, learn_ends=True),
        ndm.SeparableTransform(UNet(1, 8, (1, 2), outputs=3)),
        predictor,
        ndm.DiscretizedGaussian(17),
        time_sampler=ndm.ImportanceTimeSampler(),
    )


def general() -> ndm.NDM:
    predictor = ndm.Predictor(UNet(1, 16, (1, 2), attention=True))
    return ndm.NDM(
        ndm.LinearLogSNRSchedule(-6.5, 5.0),
        ndm.GatedTransform(UNet(1, 8, (1,))),
        predictor,
        ndm.DiscretizedGaussian(17),
    )


def transformer() -> ndm.NDM:
    predictor = ndm.Predictor(ndm.nn.DiT(1, 2, 64, 2, 2))
    return ndm.NDM(
        ndm.LinearLogSNRSchedule(-6.5, 5.0), ndm.Identity(), predictor, ndm.DiscretizedGaussian(17)
    )


MODELS: dict[str, Callable[[], ndm.NDM]] = {
    "separable": separable,
    "general": general,
    "transformer": transformer,
}


def make_model(name: str) -> tuple[ndm.NDM, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, Digits().split("train").__getitems__(range(32))


def means_and_gradients(
    model: ndm.NDM, terms: TrainingTerms, x: Tensor, draw: ndm.elbo.BoundDraw
) -> dict[str, Tensor]:
    model.zero_grad()
    found = terms(x, draw)
    found.loss.backward()
    gradients = {
        name: parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"means": found.means.cpu(), **gradients}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error, size = float((found[name] - value).norm()), float(value.norm())
        assert error <= tolerance * size + 1e-5, f"{name}: {error} of {size}"


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
def test_the_bound_and_its_gradients_agree_with_the_cpu(name: str) -> None:
    model, x = make_model(name)
    draw = model.draw(x)
    expected = means_and_gradients(model, TrainingTerms(model), x, draw)
    moved = type(draw)(
        **{key: None if value is None else value.cuda() for key, value in vars(draw).items()}
    )
    found = means_and_gradients(model.cuda(), TrainingTerms(model), x.cuda(), moved)
    assert_close(found, expected, 2e-3)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_cuda_graphs_give_the_same_bound_and_gradients(name: str, half: bool) -> None:
    model, x = make_model(name)
    model, x = model.cuda(), x.cuda()
    plain = TrainingTerms(model)
    faster = compiled(plain, cuda_graphs=True, fullgraph=True)
    for _ in range(4):  # warm up, record, replay with new values
        draw = model.draw(x)
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            expected = means_and_gradients(model, plain, x, draw)
            found = means_and_gradients(model, faster, x, draw)
        assert_close(found, expected, 0.15 if half else 2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_does_not_wait_for_the_gpu(name: str) -> None:
    """PyTorch raises an error if the host waits."""
    model, x = make_model(name)
    model, x = model.cuda(), x.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    watch, terms = Watch(), TrainingTerms(model)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.zero_grad()
            draw = model.draw(x)
            found = terms(x, draw)
            model.learn_times(draw, found.diffusion)
            watch.look("bound", found.loss, step)
            found.loss.backward()
            watch.look("gradient", torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), step)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    watch.read()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_compiled_training_lowers_the_bound(
    optimizer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model, data = separable(), Digits()
    x = data.split("test").__getitems__(range(64))
    before = float(model.bound(x, draws=8).total.mean().detach())
    settings = TrainSettings(
        steps=60,
        batch_size=64,
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        compile=True,
        optimizer=optimizer,
    )
    fit(RunParts(model, data, settings), Run(tmp_path), 0)
    assert "compilation failed" not in capfd.readouterr().err
    assert float(model.cpu().bound(x, draws=8).total.mean().detach()) < 0.7 * before
    checkpoint = torch.load(
        tmp_path / "checkpoints/last.ckpt", weights_only=True, map_location="cpu"
    )
    assert checkpoint["global_step"] == 60
    assert all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values())
