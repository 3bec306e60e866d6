"""Invalid input: one clear line on standard error, exit code 2, nothing half-written."""

import gzip
import os
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from cli.commands import arguments, rejected, run_command
from conftest import TINY
from ndm.cli.main import fail
from ndm.errors import DataWarning, UserError
from ndm.serialize import write_atomically

ConfigWriter = Callable[..., Path]


def train_arguments(config: Path, out: Path, options: str = "") -> list[str]:
    return arguments("train --config", config, "--out", out, options)


def image(path: Path, size: tuple[int, int] = (8, 8), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.mark.parametrize("command", ["frobnicate", "train --out", "sample --nope", "evaluate"])
def test_invalid_arguments_are_rejected(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    rejected(capsys, [command])


def test_a_missing_broken_or_binary_configuration_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    rejected(capsys, train_arguments(tmp_path / "missing.yaml", out), "missing.yaml")
    for name, content in (
        ("broken", b"train: {steps: [1\n"),
        ("binary", bytes(range(256))),
        ("empty", b""),
        ("list", b"- 1\n- 2\n"),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(content)
        rejected(capsys, train_arguments(path, out))
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
def test_invalid_values_are_rejected(
    override: str,
    culprit: str,
    write_config: ConfigWriter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = f"{override} --train.accumulate=2"
    rejected(capsys, train_arguments(write_config(), tmp_path / "run", options), culprit)
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
            "--model.predictor.network.hidden: give a whole number, not x",
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
    command = ["train --config two_moons --out", tmp_path / "run", f"--{option}", value]
    line = rejected(capsys, command)
    assert line == f"ndm: error: {message} (see ndm train --help)"


def test_an_unknown_key_in_the_file_is_rejected(
    write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rejected(capsys, train_arguments(write_config(trane={"steps": 1}), tmp_path / "run"), "trane")
    path = write_config()
    config = yaml.safe_load(path.read_text())
    config["model"]["predictor"]["init_args"]["network"]["init_args"]["hiden"] = 3
    path.write_text(yaml.safe_dump(config))
    rejected(capsys, train_arguments(path, tmp_path / "run"), "hiden")
    assert not (tmp_path / "run").exists()


def source(name: str, path: Path, **arguments: Any) -> dict[str, Any]:
    """A data section."""
    return {"class_path": f"ndm.data.{name}", "init_args": {"path": str(path), **arguments}}


def invalid_table(kind: str, folder: Path) -> tuple[dict[str, Any], str]:
    """A data section with one fault, and a string that the message must contain."""
    generator = np.random.default_rng(0)
    if kind == "missing table":
        return source("Table", folder / "nothing.csv"), "nothing.csv"
    path = folder / "table.npy"
    if kind == "NaN":
        values = generator.normal(size=(50, 2))
        values[17, 1] = np.nan
        np.save(path, values)
        return source("Table", path), "17"
    if kind == "out of range":
        integers = generator.integers(0, 17, (50, 2))
        integers[3, 0] = 99
        np.save(path, integers)
        return source("Table", path, num_values=17), "99"
    if kind == "pickle":
        np.save(path, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
        return source("Table", path), "table.npy"
    assert kind == "discrete under a density"
    np.save(path, generator.integers(0, 17, (50, 2)))
    return source("Table", path, num_values=17), "DiscretizedGaussian"


def invalid_images(kind: str, folder: Path) -> tuple[dict[str, Any], str]:
    """A data section with one fault, and a string that the message must contain."""
    if kind == "image sizes":
        for index in range(6):
            image(folder / f"{index}.png", (8, 8) if index else (8, 9), index)
        return source("ImageFolder", folder), "0.png"
    if kind == "empty class folder":
        for index in range(10):
            image(folder / "cats" / f"{index}.png", seed=index)
        (folder / "dogs").mkdir()
        return source("ImageFolder", folder), "dogs"
    if kind == "empty split":
        for index in range(4):
            image(folder / "train" / f"{index}.png", seed=index)
        (folder / "test").mkdir()
        return source("ImageFolder", folder), "test"
    assert kind == "class missing in MNIST files"
    generator = np.random.default_rng(0)
    for prefix, classes in (("train", 10), ("t10k", 9)):
        idx(folder / f"{prefix}-images-idx3-ubyte.gz", generator.integers(0, 256, (40, 28, 28)))
        idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(40) % classes)
    return source("MNIST", folder), "9"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (invalid_table, "missing table"),
        (invalid_table, "NaN"),
        (invalid_table, "out of range"),
        (invalid_table, "pickle"),
        (invalid_images, "image sizes"),
        (invalid_images, "empty class folder"),
        (invalid_images, "empty split"),
        (invalid_images, "class missing in MNIST files"),
        (invalid_table, "discrete under a density"),
    ],
)
def test_invalid_data_are_rejected(
    make: Callable[[str, Path], tuple[dict[str, Any], str]],
    kind: str,
    write_config: ConfigWriter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "data").mkdir()
    data, culprit = make(kind, tmp_path / "data")
    config = write_config()
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**content, "data": data}))
    rejected(capsys, train_arguments(config, tmp_path / "run"), culprit)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**TINY, "train": {**TINY["train"], "steps": 2}}))
    run_command(*train_arguments(config, folder / "run"))
    return folder / "run"


def copy_run(run: Path, target: Path) -> Path:
    for path in run.rglob("*"):
        if path.is_file():
            (target / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(run)).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_checkpoint_is_named_and_left_in_place(
    keep: int, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(finished, tmp_path / "run")
    (run / "metrics.json").unlink()
    checkpoint = run / "checkpoints/last.ckpt"
    content = checkpoint.read_bytes()
    damaged = content[: len(content) // 2] if keep < 0 else content[:keep]
    checkpoint.write_bytes(damaged)
    rejected(capsys, ["train --out", run], "last.ckpt", "truncated or damaged")
    assert checkpoint.read_bytes() == damaged


def test_a_checkpoint_is_not_unpickled(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    run = copy_run(finished, tmp_path / "run")
    (run / "metrics.json").unlink()
    torch.save({"global_step": 1, "state_dict": Evil()}, run / "checkpoints/last.ckpt")
    rejected(capsys, ["train --out", run], "last.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_damaged_model_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(finished, tmp_path / "run")
    weights = run / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for command in (["sample", run, "--out", tmp_path / "x.png"], ["evaluate", run]):
        rejected(capsys, command, "model.safetensors")
    assert not (tmp_path / "x.png").exists()


def test_another_configuration_in_the_same_folder_is_rejected(
    finished: Path, write_config: ConfigWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "config.yaml").read_bytes()
    command = train_arguments(write_config(), finished, "--train.steps=3")
    rejected(capsys, command, "train.steps", "2", "3")
    assert (finished / "config.yaml").read_bytes() == before


def test_a_run_of_an_earlier_version_resumes_with_the_default_settings(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value other than the default is rejected."""
    run = copy_run(finished, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"].pop("optimizer") == "adamw"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    run_command("train --out", run)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["train --out", run, "--train.optimizer=soap"]
    rejected(capsys, command, "train.optimizer", "'adamw'", "'soap'")


@pytest.mark.parametrize(
    ("command", "culprit"),
    [
        ("sample RUN --out x.gif", "x.gif"),
        ("sample RUN --out x.png --n 0", "n=0"),
        ("sample RUN --out x.png --method magic", "magic"),
        ("sample RUN --out x.png --method ode --solver rk9", "rk9"),
        ("sample RUN --out x.png --method ddim --eta 0.5", "eta"),
        ("sample RUN --out x.png --steps 0", "steps"),
        ("sample nowhere --out x.png", "nowhere"),
        ("evaluate RUN --split holdout", "holdout"),
        ("evaluate RUN --draws 0", "draws"),
        ("evaluate RUN --device abacus", "abacus"),
        ("evaluate RUN --steps 10,fifty", "fifty"),
        ("evaluate RUN --steps 0", "steps"),
        ("evaluate RUN --steps 99999999999999999999999", "steps"),
        ("evaluate RUN --json .", "is a folder"),
        ("evaluate RUN --nll --iw 2 --dequantization none", "iw=2"),
        ("evaluate RUN --iw 4", "iw=4"),
        ("evaluate RUN --nll --iw 0", "iw=0"),
        ("evaluate RUN --limit 0", "limit=0"),
        ("evaluate RUN --nll --solver rk9", "rk9"),
        ("evaluate RUN --nll --probes 0", "probes=0"),
        ("evaluate RUN --nll --nodes 5", "nodes=5"),
        ("evaluate RUN --nll --rtol -1", "rtol"),
        ("evaluate RUN --nll --rtol 1e-30 --atol 1e-30", "float64"),
        ("evaluate RUN --nll --dequantization uniform", "uniform"),
        ("evaluate nowhere", "nowhere"),
    ],
)
def test_invalid_use_of_a_run_is_rejected(
    command: str,
    culprit: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [finished if part == "RUN" else part for part in command.split()]
    rejected(capsys, parts, culprit)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_output_path_is_rejected(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    rejected(capsys, ["sample", finished, "--n 2 --out", tmp_path / "file" / "x.npy"], "file")
    (tmp_path / "x.npy").mkdir()
    rejected(capsys, ["sample", finished, "--n 2 --out", tmp_path / "x.npy"], "x.npy is a folder")
    command = train_arguments(finished / "config.yaml", tmp_path / "file" / "run")
    rejected(capsys, command, "cannot be created")


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(10**5)),
        lambda path: torch.save(torch.zeros(10**5), path),
        lambda path: save_file({"x": torch.zeros(10**5)}, path),
    ],
)
def test_a_failed_write_keeps_the_old_file(write: Callable[[Path], object], tmp_path: Path) -> None:
    """A limit on file sizes acts like a full disk: one error line and no temporary files."""
    import resource

    target = tmp_path / "x"
    target.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*x: .*full"):
            write_atomically(target, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and target.read_text() == "before"


def test_too_little_memory_is_reported(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 10**16
    command = ["sample", finished, f"--n {size} --batch_size {size} --out", tmp_path / "x.npy"]
    rejected(capsys, command, "out of memory", "--batch_size")


def test_files_left_by_a_killed_process_are_removed(finished: Path, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path / "run")
    (run / "metrics.json").unlink()
    (run / "checkpoints/.last-abc.ckpt").write_bytes(bytes(1000))
    run_command("train --out", run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


def test_long_words_of_a_message_are_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "x" * 230
    line = rejected(
        capsys, ["train --config", name, "--out", tmp_path / "run"], "x...x", "checkerboard"
    )
    assert "x" * 70 not in line


@pytest.mark.parametrize("words", [[], ["x" * 400], ["some words"] * 40, ["y" * 59] * 9])
def test_a_long_message_keeps_its_start_and_its_end(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(" ".join(["start:", *words, "give 1"])) == 2
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.startswith("ndm: error: start:") and line.endswith("give 1") and len(line) <= 300
    assert bool(words) == (" ... " in line or "x...x" in line or len(line) > 290)


def test_bad_data_are_reported_without_importing_lightning(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,x\n2,y\n")
    command = ["train", "--config", "transport", "--data", "ndm.data.Table"]
    command += ["--data.path", str(table), "--out", str(tmp_path / "run")]
    program = (
        "import sys; from ndm.cli.main import main; code = main(sys.argv[1:]);"
        "print('lightning.pytorch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert "'b'" in done.stderr


def test_warnings_are_one_line_and_those_of_others_are_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(arguments: Sequence[str]) -> None:
        warnings.warn("some\nwhere: give x", DataWarning, stacklevel=2)
        warnings.warn("of another library", UserWarning, stacklevel=2)

    monkeypatch.setattr("ndm.cli.sample.run_sample", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run_command("sample")
    assert capsys.readouterr().err == "ndm: warning: some where: give x\n"


@pytest.mark.parametrize(
    "command",
    ["evaluate RUN --json", "evaluate RUN --csv", "quality RUN --json", "sample RUN --out"],
)
def test_a_file_that_cannot_be_written_is_rejected_before_the_run_is_read(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "missing")
    for target, culprit in (("x" * 300 + ".png", "too long"), (str(tmp_path), "a folder")):
        if "sample" in command and culprit == "a folder":
            target = str(tmp_path / "folder.png")
            Path(target).mkdir()
        rejected(capsys, [*command.replace("RUN", run).split(), target], culprit)
