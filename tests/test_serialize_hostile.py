"""Model folders from strangers: one line, in bounded time and memory, before any use."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.commands import rejected, run_command
from ndm.decoder import DiscretizedGaussian
from ndm.errors import UserError
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.predictor import Predictor
from ndm.schedule import LearnedSchedule, LinearLogSNRSchedule
from ndm.serialize import read_json
from ndm.time_sampling import ImportanceTimeSampler
from ndm.transform import GatedTransform

Change = Callable[[dict[str, Any]], object]
DATA = {
    "name": "toy",
    "version": "1",
    "kind": "image",
    "event_shape": [1, 4, 4],
    "num_values": 8,
    "low": 0.0,
    "high": 7.0,
    "splits": {"train": 3, "test": 2},
    "sha256": "0" * 64,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = NDM(
        LinearLogSNRSchedule(-6.0, 4.0),
        GatedTransform(UNet(1, 4, (1,))),
        Predictor(MLP(16, 8, 1)),
        DiscretizedGaussian(8),
        ImportanceTimeSampler(4),
    )
    folder = tmp_path_factory.mktemp("model") / "m"
    model.save_pretrained(folder, {"data": DATA})
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "m"
    copy.mkdir()
    for path in original.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def put(place: str, value: object) -> Change:
    """Set the argument at a dotted place of the model, or of the data."""

    def change(config: dict[str, Any]) -> None:
        *parents, last = place.split(".")
        node = config[parents.pop(0)] if parents else config
        for name in parents:
            node = node["init_args"][name]
        (node["init_args"] if "init_args" in node and last != "class_path" else node)[last] = value

    return change


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


WRONG = {
    "blocks": put("model.predictor.network.blocks", 10**9),
    "hidden": put("model.predictor.network.hidden", 10**9),
    "wide": put("model.predictor.network.hidden", 30_000),
    "wide U-Net": put("model.transform.network.channels", 10**5),
    "blocks of the U-Net": put("model.transform.network.blocks", 10**9),
    "multiples": put("model.transform.network.multiples", [1] * 10_000),
    "multiple": put("model.transform.network.multiples", [10**9]),
    "outputs": put("model.predictor.network.outputs", 10**12),
    "fourier": put("model.predictor.network.fourier", [10**9]),
    "many fourier": put("model.predictor.network.fourier", list(range(100_000))),
    "bins": put("model.time_sampler.bins", 10**9),
    "bins beyond memory": put("model.time_sampler.bins", 10**15),
    "values": put("model.decoder.num_values", 10**9),
    "units": put(
        "model.schedule", {"class_path": "ndm.LearnedSchedule", "init_args": {"units": 10**9}}
    ),
    "steps": put("model.steps", 10**9),
    "steps of many digits": put("model.steps", 10**30),
    "steps 1.5": put("model.steps", 1.5),
    "steps true": put("model.steps", True),
    "steps text": put("model.steps", "x" * 10**5),
    "eta": put("model.eta", "x"),
    "reverse": put("model.reverse", ["tied"]),
    "gamma": put("model.schedule.gamma_1", 1e308),
    "gamma infinite": put("model.schedule.gamma_1", float("inf")),
    "gamma NaN": put("model.schedule.gamma_0", float("nan")),
    "gamma integer": put("model.schedule.gamma_1", 10**99),
    "gamma null": put("model.schedule.gamma_1", None),
    "levels text": put("model.decoder.num_values", "x"),
    "levels list": put("model.decoder.num_values", ["x"]),
    "levels NaN": put("model.decoder.num_values", [float("nan"), 1.0]),
    "levels nested": put("model.decoder.num_values", [[0.0, 1.0]]),
    "levels negative": put("model.decoder.num_values", -3),
    "dropout": put("model.predictor.network.dropout", 7),
    "attention": put("model.transform.network.attention", {"a": 1}),
    "network": put("model.predictor.network", 5),
    "network list": put("model.predictor.network", []),
    "network loop": lambda c: c["model"]["init_args"]["predictor"]["init_args"].update(
        network=json.loads(json.dumps(c["model"]))
    ),
    "argument": put("model.predictor.x", 1),
    "long argument": put("model.predictor." + "x" * 10**5, 1),
    "arguments": put("model.init_args", [1, 2])
    if False
    else (lambda c: c["model"].update(init_args=[1, 2])),
    "no arguments": lambda c: c["model"]["init_args"]["predictor"].update(init_args={}),
    "class": lambda c: c["model"].update(class_path="ndm" + ".a" * 10**4),
    "class number": lambda c: c["model"].update(class_path=7),
    "class not in ndm": lambda c: c["model"].update(class_path="x" * 10**5),
    "part as model": lambda c: c.update(model=c["model"]["init_args"]["schedule"]),
    "model": lambda c: c.update(model=nested(900)),
    "model list": lambda c: c.update(model=[1]),
    "deep data": lambda c: c.update(data=nested(900)),
    "format": lambda c: c.update(format=[2] * 10**5),
    "event": put("data.event_shape", [-1, 4, 4]),
    "event zero": put("data.event_shape", [1, 0, 4]),
    "event text": put("data.event_shape", ["a"]),
    "event number": put("data.event_shape", 5),
    "event axes": put("data.event_shape", [1] * 10**5),
    "event large": put("data.event_shape", [1, 10**9, 10**9]),
    "event other": put("data.event_shape", [1, 4, 5]),
    "event none": put("data.event_shape", None),
    "num_values": put("data.num_values", "x"),
    "low": put("data.low", "x"),
    "low infinite": put("data.low", float("inf")),
    "kind": put("data.kind", "sound"),
    "splits": put("data.splits", [1]),
    "columns": put("data.columns", [[1]]),
    "name": put("data.name", 5),
    "scale": put("data.scale", ["x"]),
    "unknown key": put("data.nothing", 1),
    "no data": lambda c: c.pop("data"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_hostile_description_is_rejected_in_one_line(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    WRONG[kind](config)
    (folder / "config.json").write_text(json.dumps(config))
    out, start = tmp_path / "s.npy", time.perf_counter()
    line = rejected(capsys, ["sample", folder, "--n 1 --steps 2 --out", out])
    assert len(line) <= 300 + len(str(folder))
    assert time.perf_counter() - start < 20 and not out.exists()


def test_the_description_itself_is_accepted(folder: Path, tmp_path: Path) -> None:
    run_command("sample", folder, "--n 1 --steps 2 --out", tmp_path / "s.npy")
    assert len(np.load(tmp_path / "s.npy")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"a": ' + "9" * 5_000 + "}",
        '{"a": ' + "9" * 4_000 + "}",
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 2}}',
        '{"a": [' + "[]," * 10**6 + "[]]}",
    ],
)
def test_hostile_json_is_rejected_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match="cannot be read as JSON") as caught:
        read_json(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_brackets_in_text_are_not_nesting(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"a": "[" * 1000 + '"\\' + "{" * 1000, "b": [1.5, None, -3, 1e300]}
    path.write_text(json.dumps(value))
    assert read_json(path) == value


def damaged_weights() -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    yield "NaN", lambda tensor: tensor * torch.nan
    yield "inf", lambda tensor: tensor + torch.inf
    yield "complex", lambda tensor: tensor.to(torch.complex64)
    yield "integers", lambda tensor: tensor.long()
    yield "bytes", lambda tensor: tensor.to(torch.uint8)
    yield "float8", lambda tensor: tensor.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("kind", "damage"), list(damaged_weights()))
@pytest.mark.parametrize("share", ["one", "all"])
def test_damaged_numbers_in_weights_are_named(
    kind: str, damage: Callable[[torch.Tensor], torch.Tensor], share: str, folder: Path
) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = list(tensors) if share == "all" else ["process.transform.network.last.weight"]
    names = [name for name in names if name in tensors] or [next(iter(tensors))]
    save_file({n: damage(t) if n in names else t for n, t in tensors.items()}, path)
    with pytest.raises(UserError, match=r"model.safetensors.*tensor '") as caught:
        NDM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_loading_draws_no_random_numbers_more_than_building(folder: Path) -> None:
    """The check of the size leaves the random numbers of the user alone."""
    torch.manual_seed(3)
    NDM.from_pretrained(folder)
    found = torch.rand(1)
    torch.manual_seed(3)
    NDM(
        LinearLogSNRSchedule(-6.0, 4.0),
        GatedTransform(UNet(1, 4, (1,))),
        Predictor(MLP(16, 8, 1)),
        DiscretizedGaussian(8),
        ImportanceTimeSampler(4),
    )
    assert torch.equal(found, torch.rand(1))
    assert LearnedSchedule().units == 32
