"""Packages that only some sources need: a source checks for them before it reads, so that the others work without."""

import importlib

from ndm.errors import MissingExtraError


def require(module: str, package: str, extra: str = "data") -> None:
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
