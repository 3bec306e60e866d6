"""A small part of the fault campaign, and the judgement of a trial."""

import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from campaign import trials
from campaign.mutations import mutate
from campaign.trials import judge, run

TESTS = Path(__file__).parents[1]


def test_damaged_files_of_every_kind_are_rejected_in_one_line_or_harmless() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "campaign.campaign", "--files", "54"]
    command += ["--kills", "0", "--workers", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "| archive, decompress | 3 |" in done.stdout


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


def test_signals_hangs_and_memory_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "MEMORY", 50 * 2**20)

    def grow() -> int:
        with mmap.mmap(-1, 2**27) as memory:  # malloc could reuse memory that the parent freed
            for _ in range(2**7):
                memory.write(bytes(2**20))
        return 0

    def sleep() -> int:
        time.sleep(5)
        return 0

    assert run(lambda: os.kill(os.getpid(), signal.SIGKILL)).verdict == "signal"
    assert run(grow).verdict == "memory"
    assert run(lambda: 0).verdict == "worked"
    monkeypatch.setattr(trials, "SECONDS", 0.3)
    assert run(sleep).verdict == "hang"


def test_damage_is_a_function_of_the_seed() -> None:
    data = bytes(range(256)) * 10
    first, second = (mutate(data, random.Random("3 1")) for _ in range(2))
    assert first == second != data
