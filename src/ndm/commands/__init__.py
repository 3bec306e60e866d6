"""What each command of ``ndm`` does, a file each; :mod:`ndm.commands.parsing` turns words into arguments."""

from collections.abc import Sequence


def run_command(name: str, words: Sequence[str]) -> None:
    """Parse the words after ``ndm NAME`` and run the command.

    Raises:
        UserError: a word is wrong, or the command met bad input.
    """
    from ndm.commands.compare import run_compare
    from ndm.commands.compress import run_compress, run_decompress, run_inspect
    from ndm.commands.evaluate import run_evaluate
    from ndm.commands.quality import run_quality
    from ndm.commands.reproduce import run_reproduce
    from ndm.commands.sample import run_sample
    from ndm.commands.train import run_train

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
