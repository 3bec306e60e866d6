"""The Lightning module for training; the objective is :meth:`ndm.NDM.bound`."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from ndm.condition import MaskCondition
from ndm.data import EventDataset, identity_collate
from ndm.elbo import bits_per_dim
from ndm.errors import UserError, require
from ndm.model import DiffusionModel
from ndm.random import part_seed
from ndm.shapes import event_size
from ndm.train.batches import RunBatches, WithConditions, WithFlips
from ndm.train.compilation import TrainingTerms, compiled, try_compiling
from ndm.train.settings import TrainSettings

VALIDATION_SEED = 1
TERMS = ("prior", "diffusion", "reconstruction", "nelbo")


Batch = Tensor | Sequence[Tensor]
"""Examples, or examples and their conditions as networks see them."""


def _parts(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the examples of a batch, and their conditions, if any."""
    return (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])


class TrainingModule(LightningModule):
    """Lightning module that minimizes the bound, in nats per dimension.

    Args:
        model: the model.
        settings: the settings of the run.
        seed: seed of the data order, times and noise.
        data: the training examples.
        validation: the validation examples, if any.
    """

    def __init__(
        self,
        model: DiffusionModel,
        settings: TrainSettings,
        seed: int,
        data: EventDataset,
        validation: EventDataset | None = None,
    ):
        super().__init__()
        self.model, self.settings, self.seed = model, settings, seed
        self._data = WithFlips(data) if settings.horizontal_flips else data
        self._validation = validation
        self._earlier, self._started = 0.0, time.perf_counter()
        self._terms = TrainingTerms(model)
        self._watch = Watch()
        self.started = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the training time so far, in seconds, over all resumptions of the run.

        A run with a non-finite value is stopped before it saves.
        """
        self._watch.read()
        checkpoint["seconds"] = self._earlier + time.perf_counter() - self._started

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the training time so far."""
        self._earlier = checkpoint.get("seconds", 0.0)

    def part_size(self) -> int:
        """Return the number of examples in a part: one accumulated batch of one process.

        Raises:
            UserError: the batch cannot be split evenly.
        """
        parts = self.trainer.world_size * self.settings.accumulate
        if self.settings.batch_size % parts:
            raise UserError(
                f"train.batch_size={self.settings.batch_size} does not split over"
                f" {self.trainer.world_size} processes times {self.settings.accumulate} accumulated"
                f" batches; give a multiple of {parts}"
            )
        return self.settings.batch_size // parts

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the training batches from the current step on."""
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
        """Return the validation batches, if any; every process evaluates all of them."""
        if self._validation is None:
            return []
        count, size = len(self._validation), self.part_size()
        batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        return [self._loader(self._validation, batches)]

    def _loader(
        self, data: EventDataset, batches: RunBatches | list[list[int]]
    ) -> DataLoader[Tensor]:
        condition = self.model.condition
        examples: Dataset[Any] = data
        if condition is not None and not condition.masks:
            examples = WithConditions(data, condition)
        workers, pinned = self.settings.workers, self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=identity_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pinned,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Check the values of a batch on the CPU, which avoids waiting for the device."""
        self.model.decoder.check(_parts(batch)[0])
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one part of a batch, with random numbers seeded by seed and part."""
        accumulate, step = self.settings.accumulate, self.trainer.global_step
        index = step * accumulate + batch_idx % accumulate
        part = index * self.trainer.world_size + self.trainer.global_rank
        torch.manual_seed(part_seed(self.seed, part))
        x, c = _parts(batch)
        draw = self.model.draw(x)
        if isinstance(self.model.condition, MaskCondition):
            c = self.model.condition.random(x)
        if self.model.condition is not None and c is not None:
            terms = self._terms(x, draw, self.model.condition.dropped(c))
        else:
            terms = self._terms(x, draw)
        self.model.learn_times(draw, terms.diffusion)
        self._watch.look("bound", terms.loss, step)
        if (step + 1) % min(self.settings.log_every, self.settings.steps) == 0:
            self._watch.read()
            self._log_terms("train", dict(zip(TERMS, terms.means.clone(), strict=True)), x)
        return terms.loss / event_size(x)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradient.

        A non-finite gradient stops the run before its next checkpoint. With 16-mixed the gradient
        scaler skips such steps instead.
        """
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        if self.settings.precision != "16-mixed":
            self._watch.look("gradient", norm, self.trainer.global_step)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the bound at four times per example, the same times at every validation."""
        x, c = _parts(batch)
        generator = torch.Generator(x.device).manual_seed(part_seed(VALIDATION_SEED, batch_idx))
        model = self.model if c is None else self.model.bind(c)
        terms = model.bound(x, draws=4, generator=generator).terms()
        self._log_terms("val", {name: term.detach().mean() for name, term in terms.items()}, x)

    def _log_terms(self, stage: str, means: Mapping[str, Tensor], batch: Tensor) -> None:
        dims = event_size(batch)
        values = {f"{stage}/{name}_bpd": bits_per_dim(mean, dims) for name, mean in means.items()}
        self.log_dict(values, prog_bar=False, batch_size=batch.shape[0])
        self.log(
            f"{stage}_bpd",
            values[f"{stage}/nelbo_bpd"],
            prog_bar=True,
            logger=False,
            batch_size=batch.shape[0],
        )

    def _can_fuse(self) -> bool:
        """Return whether the optimizer may be fused.

        It may not if gradients are scaled (16-mixed) or sharded (fsdp).
        """
        plain = self.settings.precision != "16-mixed" and "fsdp" not in self.settings.strategy
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return plain and all(
            parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
            for parameter in parameters
        )

    def on_train_start(self) -> None:
        """Compile the bound, if set: the model is on its device now, with restored weights."""
        self._started, self.started = time.perf_counter(), True
        if not self.settings.compile:
            return
        if "fsdp" in self.settings.strategy:
            self._terms = compiled(self._terms)
            return
        indices = [index % len(self._data) for index in range(self.part_size())]
        part = self._data.__getitems__(indices).to(self.model.like)
        known: list[Tensor] = []
        if self.model.condition is not None:
            condition = self.model.condition
            if isinstance(condition, MaskCondition):
                known = [condition.random(part)]
            else:
                known = [condition.encode(self._data.conditions(indices)).to(part.device)]

        def trial(terms: TrainingTerms) -> Tensor:
            with self.trainer.precision_plugin.train_step_context():
                return terms(part, self.model.draw(part), *known).loss

        cuda_graphs = self.model.like.device.type == "cuda" and self.settings.accumulate == 1
        self._terms = try_compiling(
            self.model, self._terms, trial, cuda_graphs, self.trainer.is_global_zero
        )

    def on_train_end(self) -> None:
        """Discard the compiled bound: evaluation uses other batch sizes."""
        self._watch.read()
        self._terms = TrainingTerms(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and the learning rate schedule."""
        settings = self.settings
        optimizer = self._optimizer(self._parameter_groups())

        def rate(step: int) -> float:
            warmup = min(1.0, (step + 1) / (settings.warmup + 1))
            if settings.decay == "constant":
                return warmup
            return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trained parameters, grouped by learning rate and weight decay."""
        settings = self.settings
        transform = {id(p) for p in self.model.transform.parameters()}
        exempt = {id(p) for module in self.model.modules() for p in _undecayed(module)}
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # Only matrices and kernels: decay would distort norms, biases and the schedule.
                decays = parameter.dim() >= 2 and id(parameter) not in exempt
                groups.setdefault((id(parameter) in transform, decays), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": settings.learning_rate * (settings.transform_rate if in_transform else 1.0),
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (in_transform, decays), parameters in groups.items()
        ]

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=self._can_fuse() or None)
        require("pytorch_optimizer", "pytorch_optimizer", "train")
        from pytorch_optimizer import SOAP, Muon  # takes a second to import

        if self.settings.optimizer == "soap":
            return SOAP(
                groups,
                lr=self.settings.learning_rate,
                betas=(0.95, 0.99),
                precondition_frequency=10,
            )
        # Muon's steps are scaled to the size of AdamW's, so that one learning rate suits both.
        groups = [
            {**group, "use_muon": all(p.dim() >= 2 for p in group["params"])} for group in groups
        ]
        return Muon(groups, use_adjusted_lr=True, adamw_betas=(0.9, 0.99), adamw_eps=1e-8)


def _undecayed(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a module exempts from weight decay.

    It names them in ``no_weight_decay``: an attribute or, as in timm's networks, a method.
    """
    names = getattr(module, "no_weight_decay", ())
    names = set(names() if callable(names) else names)
    if not names:
        return []
    return [parameter for name, parameter in module.named_parameters() if name in names]


class Watch:
    """A record, on the device, of the first step at which each quantity was not finite.

    Recording does not wait for the device; only reading does.
    """

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self, what: str, value: Tensor, step: int) -> None:
        """Record whether the value of a step is finite."""
        first = self._first.get(what)
        if first is None:
            first = torch.full((), -1, dtype=torch.int64, device=value.device)
        self._first[what] = torch.where(value.isfinite().all() | (first >= 0), first, step)

    def read(self) -> None:
        """Wait for the device and check that all recorded values were finite.

        Raises:
            UserError: a value was not finite.
        """
        steps = {what: int(first) for what, first in self._first.items()}
        steps = {what: step for what, step in steps.items() if step >= 0}
        if steps:
            what = min(steps, key=steps.__getitem__)
            raise UserError(
                f"the {what} is not finite at step {steps[what]}; train into another --out with a"
                " lower train.learning_rate or train.gradient_clip, or with"
                " train.precision=32-true"
            )
