"""The fault campaign: damaged files of every kind, and trainings killed at random moments.

    PYTHONPATH=tests python -m campaign.campaign --files 20000 --kills 60 --seed 0

prints a table of what was tried and what failed, and exits with 1 if anything did. It takes a
minute for about 500 files or 4 kills.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from campaign.mutations import mutate
from campaign.trials import Outcome, run, table
from ndm.cli.main import main as ndm
from ndm.errors import UserError, one_line, without_long_words
from ndm.train.config import RunConfig

TRAIN = {
    "steps": 40,
    "batch_size": 16,
    "warmup": 2,
    "accelerator": "cpu",
    "devices": 1,
    "checkpoint_every": 5,
    "log_every": 5,
    "evaluation_draws": 1,
    "evaluation_limit": 20,
    "sample_steps": 2,
}


def _network(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"ndm.nn.{name}", "init_args": arguments}


def _config(data: dict[str, Any], network: dict[str, Any], decoder: dict[str, Any]) -> str:
    """A configuration of a tiny model, as YAML."""
    model = {
        "schedule": {"class_path": "ndm.LinearLogSNRSchedule", "init_args": {"gamma_0": -6.0}},
        "transform": {"class_path": "ndm.GatedTransform", "init_args": {"network": network}},
        "predictor": {"class_path": "ndm.Predictor", "init_args": {"network": network}},
        "decoder": decoder,
        "steps": 4,
    }
    return yaml.safe_dump({"data": data, "model": model, "train": TRAIN})


@dataclass(frozen=True)
class Kind:
    """A kind of file: a sound example, and the command that reads it."""

    name: str
    source: Path
    """A file, or a folder of which one file is damaged."""
    command: Callable[[Path, Path], int]
    """Called with the damaged file or folder and an empty folder; returns the exit code."""
    damaged: str | None = None
    """The file of a folder to damage."""

    def trial(self, seed: str) -> Outcome:
        """Damage a copy and run the command on it."""
        chance = random.Random(seed)
        with tempfile.TemporaryDirectory() as name:
            copy, out = Path(name) / self.source.name, Path(name) / "out"
            if self.source.is_dir():
                shutil.copytree(self.source, copy)
            else:
                shutil.copy(self.source, copy)
            target = copy / self.damaged if self.damaged else copy
            target.write_bytes(mutate(target.read_bytes(), chance))
            out.mkdir()
            return run(lambda: self.command(copy, out))


def prepare(folder: Path) -> list[Kind]:
    """Train two tiny models and write a sound file of every kind."""
    generator = np.random.default_rng(0)
    rows = np.round(generator.normal(size=(60, 3)) * [1.0, 10.0, 100.0] + [0.0, 5.0, 2020.0], 4)
    csv = folder / "table.csv"
    np.savetxt(csv, rows, delimiter=",", header="a,b,c", comments="", fmt="%.4f")
    np.save(folder / "table.npy", rows)
    np.savez(folder / "table.npz", x=rows)
    _parquet(folder / "table.parquet", rows)
    images = folder / "images"
    for index in range(6):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (images / "train").mkdir(parents=True, exist_ok=True)
        (images / "test").mkdir(exist_ok=True)
        for split in ("train", "test"):
            Image.fromarray(pixels).save(images / split / f"{index}.{('png', 'jpg')[index % 2]}")

    mlp = _network("MLP", dims=3, hidden=8, blocks=1)
    unet = _network("UNet", image_channels=3, channels=8, multiples=[1])
    data = {"class_path": "ndm.data.Table", "init_args": {"path": str(csv)}}
    pictures = {"class_path": "ndm.data.ImageFolder", "init_args": {"path": str(images)}}
    grid = {"class_path": "ndm.DiscretizedGaussian", "init_args": {"num_values": 256}}
    configs = {
        "vectors": _config(data, mlp, {"class_path": "ndm.GaussianDecoder"}),
        "pictures": _config(pictures, unet, grid),
    }
    for name, text in configs.items():
        (folder / f"{name}.yaml").write_text(text)
        arguments = ["--config", str(folder / f"{name}.yaml"), "--out", str(folder / name)]
        assert ndm(["train", *arguments]) == 0
    archive = folder / "archive.ndm"
    model = str(folder / "pictures" / "model")
    assert ndm(["compress", str(images / "test"), "--model", model, "-o", str(archive)]) == 0
    return _kinds(folder, images, model, archive)


def _parquet(path: Path, rows: np.ndarray) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {name: rows[:, index] for index, name in enumerate("abc")}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _kinds(folder: Path, images: Path, model: str, archive: Path) -> list[Kind]:
    vectors, config = folder / "vectors", folder / "vectors.yaml"
    run_config = ["--config", str(config), "--train.steps", "1"]

    def score(file: Path, out: Path) -> int:
        options = ["--limit", "2", "--draws", "1", "--json", str(out / "e.json")]
        return ndm(["evaluate", str(vectors / "model"), "--data", str(file), *options])

    def sample(file: Path, out: Path) -> int:
        return ndm(["sample", str(file), "--n", "1", "--steps", "1", "--out", str(out / "s.npy")])

    def read(file: Path, out: Path) -> int:
        """Parse and build a configuration, up to the first look at the data."""

        def build() -> None:
            RunConfig.parse(["--config", str(file)]).build()

        return _as_command(build)

    def describe(file: Path, out: Path) -> int:

        def look() -> None:
            RunConfig.parse([*run_config, "--data.path", str(file)]).build().data.describe()

        return _as_command(look)

    def restore(file: Path, out: Path) -> int:
        code = ndm(["decompress", str(file), "--model", model, "-o", str(out / "restored")])
        if code:
            return code
        if _pixels(out / "restored") != _pixels(images / "test"):
            print("other images were restored", file=sys.stderr)
            return 3
        return 0

    def inspect(file: Path, out: Path) -> int:
        return ndm(["inspect", str(file)])

    def pack(file: Path, out: Path) -> int:
        return ndm(["compress", str(file), "--model", model, "-o", str(out / "a.ndm")])

    def resume(file: Path, out: Path) -> int:
        return ndm(["train", "--config", str(config), "--out", str(file)])

    unfinished = folder / "unfinished"
    shutil.copytree(vectors, unfinished, ignore=shutil.ignore_patterns("model", "metrics.json"))
    tables = [folder / f"table.{ending}" for ending in ("csv", "npy", "npz", "parquet")]
    return [
        *(Kind(f"{one.name}, evaluate --data", one, score) for one in tables),
        *(Kind(f"{one.name}, train", one, describe) for one in tables),
        Kind("PNG, compress", images / "test", pack, "0.png"),
        Kind("JPEG, compress", images / "test", pack, "1.jpg"),
        Kind("configuration (YAML), train", config, read),
        Kind("model/config.json, sample", vectors / "model", sample, "config.json"),
        Kind("model/model.safetensors, sample", vectors / "model", sample, "model.safetensors"),
        Kind("checkpoints/last.ckpt, sample", unfinished, sample, "checkpoints/last.ckpt"),
        Kind("config.yaml of a run, sample", unfinished, sample, "config.yaml"),
        Kind("metrics.json of a run, train", vectors, resume, "metrics.json"),
        Kind("archive, inspect", archive, inspect),
        Kind("archive, decompress", archive, restore),
    ]


def _pixels(folder: Path) -> list[bytes]:
    """The pixels of the images of a folder, in any order."""
    files = [path for path in folder.rglob("*") if path.suffix in (".png", ".jpg")]
    return sorted(np.asarray(Image.open(path).convert("RGB")).tobytes() for path in files)


def _as_command(action: Callable[[], object]) -> int:
    """Run an action and report errors as the command line does."""
    try:
        action()
    except UserError as error:
        print(f"ndm: error: {without_long_words(one_line(error))}", file=sys.stderr)
        return 2
    return 0


def kill_and_resume(config: Path, folder: Path, chance: random.Random) -> tuple[int, float]:
    """Train, killing the process at random moments, until it ends; return kills and seconds."""
    command = [sys.executable, "-m", "ndm.cli", "train", "--config", str(config)]
    command += ["--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started, kills = time.monotonic(), 0
    while True:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, errors = process.communicate(
                timeout=chance.uniform(2.0, 14.0) if kills < 4 else None
            )
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors.decode()[-400:]
        return kills, time.monotonic() - started


def kill_campaign(folder: Path, kills: int, seed: int) -> list[Outcome]:
    """Kill and resume trainings until there were so many kills; compare the weights bit by bit."""
    config = folder / "vectors.yaml"
    expected = load_file(folder / "vectors" / "model" / "model.safetensors")
    outcomes: list[Outcome] = []
    chance = random.Random(f"kills {seed}")
    while len(outcomes) < kills:
        out = folder / f"killed-{len(outcomes)}"
        count, _ = kill_and_resume(config, out, chance)
        found = load_file(out / "model" / "model.safetensors")
        same = all(torch.equal(found[name], value) for name, value in expected.items())
        leftover = [path for path in out.rglob(".*") if path.name != ".lock"]
        verdict = Outcome("worked") if same else Outcome("wrong", "the weights differ")
        if leftover:
            verdict = Outcome("wrong", f"{leftover[0]} was left")
        outcomes += [verdict] * max(count, 1)
    return outcomes


def campaign(files: int, kills: int, seed: int) -> list[tuple[str, list[Outcome]]]:
    """Run the campaign and print failures as they occur."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = prepare(folder)
        rows: list[tuple[str, list[Outcome]]] = [(kind.name, []) for kind in kinds]
        for index in range(files):
            at = index % len(kinds)
            label = f"{seed} {index}"
            outcome = kinds[at].trial(label)
            rows[at][1].append(outcome)
            if not outcome.passed:
                print(
                    f"{kinds[at].name}, trial {label!r}: {outcome.verdict}: {outcome.detail}",
                    flush=True,
                )
        if kills:
            rows.append(("training, kill -9", kill_campaign(folder, kills, seed)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="number of damaged files")
    parser.add_argument("--kills", type=int, default=60, help="number of kills while training")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.monotonic()
    rows = campaign(options.files, options.kills, options.seed)
    print(table(rows))
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s")
    return int(any(not one.passed for _, outcomes in rows for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
