r"""Number of training steps of each row of a comparison, and the time of a step.

.. math::
    \text{steps} = \text{seconds} / \text{seconds per step} \qquad (\text{budget } \texttt{seconds})

Steps are timed in a run of the trainer, including loading, logging, clipping and averaging, on the
same device and with as many threads as the later runs. The rows take turns over several rounds, so
that a temporarily slow machine affects them equally. The time of a step is the median over all
steps. It is saved, so that a resumed comparison uses the same numbers of steps.
"""

import itertools
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from ndm.compare.plan import Budget, Row, build
from ndm.device import describe_machine
from ndm.errors import UserError
from ndm.serialize import read_json, write_json
from ndm.train.callbacks import quiet_lightning
from ndm.train.fit import make_trainer
from ndm.train.module import TrainingModule
from ndm.train.run import Run

PLAN = "plan.json"
_ROUNDS, _STEPS, _WARM = 3, 8, 3
_PERIOD = 10  # steps after which SOAP computes a new basis


class _Clock(Callback):
    """Records the times at which steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def step_seconds(rows: list[Row], progress: bool = False) -> dict[str, float]:
    """Return the seconds per training step of each row, by name.

    Each is the median over several rounds, in which the rows take turns.
    """
    quiet_lightning()
    parts = {row.name: build(row) for row in rows}
    times: dict[str, list[float]] = {name: [] for name in parts}
    state = torch.random.get_rng_state()
    options: dict[str, Any] = {"disable": not progress, "delay": 1, "leave": False}
    for _ in tqdm(range(_ROUNDS), desc="timing steps", unit="round", **options):
        for name, one in parts.items():
            settings = one.settings
            uneven = settings.optimizer == "soap"
            # A tiny learning rate, so that a run that diverges fails in training and not here.
            short = replace(
                settings,
                steps=_WARM + _PERIOD + 1 if uneven else _STEPS,
                validate_every=None,
                checkpoint_every=10**9,
                learning_rate=1e-12,
            )
            with tempfile.TemporaryDirectory() as folder:
                trainer, clock = make_trainer(short, Run(Path(folder)), progress=False), _Clock()
                trainer.callbacks.append(clock)  # type: ignore[attr-defined]
                trainer.fit(TrainingModule(one.model, short, 0, one.data.split("train")))
            ends = clock.ends[settings.accumulate - 1 :: settings.accumulate]  # of optimizer steps
            spent = [after - before for before, after in itertools.pairwise(ends[_WARM:])]
            times[name] += [statistics.mean(spent)] if uneven else spent
    torch.random.set_rng_state(state)
    return {name: statistics.median(values) for name, values in times.items()}


def read_plan(
    out: Path,
    rows: list[Row],
    budget: Budget,
    seconds: float | None = None,
    train_steps: int | None = None,
) -> dict[str, Any]:
    """Return the number of steps and the seconds per step of every row.

    They are read from the folder if it has them for all rows, otherwise measured and written there.

    Raises:
        UserError: the folder contains a comparison with another budget.
    """
    shared = {"budget": budget, "seconds": seconds, "train_steps": train_steps}
    plan: dict[str, Any] = (
        read_json(out / PLAN) if (out / PLAN).exists() else {**shared, "rows": {}}
    )
    if {key: plan.get(key) for key in shared} != shared or not isinstance(plan.get("rows"), dict):
        raise UserError(f"{out} contains a comparison with another budget; choose another --out")
    planned = plan["rows"]
    if any(planned.get(row.name, {}).get("parameters") != row.parameters for row in rows):
        # Time all rows, so that the times are comparable. Rows that were planned before keep their
        # number of steps.
        measured = step_seconds(rows, progress=True)
        for row in rows:
            seconds_per_step = measured[row.name]
            steps = planned.get(row.name, {}).get("steps")
            planned[row.name] = {
                "parameters": row.parameters,
                "steps": steps or _steps(row, seconds_per_step, seconds, train_steps),
                "seconds_per_step": seconds_per_step,
            }
        plan["machine"] = describe_machine()
        write_json(out / PLAN, plan)
    return plan


def _steps(row: Row, measured: float, seconds: float | None, train_steps: int | None) -> int:
    if seconds is not None:
        return max(1, round(seconds / measured))
    return train_steps or int(row.config.get("train.steps"))
