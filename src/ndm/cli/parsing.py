"""What several commands parse alike."""

from jsonargparse import ArgumentParser

from ndm.errors import UserError


def run_parser(name: str, description: str) -> ArgumentParser:
    """The parser of a command whose first argument is the folder of a run."""
    parser = ArgumentParser(prog=f"ndm {name}", description=description, exit_on_error=False)
    parser.add_argument("run", metavar="RUN", help="folder of the run, made by ndm train")
    return parser


def step_numbers(name: str, text: str, most: int, example: str) -> list[int]:
    """The numbers of steps T in a comma-separated text, increasing.

    Raises:
        UserError: they are not whole numbers from 1 to ``most``.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(
        word.isascii() and word.isdigit() and len(word) < 9 and 1 <= int(word) <= most
        for word in words
    ):
        raise UserError(
            f"{name}={text!r}: give whole numbers from 1 to {most}, separated by commas, such as"
            f" {example}"
        )
    return sorted({int(word) for word in words})
