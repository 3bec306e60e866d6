"""``ndm train``: train a model, or go on with an interrupted run."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from ndm.commands.parsing import CONFIG, build, load_run, parse, read_config
from ndm.data import DataSource
from ndm.errors import UserError, check_whole
from ndm.model import NDM
from ndm.parallel import started_first
from ndm.report import bound_table
from ndm.serialize import read_json, to_config, write_atomically
from ndm.train.run import CHECKPOINT, METRICS, check_data, held, train
from ndm.train.settings import TrainSettings

MACHINE_SETTINGS = ("accelerator", "devices", "nodes", "strategy", "threads", "workers", "compile", "checkpoint_every", "log_every")
"""Settings that say how a run is carried out rather than what it computes: they may change when a run goes on."""
FINAL_SETTINGS = ("evaluation_draws", "evaluation_limit", "evaluation_split", "sample_images", "sample_steps")
"""Settings of what comes after the last step: they may change until it is done."""


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
    out, config = Path(arguments.out), _plain(parser, arguments)
    check_same_run(out, config)
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
    check_data(parts.model, parts.data, parts.train)  # what cannot be trained must not leave a folder behind
    if parts.train.start_from is not None and not (out / CHECKPOINT).exists():
        start_from(parts.model, parts.train.start_from)
    with held(out):
        check_same_run(out, config)  # again: until here another process could train into it
        if started_first():
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


def start_from(model: NDM, run: str) -> None:
    """Give a model the weights of a run. Dropout, steps T, eta and how times are drawn may be others: they give no weight another meaning.

    Raises:
        UserError: there is no such run, or its model is built otherwise.
    """
    other = load_run(Path(run))
    weights, own = other.state_dict(), model.state_dict()
    there, here = (_flat(to_config(one)) for one in (other, model))
    for key in {**here, **there}:
        parts = key.removeprefix("init_args.").split(".")
        if there.get(key) != here.get(key) and parts[0] not in ("times", "steps", "eta") and parts[-1] != "dropout":
            place = ".".join(part for part in parts if part != "init_args")
            raise UserError(
                f"train.start_from={run}: {place} is {there.get(key)!r} there and {here.get(key)!r} here; give the model of {run}, or leave it out"
            )
    for name in {**own, **weights}:
        shapes = [tuple(one[name].shape) if name in one else "not there" for one in (weights, own)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"train.start_from={run}: {name} is {shapes[0]} there and {shapes[1]} here; give the model of {run}, or leave it out"
            )
    model.load_state_dict(weights)


def resolved(words: Sequence[str]) -> dict[str, Any]:
    """The configuration that these words of ``ndm train`` amount to, defaults filled in."""
    parser = train_parser()
    return _plain(parser, parse(parser, words))


def _plain(parser: ArgumentParser, arguments: Namespace) -> dict[str, Any]:
    """Parsed arguments as they stand in the configuration of a run."""
    config: dict[str, Any] = yaml.safe_load(parser.dump(arguments, skip_unset=False))
    return {key: value for key, value in config.items() if key not in ("out", "config")}


def _stored_config(words: Sequence[str]) -> Path | None:
    """The configuration of an existing run, when the words give --out but no --config."""
    if any(word == "--config" or word.startswith("--config=") for word in words):
        return None
    outs = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--out"]
    outs += [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    path = Path(outs[-1]) / CONFIG if outs else None
    return path if path is not None and path.exists() else None


def check_same_run(out: Path, config: dict[str, Any]) -> None:
    """Refuse to go on with a run under another configuration; one that has no checkpoint yet has nothing to go on with.

    Raises:
        UserError: the folder holds one, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if not ((out / CONFIG).exists() and ((out / CHECKPOINT).exists() or (out / METRICS).exists())):
        return
    old, new = _flat(read_config(out)), _flat(config)
    if new.keys() - old.keys():  # perhaps settings that the version which wrote it did not have
        with contextlib.suppress(UserError):
            old = _flat(resolved(["--config", str(out / CONFIG), "--out", str(out)]))
    ignored = {f"train.{name}" for name in (*MACHINE_SETTINGS, *(() if (out / METRICS).exists() else FINAL_SETTINGS))}
    changed = sorted(key for key in {**old, **new} if key not in ignored and old.get(key) != new.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{out} holds a run with another configuration: {key} is {old.get(key)!r} there and {new.get(key)!r} here"
            f"{f' ({len(changed) - 1} more differ)' if len(changed) > 1 else ''}; choose another --out, or give --out alone to go on with it"
        )


def _flat(config: object, prefix: str = "") -> dict[str, object]:
    if isinstance(config, dict):
        return {
            key: value for name, part in config.items() for key, value in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: config}
