"""The errors that a user of the library can cause, and can mend.

Every message says what is wrong, where, which values are allowed, and how to mend it, in one line.
The command line prints the message alone and ends with exit code 2; anything that is not a
:class:`UserError` is a bug of ours and keeps its traceback.
"""

import importlib
from collections.abc import Sequence


class UserError(ValueError):
    """A wrong value, file or combination that the user can mend; the message is one line."""


class MissingExtraError(UserError, ImportError):
    """A part of the library needs a package that is not installed.

    Args:
        package: the package that could not be imported.
        extra: the extra of ``ndm`` that brings it.
    """

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"{package} is not installed; it comes with the extra {extra!r}: pip install"
            f" 'ndm[{extra}]'"
        )


class ForwardModeError(UserError):
    """A network cannot be differentiated in time by forward-mode automatic differentiation."""


class ForeignModuleError(UserError):
    """A saved model has a part that is not of this library."""


def describe_value(value: object) -> str:
    """Return a one-line ``repr`` of a value, shortened to 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def check_whole(name: str, value: object, least: int) -> None:
    """Check that an argument is a whole number of at least ``least``.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={describe_value(value)}: give a whole number of at least {least}")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Check that an argument is one of the known words.

    Raises:
        UserError: it is not.
    """
    if value not in known:
        raise UserError(
            f"{name}={describe_value(value)} is not known: choose one of {', '.join(known)}"
        )


def require(module: str, package: str, extra: str) -> None:
    """Check that an optional package can be imported.

    Args:
        module: the module to import.
        package: the package that holds it.
        extra: the extra of ``ndm`` that brings the package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, extra) from error
