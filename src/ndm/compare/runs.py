"""Runs of a comparison: train, measure and resume, optionally in parallel processes."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ndm.device import pick_device
from ndm.errors import UserError, one_line
from ndm.evaluation.calibrate import Fit, GridKind, VarianceKind
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.measurement import Measurement
from ndm.serialize import read_json, write_json
from ndm.train.config import RunConfig
from ndm.train.run import Run
from ndm.train.training import train_run

MEASURES = "measures.json"


@dataclass(frozen=True)
class Measures:
    """Quantities to measure for every run."""

    horizons: tuple[int, ...]
    """Numbers of steps T of the discrete-time bounds. A model that is trained in continuous time is
    measured there, too.
    """
    draws: int
    """Number of times t drawn per example."""
    split: str
    limit: int | None
    fit: tuple[GridKind, VarianceKind] | None
    """The grid and the reverse variance to fit on ``train`` for a second set of discrete-time
    bounds; None to fit nothing.
    """
    nll: bool
    """Whether to measure the likelihood under the ODE, if the reverse process has one."""

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        fit = None if self.fit is None else list(self.fit)
        return {**vars(self), "horizons": list(self.horizons), "fit": fit}


@dataclass(frozen=True)
class Job:
    """One run of one row."""

    row: str
    config: RunConfig
    run: Run
    measures: Measures | None = None
    """None to train only."""
    quiet: bool = False
    """Print to the log file of the run instead of the terminal."""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config.seed

    def check(self, data_sha256: str) -> None:
        """Check that the folder is empty or contains a run of this configuration on these data.

        Raises:
            UserError: it contains another run.
        """
        self.run.check(self.config)
        found = self._read().get("data_sha256", data_sha256)
        if found != data_sha256:
            raise UserError(
                f"{self.run.folder} was measured on other data (sha256 {str(found)[:12]} there,"
                f" {data_sha256[:12]} now); choose another --out"
            )

    def result(self) -> dict[str, Any] | None:
        """Return the results, or None if they are missing or have other settings.

        For a job that only trains, they are the metrics of the training run.
        """
        if self.measures is None:
            return self.run.metrics() if self.run.finished else None
        found = self._read()
        same_settings = found.get("settings") == self.measures.record()
        return found if same_settings and isinstance(found.get("measures"), dict) else None

    def _read(self) -> dict[str, Any]:
        path = self.run.folder / MEASURES
        return read_json(path) if path.exists() else {}


def run_all(jobs: list[Job], at_once: int) -> dict[str, str]:
    """Run all jobs without results; return the reasons of failures by the name of the run."""
    missing = [job for job in jobs if job.result() is None]
    failures: dict[str, str] = {}
    with tqdm(
        total=len(jobs),
        initial=len(jobs) - len(missing),
        desc="runs",
        unit="run",
        disable=not missing,
    ) as bar:

        def note(job: Job, reason: str | None) -> None:
            if reason is not None:
                failures[f"{job.row!r}, seed {job.seed}"] = reason
                print(f"ndm: warning: {job.row}, seed {job.seed}: {reason}", file=sys.stderr)
            bar.update()

        if at_once > 1:
            _run_in_processes(missing, at_once, note, bar)
        else:
            for job in missing:
                bar.set_postfix_str(f"{job.row}, seed {job.seed}")
                note(job, _attempt(job))
    return failures


def threads_for(at_once: int) -> int:
    """Return the number of CPU threads for each of several parallel runs."""
    return max(1, (os.cpu_count() or 1) // at_once)


def _run_in_processes(jobs: list[Job], at_once: int, note: Any, bar: tqdm) -> None:
    """Run jobs in parallel.

    Jobs are submitted only to idle workers, so that an interruption leaves no job in a queue.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        at_once, context, initializer=torch.set_num_threads, initargs=(threads_for(at_once),)
    )
    waiting, running = list(jobs), dict[Future[str | None], Job]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[pool.submit(_attempt, job)] = job
            bar.set_postfix_str(
                "; ".join(f"{job.row}, seed {job.seed}" for job in running.values())
            )
            done = next(as_completed(running))
            note(running.pop(done), done.result())
    except BrokenProcessPool as error:
        raise UserError(
            "a run was killed, perhaps for lack of memory; rerun the command with fewer --jobs,"
            " finished runs are not repeated"
        ) from error
    finally:
        # Interrupted. Kill, because the trainer in a worker handles SIGTERM only after a delay.
        # Files are written atomically.
        if running:
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _attempt(job: Job) -> str | None:
    """Train and measure one run; return the reason if it fails, else None."""
    try:
        with _output(job):
            train_run(job.run, job.config)
            if job.measures is not None:
                _measure(job, job.measures)
    except UserError as error:
        return one_line(error)
    except torch.OutOfMemoryError as error:
        return (
            f"out of memory ({' '.join(str(error).split())[:80]}); lower train.batch_size or raise"
            " train.accumulate in the base"
        )
    return None


@contextlib.contextmanager
def _output(job: Job) -> Iterator[None]:
    if not job.quiet:
        yield
        return
    job.run.folder.mkdir(parents=True, exist_ok=True)
    log = job.run.folder / "log.txt"
    with (
        log.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def _measure(job: Job, wanted: Measures) -> None:
    """Measure a trained run and write the results into its folder."""
    model, data = job.run.model(), job.run.data()
    model.to(pick_device())
    description = data.describe()
    evaluation = Evaluation(
        model,
        data.split(wanted.split),
        limit=wanted.limit,
        progress=True,
        about=description.about(wanted.split),
    )
    train = data.split("train")
    found: dict[str, Measurement] = {}
    if model.steps is None or not wanted.horizons:
        found["continuous"] = evaluation.nelbo(None, wanted.draws)
    for steps in wanted.horizons:
        found[f"T = {steps}"] = evaluation.nelbo(steps, wanted.draws)
    if wanted.fit is not None:
        grid, variance = wanted.fit
        for steps in wanted.horizons:
            fit = Fit(train, grid=grid, variance=variance)
            found[f"T = {steps}, calibrated"] = evaluation.nelbo(steps, wanted.draws, fit)
    if wanted.nll and model.reverse_process.serves_every_eta:
        found["NLL"] = evaluation.nll()
    if description.num_values is None:
        unit, shift = "nats per example", description.log_scale
        values = {name: one.nats + shift for name, one in found.items()}
        errors = {name: one.stderr for name, one in found.items()}
    else:
        unit = "bits/dim"
        values = {name: one.bpd for name, one in found.items()}
        errors = {name: one.bpd_stderr for name, one in found.items()}
    protocol = next(iter(found.values())).protocol
    record = {
        "measures": values,
        "stderr_over_examples": errors,
        "settings": wanted.record(),
        "unit": unit,
        "examples": protocol.num_examples,
        "data": description.name,
        "data_sha256": description.sha256,
        "parameters": protocol.parameters,
        "training_seconds": job.run.metrics().get("training_seconds"),
    }
    write_json(job.run.folder / MEASURES, record)
