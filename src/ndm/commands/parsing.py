"""Words, YAML files and the folders of runs, turned into arguments and objects (jsonargparse: class paths, overrides)."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from ndm.data import DataSource
from ndm.errors import ForeignModuleError, UserError
from ndm.model import NDM
from ndm.serialize import CONFIG_NAME, WEIGHTS_NAME, read_json, read_weights

set_parsing_settings(docstring_parse_attribute_docstrings=True)

CONFIG = "config.yaml"


def run_parser(name: str, description: str) -> ArgumentParser:
    """The parser of a command whose first word is the folder of a run."""
    parser = ArgumentParser(prog=f"ndm {name}", description=description, exit_on_error=False)
    parser.add_argument("run", metavar="RUN", help="folder of the run, made by ndm train")
    return parser


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse, turning the parser's complaints into a :class:`UserError`."""
    try:
        return parser.parse_args(list(words))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UserError(f"{' '.join(str(error).split())} (see {parser.prog} --help)") from error


def step_numbers(name: str, text: str, most: int, example: str) -> list[int]:
    """The numbers of steps T in a comma-separated text, increasing.

    Raises:
        UserError: they are not whole numbers from 1 to ``most``.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isascii() and word.isdigit() and len(word) < 9 and 1 <= int(word) <= most for word in words):
        raise UserError(f"{name}={text!r}: give whole numbers from 1 to {most}, separated by commas, such as {example}")
    return sorted({int(word) for word in words})


def build(parser: ArgumentParser, arguments: Namespace) -> Namespace:
    """Build the objects that parsed arguments describe, turning complaints of constructors into a :class:`UserError`."""
    try:
        return parser.instantiate(arguments)
    except (TypeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise UserError(f"the configuration cannot be built: {cause or error}") from error


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
        raise UserError(f"{run / CONFIG} cannot be read; it is damaged: restore it, or train into another folder") from error
    if not isinstance(config, dict):
        raise UserError(f"{run / CONFIG} holds no configuration; it is damaged: restore it, or train into another folder")
    return config


def load_run(run: Path) -> NDM:
    """The trained model of a run, of its last checkpoint where the run is not finished, or of a model folder; in evaluation mode.

    A network that is not of this library is imported from where ``config.yaml`` says, as it is when the run goes on.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not run.is_dir():
        raise UserError(f"there is no run {run}; make one with: ndm train --config configs/digits.yaml --out {run}")
    if (run / CONFIG_NAME).is_file():
        return NDM.from_pretrained(run)
    if (run / "model" / CONFIG_NAME).is_file():
        try:
            return NDM.from_pretrained(run / "model")
        except ForeignModuleError:
            model = _model_of(run)
            model.load_state_dict(read_weights(run / "model" / WEIGHTS_NAME, model.state_dict()))
            model.info = {"data": read_json(run / "model" / CONFIG_NAME).get("data")}
            return model.eval()
    from ndm.train.run import CHECKPOINT, DATA, weights_of  # here: Lightning takes seconds to import

    if not (run / CHECKPOINT).is_file():
        raise UserError(f"{run} holds no trained model yet; go on with: ndm train --out {run}")
    model = _model_of(run)
    step = weights_of(run, model)["global_step"]
    model.info = {"data": read_json(run / DATA)}
    print(f"ndm: warning: {run} is not finished; this is its model after {step:,} steps", file=sys.stderr)
    return model.eval()


def _model_of(run: Path) -> NDM:
    """The model that the configuration of a run describes, untrained."""
    return _part(run, "model", lambda parser: parser.add_class_arguments(NDM, "model"))


def load_data(run: Path) -> DataSource:
    """The data source of a run, from its configuration.

    Raises:
        UserError: the configuration is missing or damaged.
    """
    return _part(run, "data", lambda parser: parser.add_subclass_arguments(DataSource, "data", required=True))


def _part(run: Path, name: str, add: Callable[[ArgumentParser], object]) -> Any:
    """What a section of the configuration of a run describes."""
    parser = ArgumentParser(prog="ndm", exit_on_error=False)
    add(parser)
    config = read_config(run)
    try:
        arguments = parser.parse_object({name: config.get(name)})
    except ArgumentError as error:
        raise UserError(f"{run / CONFIG}: {' '.join(str(error).split())}") from error
    return build(parser, arguments)[name]
