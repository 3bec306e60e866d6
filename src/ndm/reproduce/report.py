"""The report of an experiment: a folder of runs, figures, numbers and a page that shows them.

=====================  =====================================================================
``runs/NAME/``         one training run each, in the layout of ``ndm train``
``parts/``             a cache of expensive results, reused when the command is rerun
``FIGURE.png, .pdf``   the figures
``results.json``       numbers with their protocols, the command, the seed and the machine
``README.md``          the page
=====================  =====================================================================

``results.json`` is written last, so its presence marks a finished experiment.
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

import torch
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
"""Measures of sample quality: table heading and record field."""


def check_learned(config: RunConfig) -> RunConfig:
    """Return the configuration if its forward process is learned.

    Raises:
        UserError: the transformation is the identity.
    """
    if str(config.get("model.transform.class_path")).endswith(".Identity"):
        raise UserError(
            "--model.transform ndm.Identity: the learned model would be the conventional one, which"
            " is trained anyway; leave it out"
        )
    return config


@dataclass(frozen=True)
class ExperimentSettings:
    """Settings of an experiment.

    Raises:
        UserError: a number is out of range, or a run to measure is not finished.
    """

    name: str
    """Name of the experiment."""
    size: str
    """``smoke``, ``small``, ``paper`` or another of the experiment's sizes."""
    out: Path
    """Output folder."""
    seed: int = 0
    """Seed of all random numbers."""
    data: str | None = None
    """Folder of the user's data, for experiments that take one."""
    features: str | None = None
    """TorchScript file of the feature network for FID, for experiments that take one."""
    runs: tuple[str, ...] = ()
    """Folders of trained runs to measure, for experiments that take them."""
    jobs: int = 1
    """Number of models to train in parallel."""
    overrides: tuple[str, ...] = ()
    """Options of ``ndm train`` that apply to every training run."""

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
        """The command line, without the output folder."""
        words = ["ndm", "reproduce", self.name, "--size", self.size, "--seed", str(self.seed)]
        for option, value in (("--data", self.data), ("--features", self.features)):
            words += [option, value] if value is not None else []
        words += ["--runs", *self.runs] if self.runs else []
        words += ["--jobs", str(self.jobs)] if self.jobs > 1 else []
        return shlex.join([*words, *(["--", *self.overrides] if self.overrides else [])])


class Report:
    """Writer of an experiment's folder.

    Args:
        settings: the settings of the experiment.

    Raises:
        UserError: the folder holds another experiment, or the same one with another size, seed or
            models.
    """

    def __init__(self, settings: ExperimentSettings):
        self.settings, self.name = settings, settings.name
        self.out, self.seed = settings.out, settings.seed
        self.runs = tuple(Run(Path(run)) for run in settings.runs)
        self.models = tuple(run.model() for run in self.runs)
        self._started = time.perf_counter()
        self._page: list[str] = []
        self._figures: list[str] = []
        self._numbers: dict[str, Any] = {}
        self._measurements: dict[str, Any] = {}
        self._checks: list[dict[str, Any]] = []
        self._write_data: Callable[[Path, int], None] | None = None
        self._fingerprints: dict[str, str] = {}  # of the models trained so far
        self._about: dict[str, Any] = {
            "experiment": self.name,
            "size": settings.size,
            "seed": self.seed,
        }
        self._about |= {"data": settings.data, "overrides": list(settings.overrides)}
        if self.runs:
            self._about["runs measured"] = {
                str(run.folder): fingerprint(model)
                for run, model in zip(self.runs, self.models, strict=True)
            }
        stored = read_json(self.out / ABOUT) if (self.out / ABOUT).exists() else self._about
        for key in self._about | stored:
            if stored.get(key) != self._about.get(key):
                there, here = (about.get(key, "not given") for about in (stored, self._about))
                raise UserError(
                    f"{self.out} holds another experiment: {key} is {there!r} there and {here!r}"
                    " here; choose another --out"
                )
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; give a folder")

    @property
    def smoke(self) -> bool:
        """Whether the size is ``smoke``, a check that takes seconds."""
        return self.settings.size == "smoke"

    @property
    def user_overrides(self) -> tuple[str, ...]:
        """The user's overrides for every training run: the data path and ``ndm train`` options."""
        data = self.settings.data
        return (*(("--data.path", data) if data is not None else ()), *self.settings.overrides)

    def config(self, name: str, *overrides: Overrides, last: Overrides = ()) -> RunConfig:
        """Return the configuration of a training run.

        Args:
            name: a configuration that ships with the library, such as ``digits``.
            overrides: the experiment's overrides, applied in order before those of the user.
            last: overrides that define the model in the experiment, applied after those of the
                user.
        """
        config = RunConfig.read(find_config(name))
        for one in (*overrides, self.user_overrides, last):
            config = config.override(one) if one else config
        return config

    def train_all(
        self, configs: Mapping[str, RunConfig], seed: int | None = None
    ) -> dict[str, tuple[DiffusionModel, DataSource]]:
        """Train several models as :meth:`train` does, ``settings.jobs`` in parallel.

        With more than one job, each run writes its output to the ``log.txt`` in its folder.

        Args:
            configs: the configurations by run name.
            seed: seed of all runs; None for that of the experiment.

        Returns:
            The model and its data by run name.

        Raises:
            UserError: a parallel run failed; the others are finished first.
        """
        self._claim()
        seed = self.seed if seed is None else seed
        if self.settings.jobs > 1:
            jobs = [
                Job(name, config.override({"seed": seed}), self.run(name), quiet=True)
                for name, config in configs.items()
            ]
            failures = run_all(jobs, self.settings.jobs)
            if failures:
                names, reason = ", ".join(failures), next(iter(failures.values()))
                raise UserError(
                    f"{len(failures)} of {len(jobs)} runs failed ({names}); the first: {reason}"
                )
        return {name: self.train(name, config, seed) for name, config in configs.items()}

    def train(
        self, name: str, config: RunConfig, seed: int | None = None
    ) -> tuple[DiffusionModel, DataSource]:
        """Train a model, or load it if an earlier call trained it.

        Args:
            name: folder of the run, under ``runs``.
            config: its configuration, without the seed.
            seed: its seed; None for that of the experiment.

        Returns:
            The trained model in evaluation mode, and its data.
        """
        run = self.run(name)
        print(f"{self.name}: {name}", flush=True)
        self._claim()
        was_finished = run.finished
        metrics = train_run(run, config.override({"seed": self.seed if seed is None else seed}))
        if metrics is None or not (started_first() or was_finished):
            sys.exit(0)  # distributed training is over: only the first process continues
        model = run.model()
        self._fingerprints[name] = fingerprint(model)
        return model, run.data()

    def synthetic_data(self, write: Callable[[Path, int], None]) -> dict[str, object]:
        """Return overrides for synthetic data; none if the user named data.

        ``write(folder, seed)`` writes the data before the first training run.
        """
        if any(option.split("=")[0] == "--data.path" for option in self.user_overrides):
            return {}
        self._write_data = write
        return {"data.path": str(self.out / "data")}

    def run(self, name: str) -> Run:
        """Return a training run by name."""
        return Run(self.out / "runs" / name)

    def cache(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Compute a JSON-ready result, or read it if an earlier call stored it.

        A stored result is recomputed if it belongs to other models than those trained so far.
        """
        path, models = self.out / "parts" / f"{key}.json", self._models_hash()
        stored = read_json(path) if path.exists() else {}
        if stored.get("models") != models or not isinstance(stored.get("found"), dict):
            self._claim()
            write_json(path, {"models": models, "found": compute()})
            stored = read_json(path)
        result = stored["found"]
        assert isinstance(result, dict)
        return result

    def cache_tensor(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a tensor, or read it, as :meth:`cache` does, but in a safetensors file."""
        path, models = self.out / "parts" / f"{key}.safetensors", self._models_hash()
        if path.exists():
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("models") == models:
                    return file.get_tensor("found")
        self._claim()
        result = compute().contiguous()
        write_atomically(
            path, lambda temporary: save_file({"found": result}, temporary, {"models": models})
        )
        return result

    def _models_hash(self) -> str:
        """Return the SHA-256 of the models trained so far."""
        return hashlib.sha256(json.dumps(self._fingerprints, sort_keys=True).encode()).hexdigest()

    def _claim(self) -> None:
        """Record the experiment in its folder before the first output.

        Not earlier, so that a rejected experiment leaves no files.
        """
        if not (self.out / ABOUT).exists():
            write_json(self.out / ABOUT, self._about)
        if self._write_data is not None and not (self.out / "data").exists():
            self._write_data(self.out / "data", self.seed)

    def text(self, text: str) -> None:
        """Add Markdown to the page."""
        self._page.append(text.strip() + "\n")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table to the page."""
        lines = [head, ["---"] * len(head), *rows]
        self.text("".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines))

    def quality_table(self, found: Mapping[str, Mapping[str, Any]], digits: Sequence[int]) -> None:
        """Add a table of FID, KID, precision and recall.

        Args:
            found: records of :class:`ndm.quality.SampleQuality` by name.
            digits: decimals of each measure.
        """
        columns = list(zip(QUALITY.values(), digits, strict=True))
        rows = [
            [name, *(f"{record[field]:.{decimals}f}" for field, decimals in columns)]
            for name, record in found.items()
        ]
        self.table(["", *QUALITY], rows)

    def figure(self, name: str, figure: "Figure", caption: str) -> None:
        """Write a figure as PNG and PDF and show it on the page."""
        for suffix in FORMATS:
            write_figure(self.out / f"{name}{suffix}", figure)
        self._figures.append(name)
        self.text(f"![{caption}]({name}.png)\n\n*{caption}* ([PDF]({name}.pdf))")

    def add_number(self, key: str, value: object) -> None:
        """Add a number, or a JSON-ready collection of numbers, to the results."""
        self._numbers[key] = value

    def add_measurement(self, key: str, measurement: Measurement | Mapping[str, Any]) -> None:
        """Add a measurement with its protocol, or its stored record, to the results."""
        self._measurements[key] = (
            measurement.to_dict() if isinstance(measurement, Measurement) else dict(measurement)
        )

    def measure(self, key: str, take: Callable[[], Measurement]) -> dict[str, Any]:
        """Take a measurement, or read it if an earlier call took it, and add it to the results.

        Returns:
            Its record, :meth:`ndm.evaluation.measurement.Measurement.to_dict`.
        """
        return self.measure_values(key, take)[0]

    def measure_values(
        self, key: str, take: Callable[[], Measurement]
    ) -> tuple[dict[str, Any], Tensor]:
        """Take a measurement as :meth:`measure` does, with the values of its examples.

        Returns:
            Its record, and the estimate of each example, ``(N,)``, nats, float64.
        """

        def both() -> dict[str, Any]:
            found = take()
            return {"record": found.to_dict(), "values": found.values.tolist()}

        stored = self.cache(key, both)
        self.add_measurement(key, stored["record"])
        return stored["record"], torch.tensor(stored["values"], dtype=torch.float64)

    def expect(self, text: str, value: float, most: float) -> None:
        """Add the check that ``value`` is at most ``most``; the page shows whether it holds.

        The smoke size adds no checks.
        """
        if not self.smoke:
            holds = math.isfinite(value) and value <= most
            self._checks.append({"text": text, "value": value, "most": most, "holds": holds})

    def finish(self) -> None:
        """Write the page and the results, and print where they are."""
        if self._checks:
            self.text("Checks:")
            rows = []
            for check in self._checks:
                verdict = "yes" if check["holds"] else "**no**"
                rows.append(
                    [check["text"], f"{check['value']:.4g}", f"{check['most']:.4g}", verdict]
                )
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
        for check in self._checks:
            verdict = "holds" if check["holds"] else "DOES NOT HOLD"
            value, most = check["value"], check["most"]
            print(f"{verdict}: {check['text']}: {value:.4g}, at most {most:.4g}")
        figures = ", ".join(f"{name}.png" for name in self._figures)
        print(f"wrote {self.out}/{PAGE}, {RESULTS}, {figures} (and PDF)")
