"""The command line: ``ndm COMMAND ...``.

Each command is a module of :mod:`ndm.cli`. Its options and their help come from a signature and
its docstring. Bad input, a full disk or lack of memory prints one line on standard error and exits
with code 2; an interruption exits with code 130. Any other exception is a bug and keeps its
traceback.
"""

import argparse
import contextlib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

from ndm.errors import DataWarning, UserError, one_line, require, shorten_line

COMMANDS = {
    "train": "train a model, or resume an interrupted run",
    "sample": "draw samples from a trained run",
    "evaluate": "measure bounds and likelihoods of a trained run",
    "quality": "measure FID, KID, precision and recall of samples",
    "compare": "train and measure several configurations under the same budget",
    "reproduce": "run an experiment of the paper and write a report",
    "compress": "compress images or arrays losslessly with a trained model",
    "decompress": "restore the files from an archive",
    "inspect": "show the contents of an archive",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: arguments after ``ndm``; by default those of this process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    trains = arguments[:1] in (["train"], ["compare"], ["reproduce"])
    try:
        with _own_warnings():
            return _dispatch(arguments)
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        advice = "; rerun the command to resume" if trains else ""
        print(f"\nndm: interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output closed it, as in `ndm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            from ndm.writing import shortened

            name = shortened(error.filename or "a path")
            return fail(f"{name}: the name is too long; choose one of at most 255 bytes")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or error
        return fail(f"the disk is full ({place}); free some space")
    except (MemoryError, RuntimeError) as error:
        reason = one_line(error)
        if not (
            isinstance(error, MemoryError)
            or "out of memory" in reason
            or "can't allocate memory" in reason
        ):
            raise
        if trains:
            advice = "lower train.batch_size or raise train.accumulate"
        else:
            advice = "lower " + ("--rows" if "compress" in arguments[0] else "--batch_size")
        return fail(f"out of memory; {advice} ({reason[:100]})")


@contextlib.contextmanager
def _own_warnings() -> Iterator[None]:
    """Print warnings of this library as one line, and hide those of others, which name its code."""

    def show(message: Warning | str, category: type[Warning], *place: object) -> None:
        if issubclass(category, DataWarning):
            print(f"ndm: warning: {one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.showwarning = show  # type: ignore[assignment]
        yield


def fail(error: object) -> int:
    """Print an error as one line of at most 300 characters, and return the exit code 2."""
    start = "ndm: error: "
    print(start + shorten_line(str(error), 300 - len(start)), file=sys.stderr)
    return 2


def _dispatch(arguments: list[str]) -> int:
    listing = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ndm",
        description=(
            "Neural Diffusion Models: train, sample and evaluate diffusion models that learn\n"
            "their forward process."
        ),
        epilog=(
            f"commands:\n{listing}\n\nRun ndm COMMAND --help for the options of a command.\n"
            "Example: ndm train --config digits --out runs/digits"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="ndm [--version] COMMAND ...",
    )
    parser.add_argument(
        "--version", action="store_true", help="show the versions of ndm and PyTorch"
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        import torch

        import ndm

        print(f"ndm {ndm.__version__}, torch {torch.__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"{name!r} is not a command; choose one of {', '.join(COMMANDS)}, or see ndm --help"
        )
    for package in ("jsonargparse", "lightning"):
        require(package, package, "train")
    _run(name, arguments[1:])
    return 0


def _run(name: str, arguments: Sequence[str]) -> None:
    """Parse the arguments after ``ndm NAME`` and run the command.

    Raises:
        UserError: an argument or an input is wrong.
    """
    # Imported here, because a command imports only what it needs, and reports errors soon.
    modules = {"decompress": "compress", "inspect": "compress"}
    module = importlib.import_module(f"ndm.cli.{modules.get(name, name)}")
    run: Callable[[Sequence[str]], None] = getattr(module, f"run_{name}")
    run([_underscored(argument) for argument in arguments])


def _underscored(argument: str) -> str:
    """Replace dashes in the name of an option: ``--batch-size=4`` becomes ``--batch_size=4``."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
