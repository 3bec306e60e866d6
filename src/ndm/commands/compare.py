"""``ndm compare``: several configurations under one budget, several seeds, resumable."""

import contextlib
import math
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionYesNo, ArgumentParser
from tqdm import tqdm

import ndm
from ndm.commands.parsing import load_data, load_run, parse
from ndm.commands.train import run_train
from ndm.compare.plan import Budget, Row, configuration, make, plan_rows, read_rows, step_seconds
from ndm.compare.report import markdown, plot, summarise
from ndm.errors import UserError, check_whole
from ndm.evaluate import Evaluation, pick_device
from ndm.report import Measurement
from ndm.serialize import read_json, write_atomically, write_json

_CALIBRATION = 128  # examples that a reverse variance is fitted on
PLAN, RESULT, MEASURES = "plan.json", "compare.json", "measures.json"
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
    """What the rows share: optimiser steps, seconds of training, or steps and parameters."""
    train_steps: int | None = None
    """Optimiser steps of each run; by default those of the base. Not with budget=seconds."""
    seconds: float | None = None
    """Seconds of training of each run, for budget=seconds: as many steps as fit in, by a step time measured for all rows in turn."""
    steps: str = "10,50,1000"
    """Numbers of steps T of bounds in discrete time, beside the continuous one; empty for none."""
    draws: int = 8
    """Times drawn for each test example in every bound."""
    split: str = "test"
    """The split to measure on."""
    limit: int | None = None
    """Measure only so many examples of the split, evenly spread over it."""
    rows: str | None = None
    """Only these rows of the file, separated by semicolons."""
    jobs: int = 1
    """Runs at once, each in a process of its own with an equal share of the cores."""
    calibrate: bool = False
    """See FLAGS."""
    nll: bool = False
    """See FLAGS."""
    horizons: list[int] = field(init=False, default_factory=list)
    """The numbers T as integers."""

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
            raise UserError("train_steps does not go with budget=seconds, which chooses the steps itself; give one of them")
        words = [word.strip() for word in self.steps.split(",")] if self.steps.strip() else []
        if not all(word.isascii() and word.isdigit() and 0 < int(word) <= 10**6 for word in words):
            raise UserError(f"steps={self.steps!r}: give whole numbers from 1 to 1000000, separated by commas, such as 10,50,1000")
        self.horizons = sorted({int(word) for word in words})

    def measured(self) -> dict[str, Any]:
        """What the numbers of a run depend on, beside the run."""
        return {name: getattr(self, name) for name in ("horizons", "draws", "split", "limit", "calibrate", "nll")}


@dataclass(frozen=True)
class Job:
    """One run of one row."""

    row: str
    seed: int
    words: tuple[str, ...]
    folder: Path
    settings: CompareSettings
    quiet: bool
    """Write to the run's log file instead of the terminal."""


def run_compare(words: Sequence[str]) -> None:
    """``ndm compare``: parse and compare."""
    parser = ArgumentParser(
        prog="ndm compare",
        description="Train and measure several configurations under one budget, a plain diffusion as large as the largest always among them. "
        "Goes on where it stopped when the same command is given again.",
        epilog="Example: ndm compare --config configs/compare-digits.yaml --out runs/compare --seeds 3 --jobs 2. "
        "Words after -- go to every run as to ndm train: -- --train.learning_rate 1e-3",
        exit_on_error=False,
    )
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, help=text)
    parser.add_class_arguments(CompareSettings, as_positional=False, skip={*FLAGS, "horizons"})
    own, overrides = (list(words), []) if "--" not in words else (list(words[: words.index("--")]), list(words[words.index("--") + 1 :]))
    compare(CompareSettings(**vars(parse(parser, own))), tuple(overrides))


def compare(settings: CompareSettings, overrides: tuple[str, ...] = ()) -> None:
    """Run what is missing, then write the table and the plot.

    Raises:
        UserError: the file is wrong, the folder holds another comparison, or a run failed.
    """
    out = Path(settings.out)
    rows, extra = read_rows(Path(settings.config), overrides)
    rows = _chosen(plan_rows(rows, extra, settings.budget), settings.rows)
    plan = _plan(out, rows, settings)
    jobs = [
        Job(
            row.name,
            seed,
            (*row.words, "--train.steps", str(plan["rows"][row.name]["steps"])),
            out / row.folder / f"seed-{seed}",
            settings,
            settings.jobs > 1,
        )
        for seed in range(settings.seeds)
        for row in rows
    ]
    failures = _run_all(jobs, settings.jobs)
    _report(out, rows, plan, jobs, settings)
    if failures:
        name, reason = next(iter(failures.items()))
        raise UserError(f"{len(failures)} of {len(jobs)} runs failed, the first of them {name}: {reason}; the others are in {out}/{RESULT}")


def _chosen(rows: list[Row], names: str | None) -> list[Row]:
    if names is None:
        return rows
    wanted = [name.strip() for name in names.split(";")]
    missing = [name for name in wanted if name not in {row.name for row in rows}]
    if missing:
        raise UserError(f"rows: there is no row {missing[0]!r}; choose from {'; '.join(row.name for row in rows)}")
    return [row for row in rows if row.name in wanted]


def _plan(out: Path, rows: list[Row], settings: CompareSettings) -> dict[str, Any]:
    """Steps and step times of every row: from the folder where they are known, else measured and written there."""
    shared = {"budget": settings.budget, "seconds": settings.seconds, "train_steps": settings.train_steps}
    known: dict[str, Any] = {}
    if (out / PLAN).exists():
        stored = read_json(out / PLAN)
        if {key: stored.get(key) for key in shared} != shared:
            raise UserError(f"{out} holds a comparison with another budget; choose another --out")
        known = stored["rows"]  # type: ignore[assignment]
    for row in rows:
        if row.name in known and known[row.name]["words"] != list(row.words):
            raise UserError(f"{out} holds a comparison whose row {row.name!r} is another; choose another --out")
    new = [row for row in rows if row.name not in known]
    if new:
        # All rows together, also those that are known, so that times can be compared; a row keeps the steps that it has.
        seconds = step_seconds(rows, progress=True)
        for row in rows:
            steps = known[row.name]["steps"] if row.name in known else _steps(row, seconds[row.name], settings)
            known[row.name] = {
                "words": list(row.words),
                "parameters": row.parameters,
                "steps": steps,
                "seconds_per_step": seconds[row.name],
            }
        write_json(out / PLAN, {**shared, "machine": _machine(), "rows": known})
    return {**shared, "rows": known}


def _steps(row: Row, seconds: float, settings: CompareSettings) -> int:
    if settings.seconds is not None:
        return max(1, round(settings.seconds / seconds))
    return settings.train_steps or int(configuration(row).train.steps)


def _machine() -> dict[str, Any]:
    device = torch.accelerator.current_accelerator(check_available=True)
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": str(device) if device else None,
        "torch": torch.__version__,
        "ndm": ndm.__version__,
    }


def _run_all(jobs: list[Job], at_once: int) -> dict[str, str]:
    """Run what is missing; reasons of failures by the name of the run."""
    missing = [job for job in jobs if not _is_measured(job)]
    failures: dict[str, str] = {}
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="runs", unit="run", disable=not missing) as bar:
        if at_once == 1:
            for job in missing:
                bar.set_postfix_str(f"{job.row}, seed {job.seed}")
                _note(failures, job, _attempt(job))
                bar.update()
            return failures
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // at_once)
        with ProcessPoolExecutor(at_once, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            futures: dict[Future[str | None], Job] = {pool.submit(_attempt, job): job for job in missing}
            try:
                for future in as_completed(futures):
                    _note(failures, futures[future], future.result())
                    bar.set_postfix_str(f"{futures[future].row}, seed {futures[future].seed}")
                    bar.update()
            except BrokenProcessPool as error:
                raise UserError("a run was killed, perhaps for memory; try again with fewer --jobs, what is finished stays") from error
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failures


def _is_measured(job: Job) -> bool:
    """Whether the run has all its numbers, by the same settings as those of this call."""
    path = job.folder / MEASURES
    return path.exists() and read_json(path).get("settings") == job.settings.measured()


def _note(failures: dict[str, str], job: Job, reason: str | None) -> None:
    if reason is not None:
        failures[f"{job.row!r}, seed {job.seed}"] = reason
        print(f"ndm: warning: {job.row}, seed {job.seed}: {reason}", file=sys.stderr)


def _attempt(job: Job) -> str | None:
    """Train and measure one run; what went wrong, or None."""
    try:
        with _output(job):
            run_train([*job.words, "--seed", str(job.seed), "--out", str(job.folder)])
            _measure(job)
    except UserError as error:
        return " ".join(str(error).split())
    return None


@contextlib.contextmanager
def _output(job: Job) -> Iterator[None]:
    if not job.quiet:
        yield
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    with (
        (job.folder / "log.txt").open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def _measure(job: Job) -> None:
    """All bounds of a trained run, written into its folder."""
    settings = job.settings
    model, data = load_run(job.folder), load_data(job.folder)
    model.to(pick_device())
    description = data.describe()
    evaluation = Evaluation(model, data.split(settings.split), limit=settings.limit, progress=True)
    train = data.split("train")
    found = {"continuous": evaluation.nelbo(None, settings.draws)}
    for steps in settings.horizons:
        found[f"T = {steps}"] = evaluation.nelbo(steps, settings.draws)
    if settings.calibrate:
        for steps in settings.horizons:
            found[f"T = {steps}, fitted variance"] = evaluation.nelbo(steps, settings.draws, train, _CALIBRATION)
    if settings.nll and model.reverse_process.serves_every_eta:
        found["NLL"] = evaluation.nll()
    shift = description.log_scale if description.levels is None else 0.0

    def value(one: Measurement) -> float:
        return one.nats + shift if description.levels is None else one.bpd

    def error(one: Measurement) -> float:
        return one.stderr if description.levels is None else one.bpd_stderr

    write_json(
        job.folder / MEASURES,
        {
            "measures": {name: value(one) for name, one in found.items()},
            "stderr_over_examples": {name: error(one) for name, one in found.items()},
            "settings": settings.measured(),
            "unit": "nats an example" if description.levels is None else "bits/dim",
            "examples": len(evaluation.numbers),
            "data": description.name,
            "data_sha256": description.sha256,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
    )


def _report(out: Path, rows: list[Row], plan: dict[str, Any], jobs: list[Job], settings: CompareSettings) -> None:
    """Print the table; write it, the numbers and the plot."""
    content, unit, about = [], "", {}
    for row in rows:
        records = [read_json(job.folder / MEASURES) for job in jobs if job.row == row.name and _is_measured(job)]
        known = plan["rows"][row.name]
        content.append({"name": row.name, **{key: known[key] for key in ("parameters", "steps", "seconds_per_step")}})
        content[-1]["runs"] = [record["measures"] for record in records]
        if records:
            unit, about = str(records[0]["unit"]), records[0]
    reference = next((row.name for row in rows if row.name.endswith(", widened")), None)
    summary = summarise(content, reference)
    _, _, training = make(rows[0])
    protocol = [
        f"{about.get('examples')} examples of {about.get('data')}/{settings.split} (sha256 {str(about.get('data_sha256'))[:12]}),",
        f"{settings.draws} times an example, batches of {training.batch_size};",
        f"means and standard errors over {settings.seeds} seeds; budget: {settings.budget}.",
        "Step times: medians of one process in which all rows took turns.",
    ]
    text = markdown(summary, unit, reference, protocol)
    print(text)
    write_json(
        out / RESULT, {"unit": unit, "reference": reference, "protocol": protocol, **plan, "machine": _machine(), "summary": summary}
    )
    write_atomically(out / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
    for suffix in (".png", ".pdf"):
        plot(out / f"compare{suffix}", summary, unit)
    print(f"wrote {out}/table.md, {RESULT}, compare.png, compare.pdf")
