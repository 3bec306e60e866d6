"""Lightning callbacks for training: moving average, last checkpoint, pictures, progress bar."""

import contextlib
import logging
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar, WeightAveraging
from torch import nn

from ndm.errors import UserError, one_line
from ndm.model import DiffusionModel

MOVES_EVERY = 0.5
"""Seconds between updates of the progress bar."""


class EMA(WeightAveraging):
    """Exponential moving average of the weights, with decay min(decay, (1 + n)/(10 + n)).

    n is the number of updates so far. Buffers are copied: integer counts have no average.

    Args:
        decay: the final decay.
    """

    def __init__(self, decay: float):
        super().__init__(use_buffers=False)
        self.decay = decay

    @property
    def averaged(self) -> nn.Module:
        """The training module with the averaged weights."""
        assert self._average_model is not None
        return self._average_model.module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average to the device of the model.

        Lightning creates the average before it moves the model, and leaves it on the CPU.
        """
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Update the average after each optimizer step, without waiting for the device."""
        if trainer.global_step <= self._latest_update_step:
            return
        assert self._average_model is not None
        average, count = self._average_model.module, self._latest_update_step  # one update per step
        self._latest_update_step = trainer.global_step
        weight = 1 - min(self.decay, (1 + count) / (10 + count)) if count else 1.0
        torch._foreach_lerp_(list(average.parameters()), list(pl_module.parameters()), weight)
        for mean, current in zip(average.buffers(), pl_module.buffers(), strict=True):
            mean.copy_(current)
        self._average_model.n_averaged += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: updates follow optimizer steps, not epochs."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the final checkpoint holds both the trained weights and the average."""


class FinalCheckpoint(Callback):
    """Callback that saves a checkpoint after the last step, whatever the checkpoint interval.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before Lightning tears down the strategy."""
        trainer.save_checkpoint(self.path)


class Interrupts(Callback):
    """Callback that ends training between two batches after Ctrl-C, and at once after a second one.

    An interruption at any other place may be lost, or leave messages of what was interrupted.
    """

    def __init__(self) -> None:
        self.pending = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer interruptions while the trainer runs; without effect outside the main thread."""
        earlier = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        if not main or earlier is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, earlier)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True

    def _end(self) -> None:
        if self.pending:
            raise KeyboardInterrupt

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """End training if it was interrupted."""
        self._end()

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """End validation and training if it was interrupted."""
        self._end()


class SamplePictures(Callback):
    """Callback that draws samples while training, with the averaged weights if there are any.

    It does not change the run: training and data order draw from seeds of their own.

    Args:
        every: optimizer steps between pictures.
        draw: called with the model, in evaluation mode, and the step.
    """

    def __init__(self, every: int, draw: Callable[[DiffusionModel, int], None]):
        self.every, self.draw, self._last = every, draw, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Draw after every ``every`` optimizer steps, in the first process."""
        step = trainer.global_step
        if step % self.every or step == self._last or not trainer.is_global_zero:
            return
        self._last = step
        averages = [one for one in trainer.callbacks if isinstance(one, EMA)]  # type: ignore[attr-defined]
        model = (averages[0].averaged if averages else pl_module).model
        assert isinstance(model, DiffusionModel)
        training = model.training
        model.eval()
        try:
            self.draw(model, step)
        except (UserError, torch.OutOfMemoryError) as error:
            if not Path(trainer.default_root_dir, "logs").is_dir():
                raise  # the folder of the run was removed
            reason = one_line(error, 200)
            print(f"ndm: warning: no samples at step {step}: {reason}", file=sys.stderr)
        finally:
            model.train(training)


class ProgressBar(TQDMProgressBar):
    """Progress bar over the steps of a run, which is one long epoch.

    It is updated at fixed times, because each update waits for the device.
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
        """Label the bar "training" instead of "Epoch 0": the run has only one epoch."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Return Lightning's metrics without the version number of the log."""
        metrics = super().get_metrics(*args, **kwargs)
        metrics.pop("v_num", None)
        return metrics


def quiet_lightning() -> None:
    """Silence Lightning's advice that does not apply here.

    For example, a run resumes its position in the data by the step, so its loader need not be
    resumable.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*Checkpoint directory .* exists.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
    ):
        warnings.filterwarnings("ignore", message=message)
