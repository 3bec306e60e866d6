"""A run: a folder that holds a configuration, checkpoints, logs, the trained model, its evaluation and its pictures.

=========================  ==================================================================
``config.yaml``            what was asked for, defaults filled in
``data.json``              what the data are, with their checksum; written first
``checkpoints/last.ckpt``  everything needed to go on: weights, moving average, optimiser, step
``logs/``                  every term of the bound, as CSV and for TensorBoard
``model/``                 the trained weights (moving average) as safetensors and JSON
``samples.png``            samples
``transform.png``          F(x, t), z_t and x̂ over time
``metrics.json``           the evaluation; written last, so that it marks a finished run
``.lock``                  held by the process that trains
=========================  ==================================================================
"""

import contextlib
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ndm.baselines import histogram_bpd, xz_bpd
from ndm.data import DataDescription, DataSource
from ndm.decoder import NetworkDecoder
from ndm.errors import UserError
from ndm.evaluate import evaluate_bound, pick_device
from ndm.model import NDM
from ndm.parallel import started_first
from ndm.sample import draw_samples
from ndm.serialize import read_json, write_atomically, write_json
from ndm.train.module import EMA, FinalCheckpoint, ProgressBar, TrainingModule, quiet_lightning
from ndm.train.settings import TrainSettings
from ndm.viz import is_image, write_samples, write_transform

CHECKPOINT, DATA, METRICS = Path("checkpoints/last.ckpt"), Path("data.json"), Path("metrics.json")
BASELINE_VALUES, SAMPLE_VALUES = 8_000_000, 200_000


def check_data(model: NDM, data: DataSource, settings: TrainSettings) -> None:
    """Check that model, data and settings fit one another, before anything is trained.

    Raises:
        UserError: they do not.
    """
    description = data.describe()
    place = "model.decoder.init_args.base" if isinstance(model.decoder, NetworkDecoder) else "model.decoder"  # of what knows the grid
    if description.levels is None and model.decoder.discrete:
        raise UserError(f"{description.name} is continuous but the decoder is discrete; use {place}=ndm.GaussianDecoder")
    if description.levels is not None and not model.decoder.discrete:
        raise UserError(
            f"{description.name} is discrete but the decoder is continuous, and its bound would be a density; use "
            f"{place}=ndm.DiscretizedGaussian with levels={description.levels}, or read the data without levels"
        )
    if description.levels is not None and model.decoder.values is not None:
        have = len(model.decoder.values)
        if have != description.levels:
            raise UserError(
                f"{description.name} has {description.levels} levels but the decoder {have}; set {place}.init_args.levels={description.levels}"
            )
    for split in ("train", settings.evaluation_split, *([settings.validation_split] if settings.validate_every else [])):
        if len(data.split(split)) == 0:
            raise UserError(f"{description.name}: the split {split!r} is empty")
    # One example through the bound: a network of the wrong shape is found here, not after the set-up.
    state = torch.random.get_rng_state()
    model.eval()
    with torch.no_grad():
        model.bound(data.split("train").__getitems__([0, 0]), draws=1)
    model.train()
    torch.random.set_rng_state(state)


def keep_description(data: DataSource, out: Path) -> None:
    """Write what the data are, unless a run goes on that has done so.

    Raises:
        UserError: it began with other data.
    """
    now = data.describe()
    if (out / CHECKPOINT).exists() and (out / DATA).exists():
        then = DataDescription.from_dict(read_json(out / DATA))
        if then.sha256 != now.sha256:
            raise UserError(
                f"{now.name} changed since {out} began (sha256 {then.sha256[:12]} then, {now.sha256[:12]} now): examples that it was trained on may "
                "be among those that it is tested on; bring the data back, or choose another --out"
            )
    elif started_first():
        if not (out / CHECKPOINT).exists():
            shutil.rmtree(out / "model", ignore_errors=True)  # of an earlier training, whose checkpoint was deleted
        write_json(out / DATA, now.to_dict())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run, memory-mapped; no code in it is run.

    Raises:
        UserError: it is truncated, damaged or not a checkpoint of a run.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not {"global_step", "state_dict"} <= set(content):
            raise ValueError("it is not a checkpoint of a run")
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"the checkpoint {path} is truncated or damaged ({reason}); restore it, or delete it to start the run again"
        ) from error
    return content


def weights_of(out: Path, model: NDM) -> dict[str, Any]:
    """Give a model the weights of the last checkpoint of a run, averaged where it averages; returns the checkpoint.

    The checkpoint holds them whatever the strategy.

    Raises:
        UserError: it is damaged, or of another model.
    """
    checkpoint = read_checkpoint(out / CHECKPOINT)
    try:
        model.load_state_dict({name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()})
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint {out / CHECKPOINT} does not fit the model of its configuration; it is of another version of ndm"
        ) from error
    return checkpoint


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: Lightning's own way copies from /tmp when that is another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))


def make_trainer(settings: TrainSettings, out: Path, progress: bool = True) -> Trainer:
    """Lightning's trainer for a run in the folder ``out``, with a progress bar or without."""
    callbacks: list[Callback] = [
        ModelCheckpoint(
            out / CHECKPOINT.parent, CHECKPOINT.stem, every_n_train_steps=settings.checkpoint_every, enable_version_counter=False
        ),
        FinalCheckpoint(out / CHECKPOINT),
        LearningRateMonitor(),
    ]
    if progress:
        callbacks.append(ProgressBar())
    if settings.ema:
        callbacks.insert(0, EMA(settings.ema))
    csv = CSVLogger(out, name="logs")
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
        logger=[csv, TensorBoardLogger(out, name="logs", version=csv.version)],
        log_every_n_steps=min(settings.log_every, settings.steps),
        val_check_interval=settings.validate_every * settings.accumulate if settings.validate_every else None,
        limit_val_batches=None if validate else 0,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=progress,
        use_distributed_sampler=False,
        benchmark=True,  # batches are all of one size
        default_root_dir=out,
        plugins=None if "fsdp" in settings.strategy else [AtomicCheckpoints()],
    )


def fit(model: NDM, data: DataSource, settings: TrainSettings, out: Path, seed: int) -> bool:
    """Train to the last step, from the last checkpoint if there is one.

    Returns:
        Whether this process is the first of all, the one that writes.

    Raises:
        UserError: the checkpoint is damaged, or training failed in a way that the user can mend.
        KeyboardInterrupt: the run was interrupted.
    """
    quiet_lightning()
    checkpoint, first_step = out / CHECKPOINT, 0
    try:
        trainer = make_trainer(settings, out)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"this machine cannot train with these settings: {reason}; see train.accelerator, train.devices, train.strategy"
        ) from error
    if checkpoint.exists():
        first_step = read_checkpoint(checkpoint)["global_step"]
        if trainer.is_global_zero:
            print(f"{out}: going on from step {first_step} of {settings.steps}", flush=True)
    if first_step < settings.steps:
        validation = data.split(settings.validation_split) if settings.validate_every else None
        module = TrainingModule(model, settings, seed, data.split("train"), validation)
        try:
            trainer.fit(module, ckpt_path=checkpoint if first_step else None, weights_only=True)
        except SystemExit as error:  # Lightning turns Ctrl-C into an exit
            raise KeyboardInterrupt from error
    return trainer.is_global_zero


def train(model: NDM, data: DataSource, settings: TrainSettings, out: Path, seed: int = 0) -> dict[str, Any] | None:
    """Train, save, draw and evaluate; goes on where an interrupted run stopped. To be checked before by :func:`check_data`.

    Args:
        model: the model, freshly made.
        data: the data.
        settings: the settings.
        out: folder of the run.
        seed: seed of the data order, times and noise.

    Returns:
        The metrics, or None in processes other than the first.

    Raises:
        UserError: the data changed, the checkpoint is damaged, or training failed in a way that the user can mend.
    """
    keep_description(data, out)
    first = fit(model, data, settings, out, seed)
    if not first:
        return None
    description = data.describe().to_dict()
    seconds = weights_of(out, model).get("seconds", 0.0)
    model.to(pick_device(settings.accelerator)).eval()
    model.save_pretrained(out / "model", {"data": description})
    test = data.split(settings.evaluation_split)
    record = evaluate_bound(model, test, draws=settings.evaluation_draws, limit=settings.evaluation_limit, progress=True)
    metrics = {"split": settings.evaluation_split, **record, **baselines(data, settings.evaluation_split)}
    metrics |= {"data_sha256": description["sha256"], "training_steps": settings.steps, "training_seconds": round(seconds, 1)}
    try:
        draw(model, data, settings, out, seed)
    except (UserError, torch.OutOfMemoryError) as error:  # the numbers are what counts
        print(f"ndm: warning: {out} has no pictures: {' '.join(str(error).split())[:200]}", file=sys.stderr)
    write_json(out / METRICS, metrics)
    return metrics


def draw(model: NDM, data: DataSource, settings: TrainSettings, out: Path, seed: int) -> None:
    """The pictures of a run, with no more images at once than a batch of training, unless they are small.

    Raises:
        UserError: samples are not finite.
    """
    test, shape = data.split(settings.evaluation_split), data.describe().event_shape
    images = is_image(shape)
    count, size = (settings.sample_images or 64) if images else 4096, settings.batch_size // settings.accumulate
    samples = draw_samples(
        model,
        count,
        shape,
        steps=settings.sample_steps,
        seed=seed,
        batch_size=max(size, SAMPLE_VALUES // math.prod(shape)),
        progress=True,
    )
    write_samples(out / "samples.png", samples, None if images else test.__getitems__(range(min(len(test), 4096))))
    shown = [0, len(test) // 2] if images else range(min(len(test), 2000))
    write_transform(out / "transform.png", model, test.__getitems__(shown), seed=seed)


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the folder of a run, since two that train into it would each write over the checkpoints of the other.

    Of several processes that train together the first holds it for all. A process that is killed lets go.

    Raises:
        UserError: another process holds it.
    """
    if not started_first():
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror or error}; choose a folder that you can write to") from error
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
        for left in (out / CHECKPOINT.parent).glob(
            f".{CHECKPOINT.stem}-*{CHECKPOINT.suffix}"
        ):  # by a process that was killed while it saved
            left.unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(f"{out}: another process is training into this folder; wait for it to end, or choose another --out") from error
    except (OSError, NotImplementedError) as error:
        print(f"{out}: cannot be locked ({error}); see to it that no other process trains into it", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def baselines(data: DataSource, split: str) -> dict[str, float]:
    """Bits/dim of simple coders on a split of discrete data; empty for continuous data."""
    levels = data.describe().levels
    if levels is None:
        return {}
    train, test = (data.split(name) for name in ("train", split))
    most = max(1, BASELINE_VALUES // math.prod(data.describe().event_shape))
    known, held_out = (data.integers(part.__getitems__(range(min(len(part), most)))) for part in (train, test))
    return {"histogram_bpd": histogram_bpd(known, held_out, levels), "xz_bpd": xz_bpd(held_out, levels)}
