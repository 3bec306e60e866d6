"""Lightning callbacks of a training run: the moving average, the last checkpoint, the progress bar."""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar, WeightAveraging

MOVES_EVERY = 0.5
"""Seconds between two moves of the progress bar."""


class EMA(WeightAveraging):
    """Lightning's weight averaging, with the decay min(decay, (1 + n)/(10 + n)) after n updates.

    Buffers are copied, not averaged: integer counts have no average.

    Args:
        decay: the final decay.
    """

    def __init__(self, decay: float):
        super().__init__(use_buffers=False)
        self.decay = decay

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average to where the model is: Lightning makes it before it moves the model, and
        leaves it on the CPU.
        """
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Update after each optimizer step, without waiting for the device."""
        if trainer.global_step <= self._latest_update_step:
            return
        assert self._average_model is not None
        average, count = self._average_model.module, self._latest_update_step  # one update a step
        self._latest_update_step = trainer.global_step
        weight = 1 - min(self.decay, (1 + count) / (10 + count)) if count else 1.0
        torch._foreach_lerp_(list(average.parameters()), list(pl_module.parameters()), weight)
        for mean, current in zip(average.buffers(), pl_module.buffers(), strict=True):
            mean.copy_(current)
        self._average_model.n_averaged += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps are what counts."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the trained weights in place: the final checkpoint holds both them and the average."""


class FinalCheckpoint(Callback):
    """Saves the checkpoint of the last step, whatever the interval between checkpoints.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save while the strategy still stands."""
        trainer.save_checkpoint(self.path)


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar over the steps of the run, which is one long epoch; it moves by the
    clock, since each look waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._moved = 0.0

    def _should_update(self, current: int, total: int | float) -> bool:
        if current != total and time.perf_counter() - self._moved < MOVES_EVERY:
            return False
        self._moved = time.perf_counter()
        return True

    def on_train_epoch_start(self, trainer, *args) -> None:  # type: ignore[no-untyped-def]
        """Name the bar after what it shows: the run has one epoch."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Leave out the version number of the log."""
        metrics = super().get_metrics(*args, **kwargs)
        metrics.pop("v_num", None)
        return metrics


def quiet_lightning() -> None:
    """Silence advice of Lightning's that does not apply: the data position is resumed by the step,
    not by the loader.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*Checkpoint directory .* exists.*",
    ):
        warnings.filterwarnings("ignore", message=message)
