"""Training with Lightning's trainer."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ndm.errors import UserError, one_line
from ndm.model import DiffusionModel
from ndm.serialize import write_atomically
from ndm.train.callbacks import (
    EMA,
    FinalCheckpoint,
    Interrupts,
    ProgressBar,
    SamplePictures,
    quiet_lightning,
)
from ndm.train.checkpoint import check_resumable, damaged
from ndm.train.config import RunParts
from ndm.train.module import TrainingModule
from ndm.train.results import draw_samples
from ndm.train.run import Run
from ndm.train.settings import TrainSettings


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoint writer that writes a temporary file in the same folder and renames it.

    Lightning's default copies from /tmp, which may be on another disk. A run whose folder was
    removed is not written anew without its configuration.

    Args:
        run: the run.
    """

    def __init__(self, run: Run):
        super().__init__()
        self._run = run

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if not self._run.logs_path.is_dir():  # created when training starts
            raise self._run.removed()
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))


class LastCheckpoint(ModelCheckpoint):
    """Callback that saves a checkpoint at fixed steps; it takes no paths from a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


def make_trainer(
    settings: TrainSettings, run: Run, progress: bool = True, extra: Sequence[Callback] = ()
) -> Trainer:
    """Return Lightning's trainer for a run.

    Args:
        settings: the settings.
        run: the run, for its paths.
        progress: show a progress bar.
        extra: more callbacks.
    """
    checkpoint = run.checkpoint_path
    callbacks: list[Callback] = [
        LastCheckpoint(
            checkpoint.parent,
            checkpoint.stem,
            every_n_train_steps=settings.checkpoint_every,
            enable_version_counter=False,
        ),
        FinalCheckpoint(checkpoint),
        LearningRateMonitor(),
        Interrupts(),
        *extra,
    ]
    if progress:
        callbacks.append(ProgressBar())
    if settings.ema:
        callbacks.insert(0, EMA(settings.ema))
    csv = CSVLogger(run.folder, name="logs")
    validate = settings.validate_every is not None
    return Trainer(
        max_steps=settings.steps,
        max_epochs=1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=settings.strategy,
        precision=settings.precision,
        gradient_clip_val=settings.gradient_clip or None,
        accumulate_grad_batches=settings.accumulate,
        callbacks=callbacks,
        logger=[csv, TensorBoardLogger(run.folder, name="logs", version=csv.version)],
        log_every_n_steps=min(settings.log_every, settings.steps),
        val_check_interval=(
            settings.validate_every * settings.accumulate if settings.validate_every else None
        ),
        limit_val_batches=None if validate else 0,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=progress,
        use_distributed_sampler=False,
        benchmark=True,  # all batches have the same size
        default_root_dir=run.folder,
        plugins=None if "fsdp" in settings.strategy else [AtomicCheckpoints(run)],
    )


def fit(parts: RunParts, run: Run, seed: int) -> bool:
    """Train to the last step, resuming from the last checkpoint if there is one.

    Returns:
        Whether this is the first process, which writes the results.

    Raises:
        UserError: the checkpoint is damaged, or training failed for a reason that the user can fix.
        KeyboardInterrupt: the run was interrupted.
    """
    quiet_lightning()
    settings, first_step, checkpoint = parts.settings, 0, None
    pictures: list[Callback] = []
    if settings.sample_every:

        def draw(model: DiffusionModel, step: int) -> None:
            if not run.logs_path.is_dir():
                raise run.removed()
            draw_samples(parts, model, run.samples_path(step), seed)

        pictures.append(SamplePictures(settings.sample_every, draw))
    try:
        trainer = make_trainer(settings, run, extra=pictures)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        reason = one_line(error)
        raise UserError(
            f"cannot train with these settings on this machine: {reason}; see train.accelerator,"
            " train.devices, train.strategy"
        ) from error
    if run.checkpoint_path.exists():
        checkpoint = run.checkpoint()
        first_step = checkpoint["global_step"]
    validation = parts.data.split(settings.validation_split) if settings.validate_every else None
    module = TrainingModule(parts.model, settings, seed, parts.data.split("train"), validation)
    if checkpoint is not None:
        check_resumable(run.checkpoint_path, checkpoint, module, trainer)
        if trainer.is_global_zero:
            print(f"{run.folder}: resuming from step {first_step} of {settings.steps}", flush=True)
    if first_step < settings.steps:
        _train(trainer, module, run, resume=checkpoint is not None)
    return trainer.is_global_zero


def _train(trainer: Trainer, module: TrainingModule, run: Run, resume: bool) -> None:
    """Run the trainer, and explain what the user can fix.

    Raises:
        UserError: the checkpoint cannot be restored, the folder was removed, or another process
            ended.
        KeyboardInterrupt: the run was interrupted.
    """
    interrupts = next(one for one in trainer.callbacks if isinstance(one, Interrupts))  # type: ignore[attr-defined]
    try:
        with interrupts.deferred(), _quiet_threads():
            trainer.fit(
                module, ckpt_path=run.checkpoint_path if resume else None, weights_only=True
            )
        if interrupts.pending:  # after the last batch
            raise KeyboardInterrupt
    except SystemExit as error:  # Lightning turns Ctrl-C into an exit
        raise KeyboardInterrupt from error
    except UserError:
        raise
    except OSError as error:
        if run.logs_path.is_dir():
            raise
        raise run.removed() from error
    except RuntimeError as error:
        if trainer.world_size == 1 or not _is_lost(error):
            raise
        if interrupts.pending:
            raise KeyboardInterrupt from error
        raise UserError(
            "another process of this training ended or does not answer; see its error message, and"
            " rerun the command to resume"
        ) from error
    except (TypeError, ValueError, LookupError, AttributeError, MisconfigurationException) as error:
        if not resume or module.started:
            raise
        reason = f"{type(error).__name__} while restoring it: {error}"
        raise damaged(run.checkpoint_path, reason) from error


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Print no traceback of a thread that cannot write: its logger raises the error again."""
    earlier = threading.excepthook

    def show(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            earlier(arguments)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = earlier


def _is_lost(error: RuntimeError) -> bool:
    """Whether the error says that a process of distributed training cannot be reached."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return "gloo" in text or any(
        f"Connection {end}" in text for end in ("reset", "closed", "refused")
    )
