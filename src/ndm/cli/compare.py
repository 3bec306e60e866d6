"""``ndm compare``: several configurations under one budget, several seeds, resumable."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionYesNo, ArgumentParser

from ndm.cli.parsing import step_numbers
from ndm.compare.budget import read_plan
from ndm.compare.plan import Budget, Row, build, plan_rows, read_rows
from ndm.compare.runs import Job, Measures, run_all, threads_for
from ndm.compare.tables import markdown, plot, summarize
from ndm.device import describe_machine
from ndm.errors import UserError, check_whole, require
from ndm.serialize import write_atomically, write_json
from ndm.train.config import parse
from ndm.train.run import Run

RESULT = "compare.json"
FLAGS = {
    "calibrate": "measure the bounds in discrete time once more with a fitted reverse variance",
    "nll": "measure the likelihood by the ODE, too, where the reverse process has one; slow",
}


@dataclass
class CompareSettings:
    """What to compare, and how."""

    config: str
    """File of the comparison: base, rows and their overrides; see configs/compare-digits.yaml."""
    out: str
    """Folder for all runs, the table and the plot; the same command again goes on."""
    seeds: int = 3
    """Runs of each row, with seeds 0, 1, ...: first weights, data order, times and noise."""
    budget: Budget = "steps"
    """What the rows share: optimizer steps, seconds of training, or steps and parameters."""
    train_steps: int | None = None
    """Optimizer steps of each run; by default those of the base. Not with budget=seconds."""
    seconds: float | None = None
    """Seconds of training of each run, for budget=seconds: as many steps as fit in, by a step time
    measured for all rows in turn.
    """
    horizons: str = "10,50,1000"
    """Numbers of steps T of bounds in discrete time, beside the continuous one; empty for none."""
    draws: int = 8
    """Times drawn for each test example in every bound."""
    split: str = "test"
    """The split to measure on."""
    limit: int | None = None
    """Measure only so many examples of the split, evenly spread over it."""
    rows: str | None = None
    """Only these rows, separated by semicolons; the baseline, a plain diffusion as large as the
    largest row of the file, comes with them.
    """
    jobs: int = 1
    """Runs at once, each in a process of its own with an equal share of the cores."""
    calibrate: bool = False
    """See FLAGS."""
    nll: bool = False
    """See FLAGS."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UserError: a value is out of range, or two contradict one another.
        """
        for name in ("seeds", "draws", "jobs"):
            check_whole(name, getattr(self, name), 1)
        for name in ("train_steps", "limit"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        if (self.budget == "seconds") != (self.seconds is not None):
            raise UserError("budget=seconds and --seconds N go together: give both, or neither")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise UserError(f"seconds={self.seconds}: give a positive number of seconds")
        if self.seconds is not None and self.train_steps is not None:
            raise UserError(
                "train_steps does not go with budget=seconds, which chooses the steps itself; give"
                " one of them"
            )
        self.measures()

    def measures(self) -> Measures:
        """What is measured of every run.

        Raises:
            UserError: the numbers of steps are not whole numbers.
        """
        steps = step_numbers("horizons", self.horizons, 10**6, "10,50,1000")
        return Measures(tuple(steps), self.draws, self.split, self.limit, self.calibrate, self.nll)


def run_compare(words: Sequence[str]) -> None:
    """``ndm compare``: parse and compare."""
    parser = ArgumentParser(
        prog="ndm compare",
        description=(
            "Train and measure several configurations under one budget, a plain diffusion as large"
            " as the largest always among them. Goes on where it stopped when the same command is"
            " given again."
        ),
        epilog=(
            "Example: ndm compare --config configs/compare-digits.yaml --out runs/compare --seeds 3"
            " --jobs 2. Words after -- go to every run as to ndm train: -- --train.learning_rate"
            " 1e-3"
        ),
        exit_on_error=False,
    )
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, help=text)
    parser.add_class_arguments(CompareSettings, as_positional=False, skip={*FLAGS})
    own, overrides = (
        (list(words), [])
        if "--" not in words
        else (list(words[: words.index("--")]), list(words[words.index("--") + 1 :]))
    )
    compare(CompareSettings(**vars(parse(parser, own))), tuple(overrides))


def compare(settings: CompareSettings, overrides: tuple[str, ...] = ()) -> None:
    """Run what is missing, then write the table and the plot.

    Raises:
        UserError: the file is wrong, the folder holds another comparison, or a run failed.
    """
    require("matplotlib.figure", "matplotlib", "eval")
    out = Path(settings.out)
    rows, extra = read_rows(Path(settings.config), overrides)
    rows = _chosen(plan_rows(rows, extra, settings.budget), settings.rows)
    parts = build(rows[0])
    data, training = parts.data, parts.settings
    if len(data.split(settings.split)) == 0:
        raise UserError(f"--split {settings.split}: it is empty")
    if settings.jobs > 1:
        torch.set_num_threads(
            threads_for(settings.jobs)
        )  # steps are timed as the runs will take them
    plan = read_plan(out, rows, settings.budget, settings.seconds, settings.train_steps)
    jobs = _jobs(rows, plan, settings)
    sha256 = data.describe().sha256
    for job in jobs:
        job.check(sha256)
    failures = run_all(jobs, settings.jobs)
    protocol = f"batches of {training.batch_size}; budget: {settings.budget}"
    _report(out, rows, plan, jobs, settings.measures(), protocol)
    if failures:
        name, reason = next(iter(failures.items()))
        raise UserError(
            f"{len(failures)} of {len(jobs)} runs failed, the first of them {name}: {reason}; the"
            f" others are in {out}/{RESULT}"
        )


def _jobs(rows: list[Row], plan: dict[str, Any], settings: CompareSettings) -> list[Job]:
    """All runs, seed after seed: an interrupted comparison has as many seeds of each row as it can."""
    jobs = []
    for seed in range(settings.seeds):
        for row in rows:
            config = row.config.override(
                {"train.steps": plan["rows"][row.name]["steps"], "seed": seed}
            )
            run = Run(Path(settings.out) / row.folder / f"seed-{seed}")
            jobs.append(Job(row.name, config, run, settings.measures(), quiet=settings.jobs > 1))
    return jobs


def _chosen(rows: list[Row], names: str | None) -> list[Row]:
    if names is None:
        return rows
    wanted = [name.strip() for name in names.split(";")]
    missing = [name for name in wanted if name not in {row.name for row in rows}]
    if missing:
        raise UserError(
            f"rows: there is no row {missing[0]!r}; choose from"
            f" {'; '.join(row.name for row in rows)}"
        )
    return [row for row in rows if row.name in wanted or row.baseline]


def _report(
    out: Path,
    rows: list[Row],
    plan: dict[str, Any],
    jobs: list[Job],
    wanted: Measures,
    protocol: str,
) -> None:
    """Print the table; write it, the numbers and the plot."""
    content, about = [], dict[str, Any]()
    for row in rows:
        found = {
            job.seed: record
            for job in jobs
            if job.row == row.name and (record := job.result()) is not None
        }
        about = about or next(iter(found.values()), {})
        content.append(
            {
                "name": row.name,
                **plan["rows"][row.name],
                "runs": {seed: one["measures"] for seed, one in found.items()},
            }
        )
        content[-1]["training_seconds"] = [one.get("training_seconds") for one in found.values()]
    if not about:
        return
    baseline = next(row.name for row in rows if row.baseline)
    summary = summarize(content, baseline)
    sentences = [
        (
            f"{about['examples']} examples of {about['data']}/{wanted.split} (sha256"
            f" {about['data_sha256'][:12]}), {wanted.draws} times an example, {protocol}."
        ),
        (
            "Means and standard errors over seeds. A step is timed in a run of the trainer, all"
            " rows in turn; minutes are steps times that."
        ),
    ]
    text = markdown(summary, about["unit"], baseline, sentences)
    print(text)
    record = {
        "unit": about["unit"],
        "baseline": baseline,
        "protocol": sentences,
        "settings": wanted.record(),
        **plan,
        "summary": summary,
    }
    write_json(out / RESULT, {**record, "reported_on": describe_machine()})
    write_atomically(out / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
    for suffix in (".png", ".pdf"):
        plot(out / f"compare{suffix}", summary, about["unit"])
    print(f"wrote {out}/table.md, {RESULT}, compare.png, compare.pdf")
