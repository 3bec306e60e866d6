"""The configuration of a run: data, model, training settings and seed.

It is read from YAML files and command-line options (jsonargparse). Values have dotted names as on
the command line, without the ``init_args`` of classes: ``model.predictor.network.channels``.
"""

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from ndm.data import DataSource
from ndm.data.columns import listed
from ndm.errors import UserError, check_whole, one_line
from ndm.model import DiffusionModel
from ndm.train.settings import TrainSettings
from ndm.train.yaml_reader import MODE, BoundError, check_text, check_yaml, load_value, read_yaml
from ndm.writing import shortened

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_CONFIGS = Path(str(files("ndm") / "configs"))
Overrides = Sequence[str] | Mapping[str, object]
"""Options as on the command line, ``["--train.steps", "100"]``, or a mapping from names to values,
``{"train.steps": 100}``.
"""


@dataclass(frozen=True)
class RunParts:
    """The objects that a configuration describes."""

    model: DiffusionModel
    data: DataSource
    settings: TrainSettings

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class RunConfig:
    """The parsed configuration of a run, with all defaults filled in."""

    arguments: Namespace

    def __post_init__(self) -> None:
        """Check the seed.

        Raises:
            UserError: it is not an integer of at least 0 and less than 2^64.
        """
        check_whole("seed", self.arguments.seed, 0)

    @classmethod
    def parse(cls, options: Sequence[str]) -> "RunConfig":
        """Parse options of ``ndm train``, including ``--config FILE``.

        Raises:
            UserError: an option is wrong.
        """
        return cls(parse(config_parser(), options))

    @classmethod
    def read(cls, path: Path, overrides: Overrides = ()) -> "RunConfig":
        """Read a YAML file and override some of its values.

        Raises:
            UserError: the file or a value is wrong.
        """
        return cls.parse(["--config", str(path), *as_options(overrides)])

    def override(self, overrides: Overrides) -> "RunConfig":
        """Return a copy of the configuration with some values replaced.

        Raises:
            UserError: a value is wrong.
        """
        return RunConfig(parse(config_parser(), as_options(overrides), deepcopy(self.arguments)))

    @property
    def seed(self) -> int:
        """Seed of the initial weights, the data order, the times and the noise."""
        return int(self.arguments.seed)

    def get(self, name: str) -> Any:
        """Return the value of a dotted name, or None if the name does not exist."""
        node: Any = self.to_dict()
        for part in name.split("."):
            if isinstance(node, dict) and part not in node:
                node = node.get("init_args")
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain types, ready for YAML and JSON."""
        config: dict[str, Any] = yaml.safe_load(
            config_parser().dump(self.arguments, skip_unset=False)
        )
        return {key: value for key, value in config.items() if key != "config"}

    def build(self) -> RunParts:
        """Build the model, the data source and the settings.

        Raises:
            UserError: an argument of one of them is wrong.
        """
        parts = build(config_parser(), deepcopy(self.arguments))
        return RunParts(parts.model, parts.data, parts.train)


class Parser(ArgumentParser):
    """A parser of bounded YAML whose help is plain text, although it comes from docstrings."""

    def __init__(self, *args: Any, parser_mode: str = MODE, **options: Any):
        super().__init__(*args, parser_mode=parser_mode, **options)

    def format_help(self, formatter: Any = None) -> str:
        """Return the help without the markup of docstrings."""
        text = re.sub(r":\w+:`~?([^`]*)`", r"\1", super().format_help(formatter))
        return text.replace("``", "")


def config_parser(name: str = "train", **options: Any) -> ArgumentParser:
    """Return the parser of configurations for the command ``ndm NAME``.

    Args:
        name: the command.
        options: arguments of ``ArgumentParser``.
    """
    parser = Parser(prog=f"ndm {name}", exit_on_error=False, **options)
    parser.add_argument(
        "--config",
        action="config",
        help=(
            "configuration file (YAML with the sections data, model, train), or the name of an"
            " included one; later options override it. Included: "
            + ", ".join(one for one in included_configs() if not one.startswith("compare-"))
        ),
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the initial weights, data order, times and noise",
    )
    add_data(parser)
    add_model(parser)
    parser.add_class_arguments(TrainSettings, "train")
    for section in ("data", "model", "train"):
        assert parser.groups is not None
        parser.groups[section].title = section
    return parser


def add_data(parser: ArgumentParser) -> None:
    """Add the section ``data`` to a parser."""
    parser.add_subclass_arguments(
        DataSource,
        "data",
        required=True,
        help="a class of ndm.data; see --data.help CLASS",
    )


def add_model(parser: ArgumentParser) -> None:
    """Add the section ``model`` to a parser: a :class:`ndm.DiffusionModel`, by default an NDM."""
    parser.add_subclass_arguments(
        DiffusionModel,
        "model",
        required=True,
        help="a model class, by default ndm.NDM; see --model.help CLASS",
    )
    parser.set_defaults({"model": {"class_path": "ndm.NDM"}})


def parse(
    parser: ArgumentParser, options: Sequence[str], base: Namespace | None = None
) -> Namespace:
    """Parse options, starting from the values of ``base`` if it is given.

    Raises:
        UserError: the parser rejects an option.
    """
    try:
        return parser.parse_args(_checked(_with_paths(options)), namespace=base)
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UserError(f"{_reason(error)} (see {parser.prog} --help)") from error


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "collections.abc.Sequence": "a list, such as [a, b]",
    "collections.abc.Mapping": "a mapping, such as {a: b}",
}
"""Types in the messages of the parser, in words."""


def _reason(error: Exception) -> str:
    """Shorten a parser's message to the full name of the option and what is wrong with it."""
    text = one_line(error)
    text = re.split(r" - Expected a <class 'NoneType'>| Given value type:", text)[0]
    for noise in (
        r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: ",
        r"- Expected a path but \S+ either not accessible or invalid ",
        r"Problem with given class_path '[^']*': (?=-? ?Parser key)",
    ):
        text = re.sub(noise, "", text)
    text = re.sub(r"Problem with given class_path '([^']*)': ", r"\1: ", text)
    text = re.sub(
        r"Expected a <class '([^']+)'>(\. Got value: )?",
        lambda found: f"give {_KINDS.get(found[1], found[1])}{', not ' if found[2] else ''}",
        text,
    )
    key = re.compile(r'-? ?Parser key "([^"]+)": ')
    option = ".".join(key.findall(text))
    text = " ".join(key.sub("", text).split()).lstrip("- ")
    return f"--{option}: {text}" if option else text


def build(parser: ArgumentParser, arguments: Namespace) -> Namespace:
    """Build the objects that parsed arguments describe.

    Raises:
        UserError: a constructor rejects its arguments.
    """
    try:
        return parser.instantiate(arguments)
    except (TypeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise UserError(f"the configuration cannot be built: {cause or error}") from error


def build_section(path: Path, name: str, add: Callable[[ArgumentParser], None]) -> Any:
    """Build the object of one section of a configuration file, ignoring the other sections.

    Raises:
        UserError: the file is missing or damaged, or the section is wrong.
    """
    parser = Parser(prog="ndm", exit_on_error=False)
    add(parser)
    config = read_values(path)
    try:
        arguments = parser.parse_object({name: config.get(name)})
    except ArgumentError as error:
        raise UserError(f"{path}: {_reason(error)}") from error
    return build(parser, arguments)[name]


def read_values(path: Path) -> dict[str, Any]:
    """Return the values of a run's configuration file, unchecked.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        config = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; {path.parent} is not a run of ndm train"
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is damaged: it contains no configuration; restore it, or train into another"
            " folder"
        )
    return config


def find_config(name: str) -> Path:
    """Return the path of a configuration, given its path or an included name such as ``digits``.

    Raises:
        UserError: no such configuration exists.
    """
    path = Path(name)
    if path.exists():
        return path
    packaged = _CONFIGS / (path.name if path.suffix == ".yaml" else f"{path.name}.yaml")
    if len(path.parts) == 1 and packaged.is_file():
        return packaged
    names = included_configs()
    meant = difflib.get_close_matches(path.stem, names, n=1)
    question = f" (did you mean {meant[0]}?)" if meant else ""
    raise UserError(
        f"there is no configuration {shortened(name)}{question}: give the path of a YAML file, or"
        f" one of {listed(names, 80)} (see ndm train --help)"
    )


@cache
def included_configs() -> tuple[str, ...]:
    """Return the names of the configurations that come with the library."""
    return tuple(sorted(one.stem for one in _CONFIGS.glob("*.yaml")))


def _with_paths(options: Sequence[str]) -> list[str]:
    """Replace the names of configurations in the options by their paths."""
    resolved = list(options)
    for index, option in enumerate(resolved):
        if option.startswith("--config="):
            resolved[index] = f"--config={find_config(option.removeprefix('--config='))}"
        elif index and resolved[index - 1] == "--config":
            resolved[index] = str(find_config(option))
    return resolved


def _checked(options: Sequence[str]) -> Sequence[str]:
    """Return the options, after checking configuration files and values that are YAML.

    Raises:
        UserError: one is not within the bounds of :mod:`ndm.train.yaml_reader`.
    """
    for index, option in enumerate(options):
        name, equals, value = option.partition("=")
        if not (equals and option.startswith("--")):
            name, value = options[index - 1] if index else "option", option
        if name == "--config":
            # Not a pipe, which can be read only once; the parser checks it as well.
            if Path(value).is_file():
                read_yaml(Path(value), load_value)
            continue
        try:
            check_text(value)
            if value.lstrip().startswith(("{", "[")):
                with contextlib.suppress(yaml.MarkedYAMLError, yaml.reader.ReaderError):
                    check_yaml(value)
        except BoundError as error:
            raise UserError(f"{name[:80]}: {error}") from error
    return options


def flat(config: object, prefix: str = "") -> dict[str, object]:
    """Flatten nested mappings into one with dotted names."""
    if not isinstance(config, dict):
        return {prefix: config}
    parts = (
        flat(part, f"{prefix}.{name}" if prefix else str(name)) for name, part in config.items()
    )
    return {key: value for part in parts for key, value in part.items()}


def as_options(overrides: Overrides) -> list[str]:
    """Return overrides as command-line options."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    pairs = (
        (f"--{name}", value if isinstance(value, str) else json.dumps(value))
        for name, value in overrides.items()
    )
    return [part for pair in pairs for part in pair]
