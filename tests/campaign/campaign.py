"""The fault campaign: damaged files of every kind, and trainings killed at random moments.

    PYTHONPATH=tests python -m campaign.campaign --files 20000 --kills 60 --seed 0

prints a table of what was tried and what failed, and exits with 1 if anything did.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from campaign.mutations import mutate
from campaign.trials import Outcome, run, table
from ndm.apps.compress.lead import LeadCost
from ndm.cli.main import fail
from ndm.cli.main import main as ndm
from ndm.errors import UserError
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
    archive, archived = folder / "archive.ndm", folder / "archived"
    shutil.copytree(images / "test", archived)
    for name, shape in (("tiles", (19, 13, 3)), ("gray", (5, 9))):
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(archived / f"{name}.png")
    model = str(folder / "pictures" / "model")

    def few(count: int, dims: int, rate: float, lead: LeadCost, *_: object) -> tuple[int, int, int]:
        return max(2, lead.edges), 0, 1

    # An untrained model is no help: otherwise it would code no image at all.
    with mock.patch("ndm.apps.compress.choose.best_lead", few):
        assert ndm(["compress", str(archived), "--model", model, "-o", str(archive)]) == 0
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
        if _pixels(out / "restored") != _pixels(folder / "archived"):
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
    """The pixels of the images of a folder, in any order; hidden folders are unfinished work."""
    files = [
        path
        for path in folder.rglob("*")
        if path.suffix in (".png", ".jpg") and not path.parent.name.startswith(".ndm-")
    ]
    return sorted(np.asarray(Image.open(path).convert("RGB")).tobytes() for path in files)


def _as_command(action: Callable[[], object]) -> int:
    """Run an action and report errors as the command line does."""
    try:
        action()
    except UserError as error:
        return fail(error)
    return 0


def kill_and_resume(config: Path, folder: Path, chance: random.Random, longest: float) -> int:
    """Train, killing the process at random moments, until it ends; return the number of kills.

    Each of the first four starts is killed after up to ``longest`` seconds.
    """
    command = [sys.executable, "-m", "ndm.cli", "train", "--config", str(config)]
    command += ["--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kills = 0
    while True:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            limit = chance.uniform(0.3, 1.0) * longest if kills < 4 else None
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors.decode()[-400:]
        return kills


def kill_campaign(folder: Path, kills: int, seed: int) -> list[Outcome]:
    """Kill and resume trainings until there were so many kills; compare the weights bit by bit."""
    config = folder / "vectors.yaml"
    expected = load_file(folder / "vectors" / "model" / "model.safetensors")
    started = time.monotonic()
    kill_and_resume(config, folder / "timed", random.Random(), 1e6)
    longest = time.monotonic() - started
    outcomes: list[Outcome] = []
    chance = random.Random(f"kills {seed}")
    with tqdm(total=kills, desc="kills", disable=None) as bar:
        while len(outcomes) < kills:
            out = folder / f"killed-{bar.n}"
            count = kill_and_resume(config, out, chance, longest)
            outcomes += [_compare(out, expected)] * count
            bar.update(count)
            shutil.rmtree(out)
    return outcomes


def _compare(out: Path, expected: dict[str, torch.Tensor]) -> Outcome:
    """Compare the weights of a resumed run bit by bit, and look for files left behind."""
    found = load_file(out / "model" / "model.safetensors")
    if not all(torch.equal(found[name], value) for name, value in expected.items()):
        return Outcome("wrong", "the weights differ")
    leftover = [path for path in out.rglob(".*") if path.name != ".lock"]
    return Outcome("wrong", f"{leftover[0]} was left") if leftover else Outcome("worked")


def restore_campaign(folder: Path, kills: int, seed: int) -> list[Outcome]:
    """Kill ``ndm decompress`` at random moments: all files or none, and a rerun restores all."""
    expected = _pixels(folder / "archived")
    chance = random.Random(f"restore {seed}")

    def restore(out: Path) -> int:
        model = str(folder / "pictures" / "model")
        return ndm(["decompress", str(folder / "archive.ndm"), "--model", model, "-o", str(out)])

    started = time.monotonic()
    assert run(lambda: restore(folder / "restored")).verdict == "worked"
    longest = time.monotonic() - started
    outcomes = []
    for number in tqdm(range(kills), desc="kills of decompress", disable=None):
        out = folder / f"restored-{number}"
        if number % 2:
            out.mkdir()
            (out / "mine.txt").write_text("mine")

        def killed(out: Path = out, moment: float = chance.uniform(0.0, longest)) -> int:
            killer = threading.Timer(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
            killer.start()
            return restore(out)

        run(killed)
        found = _pixels(out) if out.exists() else []
        again = run(partial(restore, out)) if found != expected else Outcome("worked")
        if number % 2 == 0 and found not in ([], expected):
            again = Outcome("wrong", f"{len(found)} of {len(expected)} files were restored")
        if again.passed and _pixels(out) != expected:
            again = Outcome("wrong", "a rerun restored other files")
        outcomes.append(again if again.verdict != "rejected" else Outcome("output", "rejected"))
        shutil.rmtree(out)
    return outcomes


_KINDS: list[Kind] = []
"""What the worker processes try; they inherit it."""


def _trial(seed: int, index: int) -> Outcome:
    """Run one trial, and print a failure at once."""
    kind, label = _KINDS[index % len(_KINDS)], f"{seed} {index}"
    outcome = kind.trial(label)
    if not outcome.passed:
        print(f"{kind.name}, trial {label!r}: {outcome.verdict}: {outcome.detail}", flush=True)
    return outcome


def damage_campaign(
    kinds: Sequence[Kind], files: int, seed: int, workers: int
) -> list[tuple[str, list[Outcome]]]:
    """Try damaged files of all kinds in turn, in several processes."""
    _KINDS[:] = kinds
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        found = pool.map(partial(_trial, seed), range(files), chunksize=4)
        try:
            outcomes.extend(tqdm(found, total=files, desc="files", disable=None))
        except KeyboardInterrupt:  # show what was found so far
            pool.shutdown(cancel_futures=True)
    return [(kind.name, outcomes[at :: len(kinds)]) for at, kind in enumerate(kinds)]


def campaign(
    files: int, kills: int, seed: int, workers: int = 1
) -> list[tuple[str, list[Outcome]]]:
    """Run the campaign and print failures as they occur."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = damage_campaign(prepare(folder), files, seed, workers)
        if kills:
            rows.append(("decompress, kill -9", restore_campaign(folder, kills, seed)))
            rows.append(("training, kill -9", kill_campaign(folder, kills, seed)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="number of damaged files")
    parser.add_argument("--kills", type=int, default=60, help="number of kills while training")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.monotonic()
    rows = campaign(options.files, options.kills, options.seed, options.workers)
    print(table(rows))
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s")
    return int(any(not one.passed for _, outcomes in rows for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
