"""``ndm reproduce``: rejected arguments, resuming, parallel training, and the page."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli.commands import exit_code, rejected, run_command
from ndm.evaluation.evaluate import Evaluation
from ndm.reproduce import EXPERIMENTS, Report
from ndm.reproduce.report import ExperimentSettings
from ndm.train.config import RunConfig

SMOKE = "reproduce checkerboard --size smoke --seed 3"


@pytest.fixture(scope="module")
def checkerboard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce") / "checkerboard"
    run_command(SMOKE, "--out", folder)
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_invalid_arguments_are_rejected_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def check(command: str, *culprits: str, out: Path = out, overrides: str = "") -> None:
        rejected(capsys, ["reproduce", command, "--out", out, overrides], *culprits)

    check("", "give the name", "checkerboard", "distribution-2d")
    check("chequers", "'chequers'", "checkerboard", "--list")
    check("checkerboard --size huge", "--size huge", "small, smoke")
    check("checkerboard --seed -1", "seed=-1")
    check("checkerboard --data somewhere", "--data somewhere")
    check("checkerboard --nonsense", "nonsense")
    check("checkerboard --size smoke", "steps", overrides="-- --train.steps none")
    moons = "-- --data ndm.data.TwoMoons"
    culprit = "-- --data: distribution-2d sets that"
    check("distribution-2d --size smoke", culprit, overrides=moons)
    plain = "-- --model.transform=ndm.Identity"
    check("checkerboard", "the learned model would be the conventional one", overrides=plain)
    conventional = "would be the conventional one"
    check("mnist --size smoke", conventional, out=tmp_path / "mnist", overrides=plain)
    fading = (
        "-- --model.transform=ndm.FadingMask --model.predictor=ndm.Predictor"
        " --model.predictor.network=ndm.nn.UNet"
    )
    check("mnist --size smoke", "give F a network", out=tmp_path / "mnist", overrides=fading)
    culprit = "-- --train.steps 9: ot-1d does not use ndm train"
    check("ot-1d", culprit, overrides="-- --train.steps 9")
    check("ot-2d --jobs 2", "--jobs 2", "one model at a time")
    check("cifar10 --data somewhere --jobs 2", "--jobs 2", "one model at a time")
    assert not out.exists()
    (tmp_path / "file").write_text("x")
    check("checkerboard --size smoke", "is a file", out=tmp_path / "file")


def test_a_folder_of_another_experiment_is_rejected(
    checkerboard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(command: str, *culprits: str, overrides: str = "") -> None:
        rejected(capsys, ["reproduce", command, "--out", checkerboard, overrides], *culprits)

    other = "distribution-2d --size smoke --seed 3"
    check(other, "'checkerboard'", "'distribution-2d'", "--out")
    check("checkerboard --size small --seed 3", "size", "'smoke'", "'small'")
    check("checkerboard --size smoke --seed 4", "seed")
    check("checkerboard --size smoke --seed 3", "overrides", overrides="-- --train.ema 0")


def test_a_repeated_command_recomputes_nothing(
    checkerboard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(checkerboard)
    files = [*checkerboard.glob("parts/*"), *checkerboard.glob("runs/*/*.json")]
    times = {path: path.stat().st_mtime_ns for path in files}
    assert len(times) == 3 + 2 * 2
    (checkerboard / "results.json").unlink()  # as if interrupted before the end
    monkeypatch.setattr(Evaluation, "nll", None)
    run_command(SMOKE, "--out", checkerboard)
    after = results(checkerboard)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {**after, "seconds_of_this_call": None} == {**before, "seconds_of_this_call": None}


def test_parallel_training_gives_the_same_models(
    checkerboard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parallel = tmp_path / "parallel"
    run_command(SMOKE, "--out", parallel, "--jobs 2")
    for name in ("ddpm", "ndm"):
        expected, found = (
            load_file(folder / "runs" / name / "model/model.safetensors")
            for folder in (checkerboard, parallel)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert "wrote" in (parallel / "runs" / name / "log.txt").read_text()
    assert results(parallel)["command"] == f"ndm {SMOKE} --jobs 2"
    capsys.readouterr()
    diverging = "--jobs 2 -- --train.learning_rate 1e30"
    smoke = "reproduce checkerboard --size smoke --out"
    assert exit_code(smoke, tmp_path / "wrong", diverging) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ndm: error: ") and "not finite" in error
    assert "2 of 2 runs failed ('ddpm', seed 0, 'ndm', seed 0)" in error
    rejected(capsys, [smoke, tmp_path / "wrong", "--jobs 0"], "jobs")


def test_cached_parts_are_read_and_failed_parts_are_recomputed(tmp_path: Path) -> None:
    report = Report(ExperimentSettings("name", "small", tmp_path))

    def fail() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.cache("part", fail)
    assert not (tmp_path / "parts" / "part.json").exists()
    assert report.cache("part", lambda: {"a": 0.1}) == {"a": 0.1}
    assert Report(report.settings).cache("part", fail) == {"a": 0.1}


def test_parts_of_another_model_are_recomputed(checkerboard: Path, tmp_path: Path) -> None:
    shutil.copytree(checkerboard, tmp_path / "runs")

    def report(kind: str) -> Report:
        """A report on a trained model that is replaced by one of another kind."""
        model = tmp_path / "runs" / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(tmp_path / "runs/runs" / kind, model)
        found = Report(ExperimentSettings("checkerboard", "smoke", tmp_path, 3))
        found.train("model", RunConfig.read(model / "config.yaml"))
        return found

    assert report("ddpm").cache("part", lambda: {"a": 1}) == {"a": 1}
    assert report("ddpm").cache("part", lambda: {"a": 2}) == {"a": 1}
    assert report("ndm").cache("part", lambda: {"a": 3}) == {"a": 3}


def test_user_overrides_do_not_change_the_transformation_of_the_ddpm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experiment's own overrides are applied after those of the user."""
    found: dict[str, str] = {}

    def stop(self: Report, configs: Mapping[str, RunConfig]) -> None:
        for name, config in configs.items():
            found[name] = config.get("model.transform.class_path")
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "train_all", stop)
    for name in ("checkerboard", "distribution-2d", "steps"):
        found.clear()
        options = ["--size smoke --out", tmp_path / name, "-- --model.transform ndm.FadingMask"]
        assert exit_code("reproduce", name, *options) == 130
        plain = [kind for key, kind in found.items() if "ndm" not in key]
        learned = [kind for key, kind in found.items() if "ndm" in key]
        assert plain and all(kind.endswith(".Identity") for kind in plain)
        assert learned and all(kind.endswith(".FadingMask") for kind in learned)


def test_the_page_states_which_targets_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(ExperimentSettings("name", "small", tmp_path))
    report.expect("good", 0.1, 0.1)
    report.expect("bad", 0.2, 0.1)
    report.expect("broken", math.nan, 0.1)
    report.finish()
    assert [one["holds"] for one in results(tmp_path)["checks"]] == [True, False, False]
    page, printed = (tmp_path / "README.md").read_text(), capsys.readouterr().out
    assert "| good | 0.1 | 0.1 | yes |" in page and "| bad | 0.2 | 0.1 | **no** |" in page
    assert "holds: good" in printed
    assert "DOES NOT HOLD: bad" in printed and "DOES NOT HOLD: broken" in printed


def test_the_list_names_every_experiment_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    run_command("reproduce --list")
    text = capsys.readouterr().out
    for experiment in EXPERIMENTS.values():
        assert experiment.name in text and experiment.shows in text
        assert "smoke" in experiment.sizes
        assert all(f"--size {size}" in text for size in experiment.sizes)
