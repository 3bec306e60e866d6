"""A run: a folder with a configuration, checkpoints, logs, the trained model, its evaluation and
its pictures.

=========================  ==================================================================
``config.yaml``            the configuration, with all defaults
``data.json``              the description of the data, with their checksum; written first
``checkpoints/last.ckpt``  everything needed to resume: weights, moving average, optimizer, step
``logs/``                  every term of the bound, as CSV and for TensorBoard
``model/``                 the trained weights (moving average) as safetensors and JSON
``samples.png``            samples
``transform.png``          F(x, t), z_t and x̂ over time
``metrics.json``           the evaluation; written last, so it marks a finished run
``.lock``                  held by the process that trains
=========================  ==================================================================
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ndm.data import DataDescription, DataSource
from ndm.errors import ForeignModuleError, UserError
from ndm.evaluation.processes import started_first
from ndm.model import DiffusionModel
from ndm.serialize import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    read_json,
    read_weights,
    write_json,
)
from ndm.train.config import (
    RunConfig,
    add_data,
    add_model,
    build_section,
    flat,
    read_values,
)
from ndm.train.settings import FINAL_SETTINGS, MACHINE_SETTINGS

METRICS = "metrics.json"


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path

    @property
    def config_path(self) -> Path:
        """The file of the configuration."""
        return self.folder / "config.yaml"

    @property
    def data_path(self) -> Path:
        """The file of the description of the data."""
        return self.folder / "data.json"

    @property
    def checkpoint_path(self) -> Path:
        """The file of the last checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def model_path(self) -> Path:
        """The folder of the trained model."""
        return self.folder / "model"

    @property
    def metrics_path(self) -> Path:
        """The file of the evaluation."""
        return self.folder / METRICS

    @property
    def finished(self) -> bool:
        """Whether the run was trained and evaluated to the end."""
        return self.metrics_path.exists()

    def metrics(self) -> dict[str, Any]:
        """The evaluation at the end of training.

        Raises:
            UserError: there is none, or it is damaged.
        """
        return read_json(self.metrics_path)

    def data(self) -> DataSource:
        """The data source of the configuration.

        Raises:
            UserError: the configuration is missing or damaged.
        """
        source: DataSource = build_section(self.config_path, "data", add_data)
        return source

    def model(self) -> DiffusionModel:
        """The trained model, in evaluation mode; that of the last checkpoint if the run is not
        finished. A model folder will do, too.

        Networks from outside this library are imported from where ``config.yaml`` says, as when the
        run is resumed.

        Raises:
            UserError: there is none, or it is damaged.
        """
        if not self.folder.is_dir():
            raise UserError(
                f"there is no run {self.folder}; make one with: ndm train --config digits --out"
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
                f"{self.folder} holds no trained model yet; resume it with: ndm train --out"
                f" {self.folder}"
            )
        model = self._new_model()
        step = self.load_weights(model)["global_step"]
        model.info = {"data": read_json(self.data_path)}
        print(
            f"ndm: warning: {self.folder} is not finished; this is its model after {step:,} steps",
            file=sys.stderr,
        )
        return model.eval()

    def _new_model(self) -> DiffusionModel:
        model: DiffusionModel = build_section(self.config_path, "model", add_model)
        return model

    def checkpoint(self) -> dict[str, Any]:
        """Read the last checkpoint, memory-mapped. No code in it is run.

        Raises:
            UserError: it is truncated, damaged or not a checkpoint of a run.
        """
        path = self.checkpoint_path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not {"global_step", "state_dict"} <= set(content):
                raise ValueError("it is not a checkpoint of a run")
        except Exception as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(
                f"the checkpoint {path} is truncated or damaged ({reason}); restore it, or delete"
                " it to start the run again"
            ) from error
        return content

    def load_weights(self, model: DiffusionModel) -> dict[str, Any]:
        """Load the weights of the last checkpoint into a model, the averaged ones if there are any,
        whatever the strategy.

        Returns:
            The checkpoint.

        Raises:
            UserError: it is damaged, or belongs to another model.
        """
        checkpoint = self.checkpoint()
        try:
            model.load_state_dict(
                {
                    name.removeprefix("model."): value
                    for name, value in checkpoint["state_dict"].items()
                }
            )
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint {self.checkpoint_path} does not fit the model of its"
                " configuration; another version of ndm wrote it"
            ) from error
        return checkpoint

    def check(self, config: RunConfig) -> None:
        """Check that the folder is free, or holds a run with this configuration.

        Settings of the machine may differ, and settings of what follows the last step until that is
        done. Without a checkpoint everything may differ: there is nothing to resume.

        Raises:
            UserError: it holds a run with another configuration, or is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder} is a file; give a folder")
        if not (self.config_path.exists() and (self.checkpoint_path.exists() or self.finished)):
            return
        old, new = flat(read_values(self.config_path)), flat(config.to_dict())
        if new.keys() - old.keys():  # perhaps an older version wrote it, which had fewer settings
            with contextlib.suppress(UserError):
                old = flat(RunConfig.read(self.config_path).to_dict())
        ignored = {
            f"train.{name}"
            for name in (*MACHINE_SETTINGS, *(() if self.finished else FINAL_SETTINGS))
        }
        changed = sorted(
            key for key in {**old, **new} if key not in ignored and old.get(key) != new.get(key)
        )
        if changed:
            key = changed[0]
            raise UserError(
                f"{self.folder} holds a run with another configuration: {key} is {old.get(key)!r}"
                f" there and {new.get(key)!r}"
                f" here{f' ({len(changed) - 1} more differ)' if len(changed) > 1 else ''}; choose"
                " another --out, or give --out alone to resume it"
            )

    def record_data(self, data: DataSource) -> None:
        """Write the description of the data, or compare it with that of the run to resume.

        Raises:
            UserError: the run began with other data.
        """
        now = data.describe()
        if self.checkpoint_path.exists() and self.data_path.exists():
            then = DataDescription.from_dict(read_json(self.data_path))
            if then.sha256 != now.sha256:
                raise UserError(
                    f"{now.name} changed since {self.folder} began (sha256 {then.sha256[:12]} then,"
                    f" {now.sha256[:12]} now): examples that it was trained on may be among the"
                    " test examples; restore the data, or choose another --out"
                )
        elif started_first():
            if not self.checkpoint_path.exists():
                shutil.rmtree(
                    self.model_path, ignore_errors=True
                )  # of an earlier training, whose checkpoint was deleted
            write_json(self.data_path, now.to_dict())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder: two processes that train into it would overwrite each other's
        checkpoints.

        Of several processes that train together the first locks it for all. The lock of a killed
        process is free.

        Raises:
            UserError: another process holds the lock, or the folder cannot be made.
        """
        if not started_first():
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {self.folder} cannot be made: {error.strerror or error}; choose a folder"
                " that you can write to"
            ) from error
        lock, checkpoint = FileLock(self.folder / ".lock"), self.checkpoint_path
        try:
            lock.acquire(timeout=0)
            for partial in checkpoint.parent.glob(
                f".{checkpoint.stem}-*{checkpoint.suffix}"
            ):  # of a process killed while it saved
                partial.unlink(missing_ok=True)
        except Timeout as error:
            raise UserError(
                f"{self.folder}: another process is training into this folder; wait for it to end,"
                " or choose another --out"
            ) from error
        except (OSError, NotImplementedError) as error:
            print(
                f"{self.folder}: cannot be locked ({error}); make sure that no other process trains"
                " into it",
                file=sys.stderr,
            )
        try:
            yield
        finally:
            lock.release()
