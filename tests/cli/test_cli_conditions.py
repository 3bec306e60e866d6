"""Conditional runs from the command line: training, resuming, measuring, sampling by class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ndm
from cli.commands import exit_code, rejected, run_command
from ndm.cli.conditions import wanted
from ndm.data import Digits
from ndm.data.source import DataSource
from ndm.quality import (
    class_diversity,
    classifier_features,
    classify,
    load_classifier,
    save_classifier,
    train_classifier,
)
from ndm.serialize import read_json, write_json
from ndm.train.run import Run

CLASSES = {"class_path": "ndm.ClassCondition", "init_args": {"num_classes": 10, "dropout": 0.2}}


def network(**more: Any) -> dict[str, Any]:
    arguments = {"dims": 64, "hidden": 16, "blocks": 1, "max_frequency": 4.0, **more}
    return {"class_path": "ndm.nn.MLP", "init_args": arguments}


CONFIG: dict[str, Any] = {
    "data": {"class_path": "ndm.data.Digits"},
    "model": {
        "condition": CLASSES,
        "schedule": {
            "class_path": "ndm.LinearLogSNRSchedule",
            "init_args": {"gamma_0": -6.5, "gamma_1": 5.0},
        },
        "transform": {
            "class_path": "ndm.GatedTransform",
            "init_args": {"network": network()},
        },
        "predictor": {
            "class_path": "ndm.Predictor",
            "init_args": {"network": network(classes=10)},
        },
        "decoder": {"class_path": "ndm.DiscretizedGaussian", "init_args": {"num_values": 17}},
    },
    "train": {
        "steps": 24,
        "batch_size": 16,
        "accelerator": "cpu",
        "devices": 1,
        "checkpoint_every": 8,
        "evaluation_draws": 2,
        "evaluation_limit": 40,
        "sample_steps": 4,
        "sample_images": 20,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditional")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    run_command("train --config", folder / "config.yaml", "--out", folder / "run")
    return folder / "run"


def test_a_run_records_both_bounds_and_draws_a_class_in_each_row(run: Path) -> None:
    metrics = read_json(run / "metrics.json")
    assert metrics["condition"] == "labels"
    assert metrics["nelbo_bpd"] != metrics["nelbo_unconditional_bpd"]
    description = read_json(run / "data.json")
    assert sum(description["frequencies"]) == pytest.approx(1)  # type: ignore[arg-type]
    labels = Digits().split("train").labels
    assert labels is not None
    assert description["frequencies"][3] == pytest.approx(float((labels == 3).float().mean()))  # type: ignore[index]
    with Image.open(run / "samples.png") as picture:
        width, height = picture.size
    assert height / width == pytest.approx(10 / 2, rel=0.1)  # ten rows of two digits


def test_the_same_seed_drops_the_same_conditions(run: Path, tmp_path: Path) -> None:
    config, again = run.parent / "config.yaml", tmp_path / "again"
    run_command("train --config", config, "--out", again)
    first, second = (
        torch.load(one / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for one in (run, again)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_evaluate_measures_given_the_labels_and_given_nothing(run: Path, tmp_path: Path) -> None:
    """The numbers are those of the model's own bound, given the labels of the test split."""
    found = tmp_path / "found.json"
    run_command("evaluate", run, "--limit 30 --nelbo --steps 5 --calibrate --json", found)
    record = read_json(found)
    assert record["condition"] == "labels"
    for name in ("nelbo", "nelbo_unconditional"):
        assert record[f"{name}_bpd"] is not None
    assert set(record["nelbo_discrete_bpd"]) == {"5"}  # type: ignore[arg-type]
    assert set(record["nelbo_discrete_unconditional_calibrated_bpd"]) == {"5"}  # type: ignore[arg-type]
    only = tmp_path / "only.json"
    run_command("evaluate", run, "--limit 30 --steps 5 --given nothing --json", only)
    alone = read_json(only)
    key = "nelbo_discrete_unconditional_bpd"
    assert alone[key] == record[key] and alone["condition"] == "none"
    assert "nelbo_discrete_bpd" not in alone

    model, test = Run(run).model(), Digits().split("test")
    labels, chosen = test.labels, list(range(0, len(test), len(test) // 30))
    assert labels is not None
    x = test[chosen]
    with torch.no_grad():
        right = model.given(labels[chosen]).bound(x, draws=200).total.mean() / 64 / np.log(2)
    assert float(right) == pytest.approx(record["nelbo_bpd"], abs=0.05)  # type: ignore[arg-type]


def test_samples_are_those_of_the_classes_that_are_named(run: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "x.npy", Run(run).model()
    common = "--method ddim --steps 4 --seed 5 --batch_size 7 --out"
    run_command("sample", run, "--condition 3,1 --n 4", common, out)
    classes = torch.tensor([3] * 4 + [1] * 4)
    expected = model.given(classes).sample(8, "ddim", steps=4, seed=5, batch_size=7)
    levels = Digits().to_source_units(expected).numpy()
    np.testing.assert_array_equal(np.load(out), levels)
    names = tmp_path / "classes.txt"
    names.write_text("3\n" * 4 + "1\n" * 4)
    run_command("sample", run, "--condition", names, common, tmp_path / "y.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), levels)
    run_command("sample", run, "--condition 3,1 --n 4 --guidance 3", common, tmp_path / "z.npy")
    guided = model.given(classes).sample(8, "ddim", steps=4, seed=5, batch_size=7, guidance=3.0)
    np.testing.assert_array_equal(
        np.load(tmp_path / "z.npy"), Digits().to_source_units(guided).numpy()
    )
    assert not np.array_equal(np.load(tmp_path / "z.npy"), levels)
    run_command("sample", run, "--condition nothing --n 8", common, tmp_path / "p.npy")
    plain = model.sample(8, "ddim", steps=4, seed=5, batch_size=7)
    np.testing.assert_array_equal(
        np.load(tmp_path / "p.npy"), Digits().to_source_units(plain).numpy()
    )
    run_command("sample", run, "--n 8", common, tmp_path / "q.npy")
    run_command("sample", run, "--condition 0,1,2 --n 5 --out", tmp_path / "rows.png", "--steps 2")
    with Image.open(tmp_path / "rows.png") as picture:
        width, height = picture.size
    assert width / height == pytest.approx(5 / 3, rel=0.05)


def test_a_fitted_grid_serves_a_conditional_model(run: Path, tmp_path: Path) -> None:
    options = "--condition 3 --n 4 --grid fitted --steps 3 --guidance 2 --out"
    run_command("sample", run, options, tmp_path / "x.npy")
    assert np.load(tmp_path / "x.npy").shape == (4, 1, 8, 8)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train classifiers for a few steps."""
    monkeypatch.setattr(
        "ndm.quality.classifier.train_classifier.__defaults__", (0, 60, 64, 2e-3, False)
    )


def test_quality_measures_samples_of_classes(
    run: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of the library for the samples that ndm sample draws."""
    found, sampler = tmp_path / "found.json", "--method ddim --steps 4 --seed 5 --batch_size 70"
    run_command("quality", run, "--n 60 --guidance 2 --guide x", sampler, "--json", found)
    record, out = read_json(found), capsys.readouterr().out
    assert record["condition"] == "as in training"
    assert (record["guidance"], record["guide"]) == (2.0, "x")
    model, train, test = Run(run).model(), *(Digits().split(name) for name in ("train", "test"))
    assert train.labels is not None and test.labels is not None
    classes = wanted(None, 60, model, Digits().describe(), 5, lambda: train).classes
    assert classes is not None
    options: dict[str, Any] = {"steps": 4, "seed": 5, "guidance": 2.0, "guide": "x"}
    x = model.given(classes).sample(60, "ddim", batch_size=70, **options)
    classifier = load_classifier(run / "classifier")
    right = (classify(classifier, x) == classes).double().mean()
    assert record["accuracy"] == float(right)
    assert record["accuracy_stderr"] == pytest.approx(float((right * (1 - right) / 60).sqrt()))
    assert record["classifier_accuracy"] == classifier.info["accuracy"]["test"]
    features = classifier_features(classifier)
    for name, images, labels in (("", x, classes), ("real_", test, test.labels)):
        expected = class_diversity(features(train), train.labels, features(images), labels)
        assert expected is not None
        assert record[f"{name}diversity"] == pytest.approx(expected[0])
        assert record[f"{name}diversity_stderr"] == pytest.approx(expected[1])
    assert record["samples"]["real_images"] == len(train)  # type: ignore[index]
    assert f"accuracy of classes {float(right):.4f}" in out
    assert f"diversity within classes {record['diversity']:.4f}" in out


def test_quality_compares_named_classes_with_real_images_of_them(
    run: Path, tmp_path: Path, quick: None
) -> None:
    found = tmp_path / "found.json"
    common = ["--steps 2 --json", found]
    run_command("quality", run, "--condition 3,1 --n 5", *common)
    record = read_json(found)
    labels = Digits().split("train").labels
    assert labels is not None
    counts = {k: int((labels == k).sum()) for k in (1, 3)}
    assert record["condition"] == "3,1" and record["guidance"] == 1.0
    assert record["samples"]["generated_images"] == 10  # type: ignore[index]
    assert record["samples"]["real_images"] == 2 * min(counts.values())  # type: ignore[index]
    run_command("quality", run, "--condition nothing --n 10", *common)
    record = read_json(found)
    assert record["condition"] == "nothing" and "accuracy" not in record
    assert record["samples"]["real_images"] == len(labels)  # type: ignore[index]


def test_quality_rejects_conditions_that_cannot_be_measured(
    run: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    save_classifier(tmp_path / "two", train_classifier(Digits(classes=[0, 1]), steps=1))
    for options, culprits in (
        ("--condition cat", ["'cat' is not a class"]),
        ("--condition 3 --n 3", ["n=3"]),
        ("--condition nothing --guidance 2", ["guidance needs a condition"]),
        (f"--condition {','.join(['3'] * 300)},x", ["'x' is not a class"]),
        ("--guidance -1", ["guidance=-1"]),
        ("--guide score", ["guide"]),
        (f"--features {tmp_path / 'two'}", ["the classifier has 2 classes", "digits has 10"]),
    ):
        rejected(capsys, ["quality", run, options], *culprits)


def test_requests_that_make_no_sense_are_rejected(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.npy"
    for options, culprits in (
        ("--condition cat", ["'cat' is not a class", "0, 1, 2"]),
        ("--condition 3, ", ["'' is not a class"]),
        ("--condition nothing --guidance 2", ["guidance needs a condition"]),
        (f"--condition {','.join(['3'] * 300)},x", ["'x' is not a class"]),
        ("--condition 3 --guidance -1", ["guidance=-1"]),
        ("--condition 3 --guide score", ["guide"]),
    ):
        parts = options.split(" ", 2) if options.endswith(" ") else [options]
        if options.endswith(" "):
            parts = ["--condition", "3,"]
        rejected(capsys, ["sample", run, *parts, "--out", out], *culprits)
    assert not out.exists()
    config = run.parent / "config.yaml"
    for options, culprits in (
        ("--model.condition.num_classes 9", ["classes=10", "classes=9"]),
        ("--model.condition null", ["takes a condition and the model has none"]),
        ("--model.predictor.network.classes 0", ["none of its networks takes it"]),
        ("--data ndm.data.Gaussian", ["Gaussian"]),
    ):
        parts = ["train --config", config, options, "--out", tmp_path / "new"]
        rejected(capsys, parts, *culprits)
    assert not (tmp_path / "new").exists()


def test_data_without_classes_are_rejected_before_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "rows.npy", np.arange(640).reshape(10, 64) % 17)
    config = yaml.safe_load((run.parent / "config.yaml").read_text())
    config["data"] = {
        "class_path": "ndm.data.Table",
        "init_args": {"path": str(tmp_path / "rows.npy"), "num_values": 17, "low": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    parts = ["train --config", tmp_path / "config.yaml", "--out", tmp_path / "new"]
    rejected(capsys, parts, "nothing to condition on")


def test_changed_classes_are_noticed_on_resuming(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run.parent / "config.yaml"
    again = tmp_path / "again"
    run_command("train --config", config, "--out", again)
    (again / "metrics.json").unlink()
    description = read_json(again / "data.json")
    write_json(again / "data.json", {**description, "condition_sha256": "0" * 64})
    rejected(capsys, ["train --config", config, "--out", again], "what is known of", "changed")


def test_a_run_without_a_condition_names_none(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((run.parent / "config.yaml").read_text())
    del config["model"]["condition"]
    config["model"]["predictor"]["init_args"]["network"] = network()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run_command("train --config", tmp_path / "config.yaml", "--out", tmp_path / "plain")
    metrics = read_json(tmp_path / "plain/metrics.json")
    assert metrics["condition"] == "none" and "nelbo_unconditional_bpd" not in metrics
    assert exit_code("sample", tmp_path / "plain", "--condition 3 --out", tmp_path / "x.npy") == 2
    rejected(capsys, ["evaluate", tmp_path / "plain", "--given condition"], "takes no condition")


def test_labels_follow_flips_and_crops(tmp_path: Path) -> None:
    """What is given of an example is the class of the image that it comes from."""
    from ndm.train.batches import WithFlips

    train = Digits().split("train")
    assert train.labels is not None
    flips = WithFlips(train)
    chosen = [5, len(train) + 5, len(train) - 1]
    found = flips.conditions(chosen)
    assert found is not None
    assert found.tolist() == train.labels[[5, 5, len(train) - 1]].tolist()
    torch.testing.assert_close(flips[chosen[1]], train[5].flip(-1))

    for kind, size in (("a", 12), ("b", 20)):
        for split in ("train", "test"):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            pixels = np.full((size, size), 40 if kind == "a" else 200, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "0.png")
    source: DataSource = ndm.data.ImageFolder(str(tmp_path), channels=1, size=8, crop="random")
    crops = source.split("train")
    numbers = [0, 24, 25, 100]
    known = crops.conditions(numbers)
    assert known is not None and crops.labels is not None
    assert known.tolist() == crops.labels[numbers].tolist() == [0, 0, 1, 1]
    assert (crops[numbers].flatten(1)[:, 0] > 0).tolist() == [False, False, True, True]
