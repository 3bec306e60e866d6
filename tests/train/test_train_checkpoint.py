"""Checkpoints are compared with the run before anything is restored."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cli.commands import exit_code, rejected, run_command
from conftest import TINY
from ndm.serialize import read_json, write_json
from ndm.train.callbacks import FinalCheckpoint
from ndm.train.checkpoint import read_checkpoint

Content = dict[str, Any]
FIT = "epoch_loop.automatic_optimization.optim_progress"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a run of 24 steps with its checkpoint after step 20."""
    folder = tmp_path_factory.mktemp("interrupted")
    runs: dict[str, Path] = {}

    def train(optimizer: str) -> Path:
        if optimizer in runs:
            return runs[optimizer]
        config, run = folder / f"{optimizer}.yaml", folder / optimizer
        settings = TINY["train"] | {"checkpoint_every": 10}
        settings |= (
            {"ema": 0, "accumulate": 2, "validate_every": 6}
            if optimizer == "plain"
            else {"optimizer": optimizer}
        )
        config.write_text(yaml.safe_dump(TINY | {"train": settings}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FinalCheckpoint, "on_train_end", lambda *_: None)
            run_command("train --config", config, "--out", run)
        (run / "metrics.json").unlink()
        shutil.rmtree(run / "model")
        return runs.setdefault(optimizer, run)

    return train


@pytest.fixture
def run(interrupted: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(interrupted("adamw"), tmp_path / "run")


def rewrite(run: Path, change: Callable[[Content], object]) -> None:
    path = run / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def moments(content: Content, number: int = 0) -> dict[str, Any]:
    state: dict[str, Any] = content["optimizer_states"][0]["state"][number]
    return state


def progress(content: Content) -> dict[str, Any]:
    total: dict[str, Any] = content["loops"]["fit_loop"][FIT]["optimizer"]["step"]["total"]
    return total


def first_of(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name, value in tensors.items() if value.dim() == 2)


def expand(content: Content) -> None:
    moments(content)["exp_avg"] = torch.zeros(1).expand(moments(content)["exp_avg"].shape)


def spoil(name: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content[name][first_of(content[name])][0, 0] = torch.nan

    return change


def groups(content: Content) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = content["optimizer_states"][0]["param_groups"]
    return found


DAMAGE: dict[str, Callable[[Content], object]] = {
    "no optimizer": lambda c: c.update(optimizer_states=[]),
    "two optimizers": lambda c: c["optimizer_states"].append(c["optimizer_states"][0]),
    "optimizer is text": lambda c: c.update(optimizer_states="adamw"),
    "empty state": lambda c: c["optimizer_states"][0].update(state={}),
    "one state missing": lambda c: c["optimizer_states"][0]["state"].pop(3),
    "state of no parameter": lambda c: c["optimizer_states"][0]["state"].update({99: {}}),
    "moment missing": lambda c: moments(c).pop("exp_avg_sq"),
    "moment is a number": lambda c: moments(c).update(exp_avg=0.0),
    "moment of one number": lambda c: moments(c).update(exp_avg=torch.zeros(1)),
    "moment of no numbers": lambda c: moments(c).update(exp_avg_sq=torch.zeros(0)),
    "moment transposed": lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].t()),
    "moment with other strides": lambda c: moments(c).update(
        exp_avg=moments(c)["exp_avg"].t().contiguous().t()
    ),
    "moment expanded": expand,
    "moment in integers": lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].long()),
    "moment in float64": lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].double()),
    "moment sparse": lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].to_sparse()),
    "moment not finite": lambda c: moments(c)["exp_avg"].fill_(torch.inf),
    "steps of a moment": lambda c: moments(c).update(step=torch.tensor(1e9)),
    "no groups": lambda c: c["optimizer_states"][0].update(param_groups=[]),
    "groups swapped": lambda c: groups(c).reverse(),
    "group without parameters": lambda c: groups(c)[0].update(params=[]),
    "learning rate": lambda c: groups(c)[0].update(lr=0.5),
    "weight decay": lambda c: groups(c)[0].update(weight_decay=7.0),
    "betas": lambda c: groups(c)[0].update(betas="0.9"),
    "maximize": lambda c: groups(c)[0].update(maximize=True),
    "no loops": lambda c: c.pop("loops"),
    "loops are a list": lambda c: c.update(loops=[1]),
    "no loop of training": lambda c: c["loops"].pop("fit_loop"),
    "progress is text": lambda c: progress(c).update(completed="20"),
    "progress is other": lambda c: progress(c).update(completed=15),
    "progress missing": lambda c: progress(c).pop("completed"),
    "no callbacks": lambda c: c.pop("callbacks"),
    "no average among callbacks": lambda c: c["callbacks"].pop("EMA"),
    "average updated at another step": lambda c: c["callbacks"]["EMA"].update(latest_update_step=3),
    "no current weights": lambda c: c.pop("current_model_state"),
    "no averaging state": lambda c: c.pop("averaging_state"),
    "averaging state is text": lambda c: c.update(averaging_state="24"),
    "no weights": lambda c: c.update(state_dict={}),
    "weights are a list": lambda c: c.update(state_dict=[1]),
    "a weight is missing": lambda c: c["current_model_state"].popitem(),
    "a weight is a number": lambda c: c["state_dict"].update({first_of(c["state_dict"]): 1.0}),
    "a weight has another shape": lambda c: c["current_model_state"].update(
        {first_of(c["current_model_state"]): torch.zeros(1)}
    ),
    "NaN in the average": spoil("state_dict"),
    "NaN in the weights": spoil("current_model_state"),
    "step of 10^9": lambda c: c.update(global_step=10**9),
    "last step": lambda c: c.update(global_step=24),
    "earlier step": lambda c: c.update(global_step=10),
    "no step": lambda c: c.update(global_step=0),
    "negative step": lambda c: c.update(global_step=-3),
    "step is text": lambda c: c.update(global_step="20"),
    "step is a fraction": lambda c: c.update(global_step=20.5),
    "no schedules": lambda c: c.update(lr_schedulers=[]),
    "schedule at another step": lambda c: c["lr_schedulers"][0].update(last_epoch=3),
    "schedule with another rate": lambda c: c["lr_schedulers"][0].update(base_lrs=[1.0] * 4),
    "seconds are text": lambda c: c.update(seconds="1"),
    "seconds are not finite": lambda c: c.update(seconds=float("nan")),
    "version of no type": lambda c: c.update({"pytorch-lightning_version": 3}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_does_not_fit_is_rejected_in_one_line(
    damage: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run, DAMAGE[damage])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    line = rejected(capsys, ["train --out", run], "last.ckpt", "damaged", "delete it to restart")
    assert len(line) - len(str(run)) < 300
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for path, content in before.items():
        assert after[path] == content, path


@pytest.mark.parametrize("optimizer", ["adamw", "soap", "muon", "plain"])
def test_an_undamaged_checkpoint_is_resumed(
    optimizer: str, interrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    run = shutil.copytree(interrupted(optimizer), tmp_path / "run")
    rewrite(run, lambda content: content.update(seconds=1000.0))
    run_command("train --out", run, "--train.checkpoint_every 7")
    assert 1000 < read_json(run / "metrics.json")["training_seconds"] < 1100  # type: ignore[operator]
    assert read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == 24


def paths_to_tensors(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(node, torch.Tensor):
        return [path]
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return [
        found
        for key, value in items
        if isinstance(value, dict | list | torch.Tensor)
        for found in paths_to_tensors(value, (*path, key))
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "soap", "muon"])
def test_every_tensor_of_every_optimizer_is_compared(
    optimizer: str,
    interrupted: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(interrupted(optimizer), tmp_path / "run")
    path = run / "checkpoints/last.ckpt"
    intact = torch.load(path, weights_only=True)
    states = intact["optimizer_states"][0]["state"]
    for place in paths_to_tensors(states):
        if place[0] not in (0, 7):
            continue
        content = deepcopy(intact)
        node = content["optimizer_states"][0]["state"]
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = torch.zeros(3)
        torch.save(content, path)
        rejected(capsys, ["train --out", run], "last.ckpt", "damaged")


def test_every_flipped_bit_is_found_or_changes_nothing(run: Path) -> None:
    """The checksums of the file cover all that is loaded from it."""
    path = run / "checkpoints/last.ckpt"
    intact, content = path.read_bytes(), torch.load(path, weights_only=True)
    expected = {
        (key, name): value
        for key in ("state_dict", "current_model_state")
        for name, value in content[key].items()
    }
    random, found = np.random.default_rng(0), 0
    for position in random.integers(len(intact), size=60):
        flipped = bytearray(intact)
        flipped[position] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        try:
            loaded = read_checkpoint(path)
        except ValueError as error:
            assert "truncated or damaged" in str(error)
            found += 1
            continue
        for key in ("state_dict", "current_model_state"):
            for name, value in loaded[key].items():
                assert torch.equal(value, expected[(key, name)]), (position, name)
    assert found > 20


def test_one_flipped_bit_of_a_weight_stops_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)["current_model_state"]
    name = first_of(content)
    data = bytearray(path.read_bytes())
    position = data.find(content[name].numpy().tobytes())
    data[position] ^= 1
    path.write_bytes(data)
    rejected(capsys, ["train --out", run], "last.ckpt", "checksum")
    rejected(capsys, ["sample", run, "--n 2 --out", run / "x.npy"], "last.ckpt", "checksum")


def test_a_checkpoint_without_its_data_is_rejected(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "data.json").unlink()
    rejected(capsys, ["train --out", run], "data.json", "restore")
    assert not (run / "data.json").exists()


@pytest.mark.parametrize(
    "change",
    [{"sha256": None}, {"sha256": 5}, {"splits": 3}, {"unknown": 1}, {"event_shape": "x"}],
)
def test_a_damaged_description_of_the_data_is_rejected(
    change: dict[str, object], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(run / "data.json", read_json(run / "data.json") | change)
    rejected(capsys, ["train --out", run], str(run))


def test_renamed_columns_are_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, run, config = tmp_path / "t.csv", tmp_path / "run", tmp_path / "c.yaml"
    rows = np.random.default_rng(0).normal(size=(50, 2))
    text = "".join(f"{a},{b}\n" for a, b in rows)
    table.write_text("height,mass\n" + text)
    data = {"class_path": "ndm.data.Table", "init_args": {"path": str(table)}}
    config.write_text(yaml.safe_dump(TINY | {"data": data}))
    run_command("train --config", config, "--out", run)
    (run / "metrics.json").unlink()
    table.write_text("mass,height\n" + text)
    rejected(capsys, ["train --out", run], "changed", "columns", "height")
    table.write_text("height,mass\n" + text)
    assert exit_code("train --out", run) == 0
