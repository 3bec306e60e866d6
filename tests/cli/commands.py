"""Run the command line inside a test.

Strings are split at spaces and paths stay whole:
``run_command("sample", run, "--n 5 --out", tmp_path / "x.npy")``.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ndm.cli.main import main


def arguments(*parts: str | Path) -> list[str]:
    """Return the parts of a command as the arguments of ``main``."""
    return [
        word for part in parts for word in (part.split() if isinstance(part, str) else [str(part)])
    ]


def exit_code(*parts: str | Path) -> int:
    """Run a command and return its exit code."""
    return main(arguments(*parts))


def run_command(*parts: str | Path) -> None:
    """Run a command that must succeed."""
    assert exit_code(*parts) == 0, parts


def rejected(
    capsys: pytest.CaptureFixture[str], parts: Sequence[str | Path], *culprits: str
) -> str:
    """Run a command that must fail with one error line; return the line."""
    capsys.readouterr()
    assert exit_code(*parts) == 2
    error = capsys.readouterr().err
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("ndm: error: ") and "Traceback" not in error
    assert len(lines[0]) <= 300, lines[0]
    for culprit in culprits:
        assert culprit in lines[0], lines[0]
    return lines[0]
