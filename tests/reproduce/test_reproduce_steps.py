"""``ndm reproduce steps``: everything works, evaluations are counted where they happen, and what
was computed is not computed again.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ndm.cli.main import main
from ndm.decoder import GaussianDecoder
from ndm.model import NDM
from ndm.nn import MLP
from ndm.predictor import Predictor
from ndm.reproduce.steps_quality import count_evaluations
from ndm.schedule import LinearLogSNRSchedule
from ndm.transform import GatedTransform, Identity


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps") / "out"
    assert main(["reproduce", "steps", "--size", "smoke", "--out", str(folder)]) == 0
    return folder


def read(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "results.json").read_text())
    return record


def test_bounds_and_quality_of_both_models(out: Path) -> None:
    record = read(out)
    bounds, quality = record["measurements"], record["numbers"]["quality"]
    for name in ("ddpm", "ndm"):
        assert bounds[f"{name}-nll"]["num_examples"] == 4
        plain, fitted = bounds[f"{name}-4"], bounds[f"{name}-4-fitted"]
        assert (plain["steps"], fitted["steps"]) == (4, 4)
        assert fitted["bpd"] < plain["bpd"]
        assert "fitted" in fitted["reverse_variance"]
        assert f"{name}-1-fitted" not in bounds, "the plan of this size fits at T = 4 alone"
        assert (
            bounds[f"{name}-1"]["bpd"]
            > bounds[f"{name}-4"]["bpd"]
            > bounds[f"{name}-continuous"]["bpd"]
        )
    less = record["numbers"]["ndm_less_ddpm_bpd"]
    assert set(less) == {"1", "4", "continuous"}
    assert less["4"]["difference"] == pytest.approx(
        bounds["ndm-4"]["bpd"] - bounds["ddpm-4"]["bpd"]
    )
    for points in quality["samplers"].values():
        for point in points:
            first, second = point["sets"]
            assert first["fid"] != second["fid"], "sets are independent"
            assert first["seed"] != second["seed"]
            assert (
                first["features_sha256"]
                == quality["features_sha256"]
                == quality["classifier"]["sha256"]
            )
            assert (first["real_images"], first["generated_images"]) == (100, 12)
            assert first["fid"] > quality["test_images"]["fid"], (
                "an untrained model is worse than real images"
            )
    assert {one.name for one in out.iterdir() if one.suffix in (".png", ".pdf")} == {
        f"{name}.{suffix}" for name in ("nelbo", "quality", "samples") for suffix in ("png", "pdf")
    }


def test_evaluations_are_those_that_happened(out: Path) -> None:
    for name, points in read(out)["numbers"]["quality"]["samplers"].items():
        assert [point["evaluations"] for point in points] == (
            [2, 4] if "Heun" in name else [1, 2, 4]
        )
        for point in points:
            for one in point["sets"]:
                assert one["predictor_evaluations"] == point["evaluations"]
                of_transform = (
                    0
                    if name.startswith("DDPM")
                    else point["evaluations"]
                    if "Heun" in name
                    else 2 * point["steps"]
                )
                assert one["transform_evaluations"] == of_transform


def test_the_same_command_again_reads_what_is_there(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(out)
    (out / "parts" / "quality-ndm-ddim-2-1.json").unlink()
    (out / "results.json").unlink()
    monkeypatch.setattr(
        "ndm.evaluation.evaluate.Evaluation.nelbo", lambda *_: pytest.fail("it is there already")
    )
    monkeypatch.setattr(
        "ndm.evaluation.evaluate.Evaluation.nll",
        lambda *_, **__: pytest.fail("it is there already"),
    )
    assert main(["reproduce", "steps", "--size", "smoke", "--out", str(out)]) == 0
    after = read(out)
    assert after["measurements"] == before["measurements"]
    again, first = (
        record["numbers"]["quality"]["samplers"]["NDM, DDIM"][1]["sets"][1]
        for record in (after, before)
    )
    timed = ("seconds",)
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in first.items() if k not in timed
    }, "from its seed alone"
    assert main(["reproduce", "steps", "--size", "smoke", "--seed", "1", "--out", str(out)]) == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "cost", "of_transform"),
    [("ancestral", 1, 2), ("ddim", 1, 2), ("ode", 2, 2), ("sde", 1, 1)],
)
def test_counting_evaluations_of_predictor_and_transformation(
    method: str, cost: int, of_transform: int
) -> None:
    for transform, expected in ((GatedTransform(MLP(2, 8, 1)), of_transform), (Identity(), 0)):
        model = NDM(
            LinearLogSNRSchedule(-4.0, 3.0), transform, Predictor(MLP(2, 8, 1)), GaussianDecoder()
        )
        with count_evaluations(model) as count:
            model.sample((6, 2), method, steps=5, seed=0)  # type: ignore[arg-type]
        assert count == {"predictor": 6 * 5 * cost, "transform": 6 * 5 * expected}
        model.predict(torch.zeros(3, 2), 0.5)
        assert count["predictor"] == 6 * 5 * cost, "nothing counts afterwards"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that says what is wrong."""

    def line(*words: str) -> str:
        capsys.readouterr()
        assert main(["reproduce", *words]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    return line


def test_runs_that_are_there_are_measured_alike(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    ddpm, ndm, again = str(out / "runs" / "ddpm"), str(out / "runs" / "ndm"), tmp_path / "again"
    command = ["steps", "--size", "smoke", "--out", str(again)]
    monkeypatch.setattr(
        "ndm.reproduce.report.train_run", lambda *_: pytest.fail("nothing is to be trained")
    )
    monkeypatch.setattr("ndm.reproduce.steps.quality", lambda *_: None)
    assert "give first a run that does not transform" in refused(*command, "--runs", ndm, ddpm)
    assert not again.exists(), "what is refused leaves nothing behind"
    assert main(["reproduce", *command, "--runs", ddpm, ndm]) == 0
    first, second = read(out), read(again)
    assert {k: v["bpd"] for k, v in second["measurements"].items()} == {
        k: v["bpd"] for k, v in first["measurements"].items()
    }
    assert f"--runs {ddpm} {ndm}" in second["command"]
    assert list(second["runs"]) == [ddpm, ndm]
    assert "runs measured is" in refused(*command), "the folder holds the measures of other models"
    assert "runs measured is 'not given' there" in refused(
        *command[:-1], str(out), "--runs", ddpm, ndm
    )


def test_runs_that_cannot_be_compared_are_refused(
    out: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    ddpm, ndm, command = (
        str(out / "runs" / "ddpm"),
        str(out / "runs" / "ndm"),
        ["steps", "--size", "smoke", "--out"],
    )
    assert "then one that does" in refused(*command, str(tmp_path / "a"), "--runs", ddpm, ddpm)
    assert "there is no run" in refused(
        *command, str(tmp_path / "b"), "--runs", ddpm, str(tmp_path / "none")
    )
    assert "--runs uses the data of the runs; leave it out" in refused(
        *command, str(tmp_path / "c"), "--runs", ddpm, ndm, "--data", str(tmp_path)
    )
    assert "nothing is trained" in refused(
        *command, str(tmp_path / "d"), "--runs", ddpm, ndm, "--", "--train.steps", "3"
    )
    assert "trains its models itself" in refused(
        "ot-1d", *command[1:], str(tmp_path / "e"), "--runs", ddpm, ndm
    )
    other = tmp_path / "other"
    shutil.copytree(ndm, other)
    description = (other / "data.json").read_text()
    (other / "data.json").write_text(description.replace("80/20", "70/30"))
    assert "trained on different data: version is" in refused(
        *command, str(tmp_path / "f"), "--runs", ddpm, str(other)
    )


def test_data_are_of_the_user_or_of_the_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    empty = str(tmp_path / "empty")
    Path(empty).mkdir()
    assert "train-images-idx3-ubyte" in refused(
        "steps", "--size", "smoke", "--data", empty, "--out", str(tmp_path / "a")
    )
    assert "makes its data itself" in refused(
        "checkerboard", "--size", "smoke", "--data", empty, "--out", str(tmp_path / "b")
    )
    assert "has the sizes small, smoke" in refused(
        "steps", "--size", "huge", "--out", str(tmp_path / "c")
    )
    assert main(["reproduce", "--list"]) == 0
    listing = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [
        "(or --data FOLDER)" in line
        for line in listing
        if line.split(":")[0] in ("checkerboard", "steps")
    ] == [False, True]
