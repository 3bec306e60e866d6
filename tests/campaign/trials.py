"""Run one command on one damaged file, in a forked child with limits on time and memory.

A trial passes if the command works or ends with one error line of at most 300 characters and exit
code 2. A traceback, a signal, a hang, too much memory or another output fails.
"""

import contextlib
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SECONDS, MEMORY = 20.0, 2**30
"""Limits of a trial: seconds, and bytes of memory beyond those it starts with."""
LONGEST_LINE = 300


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    verdict: str
    """``worked``, ``rejected``, or what failed: ``traceback``, ``signal``, ``hang``, ``memory``,
    ``output`` or ``wrong``.
    """
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict in ("worked", "rejected")


def run(action: Callable[[], int]) -> Outcome:
    """Run an action that returns an exit code in a forked child, and judge what it does."""
    with tempfile.TemporaryFile() as output, mmap.mmap(-1, 8) as shared:
        child = os.fork()
        if child == 0:
            # A fork drops the pages of mapped libraries, so that only the child knows its start.
            shared[:] = _peak(resource.getrusage(resource.RUSAGE_SELF)).to_bytes(8, "little")
            _run_child(action, output.fileno())
        status, usage, hung = _wait(child)
        grown = _peak(usage) - int.from_bytes(shared[:], "little")
        output.seek(0)
        text = output.read().decode(errors="replace")
    if hung:
        return Outcome("hang", f"over {SECONDS:g} s")
    if grown > MEMORY:
        return Outcome("memory", f"{grown / 2**20:.0f} MiB more than before")
    if os.WIFSIGNALED(status):
        return Outcome("signal", signal.Signals(os.WTERMSIG(status)).name)
    return judge(os.WEXITSTATUS(status), text)


def judge(code: int, errors: str) -> Outcome:
    """Judge an exit code and what was written to standard error."""
    lines = [line for line in errors.splitlines() if line.strip()]
    if "Traceback (most recent call last)" in errors or code not in (0, 2, 3):
        return Outcome("traceback", " | ".join(lines[-3:])[:300])
    if code == 3:
        return Outcome("wrong", lines[-1] if lines else "")
    if code == 0:
        return Outcome("worked")
    last = lines[-1] if lines else ""
    if not last.startswith("ndm: error: ") or len(last) > LONGEST_LINE:
        return Outcome("output", last[:400])
    if any(not line.startswith("ndm: ") for line in lines):
        return Outcome("output", " | ".join(lines)[:400])
    return Outcome("rejected")


def _run_child(action: Callable[[], int], output: int) -> None:
    """Run the action with standard error in a file and standard output nowhere; never return."""
    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = action()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> tuple[int, resource.struct_rusage, bool]:
    """Wait for a child, and kill it when it hangs or grows beyond twice the limit."""
    deadline = time.monotonic() + SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage, False
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage, True
        time.sleep(0.002)


def _peak(usage: resource.struct_rusage) -> int:
    """The most memory a process held at once, bytes."""
    return usage.ru_maxrss * 1024


def table(rows: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    """A Markdown table of trials and failures by kind of file."""
    head = ["kind", "tried", "worked", "rejected", "failed"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for kind, outcomes in rows:
        counts = [len(outcomes)]
        counts += [
            sum(one.verdict == verdict for one in outcomes) for verdict in ("worked", "rejected")
        ]
        counts += [sum(not one.passed for one in outcomes)]
        lines.append(f"| {kind} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(lines)
