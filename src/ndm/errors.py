"""Errors that users can cause and fix.

Every message is one line: what is wrong, where, which values are allowed, and how to fix it. The
command line prints only the message and exits with code 2. Any exception that is not a
:class:`UserError` is a bug and keeps its traceback.
"""

import importlib.util
from collections.abc import Sequence


class UserError(ValueError):
    """A wrong value, file or combination that the user can fix; the message is one line."""


class DataWarning(UserWarning):
    """Data can be used, but perhaps not as the user meant; the message is one line."""


class MissingExtraError(UserError, ImportError):
    """An optional package is needed but not installed.

    Args:
        package: the package that could not be imported.
        extra: the extra of ``ndm`` that installs it.
    """

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"{package} is not installed; install it with the extra {extra!r}: pip install"
            f" 'ndm[{extra}]'"
        )


class ForwardModeError(UserError):
    """A network cannot be differentiated in time by forward-mode automatic differentiation."""


class ForeignModuleError(UserError):
    """A saved model has a part that is not a class of this library."""


def describe_value(value: object) -> str:
    """Return a one-line ``repr`` of a value, shortened to 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(text: object, most: int | None = None) -> str:
    """Return a text, such as an error's message, as one line of at most ``most`` characters."""
    return " ".join(str(text).split())[:most]


def shorten_line(text: str, most: int = 300) -> str:
    """Return one line of at most ``most`` characters: long words are cut, then the middle."""
    for longest in (200, 100, 60):
        line = " ".join(
            word if len(word) <= longest else f"{word[: longest // 4]}...{word[-longest // 2 :]}"
            for word in text.split()
        )
        if len(line) <= most:
            return line
    end = line[-most // 2 :].partition(" ")[2]
    return f"{line[: most - len(end) - 5].rstrip()} ... {end}"


def check_whole(name: str, value: object, least: int) -> None:
    """Check that an argument is an integer of at least ``least`` and less than 2^64.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={describe_value(value)}: give an integer of at least {least}")
    if value >= 2**64:  # the limit of PyTorch's seeds
        raise UserError(f"{name}={describe_value(value)}: give an integer of less than 2^64")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that an argument is one of the choices.

    Raises:
        UserError: it is not.
    """
    if value not in choices:
        raise UserError(
            f"{name}={describe_value(value)} is unknown: choose one of {', '.join(choices)}"
        )


def require(module: str, package: str, extra: str) -> None:
    """Check that an optional package is installed, without importing it.

    Args:
        module: the module that is needed.
        package: the package that contains it.
        extra: the extra of ``ndm`` that installs the package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that contains the module
        found = False
    if not found:
        raise MissingExtraError(package, extra)
