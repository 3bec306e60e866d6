"""Training with Lightning's trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ndm.errors import UserError
from ndm.model import DiffusionModel
from ndm.serialize import write_atomically
from ndm.train.callbacks import EMA, FinalCheckpoint, ProgressBar, SamplePictures, quiet_lightning
from ndm.train.config import RunParts
from ndm.train.module import TrainingModule
from ndm.train.results import draw_samples
from ndm.train.run import Run
from ndm.train.settings import TrainSettings


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoint writer that writes a temporary file in the same folder and renames it.

    Lightning's default copies from /tmp, which may be on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))


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
        ModelCheckpoint(
            checkpoint.parent,
            checkpoint.stem,
            every_n_train_steps=settings.checkpoint_every,
            enable_version_counter=False,
        ),
        FinalCheckpoint(checkpoint),
        LearningRateMonitor(),
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
        plugins=None if "fsdp" in settings.strategy else [AtomicCheckpoints()],
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
    settings, first_step = parts.settings, 0
    pictures: list[Callback] = []
    if settings.sample_every:

        def draw(model: DiffusionModel, step: int) -> None:
            draw_samples(parts, model, run.samples_path(step), seed)

        pictures.append(SamplePictures(settings.sample_every, draw))
    try:
        trainer = make_trainer(settings, run, extra=pictures)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot train with these settings on this machine: {reason}; see train.accelerator,"
            " train.devices, train.strategy"
        ) from error
    if run.checkpoint_path.exists():
        first_step = run.checkpoint()["global_step"]
        if trainer.is_global_zero:
            print(f"{run.folder}: resuming from step {first_step} of {settings.steps}", flush=True)
    if first_step < settings.steps:
        validation = (
            parts.data.split(settings.validation_split) if settings.validate_every else None
        )
        module = TrainingModule(parts.model, settings, seed, parts.data.split("train"), validation)
        try:
            trainer.fit(
                module, ckpt_path=run.checkpoint_path if first_step else None, weights_only=True
            )
        except SystemExit as error:  # Lightning turns Ctrl-C into an exit
            raise KeyboardInterrupt from error
    return trainer.is_global_zero
