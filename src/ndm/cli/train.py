"""``ndm train``: train a model, or resume an interrupted run."""

from collections.abc import Sequence
from pathlib import Path

from ndm.train.config import RunConfig, config_parser, parse
from ndm.train.run import Run
from ndm.train.training import train_run


def run_train(words: Sequence[str]) -> None:
    """``ndm train``: parse and train."""
    parser = config_parser(
        description=(
            "Train a model and evaluate it. Rerun the command to resume an interrupted run; --out"
            " alone is enough then."
        ),
        epilog=(
            "A model is built of a schedule, a transform, a predictor and a decoder; ndm train"
            " --model.help ndm.NDM lists all its parts, --model.transform.help"
            " ndm.SeparableTransform the arguments of one. Example: ndm train --config digits --out"
            " runs/digits --train.steps 2000"
        ),
    )
    parser.add_argument(
        "--out", type=str, required=True, metavar="RUN", help="folder of the run; created if needed"
    )
    stored = _stored_config(words)
    arguments = parse(parser, (["--config", str(stored)] if stored else []) + list(words))
    run = Run(Path(arguments.pop("out")))
    train_run(run, RunConfig(arguments))


def _stored_config(words: Sequence[str]) -> Path | None:
    """The configuration of an existing run, if the words have --out but no --config."""
    if any(word == "--config" or word.startswith("--config=") for word in words):
        return None
    outs = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--out"]
    outs += [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    path = Run(Path(outs[-1])).config_path if outs else None
    return path if path is not None and path.exists() else None
