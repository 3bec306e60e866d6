"""What each command of ``ndm`` does, and how its words become arguments (jsonargparse: YAML files, class paths, overrides)."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

import ndm
from ndm.data import DataDescription, DataSource
from ndm.errors import UserError, check_whole
from ndm.evaluate import bound_table, evaluate_bound, pick_device
from ndm.model import NDM
from ndm.sample import Method
from ndm.serialize import read_json, write_atomically, write_json
from ndm.train.batches import part_seed
from ndm.train.run import METRICS, train
from ndm.train.settings import TrainSettings
from ndm.viz import write_samples

set_parsing_settings(docstring_parse_attribute_docstrings=True)

CONFIG = "config.yaml"
MACHINE_SETTINGS = ("accelerator", "devices", "nodes", "strategy", "threads", "workers", "compile", "checkpoint_every", "log_every")
"""Settings that say how a run is carried out rather than what it computes: they may change when a run goes on."""


def run_command(name: str, words: Sequence[str]) -> None:
    """Parse the words after ``ndm NAME`` and run the command.

    Raises:
        UserError: a word is wrong, or the command met bad input.
    """
    if name == "train":
        run_train(words)
        return
    functions: dict[str, Callable[..., None]] = {"sample": sample, "evaluate": evaluate}
    function = functions[name]
    parser = ArgumentParser(prog=f"ndm {name}", description=(function.__doc__ or "").split("\n")[0], exit_on_error=False)
    parser.add_argument("run", metavar="RUN", help="folder of the run, made by ndm train")
    parser.add_function_arguments(function, as_positional=False, skip={"run"})
    function(**vars(parse(parser, words)))


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse, turning the parser's complaints into a :class:`UserError`."""
    try:
        return parser.parse_args(list(words))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UserError(f"{' '.join(str(error).split())} (see {parser.prog} --help)") from error


def build(parser: ArgumentParser, arguments: Namespace) -> Namespace:
    """Build the objects that parsed arguments describe, turning complaints of constructors into a :class:`UserError`."""
    try:
        return parser.instantiate(arguments)
    except (TypeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise UserError(f"the configuration cannot be built: {cause or error}") from error


def train_parser() -> ArgumentParser:
    """The parser of ``ndm train``."""
    parser = ArgumentParser(
        prog="ndm train",
        description="Train a model and evaluate it. The same command again goes on with an interrupted run; --out alone is enough then.",
        epilog="Example: ndm train --config configs/digits.yaml --out runs/digits --train.steps 2000",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the sections data, model and train; options after it override it")
    parser.add_argument("--out", type=str, required=True, metavar="RUN", help="folder of the run, made if need be")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first weights, the data order, times and noise")
    parser.add_subclass_arguments(
        DataSource, "data", required=True, help="the data: a class of ndm.data and its arguments; see --data.help CLASS"
    )
    parser.add_class_arguments(NDM, "model")
    parser.add_class_arguments(TrainSettings, "train")
    return parser


def run_train(words: Sequence[str]) -> None:
    """``ndm train``: parse, check against the folder, train, and print what came out."""
    parser = train_parser()
    stored = _stored_config(words)
    arguments = parse(parser, (["--config", str(stored)] if stored else []) + list(words))
    check_whole("seed", arguments.seed, 0)
    out = Path(arguments.out)
    config = yaml.safe_load(parser.dump(arguments, skip_unset=False))
    config.pop("out", None)
    config.pop("config", None)
    _check_same_run(out, config)
    if (out / METRICS).exists():
        record = read_json(out / METRICS)
        print(
            f"{out} is finished: {float(str(record.get('nelbo_bpd', 'nan'))):.4f} bits/dim on {record.get('split')}; nothing to do (choose another --out to train again)"
        )
        return
    torch.manual_seed(arguments.seed)
    parts = build(parser, arguments)
    if parts.train.threads:
        torch.set_num_threads(parts.train.threads)
    parts.data.describe()  # data that cannot be read must not leave a folder behind
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        write_atomically(out / CONFIG, lambda path: path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8"))
    metrics = train(parts.model, parts.data, parts.train, out, arguments.seed)
    if metrics is not None:
        print(bound_table(metrics))
        for name in ("histogram", "xz"):
            if f"{name}_bpd" in metrics:
                print(f"{name + ' (baseline)':<20}{metrics[f'{name}_bpd']:9.4f}")
        print(
            f"{metrics['num_examples']} {metrics['split']} examples, {metrics['parameters']:,} parameters, trained {metrics['training_seconds']:.0f} s"
        )
        print(f"wrote {out}/model, metrics.json, samples.png, transform.png")


def _stored_config(words: Sequence[str]) -> Path | None:
    """The configuration of an existing run, when the words give --out but no --config."""
    if any(word == "--config" or word.startswith("--config=") for word in words):
        return None
    outs = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--out"]
    outs += [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    path = Path(outs[-1]) / CONFIG if outs else None
    return path if path is not None and path.exists() else None


def _check_same_run(out: Path, config: dict[str, Any]) -> None:
    """Refuse to go on with a run under another configuration."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if not (out / CONFIG).exists():
        return
    stored = read_config(out)
    old, new = _flat(stored), _flat(config)
    ignored = {f"train.{name}" for name in MACHINE_SETTINGS}
    changed = sorted(key for key in {**old, **new} if key not in ignored and old.get(key) != new.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{out} holds a run with another configuration: {key} is {old.get(key)!r} there and {new.get(key)!r} here"
            f"{f' ({len(changed) - 1} more differ)' if len(changed) > 1 else ''}; choose another --out, or give --out alone to go on with it"
        )


def read_config(run: Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{run / CONFIG} does not exist; {run} is not a run of ndm train") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{run / CONFIG} cannot be read; it is damaged: choose another --out") from error
    if not isinstance(config, dict):
        raise UserError(f"{run / CONFIG} holds no configuration; it is damaged: choose another --out")
    return config


def _flat(config: object, prefix: str = "") -> dict[str, object]:
    if isinstance(config, dict):
        return {
            key: value for name, part in config.items() for key, value in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: config}


def load_run(run: Path) -> NDM:
    """The trained model of a run.

    Raises:
        UserError: there is no such run, or it is not finished.
    """
    if not run.is_dir():
        raise UserError(f"there is no run {run}; make one with: ndm train --config configs/digits.yaml --out {run}")
    if not (run / "model").is_dir():
        raise UserError(f"{run} holds no trained model yet; go on with: ndm train --out {run}")
    return NDM.from_pretrained(run / "model")


def load_data(run: Path) -> DataSource:
    """The data source of a run, from its configuration.

    Raises:
        UserError: the configuration is missing or damaged.
    """
    parser = ArgumentParser(prog="ndm", exit_on_error=False)
    parser.add_subclass_arguments(DataSource, "data", required=True)
    config = read_config(run)
    try:
        arguments = parser.parse_object({"data": config.get("data")})
    except ArgumentError as error:
        raise UserError(f"{run / CONFIG}: {' '.join(str(error).split())}") from error
    return build(parser, arguments).data


def sample(
    run: str,
    out: str,
    n: int = 64,
    method: Method = "ancestral",
    steps: int | None = None,
    seed: int = 0,
    eta: float | None = None,
    solver: str | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    batch_size: int = 256,
    device: str = "auto",
) -> None:
    """Draw samples from a trained run.

    Args:
        run: folder of the run.
        out: file to write: .png for a picture, .npy for the values in the units of the data.
        n: number of samples.
        method: ancestral (DDPM), ddim, sde or ode.
        steps: steps of the time grid; by default the model's own number, or 100.
        seed: the same seed and batch size give the same samples.
        eta: noise of the reverse process for ancestral and sde; 1 is DDPM, 0 deterministic.
        solver: for sde euler, heun, torchsde-euler or torchsde-srk; for ode heun, euler or dopri5.
        rtol: relative tolerance of dopri5.
        atol: absolute tolerance of dopri5.
        batch_size: samples drawn at once.
        device: auto, cpu or cuda.
    """
    target = Path(out)
    if target.suffix.lower() not in (".png", ".npy"):
        raise UserError(f"--out {out}: the file must end in .png or .npy")
    check_whole("seed", seed, 0)
    if n < 1 or batch_size < 1:
        raise UserError(f"n={n}, batch_size={batch_size}: give integers of at least 1")
    model = load_run(Path(run)).to(pick_device(device))
    description = DataDescription.from_dict(model.info.get("data"))
    parts = []
    for index, start in enumerate(range(0, n, batch_size)):
        shape = (min(batch_size, n - start), *description.event_shape)
        options: dict[str, Any] = {"steps": steps, "eta": eta, "solver": solver, "rtol": rtol, "atol": atol}
        parts.append(model.sample(shape, method, **options, seed=part_seed(seed, index), progress=True))
    samples = torch.cat(parts).cpu()
    if target.suffix.lower() == ".png":
        write_samples(target, samples)
    else:
        values = description.to_source_units(samples)
        write_atomically(target, lambda path: _write_array(path, values.numpy()))
    print(f"wrote {n} samples to {target}")


def _write_array(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would append .npy to a name that ends in .NPY
        np.save(file, values)


def evaluate(
    run: str,
    split: str = "test",
    json: str | None = None,
    draws: int = 16,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Measure the bound of a trained run on a split of its data.

    Args:
        run: folder of the run.
        split: the split of the data.
        json: file to write the record to.
        draws: times drawn for each example.
        batch_size: examples at once; by default 256, fewer for large images.
        seed: seed of times and noise.
        device: auto, cpu or cuda.
    """
    check_whole("seed", seed, 0)
    folder = Path(run)
    model, data = load_run(folder).to(pick_device(device)), load_data(folder)
    description = data.describe()
    trained = DataDescription.from_dict(model.info.get("data"))
    if trained.sha256 != description.sha256:
        print(
            f"ndm: warning: the data changed since training (sha256 {trained.sha256[:12]} then, {description.sha256[:12]} now)",
            file=sys.stderr,
        )
    record = evaluate_bound(model, data.split(split), draws=draws, batch_size=batch_size, seed=seed, progress=True)
    record = {"run": str(folder), "data": description.name, "split": split, **record, "data_sha256": description.sha256}
    record |= {"torch_version": torch.__version__, "ndm_version": ndm.__version__}
    print(bound_table(record))
    print(f"{record['num_examples']} examples of {description.name}/{split}, {draws} times each, seed {seed}")
    if description.levels is None:
        nats = record["nelbo_nats"] + description.log_scale
        record["nelbo_nats_source_units"] = nats
        print(f"density in the units of the data: {nats:.4f} ± {record['nelbo_nats_stderr']:.4f} nats an example")
    if json is not None:
        write_json(Path(json), record)
        print(f"wrote {json}")
