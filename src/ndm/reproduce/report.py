"""What an experiment leaves behind: a folder of runs, figures, numbers and a page that shows them.

=====================  =====================================================================
``runs/NAME/``         each training run, as ``ndm train`` leaves it
``parts/``             what took long to compute; the same command again reads it
``FIGURE.png, .pdf``   the figures
``results.json``       numbers with their protocols, the command, the seed and the machine
``README.md``          a page with all of them
=====================  =====================================================================

``results.json`` is written last, so that it marks a finished experiment.
"""

import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ndm.compare.runs import Job, run_all
from ndm.data import DataSource
from ndm.device import describe_machine
from ndm.errors import UserError, check_whole
from ndm.evaluation.measurement import Measurement
from ndm.evaluation.processes import started_first
from ndm.model import DiffusionModel
from ndm.serialize import fingerprint, read_json, write_atomically, write_json
from ndm.train.config import Overrides, RunConfig, find_config
from ndm.train.run import Run
from ndm.train.training import train_run
from ndm.viz import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, PAGE, ABOUT = "results.json", "README.md", "experiment.json"
FORMATS = (".png", ".pdf")
QUALITY = {"FID": "fid", "KID": "kid", "precision": "precision", "recall": "recall"}
"""Measures of sample quality: heading and field."""


def check_learned(config: RunConfig) -> RunConfig:
    """The configuration of a model with a learned forward process, as it is.

    Raises:
        UserError: its transformation is the identity.
    """
    if str(config.get("model.transform.class_path")).endswith(".Identity"):
        raise UserError(
            "--model.transform ndm.Identity: the learned model would be the conventional one, which"
            " is trained beside it; leave it out"
        )
    return config


@dataclass(frozen=True)
class ExperimentSettings:
    """How an experiment is carried out.

    Raises:
        UserError: a number is out of range, or a run to measure is not finished.
    """

    name: str
    """The experiment."""
    size: str
    """``smoke``, ``small``, ``paper`` or another of the experiment's sizes."""
    out: Path
    """Folder for everything."""
    seed: int = 0
    """Seed of everything random."""
    data: str | None = None
    """Folder of the user's data, for the experiments that take one."""
    features: str | None = None
    """TorchScript file of the feature network for FID, for the experiments that take one."""
    runs: tuple[str, ...] = ()
    """Folders of trained runs to measure, for the experiments that take them."""
    jobs: int = 1
    """Trainings at once."""
    overrides: tuple[str, ...] = ()
    """Options for every training run, as of ``ndm train``."""

    def __post_init__(self) -> None:
        """Check the numbers and the runs."""
        check_whole("seed", self.seed, 0)
        check_whole("jobs", self.jobs, 1)
        for run in self.runs:
            if Path(run).is_dir() and not Run(Path(run)).finished:
                raise UserError(
                    f"--runs {run}: the run is not finished; resume it with: ndm train --out {run}"
                )

    @property
    def command(self) -> str:
        """The command that carries it out, but for the folder."""
        words = ["ndm", "reproduce", self.name, "--size", self.size, "--seed", str(self.seed)]
        for option, value in (("--data", self.data), ("--features", self.features)):
            words += [option, value] if value is not None else []
        words += ["--runs", *self.runs] if self.runs else []
        words += ["--jobs", str(self.jobs)] if self.jobs > 1 else []
        return shlex.join([*words, *(["--", *self.overrides] if self.overrides else [])])


class Report:
    """The folder of one experiment while it is being filled.

    Args:
        settings: how the experiment is carried out.

    Raises:
        UserError: the folder holds another experiment, or the same with another size, seed or
            models.
    """

    def __init__(self, settings: ExperimentSettings):
        self.settings, self.name, self.out, self.seed = (
            settings,
            settings.name,
            settings.out,
            settings.seed,
        )
        self.runs = tuple(Run(Path(run)) for run in settings.runs)
        self.models = tuple(run.model() for run in self.runs)
        self._started = time.perf_counter()
        self._page: list[str] = []
        self._figures: list[str] = []
        self._numbers: dict[str, Any] = {}
        self._measurements: dict[str, Any] = {}
        self._checks: list[dict[str, Any]] = []
        self._write_data: Callable[[Path, int], None] | None = None
        self._trained: dict[str, str] = {}  # fingerprints of the models so far
        self._about: dict[str, Any] = {
            "experiment": self.name,
            "size": settings.size,
            "seed": self.seed,
        }
        self._about |= {"data": settings.data, "overrides": list(settings.overrides)}
        if self.runs:
            self._about["runs measured"] = {
                str(run.folder): fingerprint(one)
                for run, one in zip(self.runs, self.models, strict=True)
            }
        stored = read_json(self.out / ABOUT) if (self.out / ABOUT).exists() else self._about
        for key in self._about | stored:
            if stored.get(key) != self._about.get(key):
                there, here = (one.get(key, "not given") for one in (stored, self._about))
                raise UserError(
                    f"{self.out} holds another experiment: {key} is {there!r} there and {here!r}"
                    " here; choose another --out"
                )
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; give a folder")

    @property
    def smoke(self) -> bool:
        """Whether this is the variant of a few seconds."""
        return self.settings.size == "smoke"

    @property
    def user_overrides(self) -> tuple[str, ...]:
        """What the user overrides in every training run: the path of the data, and options of ``ndm
        train``.
        """
        data = self.settings.data
        return (*(("--data.path", data) if data is not None else ()), *self.settings.overrides)

    def config(self, name: str, *overrides: Overrides, last: Overrides = ()) -> RunConfig:
        """The configuration of a training run.

        Args:
            name: a configuration that comes with the library, such as ``digits``.
            overrides: the experiment's overrides, in turn, before those of the user.
            last: overrides that make the model what the experiment calls it, after those of the
                user.
        """
        config = RunConfig.read(find_config(name))
        for one in (*overrides, self.user_overrides, last):
            config = config.override(one) if one else config
        return config

    def train_all(
        self, configs: Mapping[str, RunConfig]
    ) -> dict[str, tuple[DiffusionModel, DataSource]]:
        """Train several models as :meth:`train` does, as many at once as the user wants; each then
        writes to the ``log.txt`` of its run.

        Args:
            configs: the configurations by the names of the runs.

        Returns:
            Each model and its data, by the name of the run.

        Raises:
            UserError: one of several at once failed; the others are finished.
        """
        self._claim()
        if self.settings.jobs > 1:
            jobs = [
                Job(name, config.override({"seed": self.seed}), self.run(name), quiet=True)
                for name, config in configs.items()
            ]
            failures = run_all(jobs, self.settings.jobs)
            if failures:
                raise UserError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
        return {name: self.train(name, config) for name, config in configs.items()}

    def train(self, name: str, config: RunConfig) -> tuple[DiffusionModel, DataSource]:
        """Train a model, or read the one that an earlier call trained.

        Args:
            name: folder of the run, under ``runs``.
            config: its configuration; the seed is that of the experiment.

        Returns:
            The trained model in evaluation mode, and its data.
        """
        run = self.run(name)
        print(f"{self.name}: {name}", flush=True)
        self._claim()
        was_finished = run.finished
        metrics = train_run(run, config.override({"seed": self.seed}))
        if metrics is None or not (started_first() or was_finished):
            sys.exit(0)  # one of several processes that trained together: the first goes on alone
        model = run.model()
        self._trained[name] = fingerprint(model)
        return model, run.data()

    def synthetic_data(self, write: Callable[[Path, int], None]) -> dict[str, object]:
        """Overrides for data that ``write(folder, seed)`` makes before the first training; none if
        the user named data.
        """
        if any(word.split("=")[0] == "--data.path" for word in self.user_overrides):
            return {}
        self._write_data = write
        return {"data.path": str(self.out / "data")}

    def run(self, name: str) -> Run:
        """A training run."""
        return Run(self.out / "runs" / name)

    def cache(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Compute a JSON-ready result, or read it from the file where an earlier call stored it.

        A result of other models, from before one was trained again, is computed again.
        """
        path, made = self.out / "parts" / f"{key}.json", self._models()
        kept = read_json(path) if path.exists() else {}
        if kept.get("models") != made or not isinstance(kept.get("found"), dict):
            self._claim()
            write_json(path, {"models": made, "found": compute()})
            kept = read_json(path)
        found = kept["found"]
        assert isinstance(found, dict)
        return found

    def cache_tensor(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a tensor, or read it, as :meth:`cache` does; the file is a safetensors file."""
        path, made = self.out / "parts" / f"{key}.safetensors", self._models()
        if path.exists():
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("models") == made:
                    return file.get_tensor("found")
        self._claim()
        found = compute().contiguous()
        write_atomically(
            path, lambda temporary: save_file({"found": found}, temporary, {"models": made})
        )
        return found

    def _models(self) -> str:
        """SHA-256 of the models that were trained so far."""
        return hashlib.sha256(json.dumps(self._trained, sort_keys=True).encode()).hexdigest()

    def _claim(self) -> None:
        """Note in the folder which experiment it holds, once it holds something: a rejected
        experiment leaves nothing behind.
        """
        if not (self.out / ABOUT).exists():
            write_json(self.out / ABOUT, self._about)
        if self._write_data is not None and not (self.out / "data").exists():
            self._write_data(self.out / "data", self.seed)

    def say(self, text: str) -> None:
        """Add Markdown to the page."""
        self._page.append(text.strip() + "\n")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table to the page."""
        lines = [head, ["---"] * len(head), *rows]
        self.say("".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines))

    def quality_table(self, found: Mapping[str, Mapping[str, Any]], digits: Sequence[int]) -> None:
        """Add a table of FID, KID, precision and recall, each with so many digits; records of
        :class:`ndm.quality.SampleQuality` by name.
        """
        rows = [
            [
                name,
                *(f"{one[field]:.{n}f}" for field, n in zip(QUALITY.values(), digits, strict=True)),
            ]
            for name, one in found.items()
        ]
        self.table(["", *QUALITY], rows)

    def figure(self, name: str, figure: "Figure", caption: str) -> None:
        """Write a figure as PNG and PDF and show it on the page."""
        for suffix in FORMATS:
            write_figure(self.out / f"{name}{suffix}", figure)
        self._figures.append(name)
        self.say(f"![{caption}]({name}.png)\n\n*{caption}* ([PDF]({name}.pdf))")

    def number(self, key: str, value: object) -> None:
        """Add a number, or several, JSON-ready, to the results."""
        self._numbers[key] = value

    def measured(self, key: str, measurement: Measurement | Mapping[str, Any]) -> None:
        """Add a measurement with its protocol, or the record of one that was kept, to the results."""
        self._measurements[key] = (
            measurement.to_dict() if isinstance(measurement, Measurement) else dict(measurement)
        )

    def measure(self, key: str, take: Callable[[], Measurement]) -> dict[str, Any]:
        """Take a measurement, or read it if an earlier call took it; its record
        (:meth:`ndm.evaluation.tables.Measurement.to_dict`) goes into the results.
        """
        record = self.cache(key, lambda: take().to_dict())
        self.measured(key, record)
        return record

    def expect(self, text: str, value: float, most: float) -> None:
        """State what the experiment should show: that ``value`` is at most ``most``. The page says
        whether it is.

        The smoke variant states nothing.
        """
        if not self.smoke:
            self._checks.append(
                {
                    "text": text,
                    "value": value,
                    "most": most,
                    "holds": math.isfinite(value) and value <= most,
                }
            )

    def finish(self) -> None:
        """Write the page and the results, and say where they are."""
        if self._checks:
            self.say("What it should show:")
            rows = [
                [
                    one["text"],
                    f"{one['value']:.4g}",
                    f"{one['most']:.4g}",
                    "yes" if one["holds"] else "**no**",
                ]
                for one in self._checks
            ]
            self.table(["", "value", "at most", "holds"], rows)
        results: Mapping[str, Any] = {
            "experiment": self.name,
            "size": self.settings.size,
            "seed": self.seed,
            "command": self.settings.command,
            "machine": describe_machine(),
            **({"runs": self._about["runs measured"]} if self.runs else {}),
            "numbers": self._numbers,
            "measurements": self._measurements,
            "checks": self._checks,
            "figures": self._figures,
            "seconds_of_this_call": round(time.perf_counter() - self._started, 1),
        }
        page = [
            f"# {self.name}, {self.settings.size}\n",
            f"`{self.settings.command}`, seed {self.seed}.\n",
            *self._page,
        ]
        write_atomically(
            self.out / PAGE, lambda path: path.write_text("\n".join(page), encoding="utf-8")
        )
        write_json(self.out / RESULTS, results)
        for one in self._checks:
            print(
                f"{'holds' if one['holds'] else 'DOES NOT HOLD'}: {one['text']}:"
                f" {one['value']:.4g}, at most {one['most']:.4g}"
            )
        print(
            f"wrote {self.out}/{PAGE}, {RESULTS},"
            f" {', '.join(f'{name}.png' for name in self._figures)} (and PDF)"
        )
