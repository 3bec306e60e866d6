"""A training run, from its configuration to its evaluation."""

from pathlib import Path
from typing import Any

import torch
import yaml

from ndm.errors import UserError
from ndm.evaluation.processes import started_first
from ndm.model import DiffusionModel
from ndm.serialize import to_config, write_atomically
from ndm.train.checks import check_parts, describe
from ndm.train.config import RunConfig, flat
from ndm.train.results import describe_results, write_results
from ndm.train.run import Run


def train_run(run: Run, config: RunConfig) -> dict[str, Any] | None:
    """Train, evaluate and draw pictures.

    An interrupted run is resumed; a finished one returns immediately.

    Args:
        run: the run. Its folder may be new, empty or hold a run with the same configuration.
        config: the configuration.

    Returns:
        The metrics, or None in processes other than the first.

    Raises:
        UserError: the folder holds another run, the configuration is wrong, the data changed, or
            training failed for a reason that the user can fix.
    """
    run.check(config)
    if run.finished:
        metrics = run.metrics()
        print(
            f"{run.folder} is finished: {metrics['nelbo_bpd']:.4f} bits/dim on"
            f" {metrics.get('split')}; nothing to do (choose another --out to train again)"
        )
        return metrics
    torch.manual_seed(config.seed)
    parts = config.build()
    settings = parts.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    check_parts(parts)  # before anything is written
    if settings.start_from is not None and not run.checkpoint_path.exists():
        start_from(parts.model, settings.start_from)
    with run.lock():
        run.check(config)  # again: another process may have trained into the folder meanwhile
        if started_first():
            text = yaml.safe_dump(config.to_dict(), sort_keys=False)
            write_atomically(run.config_path, lambda path: path.write_text(text, encoding="utf-8"))
            print(describe(parts, run.folder), flush=True)
        run.record_data(parts.data)
        # Imported here: Lightning takes seconds, and errors of the data need not wait for it.
        from ndm.train.fit import fit

        if not fit(parts, run, config.seed):
            return None
        metrics = write_results(parts, run, config.seed)
    print(describe_results(metrics))
    print(f"wrote {run.folder}/model, metrics.json, samples.png, transform.png")
    return metrics


def start_from(model: DiffusionModel, run: str) -> None:
    """Load the weights of a run into a model.

    Dropout, steps T, eta and the time sampler may differ: no weights depend on them.

    Raises:
        UserError: the run does not exist, or its model differs.
    """
    other = Run(Path(run)).model()
    there, here = flat(to_config(other)), flat(to_config(model))
    fix = f"configure the model of {run}, or leave train.start_from out"
    for key in {**here, **there}:
        path = key.removeprefix("init_args.").split(".")
        free = path[0] in ("time_sampler", "steps", "eta") or path[-1] == "dropout"
        if there.get(key) != here.get(key) and not free:
            name = ".".join(part for part in path if part != "init_args")
            raise UserError(
                f"train.start_from={run}: {name} is {there.get(key)!r} there and"
                f" {here.get(key)!r} here; {fix}"
            )
    weights, own = other.state_dict(), model.state_dict()
    sampler = {name for name in {**own, **weights} if name.startswith("time_sampler.")}
    for name in {**own, **weights}:
        shapes = [tuple(one[name].shape) if name in one else "missing" for one in (weights, own)]
        if shapes[0] != shapes[1] and name not in sampler:
            raise UserError(
                f"train.start_from={run}: {name} is {shapes[0]} there and {shapes[1]} here; {fix}"
            )
    model.load_state_dict({name: (own if name in sampler else weights)[name] for name in own})
