"""``ndm reproduce photos``: bounds and picture formats on the same crops, seeds, resuming."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli.commands import exit_code, rejected, run_command
from ndm.evaluation.baselines import picture_bpd
from ndm.evaluation.evaluate import Evaluation
from ndm.reproduce.photos import PLANS, Result, over_seeds
from ndm.reproduce.report import Report
from ndm.reproduce.synthetic import pictures
from ndm.train.config import RunConfig, find_config
from ndm.train.run import Run
from ndm.viz import write_images

ROWS = ("plain", "plain, widened", "by frequency", "separable")
TEST = pictures(6, 80, 1)[:, :, :70]
"""The test photographs: 35 x 40 after averaging, one crop each."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for split, images in (("train", pictures(4, 72, 0)), ("test", TEST), ("val", TEST[:2])):
        write_images(folder / "data" / split, images)
    run_command(command(folder), "--out", folder / "out")
    return folder / "out"


def command(folder: Path, size: str = "smoke") -> str:
    return f"reproduce photos --size {size} --data {folder / 'data'}"


def read(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "results.json").read_text())
    return record


def folder_of(row: str, time: str) -> str:
    return f"{row.replace(', ', '-').replace(' ', '-')}-{time}"


def test_the_bounds_and_differences_equal_evaluations_of_the_saved_models(out: Path) -> None:
    record = read(out)
    assert set(record["numbers"]["bounds"]) == {"8", "continuous"}
    for time, rows in record["numbers"]["bounds"].items():
        steps = None if time == "continuous" else int(time)
        assert tuple(rows) == ROWS
        values = {}
        for row in ROWS:
            run = Run(out / "runs" / folder_of(row, time))
            model, data = run.model(), run.data()
            assert model.steps == steps, "each model is measured in the time of its training"
            assert data.describe().splits.keys() == {"train", "test"}, "val is not used"
            found = Evaluation(model, data.split("test"), limit=6).nelbo(steps, 2)
            values[row] = found.values / (found.dims * math.log(2))
            assert rows[row]["bpd"] == pytest.approx(found.bpd, rel=1e-5)
            assert rows[row]["stderr"] == pytest.approx(found.bpd_stderr, rel=1e-3)
            assert rows[row]["parameters"] == sum(p.numel() for p in model.parameters())
            assert record["measurements"][folder_of(row, time)]["steps"] == steps
        for row in set(ROWS) - {"plain, widened"}:
            difference = values[row] - values["plain, widened"]
            assert rows[row]["difference"] == pytest.approx(float(difference.mean()), abs=1e-4)
            error = float(difference.std()) / math.sqrt(6)
            assert rows[row]["difference_stderr"] == pytest.approx(error, rel=1e-2)
        sizes = {row: rows[row]["parameters"] for row in ROWS}
        assert max(sizes, key=lambda row: sizes[row]) == "plain, widened"
        assert min(sizes, key=lambda row: sizes[row]) == "plain"


def test_only_models_that_are_trained_for_steps_learn_a_variance(out: Path) -> None:
    for time, learned in (("8", True), ("continuous", False)):
        for row in ROWS:
            model = Run(out / "runs" / folder_of(row, time)).model()
            assert model.predictor.learned_variance is learned


def test_the_picture_formats_code_the_crops_of_the_bounds(out: Path) -> None:
    blocks = TEST.astype(int).reshape(6, 3, 35, 2, 40, 2).sum((3, 5))
    averages = np.floor(blocks / 4 + 0.5)
    crops = averages[:, :, 1:33, 4:36].astype(np.uint8)  # from the middle
    formats = read(out)["numbers"]["formats"]
    for name in ("PNG", "WebP"):
        assert formats[name] == picture_bpd(crops, name)


def test_the_page_shows_every_number_and_figure(out: Path) -> None:
    page, record = (out / "README.md").read_text(), read(out)
    assert record["figures"] == ["bounds", "samples", "transform-8", "transform-continuous"]
    for name in record["figures"]:
        assert f"({name}.png)" in page
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    for rows in record["numbers"]["bounds"].values():
        assert all(f"{one['bpd']:.4f} ± {one['stderr']:.4f}" in page for one in rows.values())
    assert record["checks"] == []


def test_a_repeated_command_recomputes_nothing_and_names_missing_formats(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [*out.glob("parts/*"), *out.glob("runs/*/model/*")]
    before, record = {path: path.stat().st_mtime_ns for path in files}, read(out)
    assert before
    monkeypatch.setattr("ndm.reproduce.photos.installed_formats", lambda: ["PNG"])
    run_command(command(out.parent), "--out", out)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read(out)["measurements"] == record["measurements"]
    assert "Not measured: WebP, JPEG XL" in (out / "README.md").read_text()
    rejected(capsys, [command(out.parent, "quick"), "--out", out], "another experiment")


def planned(
    out: Path, monkeypatch: pytest.MonkeyPatch, size: str, *options: str
) -> list[tuple[int, dict[str, RunConfig]]]:
    """The seeds and configurations of the runs that a size trains."""
    found = []

    def note(
        self: Report, configs: Mapping[str, RunConfig], seed: int
    ) -> dict[str, tuple[torch.nn.Module, None]]:
        found.append((seed, dict(configs)))
        return {name: (torch.nn.Linear(1, 1), None) for name in configs}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "train_all", note)
    monkeypatch.setattr(Run, "metrics", lambda self: {"training_seconds": 1.0})
    monkeypatch.setattr("ndm.reproduce.photos._measure", stop)
    folder = out.parent / f"planned-{size}"
    parts = [command(out.parent, size), "--seed 5 --out", folder, *options]
    assert exit_code(*parts) == 130
    return found


def test_each_size_trains_its_steps_and_seeds(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, full = (planned(out, monkeypatch, size) for size in ("small", "full"))
    assert [seed for seed, _ in small] == [5] and [seed for seed, _ in full] == [5, 6, 7]
    times = ("8", "16", "continuous")
    assert list(small[0][1]) == [folder_of(row, time) for time in times for row in ROWS]
    names = [name for _, configs in full for name in configs]
    assert len(set(names)) == 3 * 4 * 3 and names[-1] == "separable-continuous-seed-7"
    for name, config in small[0][1].items():
        expected = {"8": 8, "16": 16, "continuous": None}[name.split("-")[-1]]
        assert config.get("model.steps") == expected
    plain, other = (small[0][1][name].to_dict() for name in ("plain-8", "plain-16"))
    assert {**plain["model"]["init_args"], "steps": 16} == other["model"]["init_args"]
    assert plain["data"] == other["data"] and plain["train"] == other["train"]


def test_overrides_change_neither_the_steps_nor_the_plain_rows(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "-- --model.steps 4 --train.steps 7 --model.transform ndm.FadingMask"
    ((_, configs),) = planned(out, monkeypatch, "quick", options)
    assert {config.get("model.steps") for config in configs.values()} == {8, None}
    assert {config.get("train.steps") for config in configs.values()} == {7}
    kinds = {name: one.get("model.transform.class_path") for name, one in configs.items()}
    assert kinds["plain-8"].endswith(".Identity")
    assert kinds["separable-8"].endswith(".FadingMask")
    culprit = "the learned model would be the conventional one"
    plain = "-- --model.transform ndm.Identity"
    rejected(capsys, [command(out.parent), "--out", out.parent / "none", plain], culprit)


def test_the_configuration_of_16_steps_differs_from_photos_only_in_what_steps_need() -> None:
    overrides = {
        "model.steps": 16,
        "model.schedule": "ndm.LearnedSchedule",
        "model.schedule.gamma_0": -11.5,
        "model.schedule.gamma_1": 5.0,
        "model.schedule.learn_ends": True,
        "model.predictor.learned_variance": True,
        "model.predictor.network.outputs": 2,
    }
    expected = RunConfig.read(find_config("photos"), overrides)
    assert RunConfig.read(find_config("photos-16-steps")).to_dict() == expected.to_dict()


def test_errors_are_over_crops_for_one_seed_and_over_runs_for_several() -> None:
    assert over_seeds([(2.0, 0.25)]) == (2.0, 0.25)
    mean, error = over_seeds([(1.0, 9.0), (2.0, 9.0), (6.0, 9.0)])
    assert mean == pytest.approx(3.0) and error == pytest.approx(math.sqrt(14 / 2 / 3))


def test_differences_are_paired_by_seed_and_crop() -> None:
    generator = torch.Generator().manual_seed(0)
    common = 100 * torch.randn(3, 20, generator=generator, dtype=torch.float64)
    shifts = (1.0, 2.0, 6.0)
    first, second = (
        Result(None, 8, records=[{"dims": 1}] * 3, values=list(values))  # type: ignore[arg-type]
        for values in (common + torch.tensor(shifts)[:, None] * math.log(2), common)
    )
    assert first.difference_to(second) == pytest.approx(over_seeds([(one, 0.0) for one in shifts]))


def test_every_size_of_the_experiment_has_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    rejected(capsys, ["reproduce photos --size huge"], ", ".join(PLANS))
    rejected(capsys, ["reproduce photos"], "--data FOLDER")


def test_a_folder_without_a_test_split_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "data" / "train", TEST)
    rejected(capsys, [command(tmp_path), "--out", tmp_path / "out"], "no subfolder 'test'")
