"""The experiments on natural images: smoke runs on synthetic files in the real formats."""

import hashlib
import json

import numpy as np
import pytest
import torch

import ndm
from cli.commands import exit_code, run_command
from ndm.data import CIFAR10, CelebAHQ, ImageNetOord, spread
from ndm.quality import compare_features, torchscript_features
from ndm.random import part_seed
from ndm.reproduce import EXPERIMENTS, images, synthetic
from ndm.train.config import RunConfig, find_config
from ndm.train.run import Run

DIMS = {
    "cifar10": 3 * 32**2,
    "imagenet32": 3 * 32**2,
    "imagenet64": 3 * 64**2,
    "celebahq64": 3 * 16**2,
    "celebahq256": 3 * 32**2,
}


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", list(images.FACTS))
def test_the_smoke_size_of_each_experiment_runs_end_to_end(tmp_path, name, capsys):
    out = tmp_path / "out"
    run_command("reproduce", name, "--size smoke --out", out, "--seed 3")
    results, page = results_of(out), (out / "README.md").read_text()
    nelbo, nll = results["measurements"]["nelbo"], results["measurements"]["nll"]
    for record in (nelbo, nll):
        assert record["dims"] == DIMS[name] and record["data"].endswith("-partial")
        assert np.isfinite(record["nats"])
        assert record["bpd"] == pytest.approx(record["nats"] / (DIMS[name] * np.log(2)))
        assert f"{record['bpd']:.4f}" in page and record["data_sha256"] in page
    terms = [nelbo[f"{term}_bpd"] for term in ("prior", "diffusion", "reconstruction")]
    assert nelbo["steps"] is None and nelbo["bpd"] == pytest.approx(sum(terms))
    assert results["figures"] == ["samples", "transform"] and results["checks"] == []
    for file in ("samples.png", "samples.pdf", "transform.png", "transform.pdf"):
        assert (out / file).stat().st_size > 1000
    assert "mean nothing" in page
    assert all(f"{one.bpd:.2f}" in page for one in images.FACTS[name].published)
    capsys.readouterr()


def test_the_other_release_is_accepted_as_an_override_and_not_trained_twice(tmp_path, capsys):
    folder, other = tmp_path / "arrays", tmp_path / "other"
    folder.mkdir()
    for name, count in (("train_data_batch_1", 12), ("val_data", 4)):
        pixels = synthetic.pictures(count, 32, count).reshape(count, -1)
        np.savez_compressed(folder / f"{name}.npz", data=pixels)
    command = ["reproduce imagenet32 --size smoke --data", folder, "--out"]
    assert exit_code(*command, tmp_path / "out") == 2
    assert "--data ndm.data.ImageNetChrabaszcz" in capsys.readouterr().err
    release = ["-- --data ndm.data.ImageNetChrabaszcz --data.path", folder]
    command += [other, *release, "--data.resolution 32 --data.partial=true"]
    run_command(*command)
    first = results_of(other)
    assert first["measurements"]["nelbo"]["data"] == "imagenet32-chrabaszcz-partial"
    checkpoint = other / "runs/ndm/checkpoints/last.ckpt"
    time = checkpoint.stat().st_mtime_ns
    run_command(*command)
    assert results_of(other)["measurements"] == first["measurements"]
    assert checkpoint.stat().st_mtime_ns == time
    assert "is finished" in capsys.readouterr().out


def test_the_full_size_requires_the_data(tmp_path, capsys):
    assert exit_code("reproduce cifar10 --out", tmp_path / "out") == 2
    assert "--data FOLDER" in capsys.readouterr().err
    assert exit_code("reproduce cifar10 --out", tmp_path / "out", "--data", tmp_path) == 2
    assert "data_batch_1.bin" in capsys.readouterr().err


def write_imagenet(folder, seed):
    synthetic.write_imagenet(folder, 32, seed)


def write_faces(folder, seed):
    synthetic.write_faces(folder, 64, seed)


@pytest.mark.parametrize(
    ("write", "source", "pixels"),
    [
        (synthetic.write_cifar, CIFAR10, [synthetic.pictures(10, 32, 5 + n) for n in range(6)]),
        (write_imagenet, ImageNetOord, [synthetic.pictures(n, 32, 5 + n) for n in (32, 8)]),
        (write_faces, CelebAHQ, [synthetic.pictures(40, 64, 5)]),
    ],
)
def test_synthetic_data_are_read_exactly(tmp_path, write, source, pixels):
    write(tmp_path / "data", 5)
    data = source(str(tmp_path / "data"), partial=True)
    splits = [data.split(split) for split in ("train", "test")]
    found = torch.cat([data.integers(split.__getitems__(range(len(split)))) for split in splits])
    np.testing.assert_array_equal(found.numpy(), np.concatenate(pixels))


def test_the_published_bound_is_a_target_only_for_the_complete_data_set(monkeypatch):
    """Other, partial and unknown releases have no published bound."""
    targets = []

    class Page:
        name, seed, smoke = "cifar10", 0, False

        def measure(self, key, compute):
            return {"bpd": 2.8, "bpd_stderr": 0.01, "num_examples": 10, "split_size": 10}

        def expect(self, text, value, most):
            targets.append((value, most))

        def table(self, head, rows):
            pass

        def text(self, text):
            pass

    class Data:
        def __init__(self, name):
            self.name, self.version, self.sha256 = name, "", ""

        def describe(self):
            return self

        def split(self, name):
            return []

    for experiment, name in (
        ("imagenet32", "imagenet32-oord"),
        ("cifar10", "cifar10-partial"),
        ("celebahq64", "celebahq64"),
    ):
        images.likelihood(Page(), images.FACTS[experiment], None, Data(name))
    assert targets == []
    images.likelihood(Page(), images.FACTS["cifar10"], None, Data("cifar10"))
    assert targets == [(2.8, pytest.approx(2.75))]


def run_configurations():
    return sorted(
        path
        for path in find_config("cifar10").parent.glob("*.yaml")
        if not path.name.startswith("compare-")
    )


@pytest.mark.parametrize("path", run_configurations(), ids=lambda path: path.stem)
def test_every_configuration_parses_and_builds(path, monkeypatch):
    # Uninitialized weights take no memory.
    for name in ("uniform_", "kaiming_uniform_", "normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    parts = RunConfig.read(path).build()
    assert parts.num_parameters > 300
    train = parts.settings
    if isinstance(train.devices, int):
        assert train.batch_size % (train.devices * train.accumulate) == 0
    if path.stem in (*images.FACTS, "mnist"):  # the comments at the top state the settings
        lines = path.read_text(encoding="utf-8").splitlines()
        head = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        count = sum(p.numel() for p in parts.model.parameters())
        phrases = [
            f"{count / 1e6:.1f} M parameters",
            f"batch {train.batch_size}",
            f"{train.steps:,} steps",
            train.precision,
            "Measured" if path.stem == "mnist" else "estimate",
        ]
        phrases += [f"{train.devices} devices"] if isinstance(train.devices, int) else []
        assert [phrase for phrase in phrases if phrase not in head] == []
        assert path.stem == "mnist" or path.stem in EXPERIMENTS


class ColorMoments(torch.nn.Module):
    """The mean and standard deviation of each channel of images as bytes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float().flatten(2) / 255
        return torch.cat([values.mean(2), values.std(2)], dim=1)


def test_fid_uses_the_feature_network_of_the_user(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images, "_CHUNK", 5)
    torch.jit.script(ColorMoments()).save(str(tmp_path / "features.pt"))
    out, features = tmp_path / "out", tmp_path / "features.pt"
    command = "reproduce cifar10 --size smoke --out"
    run_command(command, out, "--features", features)
    found = results_of(out)["numbers"]["quality"]
    run = out / "runs" / "ndm"
    data, model = Run(run).data(), Run(run).model()
    network = torchscript_features(features, (3, 32, 32))
    real = network(data.split("train").__getitems__(spread(50, 8)))
    samples = torch.cat(
        [
            model.sample((count, 3, 32, 32), steps=2, seed=part_seed(0, 7, index), batch_size=64)
            for index, count in enumerate((5, 3))
        ]
    )
    test_images = data.split("test").__getitems__(spread(10, 8))
    for name, x in (("samples", samples), ("test images", test_images)):
        expected = compare_features(real, network(x), network).fid
        assert found[name]["fid"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert found[name]["real_images"] == found[name]["generated_images"] == 8
    checksum = hashlib.sha256(features.read_bytes()).hexdigest()
    assert found["samples"]["features_sha256"] == checksum
    for path in (out / "results.json", *out.glob("parts/quality-*.json")):
        path.unlink()  # as if interrupted while features were compared
    draw = ndm.NDM.sample

    def draw_only_pictures(self, *arguments, **options):
        assert "batch_size" not in options, "samples with stored features are not drawn again"
        return draw(self, *arguments, **options)

    monkeypatch.setattr(ndm.NDM, "sample", draw_only_pictures)
    run_command(command, out, "--features", features)
    assert results_of(out)["numbers"]["quality"] == found
    capsys.readouterr()
    assert exit_code(command, tmp_path / "other", "--features", tmp_path / "missing.pt") == 2
    assert exit_code("reproduce mnist --data x --features x.pt --out", tmp_path / "other") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2
    assert "there is no such file" in errors[0] and "takes no feature network" in errors[1]
    assert not (tmp_path / "other").exists()
