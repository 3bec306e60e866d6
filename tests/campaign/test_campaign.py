"""A small part of the fault campaign, and the judgement of a trial."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from campaign.mutations import mutate
from campaign.trials import judge

TESTS = Path(__file__).parents[1]


def test_damaged_files_of_every_kind_are_rejected_in_one_line_or_harmless() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "campaign.campaign", "--files", "36"]
    command += ["--kills", "0", "--workers", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "| archive, decompress | 2 |" in done.stdout


JUDGEMENTS = {
    "worked": (0, ""),
    "rejected": (2, "ndm: error: x: give y\n"),
    "traceback": (1, "Traceback (most recent call last):\nValueError: x\n"),
    "output": (2, f"ndm: error: {'x' * 300}\n"),
    "wrong": (3, "other images were restored"),
}


@pytest.mark.parametrize("verdict", JUDGEMENTS)
def test_an_exit_code_and_its_output_are_judged(verdict: str) -> None:
    assert judge(*JUDGEMENTS[verdict]).verdict == verdict


def test_a_warning_beside_the_error_is_a_failure() -> None:
    assert judge(2, "UserWarning: x\nndm: error: y\n").verdict == "output"


PROGRAM = """
import mmap, os, signal, time
from campaign import trials

def grow():
    with mmap.mmap(-1, 2**27) as memory:
        for _ in range(2**7):
            memory.write(bytes(2**20))
    return 0

trials.MEMORY, trials.SECONDS = 50 * 2**20, 2.0
killed = lambda: os.kill(os.getpid(), signal.SIGKILL)
actions = (killed, grow, lambda: 0, lambda: time.sleep(9))
print(*(trials.run(action).verdict for action in actions))
"""


def test_signals_hangs_and_memory_are_found() -> None:
    """In a process of its own, because a fork of this one may return memory to the system."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["signal", "memory", "worked", "hang"]


def test_damage_is_a_function_of_the_seed() -> None:
    data = bytes(range(256)) * 10
    first, second = (mutate(data, random.Random("3 1")) for _ in range(2))
    assert first == second != data
