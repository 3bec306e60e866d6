"""Bad input: one clear line on standard error, exit code 2, nothing half-written."""

import gzip
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from ndm.cli.main import main
from ndm.errors import UserError
from ndm.serialize import write_atomically

ConfigWriter = Callable[..., Path]


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *culprits: str) -> str:
    """Run a command that must be refused, and return its one line."""
    capsys.readouterr()
    assert main(words) == 2
    streams = capsys.readouterr()
    lines = streams.err.strip().splitlines()
    assert len(lines) == 1, streams.err
    assert lines[0].startswith("ndm: error: ")
    assert "Traceback" not in streams.err
    for culprit in culprits:
        assert culprit in lines[0], lines[0]
    return lines[0]


def train_words(config: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--config", str(config), "--out", str(out), *more]


def image(path: Path, size: tuple[int, int] = (8, 8), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    ).save(path)


def idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.mark.parametrize(
    "words", [["frobnicate"], ["train", "--out"], ["sample", "--nope"], ["evaluate"]]
)
def test_wrong_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, words)


def test_configuration_that_is_missing_broken_or_binary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    refused(capsys, train_words(tmp_path / "missing.yaml", out), "missing.yaml")
    for name, content in (
        ("broken", b"train: {steps: [1\n"),
        ("binary", bytes(range(256))),
        ("empty", b""),
        ("list", b"- 1\n- 2\n"),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(content)
        refused(capsys, train_words(path, out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("override", "culprit"),
    [
        ("--train.stepz=3", "stepz"),
        ("--train.steps=many", "train.steps"),
        ("--train.steps=0", "train.steps"),
        ("--train.precision=float3", "precision"),
        ("--train.learning_rate=-1", "learning_rate"),
        ("--model.schedule=NoSuchSchedule", "NoSuchSchedule"),
        ("--model.schedule.gamma_9=1", "gamma_9"),
        ("--model.schedule.gamma_0=9", "gamma_0"),
        ("--model.steps=0", "steps"),
        ("--model.predictor.network.dims=3", "dims"),
        ("--model.transform.network.dims=3", "dims"),
        ("--model.decoder=ndm.DiscretizedGaussian", "continuous"),
        ("--data=ndm.data.NoSuchData", "NoSuchData"),
        ("--data.train_size=0", "train_size"),
        ("--train.batch_size=15", "batch_size"),
        ("--train.strategy=fsdp", "train.ema=0"),
        ("--train.optimizer=sgd", "adamw"),
        ("--train.strategy=telepathy", "train.strategy"),
        ("--train.devices=-7", "train.devices"),
        ("--train.validate_every=1000", "validate_every"),
        ("--train.learning_rate=1e30", "not finite"),
        ("--seed=-1", "seed"),
        ("--train.evaluation_split=holdout", "holdout"),
    ],
)
def test_wrong_values(
    override: str,
    culprit: str,
    write_config: ConfigWriter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = train_words(write_config(), tmp_path / "run", override, "--train.accumulate=2")
    refused(capsys, words, culprit)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model", "ndm.Foo", "--model: ndm.Foo: module 'ndm' has no attribute 'Foo'"),
        ("data", "nowhere.Ring", "--data: nowhere.Ring: No module named 'nowhere'"),
        ("model.schedule", "nowhere.X", "--model.schedule: nowhere.X: No module named 'nowhere'"),
        (
            "model.predictor.network.hidden",
            "x",
            "--model.predictor.network.hidden: expected int, got x",
        ),
        (
            "model.predictor.network.hiden",
            "3",
            "--model.predictor.network: ndm.nn.MLP: Option 'hiden' is not accepted",
        ),
        (
            "model.transform",
            "ndm.Predictor",
            "--model.transform: Import path ndm.Predictor does not correspond to a subclass of"
            " Transform",
        ),
    ],
)
def test_an_option_of_a_class_is_named_in_full(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", "two_moons", "--out", str(tmp_path / "run"), f"--{option}", value]
    line = refused(capsys, words)
    assert line == f"ndm: error: {message} (see ndm train --help)"


def test_unknown_key_in_the_file(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, train_words(write_config(trane={"steps": 1}), tmp_path / "run"), "trane")
    path = write_config()
    config = yaml.safe_load(path.read_text())
    config["model"]["predictor"]["init_args"]["network"]["init_args"]["hiden"] = 3
    path.write_text(yaml.safe_dump(config))
    refused(capsys, train_words(path, tmp_path / "run"), "hiden")
    assert not (tmp_path / "run").exists()


def bad_data(kind: str, folder: Path) -> tuple[dict[str, Any], str]:
    """A data section with one thing wrong, and the word that the message must hold."""
    folder.mkdir()
    if kind == "missing table":
        return {
            "class_path": "ndm.data.Table",
            "init_args": {"path": str(folder / "nothing.csv")},
        }, "nothing.csv"
    if kind == "NaN":
        values = np.random.default_rng(0).normal(size=(50, 2))
        values[17, 1] = np.nan
        np.save(folder / "table.npy", values)
        return {
            "class_path": "ndm.data.Table",
            "init_args": {"path": str(folder / "table.npy")},
        }, "17"
    if kind == "out of range":
        values = np.random.default_rng(0).integers(0, 17, (50, 2))
        values[3, 0] = 99
        np.save(folder / "table.npy", values)
        return {
            "class_path": "ndm.data.Table",
            "init_args": {"path": str(folder / "table.npy"), "num_values": 17},
        }, "99"
    if kind == "pickle":
        np.save(folder / "table.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
        return {
            "class_path": "ndm.data.Table",
            "init_args": {"path": str(folder / "table.npy")},
        }, "table.npy"
    if kind == "image sizes":
        for index in range(6):
            image(folder / f"{index}.png", (8, 8) if index else (8, 9), index)
        return {"class_path": "ndm.data.ImageFolder", "init_args": {"path": str(folder)}}, "0.png"
    if kind == "empty class folder":
        for index in range(10):
            image(folder / "cats" / f"{index}.png", seed=index)
        (folder / "dogs").mkdir()
        return {"class_path": "ndm.data.ImageFolder", "init_args": {"path": str(folder)}}, "dogs"
    if kind == "empty split":
        for index in range(4):
            image(folder / "train" / f"{index}.png", seed=index)
        (folder / "test").mkdir()
        return {"class_path": "ndm.data.ImageFolder", "init_args": {"path": str(folder)}}, "test"
    if kind == "discrete under a density":
        np.save(folder / "table.npy", np.random.default_rng(0).integers(0, 17, (50, 2)))
        return {
            "class_path": "ndm.data.Table",
            "init_args": {"path": str(folder / "table.npy"), "num_values": 17},
        }, "DiscretizedGaussian"
    assert kind == "class missing in MNIST files"
    generator = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        idx(folder / f"{prefix}-images-idx3-ubyte.gz", generator.integers(0, 256, (40, 28, 28)))
        idx(
            folder / f"{prefix}-labels-idx1-ubyte.gz",
            np.arange(40) % 10 if prefix == "train" else np.arange(40) % 9,
        )
    return {"class_path": "ndm.data.MNIST", "init_args": {"path": str(folder)}}, "9"


@pytest.mark.parametrize(
    "kind",
    [
        "missing table",
        "NaN",
        "out of range",
        "pickle",
        "image sizes",
        "empty class folder",
        "empty split",
        "class missing in MNIST files",
        "discrete under a density",
    ],
)
def test_bad_data(
    kind: str, write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, culprit = bad_data(kind, tmp_path / "data")
    config = write_config()
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**content, "data": data}))
    refused(capsys, train_words(config, tmp_path / "run"), culprit)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import TINY

    folder = tmp_path_factory.mktemp("finished")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**TINY, "train": {**TINY["train"], "steps": 2}}))
    assert main(train_words(config, folder / "run")) == 0
    return folder / "run"


def copy_of(run: Path, target: Path) -> Path:
    for path in run.rglob("*"):
        if path.is_file():
            (target / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(run)).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_checkpoint_is_named_and_kept(
    keep: int, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(finished, tmp_path / "run")
    (run / "metrics.json").unlink()
    checkpoint = run / "checkpoints/last.ckpt"
    content = checkpoint.read_bytes()
    damaged = content[: len(content) // 2] if keep < 0 else content[:keep]
    checkpoint.write_bytes(damaged)
    refused(capsys, ["train", "--out", str(run)], "last.ckpt", "truncated or damaged")
    assert checkpoint.read_bytes() == damaged


def test_a_checkpoint_is_not_unpickled(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    run = copy_of(finished, tmp_path / "run")
    (run / "metrics.json").unlink()
    torch.save({"global_step": 1, "state_dict": Evil()}, run / "checkpoints/last.ckpt")
    refused(capsys, ["train", "--out", str(run)], "last.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_damaged_model_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(finished, tmp_path / "run")
    weights = run / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for words in (["sample", str(run), "--out", str(tmp_path / "x.png")], ["evaluate", str(run)]):
        refused(capsys, words, "model.safetensors")
    assert not (tmp_path / "x.png").exists()


def test_another_configuration_in_the_same_folder(
    finished: Path, write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "config.yaml").read_bytes()
    refused(
        capsys, train_words(write_config(), finished, "--train.steps=3"), "train.steps", "2", "3"
    )
    assert (finished / "config.yaml").read_bytes() == before


def test_a_run_of_a_version_that_had_fewer_settings_goes_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With their defaults; another value of one is refused."""
    run = copy_of(finished, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"].pop("optimizer") == "adamw"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--out", str(run)]) == 0
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    refused(
        capsys,
        ["train", "--out", str(run), "--train.optimizer=soap"],
        "train.optimizer",
        "'adamw'",
        "'soap'",
    )


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["sample", "RUN", "--out", "x.gif"], "x.gif"),
        (["sample", "RUN", "--out", "x.png", "--n", "0"], "n=0"),
        (["sample", "RUN", "--out", "x.png", "--method", "magic"], "magic"),
        (["sample", "RUN", "--out", "x.png", "--method", "ode", "--solver", "rk9"], "rk9"),
        (["sample", "RUN", "--out", "x.png", "--method", "ddim", "--eta", "0.5"], "eta"),
        (["sample", "RUN", "--out", "x.png", "--steps", "0"], "steps"),
        (["sample", "nowhere", "--out", "x.png"], "nowhere"),
        (["evaluate", "RUN", "--split", "holdout"], "holdout"),
        (["evaluate", "RUN", "--draws", "0"], "draws"),
        (["evaluate", "RUN", "--device", "abacus"], "abacus"),
        (["evaluate", "RUN", "--steps", "10,fifty"], "fifty"),
        (["evaluate", "RUN", "--steps", "0"], "steps"),
        (["evaluate", "RUN", "--steps", "99999999999999999999999"], "steps"),
        (["evaluate", "RUN", "--json", "."], "is a folder"),
        (["evaluate", "RUN", "--nll", "--iw", "2", "--dequantization", "none"], "iw=2"),
        (["evaluate", "RUN", "--iw", "4"], "iw=4"),
        (["evaluate", "RUN", "--nll", "--iw", "0"], "iw=0"),
        (["evaluate", "RUN", "--limit", "0"], "limit=0"),
        (["evaluate", "RUN", "--nll", "--solver", "rk9"], "rk9"),
        (["evaluate", "RUN", "--nll", "--probes", "0"], "probes=0"),
        (["evaluate", "RUN", "--nll", "--nodes", "5"], "nodes=5"),
        (["evaluate", "RUN", "--nll", "--rtol", "-1"], "rtol"),
        (["evaluate", "RUN", "--nll", "--rtol", "1e-30", "--atol", "1e-30"], "float64"),
        (["evaluate", "RUN", "--nll", "--dequantization", "uniform"], "uniform"),
        (["evaluate", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use_of_a_run(
    words: list[str],
    culprit: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, [str(finished) if word == "RUN" else word for word in words], culprit)
    assert not list(tmp_path.iterdir())


def test_a_full_or_forbidden_place_to_write(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused(
        capsys,
        ["sample", str(finished), "--n", "2", "--out", str(tmp_path / "file" / "x.npy")],
        "file",
    )
    (tmp_path / "x.npy").mkdir()
    refused(
        capsys,
        ["sample", str(finished), "--n", "2", "--out", str(tmp_path / "x.npy")],
        "x.npy is a folder",
    )
    refused(
        capsys,
        [
            "train",
            "--config",
            str(finished / "config.yaml"),
            "--out",
            str(tmp_path / "file" / "run"),
        ],
        "cannot be created",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(10**5)),
        lambda path: torch.save(torch.zeros(10**5), path),
        lambda path: save_file({"x": torch.zeros(10**5)}, path),
    ],
)
def test_a_file_for_which_there_is_no_place(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    """As on a full disk: one line, what was there stays, nothing is left over. By a limit on the
    size of files.
    """
    import resource

    target, limits, ignored = (
        tmp_path / "x",
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    target.write_text("before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*x: .*full"):
            write_atomically(target, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and target.read_text() == "before"


def test_too_little_memory(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sample",
        str(finished),
        "--n",
        str(10**16),
        "--batch_size",
        str(10**16),
        "--out",
        str(tmp_path / "x.npy"),
    ]
    refused(capsys, words, "out of memory", "--batch_size")


def test_what_a_killed_process_left_is_cleared_away(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    (run / "metrics.json").unlink()
    (run / "checkpoints/.last-abc.ckpt").write_bytes(bytes(1000))
    assert main(["train", "--out", str(run)]) == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
