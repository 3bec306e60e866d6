"""The folder of a training run, and how its files are read and written.

=========================  ==================================================================
``config.yaml``            the configuration, with all defaults
``data.json``              the description of the data, with a checksum; written first
``checkpoints/last.ckpt``  everything needed to resume: weights, moving average, optimizer, step
``logs/``                  every term of the bound, as CSV and for TensorBoard
``model/``                 the trained weights (moving average) as safetensors and JSON
``samples.png``            samples
``samples/``               samples while training (``train.sample_every``)
``transform.png``          F(x, t), z_t and x̂ over time
``metrics.json``           the evaluation; written last, so it marks a finished run
``.lock``                  locked by the process that trains
=========================  ==================================================================
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ndm.data import DataDescription, DataSource
from ndm.errors import ForeignModuleError, UserError, describe_value
from ndm.evaluation.processes import started_first
from ndm.model import DiffusionModel
from ndm.serialize import CONFIG_NAME, WEIGHTS_NAME, read_json, read_weights, write_json
from ndm.train.checkpoint import check_finite, read_checkpoint
from ndm.train.config import RunConfig, add_data, add_model, build_section, flat, read_values
from ndm.train.settings import FINAL_SETTINGS, MACHINE_SETTINGS

METRICS = "metrics.json"
_SAME_DATA = ("kind", "event_shape", "num_values", "low", "high", "columns", "classes", "splits")
"""What data have in common on resuming, besides the checksum of their values."""


@dataclass(frozen=True)
class Run:
    """A training run, given by its folder."""

    folder: Path

    @property
    def config_path(self) -> Path:
        """The path of the configuration."""
        return self.folder / "config.yaml"

    @property
    def data_path(self) -> Path:
        """The path of the description of the data."""
        return self.folder / "data.json"

    @property
    def checkpoint_path(self) -> Path:
        """The path of the last checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def logs_path(self) -> Path:
        """The folder of the logs."""
        return self.folder / "logs"

    @property
    def model_path(self) -> Path:
        """The folder of the trained model."""
        return self.folder / "model"

    @property
    def metrics_path(self) -> Path:
        """The path of the evaluation."""
        return self.folder / METRICS

    def samples_path(self, step: int) -> Path:
        """Return the path of the picture of samples after a training step."""
        return self.folder / "samples" / f"step-{step:07d}.png"

    @property
    def finished(self) -> bool:
        """Whether training and evaluation are complete."""
        return self.metrics_path.exists()

    def metrics(self) -> dict[str, Any]:
        """Read the evaluation at the end of training.

        Raises:
            UserError: the file is missing or damaged.
        """
        metrics = read_json(self.metrics_path)
        bits = metrics.get("nelbo_bpd")
        if isinstance(bits, bool) or not isinstance(bits, float | int):
            raise UserError(
                f"{self.metrics_path} is damaged: nelbo_bpd is {describe_value(bits)}; restore it,"
                f" or delete it and evaluate again: ndm train --out {self.folder}"
            )
        return metrics

    def data(self) -> DataSource:
        """Build the data source of the configuration.

        Raises:
            UserError: the configuration is missing or damaged.
        """
        source: DataSource = build_section(self.config_path, "data", add_data)
        return source

    def model(self) -> DiffusionModel:
        """Load the trained model, in evaluation mode.

        If the run is not finished, this is the model of its last checkpoint. The folder may also be
        a saved model. Networks that are not part of this library are imported by their names in
        ``config.yaml``, as on resuming.

        Raises:
            UserError: there is no model, or it is damaged.
        """
        if not self.folder.is_dir():
            raise UserError(
                f"there is no run {self.folder}; train one with: ndm train --config digits --out"
                f" {self.folder}"
            )
        if (self.folder / CONFIG_NAME).is_file():
            return DiffusionModel.from_pretrained(self.folder)
        if (self.model_path / CONFIG_NAME).is_file():
            try:
                return DiffusionModel.from_pretrained(self.model_path)
            except ForeignModuleError:
                model = self._new_model()
                model.load_state_dict(
                    read_weights(self.model_path / WEIGHTS_NAME, model.state_dict())
                )
                model.info = {"data": read_json(self.model_path / CONFIG_NAME).get("data")}
                return model.eval()
        if not self.checkpoint_path.is_file():
            raise UserError(
                f"{self.folder} holds no trained model yet; resume the run with: ndm train --out"
                f" {self.folder}"
            )
        model = self._new_model()
        step = self.load_weights(model)["global_step"]
        model.info = {"data": read_json(self.data_path)}
        print(
            f"ndm: warning: {self.folder} is not finished; using its model after {step:,} steps",
            file=sys.stderr,
        )
        return model.eval()

    def removed(self) -> UserError:
        """Return the error for a folder that was removed while it was trained into."""
        return UserError(
            f"{self.folder} was removed or renamed while it trained; rerun the command to train"
            " again"
        )

    def _remove_partial_files(self) -> None:
        """Remove the temporary files of a killed process; no other process may train."""
        model = [self.model_path / name for name in (CONFIG_NAME, WEIGHTS_NAME)]
        pictures = [self.folder / name for name in ("samples.png", "transform.png")]
        pictures.append(self.folder / "samples" / "step-*.png")
        records = [self.config_path, self.data_path, self.metrics_path, self.checkpoint_path]
        for path in (*model, *pictures, *records):
            for partial in path.parent.glob(f".{path.stem}-*{path.suffix}"):
                partial.unlink(missing_ok=True)

    def _new_model(self) -> DiffusionModel:
        model: DiffusionModel = build_section(self.config_path, "model", add_model)
        return model

    def checkpoint(self) -> dict[str, Any]:
        """Read the last checkpoint, memory-mapped, without executing code from it.

        Raises:
            UserError: the file is truncated, damaged or not a checkpoint of a run.
        """
        return read_checkpoint(self.checkpoint_path)

    def load_weights(self, model: DiffusionModel) -> dict[str, Any]:
        """Load the last checkpoint's weights, or their moving average, into a model.

        Returns:
            The checkpoint.

        Raises:
            UserError: the checkpoint is damaged, or belongs to another model.
        """
        checkpoint = self.checkpoint()
        weights = {
            name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()
        }
        own = model.state_dict()
        if weights.keys() == own.keys():
            check_finite(self.checkpoint_path, weights, own)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint {self.checkpoint_path} does not fit the model of its"
                " configuration; another version of ndm wrote it"
            ) from error
        return checkpoint

    def check(self, config: RunConfig) -> None:
        """Check that the folder is free or holds a run with this configuration.

        Machine settings may differ. Settings of the final evaluation and pictures may differ until
        the run is finished. Without a checkpoint everything may differ: there is nothing to resume.

        Raises:
            UserError: the folder holds a run with another configuration, or is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder} is a file; give a folder")
        if not (self.config_path.exists() and (self.checkpoint_path.exists() or self.finished)):
            return
        old, new = flat(read_values(self.config_path)), flat(config.to_dict())
        if new.keys() - old.keys():  # perhaps written by an older version with fewer settings
            with contextlib.suppress(UserError):
                old = flat(RunConfig.read(self.config_path).to_dict())
        free = MACHINE_SETTINGS if self.finished else (*MACHINE_SETTINGS, *FINAL_SETTINGS)
        ignored = {f"train.{name}" for name in free}
        changed = sorted(
            key for key in {**old, **new} if key not in ignored and old.get(key) != new.get(key)
        )
        if changed:
            key = changed[0]
            more = f" ({len(changed) - 1} more differ)" if len(changed) > 1 else ""
            raise UserError(
                f"{self.folder} holds a run with another configuration: {key} is {old.get(key)!r}"
                f" there and {new.get(key)!r} here{more}; choose another --out, or give only --out"
                " to resume the run"
            )

    def record_data(self, data: DataSource) -> None:
        """Write the description of the data, or on resuming check that the data are the same.

        Raises:
            UserError: the run was started with other data, or their description is lost.
        """
        now = data.describe()
        if self.checkpoint_path.exists():
            _check_same(self._recorded_data(), now, self.folder)
        elif started_first():
            # Left by an earlier training whose checkpoint was deleted.
            shutil.rmtree(self.model_path, ignore_errors=True)
            write_json(self.data_path, now.to_dict())

    def _recorded_data(self) -> DataDescription:
        """Read the description of the data that the last checkpoint was trained on.

        Raises:
            UserError: the file is missing or damaged.
        """
        advice = f"restore it, or delete {self.checkpoint_path} to restart the run"
        if not self.data_path.exists():
            raise UserError(
                f"{self.data_path} is missing, so nothing shows whether the data are those of the"
                f" checkpoint; {advice}"
            )
        recorded = read_json(self.data_path)
        try:
            description = DataDescription.from_dict(recorded)
        except UserError as error:
            raise UserError(f"{self.data_path} is damaged; {advice}") from error
        if not isinstance(description.sha256, str):
            raise UserError(f"{self.data_path} is damaged: sha256 is no text; {advice}")
        return description

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder, so that no other process overwrites its checkpoints.

        In distributed training only the first process takes the lock. A killed process releases it.

        Raises:
            UserError: another process holds the lock, or the folder cannot be created.
        """
        if not started_first():
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {self.folder} cannot be created: {error.strerror or error}; choose a folder"
                " that you can write to"
            ) from error
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
            self._remove_partial_files()
        except Timeout as error:
            raise UserError(
                f"{self.folder}: another process is training into this folder; wait for it to end,"
                " or choose another --out"
            ) from error
        except (OSError, NotImplementedError) as error:
            print(
                f"{self.folder} cannot be locked ({error}); make sure that no other process trains"
                " into it",
                file=sys.stderr,
            )
        try:
            yield
        finally:
            lock.release()


def _check_same(then: DataDescription, now: DataDescription, folder: Path) -> None:
    """Check that the data of a run have not changed.

    Raises:
        UserError: they have.
    """
    fix = "restore the data, or choose another --out"
    if then.sha256 != now.sha256:
        raise UserError(
            f"{now.name} changed since {folder} was started (sha256 {then.sha256[:12]} then,"
            f" {now.sha256[:12]} now), so the test split may contain training examples; {fix}"
        )
    labels = then.condition_sha256, now.condition_sha256  # older runs have none
    if all(labels) and labels[0] != labels[1]:
        raise UserError(
            f"what is known of {now.name}, classes or images, changed since {folder} was started;"
            f" {fix}"
        )
    for name in _SAME_DATA:
        old, new = getattr(then, name), getattr(now, name)
        if old != new:
            raise UserError(
                f"{now.name} changed since {folder} was started: {name} was {describe_value(old)}"
                f" and is {describe_value(new)}; {fix}"
            )
