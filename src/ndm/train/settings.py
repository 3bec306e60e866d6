"""What a training run is told: optimizer, schedule of the learning rate, precision, devices,
checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ndm.device import Precision
from ndm.errors import UserError, check_choice

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
)
"""Settings that say how a run is carried out, not what it computes: they may change when it is
resumed.
"""
FINAL_SETTINGS = (
    "evaluation_draws",
    "evaluation_limit",
    "evaluation_split",
    "sample_images",
    "sample_steps",
)
"""Settings of what follows the last step: they may change until it is done."""


@dataclass
class TrainSettings:
    """Settings of a training run."""

    steps: int = 10_000
    """Number of optimizer steps."""
    batch_size: int = 64
    """Examples in one optimizer step, over all devices and accumulated batches together."""
    start_from: str | None = None
    """Folder of a run, or of a model, whose weights training starts from in the place of random
    ones. Its model must be built alike, but for dropout, steps T, eta and times.
    """
    optimizer: Optimizer = "adamw"
    """adamw; soap: Adam in the eigenbasis of Shampoo's preconditioner, which learns more from a
    step and takes longer for it; or muon: momentum whose matrices are made orthogonal, with AdamW
    for everything else.
    """
    learning_rate: float = 1e-3
    """Peak learning rate."""
    transform_rate: float = 1.0
    """Learning rate of the transformation F, as a multiple of ``learning_rate``."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and kernels, less those that a module names in its
    attribute ``no_weight_decay``.
    """
    warmup: int = 100
    """Steps over which the learning rate rises linearly from zero."""
    decay: Decay = "cosine"
    """How the learning rate goes on after the warm-up: down to zero by a cosine, or constant."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient (0: no clipping)."""
    ema: float = 0.999
    """Decay of the exponential moving average of the weights, which is what gets evaluated and
    saved; it warms up (0: none).
    """
    accumulate: int = 1
    """Split each batch into this many parts and add up their gradients, to save memory."""
    precision: Precision = "32-true"
    """Numerical precision; bf16-mixed suits GPUs, and CPUs with matrix instructions for it. The
    transformation F always runs in full precision.
    """
    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu, ..."""
    devices: int | str = "auto"
    """How many devices, or auto."""
    nodes: int = 1
    """How many machines."""
    strategy: str = "auto"
    """Lightning's strategy: auto, ddp, fsdp, ..."""
    threads: int | None = None
    """CPU threads of each process; None leaves PyTorch's choice."""
    workers: int = 0
    """Processes that load data."""
    compile: bool = False
    """Compile the networks with torch.compile: slow to start, for long runs. Where that fails,
    training goes on without.
    """
    checkpoint_every: int = 250
    """Steps between checkpoints: what an interruption loses at most."""
    log_every: int = 20
    """Steps between two rows of the logs."""
    validate_every: int | None = None
    """Steps between evaluations on ``validation_split``; None for none."""
    validation_split: str = "test"
    """The split that ``validate_every`` looks at; nothing is selected by it."""
    evaluation_draws: int = 8
    """Times drawn for each example in the evaluation at the end."""
    evaluation_limit: int | None = None
    """Evaluate only so many examples at the end, evenly spread over the split; None for all."""
    evaluation_split: str = "test"
    """The split that is evaluated at the end."""
    sample_images: int | None = None
    """Images in the picture of samples at the end; None takes 64. Of vectors there are always
    4,096.
    """
    sample_steps: int | None = None
    """Steps of the sampler for the picture at the end; None takes the model's T, or 100 in
    continuous time.
    """

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UserError: a value is out of range.
        """
        for name, known in (("optimizer", Optimizer), ("decay", Decay), ("precision", Precision)):
            check_choice(f"train.{name}", getattr(self, name), get_args(known))
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
                raise UserError(
                    f"train.{name}={getattr(self, name)}: give an integer of at least 1"
                )
        for name in ("warmup", "workers", "gradient_clip", "weight_decay", "transform_rate"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"train.{name}={getattr(self, name)}: give a number of at least 0")
        for name in (
            "threads",
            "validate_every",
            "evaluation_limit",
            "sample_images",
            "sample_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(
                    f"train.{name}={getattr(self, name)}: give an integer of at least 1, or null"
                )
        if self.validate_every is not None and self.validate_every > self.steps:
            raise UserError(
                f"train.validate_every={self.validate_every} is more than train.steps={self.steps};"
                " give fewer steps, or null"
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(
                f"train.learning_rate={self.learning_rate}: give a positive number, for example"
                " 1e-3"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema={self.ema}: give a decay in [0, 1), for example 0.999")
        self._check_sharding()

    def _check_sharding(self) -> None:
        if "fsdp" not in self.strategy:
            return
        if self.ema or self.gradient_clip:
            raise UserError(
                "train.strategy=fsdp shards the weights, which neither averaging nor clipping"
                " takes; set train.ema=0, train.gradient_clip=0"
            )
        if self.optimizer != "adamw":
            raise UserError(
                "train.strategy=fsdp shards the weights, whose matrices"
                f" train.optimizer={self.optimizer} looks at; set train.optimizer=adamw"
            )
