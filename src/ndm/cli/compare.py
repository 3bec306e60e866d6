"""``ndm compare``: train and measure several configurations under the same budget."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionYesNo

from ndm.cli.parsing import split_overrides, step_numbers
from ndm.compare.budget import read_plan
from ndm.compare.plan import Budget, Row, build, plan_rows, read_rows
from ndm.compare.runs import Job, Measures, run_all, threads_for
from ndm.compare.tables import markdown, plot, summarize
from ndm.device import describe_machine
from ndm.errors import UserError, check_whole, require
from ndm.evaluation.calibrate import GridKind, VarianceKind
from ndm.serialize import write_atomically, write_json
from ndm.train.config import Parser, parse
from ndm.train.run import Run

RESULT = "compare.json"
FLAGS = {
    "calibrate": "repeat the discrete-time bounds with fitted times and a fitted reverse variance",
    "nll": "also measure the likelihood under the ODE, if the reverse process has one; slow",
}


@dataclass
class CompareSettings:
    """Settings of a comparison."""

    config: str
    """Comparison file (YAML with a base and rows with their overrides), or the name of an included
    one, such as compare-digits.
    """
    out: str
    """Folder for all runs, the table and the plot; created if needed."""
    seeds: int = 3
    """Number of runs of each row, with the seeds 0, 1, ..."""
    budget: Budget = "steps"
    """Shared by all rows: optimizer steps, seconds of training, or both steps and parameters."""
    train_steps: int | None = None
    """Optimizer steps of each run; by default those of the base. Not for budget=seconds."""
    seconds: float | None = None
    """Seconds of training of each run, for budget=seconds. The number of steps follows from the
    measured time of a step.
    """
    horizons: str | None = None
    """Numbers of steps T of the discrete-time bounds; empty for only the continuous-time bound. By
    default the T that the rows are trained for, or 10,50,1000 if they are trained in continuous
    time.
    """
    draws: int = 8
    """Number of times t drawn per example in every bound."""
    split: str = "test"
    """Split of the data to measure."""
    limit: int | None = None
    """Number of examples to measure, evenly spread over the split; by default all."""
    rows: str | None = None
    """Names of the rows to run, separated by semicolons; by default all. The baseline, a plain
    diffusion as large as the largest row, is always included.
    """
    jobs: int = 1
    """Number of parallel runs, each in its own process with an equal share of the CPU cores."""
    grid: GridKind = "fitted"
    """Times of the T steps with --calibrate: fitted, or equal. Only equal with more than 64
    steps.
    """
    variance: VarianceKind = "dimension"
    """Reverse variance with --calibrate: one for each step and dimension of the latents, or one for
    each step.
    """
    calibrate: bool = False
    """See FLAGS."""
    nll: bool = False
    """See FLAGS."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UserError: a value is out of range, or two values contradict each other.
        """
        for name in ("seeds", "draws", "jobs"):
            check_whole(name, getattr(self, name), 1)
        for name in ("train_steps", "limit"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        if (self.budget == "seconds") != (self.seconds is not None):
            raise UserError("budget=seconds and --seconds N go together: give both or neither")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise UserError(f"seconds={self.seconds}: give a positive number of seconds")
        if self.seconds is not None and self.train_steps is not None:
            raise UserError(
                "train_steps does not go with budget=seconds, which determines the steps; leave one"
                " of them out"
            )
        self.measures()

    def measures(self, trained: Collection[int] = ()) -> Measures:
        """Return the quantities to measure for every run.

        Args:
            trained: the numbers of steps T that rows are trained for; none in continuous time.

        Raises:
            UserError: the numbers of steps are not integers.
        """
        usual = ",".join(map(str, sorted(trained))) or "10,50,1000"
        wanted = usual if self.horizons is None else self.horizons
        steps = step_numbers("horizons", wanted, 10**6, "10,50,1000")
        fit = (self.grid, self.variance) if self.calibrate else None
        return Measures(tuple(steps), self.draws, self.split, self.limit, fit, self.nll)


def run_compare(arguments: Sequence[str]) -> None:
    """Parse the arguments of ``ndm compare`` and compare."""
    parser = Parser(
        prog="ndm compare",
        description=(
            "Train and measure several configurations under the same budget, including a plain"
            " diffusion as large as the largest of them. Rerun the command to resume an interrupted"
            " comparison."
        ),
        epilog=(
            "Example: ndm compare --config compare-digits --out runs/compare --seeds 3 --jobs 2."
            " Options after -- are passed to every training run, as to ndm train: --"
            " --train.learning_rate 1e-3"
        ),
        exit_on_error=False,
    )
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, help=text)
    parser.add_class_arguments(CompareSettings, as_positional=False, skip={*FLAGS})
    own, overrides = split_overrides(arguments)
    compare(CompareSettings(**vars(parse(parser, own))), overrides)


def compare(settings: CompareSettings, overrides: tuple[str, ...] = ()) -> None:
    """Run all missing runs, then write the table and the plot.

    Raises:
        UserError: the file is wrong, the folder contains another comparison, or a run failed.
    """
    require("matplotlib.figure", "matplotlib", "eval")
    out = Path(settings.out)
    rows, extra = read_rows(Path(settings.config), overrides)
    rows = _chosen(plan_rows(rows, extra, settings.budget), settings.rows)
    parts = build(rows[0])
    data, training = parts.data, parts.settings
    if len(data.split(settings.split)) == 0:
        raise UserError(f"--split {settings.split}: the split is empty; choose another")
    if settings.jobs > 1:
        # Steps are timed with as many threads as the runs will have.
        torch.set_num_threads(threads_for(settings.jobs))
    plan = read_plan(out, rows, settings.budget, settings.seconds, settings.train_steps)
    horizons = (build(row).model.steps for row in rows)
    trained = {steps for steps in horizons if steps is not None}
    measures = settings.measures(trained)
    jobs = _jobs(rows, plan, settings, measures)
    sha256 = data.describe().sha256
    for job in jobs:
        job.check(sha256)
    failures = run_all(jobs, settings.jobs)
    protocol = f"batches of {training.batch_size}; budget: {settings.budget}"
    _report(out, rows, plan, jobs, measures, protocol)
    if failures:
        name, reason = next(iter(failures.items()))
        raise UserError(
            f"{len(failures)} of {len(jobs)} runs failed, the first is {name}: {reason}; results of"
            f" the others are in {out}/{RESULT}"
        )


def _jobs(
    rows: list[Row], plan: dict[str, Any], settings: CompareSettings, measures: Measures
) -> list[Job]:
    """Return all runs ordered by seed, so that an interrupted comparison has whole seeds."""
    jobs = []
    for seed in range(settings.seeds):
        for row in rows:
            steps = plan["rows"][row.name]["steps"]
            config = row.config.override({"train.steps": steps, "seed": seed})
            run = Run(Path(settings.out) / row.folder / f"seed-{seed}")
            jobs.append(Job(row.name, config, run, measures, quiet=settings.jobs > 1))
    return jobs


def _chosen(rows: list[Row], names: str | None) -> list[Row]:
    if names is None:
        return rows
    wanted = [name.strip() for name in names.split(";")]
    present = [row.name for row in rows]
    missing = [name for name in wanted if name not in present]
    if missing:
        raise UserError(f"rows: no row {missing[0]!r}; choose from {'; '.join(present)}")
    return [row for row in rows if row.name in wanted or row.baseline]


def _report(
    out: Path,
    rows: list[Row],
    plan: dict[str, Any],
    jobs: list[Job],
    wanted: Measures,
    protocol: str,
) -> None:
    """Print the table; write the table, the results and the plot."""
    content, about = [], dict[str, Any]()
    for row in rows:
        results = {job.seed: job.result() for job in jobs if job.row == row.name}
        found = {seed: result for seed, result in results.items() if result is not None}
        about = about or next(iter(found.values()), {})
        entry = {"name": row.name, **plan["rows"][row.name]}
        entry["runs"] = {seed: result["measures"] for seed, result in found.items()}
        entry["training_seconds"] = [one.get("training_seconds") for one in found.values()]
        content.append(entry)
    if not about:
        return
    baseline = next(row.name for row in rows if row.baseline)
    summary = summarize(content, baseline)
    sentences = [
        f"{about['examples']} examples of {about['data']}/{wanted.split} (sha256"
        f" {about['data_sha256'][:12]}), {wanted.draws} times per example, {protocol}.",
        "Means and standard errors over seeds. Steps are timed in a run of the trainer, with the"
        " rows taking turns; minutes are steps times the time of a step.",
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
