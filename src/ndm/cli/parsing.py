"""Parsing shared by several commands."""

from collections.abc import Sequence

from ndm.errors import UserError
from ndm.train.config import Parser


def run_parser(name: str, description: str, example: str) -> Parser:
    """Return the parser of a command whose first argument is the folder of a run."""
    parser = Parser(
        prog=f"ndm {name}", description=description, epilog=example, exit_on_error=False
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run, created by ndm train")
    return parser


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the arguments before and after the first ``--``."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), tuple(arguments[at + 1 :])


def step_numbers(name: str, text: str, most: int, example: str) -> list[int]:
    """Return the numbers of steps T in a comma-separated text, increasing.

    Raises:
        UserError: they are not integers from 1 to ``most``.
    """
    items = [item.strip() for item in text.split(",")] if text.strip() else []
    if not all(
        item.isascii() and item.isdigit() and len(item) < 9 and 1 <= int(item) <= most
        for item in items
    ):
        raise UserError(
            f"{name}={text!r}: give integers from 1 to {most}, separated by commas, such as"
            f" {example}"
        )
    return sorted({int(item) for item in items})
