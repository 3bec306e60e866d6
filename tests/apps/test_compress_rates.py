"""The sizes that are forecast and printed are those of the archive, initial bits included."""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from apps.test_compress import make_archive, make_model
from cli.commands import run_command
from ndm.apps.compress.archive import pack
from ndm.apps.compress.chain import Chain
from ndm.apps.compress.choose import Forecast, choose_plan
from ndm.apps.compress.coder import encode
from ndm.cli.compress import _print_forecast
from ndm.time_grid import TimeGrid
from ndm.time_sampling import PiecewiseConstant


def stored(index: np.ndarray, *_: object) -> bytes:
    """Code the first images in 8 bits for each dimension, more than the model takes."""
    return bytes([0]) + zlib.compress(index.astype(np.uint8).T.tobytes(), 0)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_forecast_is_the_size_of_the_archive(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch, so that its T + 1 latents take a large part of the archive."""
    monkeypatch.setattr("ndm.apps.compress.choose.encode_lead", stored)
    monkeypatch.setattr("ndm.apps.compress.coder.encode_lead", stored)
    model, count, dims = make_model((8,), 16, 2), 256, 8
    normal = np.random.default_rng(0).normal(8, 2, (count, dims))
    index = np.clip(normal.round(), 0, 15).astype(np.int64)
    plan, forecast = choose_plan(model, index, (dims,), steps, count)
    coded = encode(Chain(model, plan, (dims,)), index, forecast.lead)
    assert 0 < forecast.lead < count
    assert forecast.initial > 0.3 * forecast.bits
    assert forecast.initial == pytest.approx(32 * coded.initial, rel=0.1)
    assert forecast.bits == pytest.approx(32 * len(coded.words), rel=0.05)
    without = encode(Chain(model, plan, (dims,)), index)
    assert len(coded.words) < 0.9 * len(without.words)
    other, _ = choose_plan(model, index, (dims,), steps, count // 2)
    assert other.batch == count // 2


def test_the_printed_rates_add_up_to_the_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = np.random.default_rng(0).integers(0, 16, (40, 8))
    archive = make_archive(make_model((8,), 16, 2), index, (8,), steps=3, batch=20)
    file = tmp_path / "x.ndm"
    file.write_bytes(pack(archive))
    run_command("inspect", file)
    text = capsys.readouterr().out
    number = r"([\d,]+) bytes"
    found = {
        name: int(re.search(pattern, text)[1].replace(",", ""))  # type: ignore[index]
        for name, pattern in {
            "all": number + ", [0-9.]+ bits/dim:",
            "images": number + " of images",
            "initial": number + " of initial bits",
            "rest": number + " of names",
        }.items()
    }
    assert found["all"] == file.stat().st_size
    assert found["initial"] == 4 * archive.coded.initial
    assert found["images"] == 4 * (len(archive.coded.words) - archive.coded.initial)
    assert found["images"] + found["initial"] + found["rest"] == found["all"]
    rates = [float(rate) for rate in re.findall(r"([0-9.]+) bits/dim", text)]
    expected = [8 * found[name] / index.size for name in ("all", "images", "initial")]
    assert rates == pytest.approx(expected, abs=6e-5)


def test_the_printed_forecast_includes_all_initial_bits(capsys: pytest.CaptureFixture[str]) -> None:
    ratio = PiecewiseConstant(torch.ones(1))
    forecast = Forecast(TimeGrid(7), 2, 3.0, 0, initial=600.0, bits=2100.0, variance_ratio=ratio)
    _print_forecast(forecast, size=500)
    found = re.findall(r"\d+(?:\.\d+)?", capsys.readouterr().out)
    assert [float(number) for number in found] == [7, 3.0, 4.2]


def test_the_rate_of_the_progress_bar_leaves_the_initial_bits_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []

    def record(_: object, text: str, *__: object) -> None:
        shown.append(text)

    monkeypatch.setattr(tqdm, "set_postfix_str", record)
    model = make_model((8,), 16, 2)
    index = np.random.default_rng(0).integers(0, 16, (40, 8))
    plan, _ = choose_plan(model, index, (8,), 3, 20)
    coded = encode(Chain(model, plan, (8,)), index, 0)
    rate = 32 * (len(coded.words) - coded.initial) / index.size
    assert shown[-1] == f"{rate:.3f} bits/dim"
