"""The command line: ``ndm COMMAND ...``.

Each command is a typed function in a file of :mod:`ndm.cli`; its arguments and their help come from
its signature. Bad input, and too little memory, end in one line on standard error and exit code 2,
an interruption in exit code 130. Anything else is a bug and keeps its traceback.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from ndm.errors import UserError, require

COMMANDS = {
    "train": "train a model on your data, or go on with an interrupted run",
    "sample": "draw samples from a trained run",
    "evaluate": "measure bounds and likelihoods of a trained run on a split of its data",
    "quality": "measure FID, KID, precision and recall of samples of a trained run",
    "compare": "train and measure several configurations under one budget",
    "reproduce": "carry out an experiment of the paper: train, measure, figures, a page",
    "compress": "compress images or arrays losslessly with a trained model",
    "decompress": "restore what ndm compress made an archive of",
    "inspect": "show what an archive holds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the words after ``ndm``; those of this process by default.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    trains = words[:1] in (["train"], ["compare"], ["reproduce"])
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"ndm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nndm:"
            f" interrupted{'; the same command again goes on from what is there' if trains else ''}",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `ndm ... | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"ndm: error: the disk is full ({error.filename or error}); make room, and give the"
            " same command again",
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if not (
            isinstance(error, MemoryError)
            or "out of memory" in reason
            or "can't allocate memory" in reason
        ):
            raise
        fewer = (
            "train.batch_size, or a larger train.accumulate"
            if trains
            else "--rows"
            if "compress" in words[0]
            else "--batch_size"
        )
        print(
            f"ndm: error: there is not enough memory; give a smaller {fewer} ({reason[:100]})",
            file=sys.stderr,
        )
        return 2


def _dispatch(words: list[str]) -> int:
    listing = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ndm",
        description=(
            "Neural Diffusion Models: train, sample and evaluate diffusion models that learn their"
            " forward process."
        ),
        epilog=(
            f"commands:\n{listing}\n\nndm COMMAND --help tells more. Start with: ndm train --config"
            " configs/digits.yaml --out runs/digits"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="ndm [--version] COMMAND ...",
    )
    parser.add_argument(
        "--version", action="store_true", help="show the versions of ndm and PyTorch"
    )
    if not words or words[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if words else 2
    if words[0] == "--version":
        import torch

        import ndm

        print(f"ndm {ndm.__version__}, torch {torch.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UserError(
            f"{words[0]!r} is not a command; choose one of {', '.join(COMMANDS)}, or see ndm --help"
        )
    for package in ("jsonargparse", "lightning"):
        require(package, package, "train")
    _run(words[0], words[1:])
    return 0


def _run(name: str, words: Sequence[str]) -> None:
    """Parse the words after ``ndm NAME`` and run the command.

    Raises:
        UserError: a word is wrong, or the command met bad input.
    """
    # Here, since Lightning takes seconds to import.
    from ndm.cli.compare import run_compare
    from ndm.cli.compress import run_compress, run_decompress, run_inspect
    from ndm.cli.evaluate import run_evaluate
    from ndm.cli.quality import run_quality
    from ndm.cli.reproduce import run_reproduce
    from ndm.cli.sample import run_sample
    from ndm.cli.train import run_train

    commands = {
        "train": run_train,
        "sample": run_sample,
        "evaluate": run_evaluate,
        "quality": run_quality,
        "compare": run_compare,
        "reproduce": run_reproduce,
        "compress": run_compress,
        "decompress": run_decompress,
        "inspect": run_inspect,
    }
    commands[name]([_underscored(word) for word in words])


def _underscored(word: str) -> str:
    """An option may be written with dashes: ``--batch-size=4`` is ``--batch_size=4``."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
