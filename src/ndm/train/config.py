"""The configuration of a run: data, model, training settings and seed, read from YAML files and
options (jsonargparse).

Values have dotted names as on the command line, without the ``init_args`` of classes:
``model.predictor.network.channels``.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from ndm.data import DataSource
from ndm.errors import UserError, check_whole
from ndm.model import DiffusionModel
from ndm.train.settings import TrainSettings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Overrides = Sequence[str] | Mapping[str, object]
"""Options as on the command line, ``["--train.steps", "100"]``, or values by name,
``{"train.steps": 100}``.
"""


@dataclass(frozen=True)
class RunParts:
    """What a configuration describes."""

    model: DiffusionModel
    data: DataSource
    settings: TrainSettings

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run, parsed, with all defaults."""

    arguments: Namespace

    def __post_init__(self) -> None:
        """Check the seed.

        Raises:
            UserError: it is not a whole number.
        """
        check_whole("seed", self.arguments.seed, 0)

    @classmethod
    def parse(cls, options: Sequence[str]) -> "RunConfig":
        """Read options of ``ndm train``, ``--config FILE`` among them.

        Raises:
            UserError: one is wrong.
        """
        return cls(parse(config_parser(), options))

    @classmethod
    def read(cls, path: Path, overrides: Overrides = ()) -> "RunConfig":
        """Read a YAML file, and override some of its values.

        Raises:
            UserError: the file or a value is wrong.
        """
        return cls.parse(["--config", str(path), *as_options(overrides)])

    def override(self, overrides: Overrides) -> "RunConfig":
        """The same configuration with other values.

        Raises:
            UserError: a value is wrong.
        """
        return RunConfig(parse(config_parser(), as_options(overrides), deepcopy(self.arguments)))

    @property
    def seed(self) -> int:
        """Seed of the initial weights, the data order, the times and the noise."""
        return int(self.arguments.seed)

    def get(self, name: str) -> Any:
        """The value of a dotted name; None if there is none."""
        node: Any = self.to_dict()
        for part in name.split("."):
            if isinstance(node, dict) and part not in node:
                node = node.get("init_args")
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def to_dict(self) -> dict[str, Any]:
        """All values, as YAML and JSON hold them."""
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


def config_parser(name: str = "train", **options: Any) -> ArgumentParser:
    """A parser of configurations, for the command ``ndm NAME``; ``options`` go to the parser."""
    parser = ArgumentParser(prog=f"ndm {name}", exit_on_error=False, **options)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with the sections data, model and train; later options override it",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the initial weights, the data order, the times and the noise",
    )
    add_data(parser)
    add_model(parser)
    parser.add_class_arguments(TrainSettings, "train")
    return parser


def add_data(parser: ArgumentParser) -> None:
    """Let a parser take a section ``data``."""
    parser.add_subclass_arguments(
        DataSource,
        "data",
        required=True,
        help="the data: a class of ndm.data; see --data.help CLASS",
    )


def add_model(parser: ArgumentParser) -> None:
    """Let a parser take a section ``model``: any :class:`ndm.DiffusionModel`; :class:`ndm.NDM`
    unless another class is named.
    """
    parser.add_subclass_arguments(
        DiffusionModel,
        "model",
        required=True,
        help="the model: ndm.NDM unless another class is named; see --model.help CLASS",
    )
    parser.set_defaults({"model": {"class_path": "ndm.NDM"}})


def parse(
    parser: ArgumentParser, options: Sequence[str], base: Namespace | None = None
) -> Namespace:
    """Parse options, on top of a parsed base.

    Raises:
        UserError: the parser complains.
    """
    try:
        return parser.parse_args(_with_paths(options), namespace=base)
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UserError(f"{' '.join(str(error).split())} (see {parser.prog} --help)") from error


def build(parser: ArgumentParser, arguments: Namespace) -> Namespace:
    """Build the objects that parsed arguments describe.

    Raises:
        UserError: a constructor complains.
    """
    try:
        return parser.instantiate(arguments)
    except (TypeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise UserError(f"the configuration cannot be built: {cause or error}") from error


def build_section(path: Path, name: str, add: Callable[[ArgumentParser], None]) -> Any:
    """Build what one section of a configuration file describes, whatever the others hold.

    Raises:
        UserError: the file is missing or damaged, or the section is wrong.
    """
    parser = ArgumentParser(prog="ndm", exit_on_error=False)
    add(parser)
    config = read_values(path)
    try:
        arguments = parser.parse_object({name: config.get(name)})
    except ArgumentError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    return build(parser, arguments)[name]


def read_values(path: Path) -> dict[str, Any]:
    """The values of the configuration file of a run, unchecked.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; {path.parent} is not a run of ndm train"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read; it is damaged: restore it, or train into another folder"
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} holds no configuration; it is damaged: restore it, or train into another"
            " folder"
        )
    return config


def find_config(name: str) -> Path:
    """The file of a configuration: a path, or the name of one that comes with the library, such as
    ``digits``.

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    folder = Path(str(files("ndm") / "configs"))
    packaged = folder / (path.name if path.suffix == ".yaml" else f"{path.name}.yaml")
    if len(path.parts) == 1 and packaged.is_file():
        return packaged
    names = ", ".join(sorted(one.stem for one in folder.glob("*.yaml")))
    raise UserError(
        f"there is no configuration {name}: give the path of a YAML file, or one of {names}"
    )


def _with_paths(options: Sequence[str]) -> list[str]:
    """Options with the path of each configuration in the place of its name."""
    found = list(options)
    for index, word in enumerate(found):
        if word.startswith("--config="):
            found[index] = f"--config={find_config(word.removeprefix('--config='))}"
        elif index and found[index - 1] == "--config":
            found[index] = str(find_config(word))
    return found


def flat(config: object, prefix: str = "") -> dict[str, object]:
    """Nested values by dotted names."""
    if not isinstance(config, dict):
        return {prefix: config}
    parts = (
        flat(part, f"{prefix}.{name}" if prefix else str(name)) for name, part in config.items()
    )
    return {key: value for part in parts for key, value in part.items()}


def as_options(overrides: Overrides) -> list[str]:
    """Overrides as options on the command line."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    pairs = (
        (f"--{name}", value if isinstance(value, str) else json.dumps(value))
        for name, value in overrides.items()
    )
    return [word for pair in pairs for word in pair]
