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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ndm.commands.parsing import load_data, load_run
from ndm.commands.train import resolved, run_train
from ndm.compare.budget import machine
from ndm.compare.runs import Job, run_all
from ndm.data import DataSource
from ndm.errors import UserError
from ndm.model import NDM
from ndm.parallel import started_first
from ndm.report import Measurement
from ndm.serialize import fingerprint, read_json, write_atomically, write_json
from ndm.train.run import METRICS
from ndm.viz import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, PAGE, ABOUT = "results.json", "README.md", "experiment.json"
FORMATS = (".png", ".pdf")
QUALITY = {"FID": "fid", "KID": "kid", "precision": "precision", "recall": "recall"}
"""Measures of sample quality: heading and field."""


def configuration(name: str) -> Path:
    """The path of a configuration that comes with the library, such as ``"checkerboard.yaml"``."""
    return Path(str(files("ndm") / "configs" / name))


def learned_words(words: Sequence[str]) -> list[str]:
    """The words of ``ndm train`` for a model that is to transform its data, as they are.

    Raises:
        UserError: they leave it F(x, t) = x.
    """
    config = resolved([*words, "--out", "-"])
    if config["model"]["transform"]["class_path"].endswith(".Identity"):
        raise UserError(
            "--model.transform ndm.Identity: the learned model would be the plain one, which is trained beside it; leave it out"
        )
    return list(words)


class Report:
    """The folder of one experiment while it is being filled.

    Args:
        name: the experiment.
        out: the folder.
        size: ``smoke``, ``small``, ``paper`` or another of the experiment's sizes.
        seed: seed of everything random.
        words: words for every training run, before those that make a model what the experiment calls it.
        command: what the user typed, for the record.
        data: folder of the user's data, for the experiments that take one; ``words`` hand it to the runs.
        features: TorchScript file of the feature network for FID, for the experiments that take one.
        jobs: trainings at once.
        runs: folders of trained runs to measure, for the experiments that take them.

    Raises:
        UserError: the folder holds another experiment, or the same with another size, seed or models.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        size: str,
        seed: int = 0,
        words: Sequence[str] = (),
        command: str = "",
        data: str | None = None,
        features: str | None = None,
        jobs: int = 1,
        runs: Sequence[str] = (),
    ):
        self.name, self.out, self.size, self.seed, self.jobs = name, out, size, seed, jobs
        self.words, self.command, self.data, self.features = tuple(words), command, data, features
        self.runs = tuple(Path(run) for run in runs)
        for run in self.runs:
            if run.is_dir() and not (run / METRICS).exists():
                raise UserError(f"--runs {run}: the run is not finished; go on with: ndm train --out {run}")
        self.models = tuple(load_run(run) for run in self.runs)
        self._started = time.perf_counter()
        self._page: list[str] = []
        self._figures: list[str] = []
        self._numbers: dict[str, Any] = {}
        self._measurements: dict[str, Any] = {}
        self._checks: list[dict[str, Any]] = []
        self._trained: dict[str, str] = {}  # fingerprints of the models so far
        self._about: dict[str, Any] = {"experiment": name, "size": size, "seed": seed, "words": list(self.words)}
        if self.runs:
            self._about["runs measured"] = {str(run): fingerprint(model) for run, model in zip(self.runs, self.models, strict=True)}
        stored = read_json(out / ABOUT) if (out / ABOUT).exists() else self._about
        for key in self._about | stored:
            if stored.get(key) != self._about.get(key):
                there, here = (one.get(key, "not said") for one in (stored, self._about))
                raise UserError(f"{out} holds another experiment: {key} is {there!r} there and {here!r} here; choose another --out")
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; give a folder")

    @property
    def smoke(self) -> bool:
        """Whether this is the variant of a few seconds."""
        return self.size == "smoke"

    def words_for(self, config: str, *words: str, last: Sequence[str] = ()) -> list[str]:
        """All words of ``ndm train`` for a run but ``--out`` and ``--seed``.

        Args:
            config: a configuration that comes with the library.
            words: overrides, before those of the user.
            last: overrides that make the model what the experiment calls it: after those of the user.
        """
        return ["--config", str(configuration(config)), *words, *self.words, *last]

    def train_all(self, runs: Mapping[str, Sequence[str]]) -> dict[str, tuple[NDM, DataSource]]:
        """Train several models as :meth:`train_words` does, as many at once as the user wants; those then write to the ``log.txt`` of their runs.

        Args:
            runs: all words of each but ``--out`` and ``--seed``, by its folder under ``runs``.

        Returns:
            Each model and its data, by the folder.

        Raises:
            UserError: one of several at once failed; the others are finished.
        """
        self._claim()
        if self.jobs > 1:
            jobs = [Job(name, self.seed, tuple(words), self.folder(name), quiet=True) for name, words in runs.items()]
            failures = run_all(jobs, self.jobs)
            if failures:
                raise UserError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
        return {name: self.train_words(name, words) for name, words in runs.items()}

    def train_words(self, name: str, words: Sequence[str]) -> tuple[NDM, DataSource]:
        """Train a model, or read the one that an earlier call trained.

        Args:
            name: folder of the run, under ``runs``.
            words: see :meth:`words_for`.

        Returns:
            The trained model in evaluation mode, and its data.
        """
        folder = self.folder(name)
        print(f"{self.name}: {name}", flush=True)
        self._claim()
        trained = (folder / METRICS).exists()
        run_train([*words, "--out", str(folder), "--seed", str(self.seed)])
        if not (started_first() or trained):
            sys.exit(0)  # one of several processes that trained together: the first goes on alone
        model = load_run(folder)
        self._trained[name] = fingerprint(model)
        return model, load_data(folder)

    def made_up_data(self, write: Callable[[Path, int], None]) -> list[str]:
        """Words of ``ndm train`` for data that ``write(folder, seed)`` makes, once, inside the folder; none if the user named data."""
        if "--data.path" in self.words:
            return []
        folder = self.out / "data"
        if not folder.exists():
            self._claim()
            write(folder, self.seed)
        return ["--data.path", str(folder)]

    def folder(self, name: str) -> Path:
        """The folder of a run."""
        return self.out / "runs" / name

    def keep(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``compute`` gives, JSON-ready; kept in a file, so that an interrupted experiment does not compute it again.

        Unless a model was trained anew since: what was computed with another is not taken for it.
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

    def keep_tensor(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives, kept as :meth:`keep` does, as safetensors."""
        path, made = self.out / "parts" / f"{key}.safetensors", self._models()
        if path.exists():
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("models") == made:
                    return file.get_tensor("found")
        self._claim()
        found = compute().contiguous()
        write_atomically(path, lambda temporary: save_file({"found": found}, temporary, {"models": made}))
        return found

    def _models(self) -> str:
        """SHA-256 of the models that were trained so far."""
        return hashlib.sha256(json.dumps(self._trained, sort_keys=True).encode()).hexdigest()

    def _claim(self) -> None:
        """Say in the folder what is in it; not before something is, so that an experiment that is refused leaves nothing behind."""
        if not (self.out / ABOUT).exists():
            write_json(self.out / ABOUT, self._about)

    def say(self, text: str) -> None:
        """Add Markdown to the page."""
        self._page.append(text.strip() + "\n")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table to the page."""
        lines = [head, ["---"] * len(head), *rows]
        self.say("".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines))

    def quality_table(self, found: Mapping[str, Mapping[str, Any]], digits: Sequence[int]) -> None:
        """Add a table of FID, KID, precision and recall, each with so many digits; records of :class:`ndm.quality.SampleQuality` by name."""
        rows = [[name, *(f"{one[field]:.{n}f}" for field, n in zip(QUALITY.values(), digits, strict=True))] for name, one in found.items()]
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
        self._measurements[key] = measurement.to_dict() if isinstance(measurement, Measurement) else dict(measurement)

    def measure(self, key: str, take: Callable[[], Measurement]) -> dict[str, Any]:
        """Take a measurement, or read it if an earlier call took it; its record (:meth:`ndm.report.Measurement.to_dict`) goes into the results."""
        record = self.keep(key, lambda: take().to_dict())
        self.measured(key, record)
        return record

    def expect(self, text: str, value: float, most: float) -> None:
        """State what the experiment should show: that ``value`` is at most ``most``. The page says whether it is.

        The smoke variant states nothing.
        """
        if not self.smoke:
            self._checks.append({"text": text, "value": value, "most": most, "holds": math.isfinite(value) and value <= most})

    def finish(self) -> None:
        """Write the page and the results, and say where they are."""
        if self._checks:
            self.say("What it should show:")
            rows = [[one["text"], f"{one['value']:.4g}", f"{one['most']:.4g}", "yes" if one["holds"] else "**no**"] for one in self._checks]
            self.table(["", "value", "at most", "holds"], rows)
        results: Mapping[str, Any] = {
            "experiment": self.name,
            "size": self.size,
            "seed": self.seed,
            "command": self.command,
            "machine": machine(),
            **({"runs": self._about["runs measured"]} if self.runs else {}),
            "numbers": self._numbers,
            "measurements": self._measurements,
            "checks": self._checks,
            "figures": self._figures,
            "seconds_of_this_call": round(time.perf_counter() - self._started, 1),
        }
        page = [f"# {self.name}, {self.size}\n", f"`{self.command}`, seed {self.seed}.\n", *self._page]
        write_atomically(self.out / PAGE, lambda path: path.write_text("\n".join(page), encoding="utf-8"))
        write_json(self.out / RESULTS, results)
        for one in self._checks:
            print(f"{'holds' if one['holds'] else 'DOES NOT HOLD'}: {one['text']}: {one['value']:.4g}, at most {one['most']:.4g}")
        print(f"wrote {self.out}/{PAGE}, {RESULTS}, {', '.join(f'{name}.png' for name in self._figures)} (and PDF)")
