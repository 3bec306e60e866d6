"""The Lightning side of training: a thin module and its callbacks. The objective is :meth:`ndm.NDM.bound`."""

import logging
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar, WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ndm.data import EventDataset, keep_batch
from ndm.elbo import Bound, bits_per_dim
from ndm.errors import UserError, require
from ndm.model import NDM
from ndm.noise import part_seed
from ndm.ops import event_size
from ndm.train.batches import RunBatches
from ndm.train.compilation import compile_networks, uncompile_networks
from ndm.train.settings import TrainSettings

VALIDATION_SEED = 1


class TrainingModule(LightningModule):
    """Minimises the bound, in nats per dimension.

    Args:
        model: the model.
        settings: the settings of the run.
        seed: seed of data order, times and noise.
        data: training examples.
        validation: examples for validation, if any.
    """

    def __init__(self, model: NDM, settings: TrainSettings, seed: int, data: EventDataset, validation: EventDataset | None = None):
        super().__init__()
        self.model, self.settings, self.seed = model, settings, seed
        self._data, self._validation = data, validation
        self._earlier, self._started = 0.0, time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep for how many seconds the run has been trained, over all its calls."""
        checkpoint["seconds"] = self._earlier + time.perf_counter() - self._started

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from those seconds."""
        self._earlier = checkpoint.get("seconds", 0.0)

    def part_size(self) -> int:
        """Examples that one process takes at once.

        Raises:
            UserError: the batch cannot be split evenly.
        """
        parts = self.trainer.world_size * self.settings.accumulate
        if self.settings.batch_size % parts:
            raise UserError(
                f"train.batch_size={self.settings.batch_size} does not split over {self.trainer.world_size} processes times "
                f"{self.settings.accumulate} accumulated batches; give a multiple of {parts}"
            )
        return self.settings.batch_size // parts

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches from the step where the run stands."""
        batches = RunBatches(
            examples=len(self._data),
            size=self.part_size(),
            steps=self.settings.steps,
            seed=self.seed,
            first_step=self.trainer.global_step,
            accumulate=self.settings.accumulate,
            processes=self.trainer.world_size,
            rank=self.trainer.global_rank,
        )
        return self._loader(self._data, batches)

    def val_dataloader(self) -> Sequence[DataLoader[Tensor]]:
        """Batches of the validation examples, if any; every process looks at all of them."""
        if self._validation is None:
            return []
        count, size = len(self._validation), self.part_size()
        batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        return [self._loader(self._validation, batches)]

    def _loader(self, data: EventDataset, batches: RunBatches | list[list[int]]) -> DataLoader[Tensor]:
        workers = self.settings.workers
        return DataLoader(data, batch_sampler=batches, collate_fn=keep_batch, num_workers=workers, persistent_workers=workers > 0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The bound of one part of a batch, with random numbers that depend on the seed and the part alone."""
        accumulate = self.settings.accumulate
        index = self.trainer.global_step * accumulate + batch_idx % accumulate
        torch.manual_seed(part_seed(self.seed, index * self.trainer.world_size + self.trainer.global_rank))
        bound = self.model.bound(batch)
        loss = bound.loss.mean() / event_size(batch)
        self._check_finite("bound", bool(loss.isfinite()))
        self._log_terms("train", bound, batch)
        return loss

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the norm of the gradient, and stop before one that is not finite reaches the weights and so the checkpoint.

        16-mixed skips such steps itself.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        if self.settings.precision != "16-mixed":
            self._check_finite("gradient", bool(norm.isfinite()))

    def _check_finite(self, what: str, finite: bool) -> None:
        if not finite:
            raise UserError(
                f"the {what} is not finite at step {self.trainer.global_step}; train into another --out with a lower train.learning_rate or "
                "train.gradient_clip, or with train.precision=32-true"
            )

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The bound with several times an example, the same ones at every validation."""
        generator = torch.Generator(batch.device).manual_seed(part_seed(VALIDATION_SEED, batch_idx))
        self._log_terms("val", self.model.bound(batch, draws=4, generator=generator), batch)

    def _log_terms(self, stage: str, bound: Bound, batch: Tensor) -> None:
        dims = event_size(batch)
        values = {f"{stage}/{name}_bpd": bits_per_dim(term.detach().mean(), dims) for name, term in bound.terms().items()}
        self.log_dict(values, prog_bar=False, batch_size=batch.shape[0])
        self.log(f"{stage}_bpd", values[f"{stage}/nelbo_bpd"], prog_bar=True, logger=False, batch_size=batch.shape[0])

    def _can_fuse(self) -> bool:
        """Whether one fused operation may step all weights: not with gradients that are scaled (16-mixed) or sharded (fsdp)."""
        plain = self.settings.precision != "16-mixed" and "fsdp" not in self.settings.strategy
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return plain and all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters)

    def on_train_start(self) -> None:
        """Compile the networks, if asked to: here the model is where it will be trained, and its weights are restored."""
        self._started = time.perf_counter()
        if not self.settings.compile:
            return
        part = self._data.__getitems__([index % len(self._data) for index in range(self.part_size())]).to(self.model.like)

        def trial() -> Tensor:
            with self.trainer.precision_plugin.train_step_context():
                return self.model.bound(part, draws=1).loss.mean()

        compile_networks(self.model, None if "fsdp" in self.settings.strategy else trial, self.trainer.is_global_zero)

    def on_train_end(self) -> None:
        """Leave the networks uncompiled: evaluation has other batch sizes, and each would be compiled anew."""
        uncompile_networks(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser with a warm-up, and with a rate of its own for F."""
        settings = self.settings
        transform = {id(p) for p in self.model.transform.parameters()}
        exempt = {id(parameter) for module in self.model.modules() for parameter in _undecayed(module)}
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # Weight decay is for matrices and kernels: it would pull norms, biases and the schedule off their meaning.
                decays = parameter.dim() >= 2 and id(parameter) not in exempt
                groups.setdefault((id(parameter) in transform, decays), []).append(parameter)
        optimizer = self._optimizer(
            [
                {
                    "params": parameters,
                    "lr": settings.learning_rate * (settings.transform_rate if of_transform else 1.0),
                    "weight_decay": settings.weight_decay if decays else 0.0,
                }
                for (of_transform, decays), parameters in groups.items()
            ]
        )

        def rate(step: int) -> float:
            rise = min(1.0, (step + 1) / (settings.warmup + 1))
            fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps))) if settings.decay == "cosine" else 1.0
            return rise * fall

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=self._can_fuse() or None)
        require("pytorch_optimizer", "pytorch_optimizer", "train")
        from pytorch_optimizer import SOAP  # a second to import

        return SOAP(groups, lr=self.settings.learning_rate, betas=(0.95, 0.99), precondition_frequency=10)


def _undecayed(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module names in ``no_weight_decay``, an attribute or, as in timm's networks, a method."""
    names = getattr(module, "no_weight_decay", ())
    names = set(names() if callable(names) else names)
    return [parameter for name, parameter in module.named_parameters() if name in names] if names else []


class EMAUpdate:
    """Update of the moving average with the warm-up min(decay, (1 + n)/(10 + n)); a class, so that it can be pickled.

    Args:
        decay: the final decay.
    """

    def __init__(self, decay: float):
        self.decay = decay

    @torch.no_grad()
    def __call__(self, average: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        count = float(updates)
        torch._foreach_lerp_(average, current, 1 - min(self.decay, (1 + count) / (10 + count)))


class EMA(WeightAveraging):
    """Lightning's weight averaging with our update. Buffers are copied, not averaged: integer counts have no average.

    Args:
        decay: the final decay.
    """

    def __init__(self, decay: float):
        super().__init__(use_buffers=False, multi_avg_fn=EMAUpdate(decay))

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
    """Lightning's progress bar over the steps of the run, which is one long epoch."""

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
    """Silence advice of Lightning's that does not apply: the data position is resumed by the step, not by the loader."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*Checkpoint directory .* exists.*",
    ):
        warnings.filterwarnings("ignore", message=message)
