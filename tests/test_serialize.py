"""Models save and load bit by bit; damaged or hostile files are rejected in one line."""

import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ndm.decoder import Decoder, DiscretizedGaussian, GaussianDecoder, NetworkDecoder
from ndm.errors import UserError
from ndm.linear_transform import Blur, Downsample, FadingMask
from ndm.model import NDM
from ndm.nn import MLP, Dense, UNet
from ndm.predictor import Predictor
from ndm.schedule import (
    CosineSchedule,
    FlowMatchingSchedule,
    LearnedSchedule,
    LinearBetaSchedule,
    LinearLogSNRSchedule,
    Schedule,
)
from ndm.serialize import from_config, read_json, to_config, write_atomically, write_json
from ndm.time_sampling import (
    ImportanceTimeSampler,
    LowDiscrepancyTimeSampler,
    TimeSampler,
    TimeSamples,
    UniformTimeSampler,
)
from ndm.transform import GatedTransform, Identity, NetworkTransform, Transform
from ndm.value_grid.rounding import RoundingPredictor
from oracles import F64

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: LinearLogSNRSchedule(-5.5, 2.5),
    "cosine": lambda: CosineSchedule(-6.0, 4.0),
    "ddpm": lambda: LinearBetaSchedule(0.2, 9.0, 0.01),
    "flow": lambda: FlowMatchingSchedule(0.05, 0.02),
    "learned": lambda: LearnedSchedule(-6.0, 3.0, units=5),
    "learned_ends": lambda: LearnedSchedule(-6.0, 3.0, learn_ends=True, units=3),
}
TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "identity": Identity,
    "mlp": lambda: NetworkTransform(MLP(16, 8, 1, fourier=[1], max_frequency=3.0)),
    "gated": lambda: GatedTransform(UNet(1, 4, (1,), attention=[True], max_frequency=2.0)),
    "blur": lambda: Blur(3.0, 0.02),
    "mask": lambda: FadingMask(7.0, 0.4),
    "downsample": lambda: Downsample((0.25, 0.75)),
}
DECODERS: dict[str, Callable[[], Decoder]] = {
    "gaussian": GaussianDecoder,
    "bytes": lambda: DiscretizedGaussian(8),
    "grid": lambda: DiscretizedGaussian([-0.875, -0.125, 0.375, 0.875]),
    "network": lambda: NetworkDecoder(Dense([1, 4, 4], [1, 4, 4], 8), DiscretizedGaussian(8), 0.2),
}
TIMES: dict[str, Callable[[], TimeSampler]] = {
    "uniform": UniformTimeSampler,
    "low": LowDiscrepancyTimeSampler,
    "importance": lambda: ImportanceTimeSampler(4, uniform=0.3, decay=0.5),
}
DATA = torch.tensor([-0.875, -0.125, 0.375, 0.875])[torch.arange(48) % 4].reshape(3, 1, 4, 4)


def make(
    schedule: str = "linear",
    transform: str = "mlp",
    decoder: str = "grid",
    times: str = "low",
    steps: int | None = None,
) -> NDM:
    torch.manual_seed(0)
    predictor = Predictor(UNet(1, 4, (1,), fourier=[0]), "x")
    first = SCHEDULES[schedule](), TRANSFORMS[transform](), predictor
    model = NDM(*first, DECODERS[decoder](), TIMES[times](), steps=steps, eta=0.75)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        u = torch.linspace(0.0, 0.99, 8)
        model.time_sampler.update(TimeSamples(u, torch.ones_like(u)), 1 + 5 * u)
    return model.eval()


@torch.no_grad()
def bound(model: NDM) -> Tensor:
    found = model.bound(DATA, generator=torch.Generator().manual_seed(4))
    return torch.stack([found.prior, found.diffusion, found.reconstruction])


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "transform"), list(product(SCHEDULES, TRANSFORMS)))
def test_every_combination_of_parts_loads_bit_by_bit(
    schedule: str, transform: str, tmp_path: Path
) -> None:
    for index, (decoder, times) in enumerate(product(DECODERS, TIMES)):
        model = make(schedule, transform, decoder, times, steps=None if index % 2 else 7)
        model.save_pretrained(tmp_path / "m", {"data": {"name": "toy", "number": index}})
        back = NDM.from_pretrained(tmp_path / "m")
        expected = bound(model)
        assert torch.equal(bound(back), expected) and bool(expected.isfinite().all())
        assert back.info == {"data": {"name": "toy", "number": index}} and not back.training
        assert (back.steps, back.eta) == (model.steps, model.eta)
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        assert json.dumps(to_config(back)) == json.dumps(to_config(model))


def test_a_rounding_predictor_loads_bit_by_bit(tmp_path: Path) -> None:
    predictor = RoundingPredictor(UNet(1, 4, (1,)), 8)
    schedule, decoder = LinearLogSNRSchedule(-8.0, 3.0), DiscretizedGaussian(8)
    model = NDM(schedule, Identity(), predictor, decoder).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert torch.equal(bound(NDM.from_pretrained(tmp_path)), bound(model))


def test_a_loaded_model_draws_the_same_samples(tmp_path: Path) -> None:
    model = make("learned_ends")
    model.save_pretrained(tmp_path)
    back = NDM.from_pretrained(tmp_path)
    samples, expected = (m.sample((2, 1, 4, 4), steps=4, seed=1) for m in (back, model))
    assert torch.equal(samples, expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_rejected(folder: Path, pattern: str, **options: object) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        NDM.from_pretrained(folder, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.6, 0.999])
def test_truncated_weights_are_rejected(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert_rejected(folder, "model.safetensors")


@pytest.mark.slow
def test_flipped_bits_of_the_header_are_rejected_or_harmless(folder: Path) -> None:
    path = folder / "model.safetensors"
    data, expected = path.read_bytes(), load_file(path)
    for place in [*range(8), *range(8, 400, 7)]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 7)
        path.write_bytes(bytes(damaged))
        try:
            back = NDM.from_pretrained(folder)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            for name, tensor in back.state_dict().items():
                assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_rejected(folder, f"{name} does not exist")
    assert_rejected(folder / "nowhere", "no model folder")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\xff",
        '{"format": 1}',
        '{"format": 1, "model": 5}',
        '{"format": 1, "model": {}}',
    ],
)
def test_a_damaged_config_is_rejected(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert_rejected(folder, "config.json|not part of ndm")


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "torch.nn.Linear",
        "ndm.serialize.write_json",
        "ndm.errors.UserError",
        "ndm.nope.Thing",
        "ndm.model.Nope",
    ],
)
def test_a_foreign_class_path_is_never_called(
    folder: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    part = {"class_path": path, "init_args": {"command": "true"}}
    edit_config(folder, lambda c: c["model"]["init_args"]["schedule"].update(part))
    assert_rejected(folder, f"schedule.*{path}")


def test_a_foreign_module_is_never_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trojan.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def change(config: dict[str, Any]) -> None:
        predictor = config["model"]["init_args"]["predictor"]
        predictor["init_args"]["network"] = {"class_path": "trojan.Net", "init_args": {}}

    edit_config(folder, change)
    assert_rejected(folder, "model.predictor.network is a trojan.Net.*modules=")


def test_wrong_arguments_in_a_config_are_rejected(folder: Path) -> None:
    edit_config(
        folder, lambda c: c["model"]["init_args"]["schedule"]["init_args"].update(gamma_7=3.0)
    )
    assert_rejected(folder, "model.schedule.*LinearLogSNRSchedule.*gamma_7")


@pytest.mark.parametrize("version", [2, 99, None, "1"])
def test_an_unknown_format_is_rejected(folder: Path, version: object) -> None:
    edit_config(folder, lambda c: c.update(format=version))
    assert_rejected(folder, f"format {version}")


@pytest.mark.parametrize("damage", ["shape", "missing", "unknown"])
def test_tensors_that_do_not_fit_are_named(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    if damage == "shape":
        tensors[name] = torch.zeros(*tensors[name].shape, 2)
    elif damage == "missing":
        del tensors[name]
    else:
        name, tensors["stranger"] = "stranger", torch.zeros(1)
    save_file(tensors, path)
    assert_rejected(folder, f"does not fit.*'{name}'")


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * (1 + t[:, None])


def test_a_foreign_network_passed_to_from_pretrained_gets_its_weights(tmp_path: Path) -> None:
    schedule, transform = LinearLogSNRSchedule(-5.0, 3.0), GatedTransform(Foreign())
    model = NDM(schedule, transform, Predictor(Foreign()), GaussianDecoder()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    pattern = r"model.transform.network is a .*Foreign.*modules=\{'model.transform.network'"
    assert_rejected(tmp_path, pattern)
    modules = {"model.transform.network": Foreign()}
    assert_rejected(tmp_path, "model.predictor.network", modules=modules)
    back = NDM.from_pretrained(tmp_path, {**modules, "model.predictor.network": Foreign()})
    x = torch.randn(5, 2)
    found, expected = (
        m.bound(x, generator=torch.Generator().manual_seed(1)).total for m in (back, model)
    )
    assert torch.equal(found, expected)


def test_float64_models_save_and_load(tmp_path: Path) -> None:
    model = make("learned", times="importance").double()
    model.save_pretrained(tmp_path)
    back = NDM.from_pretrained(tmp_path).double()
    assert to_config(from_config(to_config(model))) == to_config(model)
    x = DATA.double()
    totals = [
        m.bound(x, draws=1, generator=torch.Generator().manual_seed(0)).total for m in (model, back)
    ]
    assert totals[0].dtype == F64
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-5)


def test_info_cannot_overwrite_the_model(tmp_path: Path) -> None:
    model = make()
    try:
        model.save_pretrained(tmp_path, {"model": "a name", "format": 7})
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert torch.equal(bound(NDM.from_pretrained(tmp_path)), bound(model))


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file.json"
    write_json(path, {"old": 1})

    def broken(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, broken)
    assert read_json(path) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    write_json(path, {"new": [1.5, None]})
    assert read_json(path) == {"new": [1.5, None]}
    with pytest.raises(UserError, match="cannot write") as caught:
        write_json(path / "below" / "x.json", {})
    assert "\n" not in str(caught.value)


def test_tied_weights_save_and_load(tmp_path: Path) -> None:
    network = MLP(2, hidden=8, blocks=1)
    transform, predictor = NetworkTransform(network), Predictor(network)
    model = NDM(LinearLogSNRSchedule(), transform, predictor, GaussianDecoder())
    model.save_pretrained(tmp_path / "model")
    back = NDM.from_pretrained(tmp_path / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
