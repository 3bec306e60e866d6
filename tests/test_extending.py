"""The page on extending the library runs as written: Python, saving and loading, commands."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ndm
from ndm.train.run import Run
from oracles import F64

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the page's files, importable."""
    *parts, use = blocks("python")
    (config,) = blocks("yaml")
    (tmp_path / "mine.py").write_text("\n".join(parts))
    (tmp_path / "use.py").write_text(use)
    (tmp_path / "ring.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    return tmp_path


def test_custom_parts_train_save_and_load(folder: Path) -> None:
    scope = runpy.run_path("use.py")
    model, loaded, x = scope["model"], scope["loaded"], scope["x"]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert model.transform.angle.grad != 0

    def bound(model: ndm.NDM) -> torch.Tensor:
        return model.bound(x, generator=torch.Generator().manual_seed(0)).total

    torch.testing.assert_close(bound(loaded), bound(model.eval()))


def test_derivatives_of_custom_parts_match_finite_differences(folder: Path) -> None:
    scope = runpy.run_path("mine.py")
    schedule, rotation = scope["PowerSchedule"](), scope["Rotation"]()
    rotation.angle.data.fill_(0.7)
    t, h = torch.linspace(0.1, 0.9, 5, dtype=F64), 1e-6
    x = torch.randn(5, 2, dtype=F64)
    up, down = schedule(t + h), schedule(t - h)
    level = schedule(t)
    torch.testing.assert_close(level.dgamma, (up.gamma - down.gamma) / (2 * h), rtol=1e-6, atol=0)
    value, derivative = rotation.with_derivative(x, level)
    torch.testing.assert_close(value.norm(dim=1), x.norm(dim=1))
    difference = (rotation(x, up) - rotation(x, down)) / (2 * h)
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_the_commands_on_the_page_run(folder: Path) -> None:
    (commands,) = blocks("console")
    short = " --train.steps 3 --train.evaluation_draws 1 --train.sample_steps 2"
    extra = {
        "train": short,
        "evaluate": " --limit 8 --solver rk4 --nodes 4",
        "sample": " --steps 3",
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for line in commands.strip().splitlines():
        command = line.removeprefix("$ ").replace(" ndm ", f" {sys.executable} -m ndm.cli ")
        command += extra[line.split(" ndm ")[1].split()[0]]
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (folder / "ring.png").is_file()
    assert np.isfinite(Run(Path("runs/ring")).metrics()["nelbo_bpd"])
