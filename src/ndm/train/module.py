"""The Lightning side of training: a thin module and its callbacks. The objective is
:meth:`ndm.NDM.bound`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ndm.data import EventDataset, keep_batch
from ndm.elbo import bits_per_dim
from ndm.errors import UserError, require
from ndm.model import DiffusionModel
from ndm.random import part_seed
from ndm.shapes import event_size
from ndm.train.batches import RunBatches
from ndm.train.compilation import TermsFunction, compiled, training_terms, try_compiling
from ndm.train.settings import TrainSettings

VALIDATION_SEED = 1
TERMS = ("prior", "diffusion", "reconstruction", "nelbo")


class TrainingModule(LightningModule):
    """Minimizes the bound, in nats per dimension.

    Args:
        model: the model.
        settings: the settings of the run.
        seed: seed of data order, times and noise.
        data: training examples.
        validation: examples for validation, if any.
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
        self._data, self._validation = data, validation
        self._earlier, self._started = 0.0, time.perf_counter()
        self._terms = training_terms(model)
        self._watch = Watch()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep for how many seconds the run has been trained, over all its calls. What is not
        finite is never saved.
        """
        self._watch.read()
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
                f"train.batch_size={self.settings.batch_size} does not split over"
                f" {self.trainer.world_size} processes times {self.settings.accumulate} accumulated"
                f" batches; give a multiple of {parts}"
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

    def _loader(
        self, data: EventDataset, batches: RunBatches | list[list[int]]
    ) -> DataLoader[Tensor]:
        workers, pinned = self.settings.workers, self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=keep_batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pinned,
        )

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        """Check the batch where it is read, so that the device need not be waited for."""
        self.model.decoder.check(batch)
        return batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The bound of one part of a batch, with random numbers that depend on the seed and the
        part alone.
        """
        accumulate, step = self.settings.accumulate, self.trainer.global_step
        index = step * accumulate + batch_idx % accumulate
        torch.manual_seed(
            part_seed(self.seed, index * self.trainer.world_size + self.trainer.global_rank)
        )
        draw = self.model.draw(batch)
        terms = self._terms(batch, draw)
        self.model.learn_times(draw, terms.diffusion)
        self._watch.look("bound", terms.loss, step)
        if (step + 1) % min(self.settings.log_every, self.settings.steps) == 0:
            self._watch.read()
            self._log_terms("train", dict(zip(TERMS, terms.means.clone(), strict=True)), batch)
        return terms.loss / event_size(batch)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradient; a run whose gradient is not finite ends before its next
        checkpoint.

        16-mixed skips such steps itself.
        """
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        if self.settings.precision != "16-mixed":
            self._watch.look("gradient", norm, self.trainer.global_step)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The bound with several times an example, the same ones at every validation."""
        generator = torch.Generator(batch.device).manual_seed(part_seed(VALIDATION_SEED, batch_idx))
        terms = self.model.bound(batch, draws=4, generator=generator).terms()
        self._log_terms("val", {name: term.detach().mean() for name, term in terms.items()}, batch)

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
        """Whether one fused operation may step all weights: not with gradients that are scaled
        (16-mixed) or sharded (fsdp).
        """
        plain = self.settings.precision != "16-mixed" and "fsdp" not in self.settings.strategy
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return plain and all(
            parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
            for parameter in parameters
        )

    def on_train_start(self) -> None:
        """Compile the bound, if asked to: here the model is where it will be trained, and its
        weights are restored.
        """
        self._started = time.perf_counter()
        if not self.settings.compile:
            return
        if "fsdp" in self.settings.strategy:
            self._terms = compiled(self._terms)
            return
        part = self._data.__getitems__(
            [index % len(self._data) for index in range(self.part_size())]
        ).to(self.model.like)

        def trial(terms: TermsFunction) -> Tensor:
            with self.trainer.precision_plugin.train_step_context():
                return terms(part, self.model.draw(part)).loss

        graphs = self.model.like.device.type == "cuda" and self.settings.accumulate == 1
        self._terms = try_compiling(
            self.model, self._terms, trial, graphs, self.trainer.is_global_zero
        )

    def on_train_end(self) -> None:
        """Let go of what was compiled: evaluation has other batch sizes."""
        self._watch.read()
        self._terms = training_terms(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer with a warm-up, and with a rate of its own for F."""
        settings = self.settings
        transform = {id(p) for p in self.model.transform.parameters()}
        exempt = {
            id(parameter) for module in self.model.modules() for parameter in _undecayed(module)
        }
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # Weight decay is for matrices and kernels: it would pull norms, biases and the
                # schedule off their meaning.
                decays = parameter.dim() >= 2 and id(parameter) not in exempt
                groups.setdefault((id(parameter) in transform, decays), []).append(parameter)
        optimizer = self._optimizer(
            [
                {
                    "params": parameters,
                    "lr": (
                        settings.learning_rate * (settings.transform_rate if of_transform else 1.0)
                    ),
                    "weight_decay": settings.weight_decay if decays else 0.0,
                }
                for (of_transform, decays), parameters in groups.items()
            ]
        )

        def rate(step: int) -> float:
            rise = min(1.0, (step + 1) / (settings.warmup + 1))
            fall = (
                0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps)))
                if settings.decay == "cosine"
                else 1.0
            )
            return rise * fall

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=self._can_fuse() or None)
        require("pytorch_optimizer", "pytorch_optimizer", "train")
        from pytorch_optimizer import SOAP, Muon  # a second to import

        if self.settings.optimizer == "soap":
            return SOAP(
                groups,
                lr=self.settings.learning_rate,
                betas=(0.95, 0.99),
                precondition_frequency=10,
            )
        # Steps of matrices are scaled to the size of AdamW's, so that one learning rate serves
        # both.
        kinds = [
            {**group, "use_muon": all(parameter.dim() >= 2 for parameter in group["params"])}
            for group in groups
        ]
        return Muon(kinds, use_adjusted_lr=True, adamw_betas=(0.9, 0.99), adamw_eps=1e-8)


def _undecayed(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module names in ``no_weight_decay``, an attribute or, as in timm's
    networks, a method.
    """
    names = getattr(module, "no_weight_decay", ())
    names = set(names() if callable(names) else names)
    return (
        [parameter for name, parameter in module.named_parameters() if name in names]
        if names
        else []
    )


class Watch:
    """Remembers on the device in which step something was not finite first, and is read now and
    then: each look alone would wait.
    """

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self, what: str, value: Tensor, step: int) -> None:
        """Look at a value of a step."""
        first = self._first.get(what)
        if first is None:
            first = torch.full((), -1, dtype=torch.int64, device=value.device)
        self._first[what] = torch.where(value.isfinite().all() | (first >= 0), first, step)

    def read(self) -> None:
        """Wait for the device, and say what it has found.

        Raises:
            UserError: something was not finite.
        """
        found = [(int(first), what) for what, first in self._first.items()]
        step, what = min(
            (pair for pair in found if pair[0] >= 0), key=lambda pair: pair[0], default=(-1, "")
        )
        if what:
            raise UserError(
                f"the {what} is not finite at step {step}; train into another --out with a lower"
                " train.learning_rate or train.gradient_clip, or with train.precision=32-true"
            )
