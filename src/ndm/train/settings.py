"""Settings of a training run: optimizer, learning rate, precision, devices, checkpoints."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ndm.device import Precision
from ndm.errors import UserError, check_choice, describe_value

Optimizer = Literal["adamw", "soap", "muon"]
Decay = Literal["cosine", "constant"]
MACHINE_SETTINGS = (
    "accelerator",
    "devices",
    "nodes",
    "strategy",
    "threads",
    "workers",
    "compile",
    "checkpoint_every",
    "log_every",
    "sample_every",
)
"""Settings of how a run is executed, not of what it computes: they may change on resuming."""
FINAL_SETTINGS = (
    "evaluation_draws",
    "evaluation_limit",
    "evaluation_split",
    "sample_images",
    "sample_steps",
)
"""Settings of the final evaluation and pictures: they may change until the run is finished."""
MOST, MOST_WORKERS = 2**31 - 1, 2**16
"""Greatest integers: of steps, examples and times, and of processes and threads."""


@dataclass
class TrainSettings:
    """Settings of a training run."""

    steps: int = 10_000
    """Number of optimizer steps."""
    batch_size: int = 64
    """Examples per optimizer step, over all devices and accumulated batches."""
    start_from: str | None = None
    """Folder of a run or model whose weights are the initial weights; null for random ones. The two
    models may differ only in dropout, steps T, eta and time sampler.
    """
    optimizer: Optimizer = "adamw"
    """adamw; soap: Adam in the eigenbasis of Shampoo's preconditioner, which learns more per step
    but takes longer; or muon: orthogonalized momentum for matrices, AdamW for all other parameters.
    """
    learning_rate: float = 1e-3
    """Peak learning rate."""
    transform_rate: float = 1.0
    """Learning rate of the transformation F, as a multiple of ``learning_rate``."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and kernels, except those that a module lists in
    ``no_weight_decay``.
    """
    horizontal_flips: bool = False
    """Train on images and their mirror images."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly from zero."""
    decay: Decay = "cosine"
    """Learning rate after the warm-up: a cosine decay to zero, or constant."""
    gradient_clip: float = 1.0
    """Maximum norm of the gradient; 0 for no clipping."""
    ema: float = 0.999
    """Decay of the exponential moving average of the weights, after a warm-up; 0 for no average.
    The averaged weights are evaluated and saved.
    """
    accumulate: int = 1
    """Split each batch into this many parts and accumulate their gradients, to save memory."""
    precision: Precision = "32-true"
    """Numerical precision. bf16-mixed suits GPUs, and CPUs with bf16 matrix instructions. The
    transformation F always runs in full precision.
    """
    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu, ..."""
    devices: int | str = "auto"
    """Number of devices, or auto."""
    nodes: int = 1
    """Number of machines."""
    strategy: str = "auto"
    """Lightning's strategy: auto, ddp, fsdp, ..."""
    threads: int | None = None
    """CPU threads per process; null for PyTorch's default."""
    workers: int = 0
    """Number of processes that load data."""
    compile: bool = False
    """Compile the networks with torch.compile: a slow start that pays off in long runs. If it
    fails, training continues uncompiled.
    """
    checkpoint_every: int = 250
    """Steps between checkpoints; an interruption loses at most this many."""
    log_every: int = 20
    """Steps between rows of the logs."""
    sample_every: int | None = None
    """Steps between pictures of samples while training, written into ``samples/`` in the run's
    folder; null for none.
    """
    validate_every: int | None = None
    """Steps between evaluations on ``validation_split``; null for no validation."""
    validation_split: str = "test"
    """Split to validate on. Validation is only logged; it does not affect training."""
    evaluation_draws: int = 8
    """Number of times t drawn per example in the final evaluation."""
    evaluation_limit: int | None = None
    """Number of examples in the final evaluation, evenly spread over the split; null for all."""
    evaluation_split: str = "test"
    """Split of the final evaluation."""
    sample_images: int | None = None
    """Number of images in the final picture of samples; null for 64. For vectors it always shows
    4,096 samples.
    """
    sample_steps: int | None = None
    """Steps of the sampler for the final picture; null for the model's T, or 100 in continuous
    time.
    """

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UserError: a value is out of range.
        """
        choices = {"optimizer": Optimizer, "decay": Decay, "precision": Precision}
        for name, allowed in choices.items():
            check_choice(f"train.{name}", getattr(self, name), get_args(allowed))
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "nodes",
            "checkpoint_every",
            "log_every",
            "evaluation_draws",
        ):
            if getattr(self, name) < 1:
                raise self._wrong(name, "an integer of at least 1")
        self._check_most()
        for name in ("warmup", "workers", "gradient_clip", "weight_decay", "transform_rate"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise self._wrong(name, "a number of at least 0")
        for name in (
            "threads",
            "sample_every",
            "validate_every",
            "evaluation_limit",
            "sample_images",
            "sample_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise self._wrong(name, "an integer of at least 1, or null")
        if self.validate_every is not None and self.validate_every > self.steps:
            raise UserError(
                f"train.validate_every={self.validate_every} is more than train.steps={self.steps};"
                " give fewer steps, or null"
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(
                f"train.learning_rate={self.learning_rate}: give a positive number, such as 1e-3"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema={self.ema}: give a decay in [0, 1), such as 0.999")
        self._check_sharding()

    def _check_most(self) -> None:
        for name, value in vars(self).items():
            most = MOST_WORKERS if name in ("devices", "nodes", "threads", "workers") else MOST
            if isinstance(value, int) and value > most:
                shown = describe_value(value)
                raise UserError(f"train.{name}={shown}: give an integer of at most {most:,}")

    def _wrong(self, name: str, allowed: str) -> UserError:
        value = describe_value(getattr(self, name))
        return UserError(f"train.{name}={value}: give {allowed}")

    def _check_sharding(self) -> None:
        if "fsdp" not in self.strategy:
            return
        if self.ema or self.gradient_clip or self.sample_every:
            raise UserError(
                "train.strategy=fsdp shards the weights, which averaging, clipping and sampling"
                " while training do not support; set train.ema=0, train.gradient_clip=0,"
                " train.sample_every=null"
            )
        if self.optimizer != "adamw":
            raise UserError(
                "train.strategy=fsdp shards the weights, but"
                f" train.optimizer={self.optimizer} needs whole matrices; set train.optimizer=adamw"
            )
