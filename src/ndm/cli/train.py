"""``ndm train``: train a model, or resume an interrupted run."""

import re
from collections.abc import Sequence
from pathlib import Path

from ndm.errors import UserError
from ndm.train.config import RunConfig, config_parser, parse
from ndm.train.run import Run
from ndm.train.training import train_run


def run_train(arguments: Sequence[str]) -> None:
    """Parse the arguments of ``ndm train`` and train."""
    parser = config_parser(
        description=(
            "Train a model and evaluate it. To resume an interrupted run, rerun the command or give"
            " only --out."
        ),
        epilog=(
            "A model consists of a schedule, a transform, a predictor and a decoder. List its parts"
            " with ndm train --model.help ndm.NDM, and the arguments of a part with ndm train"
            " --model.transform.help ndm.SeparableTransform. Example: ndm train --config digits"
            " --out runs/digits --train.steps 2000"
        ),
    )
    parser.add_argument(
        "--out", type=str, required=True, metavar="RUN", help="folder of the run; created if needed"
    )
    stored = _stored_config(arguments)
    folder = _folder(arguments)
    if stored is None and not _has_sections(arguments):
        problem = "" if folder is None else f"there is no run in {folder} to resume: "
        raise UserError(
            f"{problem}give a configuration and a folder, such as --config digits --out runs/digits"
        )
    values = parse(parser, (["--config", str(stored)] if stored else []) + list(arguments))
    run = Run(Path(values.pop("out")))
    train_run(run, RunConfig(values))


def _stored_config(arguments: Sequence[str]) -> Path | None:
    """Return the configuration of an existing run if there is --out but no --config."""
    if any(one == "--config" or one.startswith("--config=") for one in arguments):
        return None
    folder = _folder(arguments)
    path = None if folder is None else Run(folder).config_path
    return path if path is not None and path.exists() else None


def _folder(arguments: Sequence[str]) -> Path | None:
    """Return the folder of the last --out, if any."""
    outs = [arguments[i + 1] for i, one in enumerate(arguments[:-1]) if one == "--out"]
    outs += [one.removeprefix("--out=") for one in arguments if one.startswith("--out=")]
    return Path(outs[-1]) if outs else None


def _has_sections(arguments: Sequence[str]) -> bool:
    """Whether the data or the model are given by an option."""
    return any(re.match(r"--(config|data|model)\b|-h$|--help$", one) for one in arguments)
