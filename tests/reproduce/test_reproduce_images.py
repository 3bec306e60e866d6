"""The experiments on natural images: a handful of images in the real formats takes every path, and
comes back exactly.
"""

import hashlib
import json

import numpy as np
import pytest
import torch

import ndm
from ndm.cli.main import main
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
def test_a_handful_of_images_takes_every_path(tmp_path, name, capsys):
    out = tmp_path / "out"
    assert main(["reproduce", name, "--size", "smoke", "--out", str(out), "--seed", "3"]) == 0
    results, page = results_of(out), (out / "README.md").read_text()
    nelbo, nll = results["measurements"]["nelbo"], results["measurements"]["nll"]
    for record in (nelbo, nll):
        assert (
            record["dims"] == DIMS[name]
            and record["data"].endswith("-partial")
            and np.isfinite(record["nats"])
        )
        assert record["bpd"] == pytest.approx(record["nats"] / (DIMS[name] * np.log(2)))
        assert f"{record['bpd']:.4f}" in page and record["data_sha256"] in page
    assert nelbo["steps"] is None and nelbo["bpd"] == pytest.approx(
        sum(nelbo[f"{t}_bpd"] for t in ("prior", "diffusion", "reconstruction"))
    )
    assert results["figures"] == ["samples", "transform"] and results["checks"] == []
    assert all(
        (out / f"{figure}{suffix}").stat().st_size > 1000
        for figure in results["figures"]
        for suffix in (".png", ".pdf")
    )
    assert "mean nothing" in page and all(
        f"{one.bpd:.2f}" in page for one in images.FACTS[name].published
    )
    capsys.readouterr()


def test_the_users_folder_the_other_release_and_a_second_call(tmp_path, capsys):
    folder, out = tmp_path / "arrays", tmp_path / "out"
    folder.mkdir()
    for name, count in (("train_data_batch_1", 12), ("val_data", 4)):
        np.savez_compressed(
            folder / f"{name}.npz", data=synthetic.pictures(count, 32, count).reshape(count, -1)
        )
    words = ["reproduce", "imagenet32", "--size", "smoke", "--data", str(folder), "--out", str(out)]
    assert main(words) == 2
    assert "--data ndm.data.ImageNetChrabaszcz" in capsys.readouterr().err
    other = [
        "--",
        "--data",
        "ndm.data.ImageNetChrabaszcz",
        "--data.path",
        str(folder),
        "--data.resolution",
        "32",
        "--data.partial=true",
    ]
    assert main([*words[:-1], str(tmp_path / "other"), *other]) == 0
    first = results_of(tmp_path / "other")
    assert first["measurements"]["nelbo"]["data"] == "imagenet32-chrabaszcz-partial"
    weights = (tmp_path / "other" / "runs" / "ndm" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert main([*words[:-1], str(tmp_path / "other"), *other]) == 0
    assert results_of(tmp_path / "other")["measurements"] == first["measurements"]
    assert (
        tmp_path / "other" / "runs" / "ndm" / "checkpoints" / "last.ckpt"
    ).stat().st_mtime_ns == weights
    assert "is finished" in capsys.readouterr().out


def test_the_real_size_wants_the_data(tmp_path, capsys):
    assert main(["reproduce", "cifar10", "--out", str(tmp_path / "out")]) == 2
    assert "--data FOLDER" in capsys.readouterr().err
    assert (
        main(["reproduce", "cifar10", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    )
    assert "data_batch_1.bin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("write", "source", "pixels"),
    [
        (
            synthetic.write_cifar,
            CIFAR10,
            [synthetic.pictures(10, 32, 5 + file) for file in range(6)],
        ),
        (
            lambda folder, seed: synthetic.write_imagenet(folder, 32, seed),
            ImageNetOord,
            [synthetic.pictures(n, 32, 5 + n) for n in (32, 8)],
        ),
        (
            lambda folder, seed: synthetic.write_faces(folder, 64, seed),
            CelebAHQ,
            [synthetic.pictures(40, 64, 5)],
        ),
    ],
)
def test_synthetic_data_come_back_exactly(tmp_path, write, source, pixels):
    write(tmp_path / "data", 5)
    data = source(str(tmp_path / "data"), partial=True)
    splits = [data.split(split) for split in ("train", "test")]
    found = torch.cat([data.integers(split.__getitems__(range(len(split)))) for split in splits])
    np.testing.assert_array_equal(found.numpy(), np.concatenate(pixels))


def test_the_published_bound_is_asked_for_only_of_the_whole_data_set(monkeypatch):
    """A stand-in for a page: no other release, no part, no unknown release may claim to reproduce
    the paper.
    """
    asked = []

    class Page:
        name, seed, smoke = "cifar10", 0, False

        def measure(self, key, compute):
            return {"bpd": 2.8, "bpd_stderr": 0.01, "num_examples": 10, "split_size": 10}

        def expect(self, text, value, most):
            asked.append((value, most))

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
    assert asked == []
    images.likelihood(Page(), images.FACTS["cifar10"], None, Data("cifar10"))
    assert asked == [(2.8, pytest.approx(2.75))]


def run_configurations():
    return sorted(
        path
        for path in find_config("cifar10").parent.glob("*.yaml")
        if not path.name.startswith("compare-")
    )


@pytest.mark.parametrize("path", run_configurations(), ids=lambda path: path.stem)
def test_every_configuration_parses_and_builds(path, monkeypatch):
    for name in (
        "uniform_",
        "kaiming_uniform_",
        "normal_",
    ):  # large weights are never touched, and so take no memory
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    parts = RunConfig.read(path).build()
    assert parts.num_parameters > 300
    train = parts.settings
    if isinstance(train.devices, int):
        assert train.batch_size % (train.devices * train.accumulate) == 0
    if path.stem in (*images.FACTS, "mnist"):  # what the head states is what is there
        head = " ".join(
            line.lstrip("# ")
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith("#")
        )
        count = sum(p.numel() for p in parts.model.parameters())
        words = [
            f"{count / 1e6:.1f} M parameters",
            f"batch {train.batch_size}",
            f"{train.steps:,} steps",
            train.precision,
            "Measured" if path.stem == "mnist" else "estimate",
        ]
        words += [f"{train.devices} devices"] if isinstance(train.devices, int) else []
        assert all(word in head for word in words), [word for word in words if word not in head]
        assert path.stem == "mnist" or path.stem in EXPERIMENTS


class Pooled(torch.nn.Module):
    """Mean and spread of each color of an image given as bytes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float().flatten(2) / 255
        return torch.cat([values.mean(2), values.std(2)], dim=1)


def test_fid_is_measured_by_the_network_that_the_user_names(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images, "_CHUNK", 5)
    torch.jit.script(Pooled()).save(str(tmp_path / "features.pt"))
    out, words = (
        tmp_path / "out",
        ["reproduce", "cifar10", "--size", "smoke", "--out", str(tmp_path / "out")],
    )
    assert main([*words, "--features", str(tmp_path / "features.pt")]) == 0
    found = results_of(out)["numbers"]["quality"]
    run = out / "runs" / "ndm"
    data, model = Run(run).data(), Run(run).model()
    network = torchscript_features(tmp_path / "features.pt", (3, 32, 32))
    real = network(data.split("train").__getitems__(spread(50, 8)))
    samples = torch.cat(
        [
            model.sample((count, 3, 32, 32), steps=2, seed=part_seed(0, 7, index), batch_size=64)
            for index, count in enumerate((5, 3))
        ]
    )
    for name, x in (
        ("samples", samples),
        ("test images", data.split("test").__getitems__(spread(10, 8))),
    ):
        assert found[name]["fid"] == pytest.approx(
            compare_features(real, network(x), network).fid, rel=1e-4, abs=1e-6
        )
        assert found[name]["real_images"] == found[name]["generated_images"] == 8
    assert (
        found["samples"]["features_sha256"]
        == hashlib.sha256((tmp_path / "features.pt").read_bytes()).hexdigest()
    )
    for path in (out / "results.json", *out.glob("parts/quality-*.json")):
        path.unlink()  # as if interrupted while features were compared
    draw = ndm.NDM.sample

    def only_pictures(self, *arguments, **options):
        assert "batch_size" not in options, "samples whose features are there are not drawn again"
        return draw(self, *arguments, **options)

    monkeypatch.setattr(ndm.NDM, "sample", only_pictures)
    assert main([*words, "--features", str(tmp_path / "features.pt")]) == 0
    assert results_of(out)["numbers"]["quality"] == found
    capsys.readouterr()
    assert (
        main([*words[:-1], str(tmp_path / "other"), "--features", str(tmp_path / "missing.pt")])
        == 2
    )
    assert (
        main(
            [
                "reproduce",
                "mnist",
                "--data",
                "x",
                "--features",
                "x.pt",
                "--out",
                str(tmp_path / "other"),
            ]
        )
        == 2
    )
    errors = capsys.readouterr().err.strip().splitlines()
    assert (
        "there is no such file" in errors[0]
        and "takes no feature network" in errors[1]
        and len(errors) == 2
    )
    assert not (tmp_path / "other").exists()
