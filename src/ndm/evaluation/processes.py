r"""Several processes that share one evaluation.

.. math::
    \text{process } r \text{ of } W \text{ takes the batches } r,\; r + W,\; r + 2W, \dots

Processes never wait for one another while they work: an adaptive solver takes as many steps as its
own batch needs. They meet once for each number, to bring the values of all examples together. Start
them with ``torchrun --nproc-per-node W -m ndm.cli evaluate RUN ...``, on any number of machines;
the result is that of one process.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ndm.errors import UserError


@dataclass(frozen=True)
class Processes:
    """The processes of an evaluation, as one of them sees them; by default it is alone."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """How many there are."""
    group: Any = None
    """The group of torch.distributed in which they meet."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` batches this process takes."""
        return range(self.rank, count, self.size)

    def gather(
        self, numbers: list[int], values: dict[str, Tensor]
    ) -> tuple[list[int], dict[str, Tensor]]:
        """The numbers of the examples and their values, ``(n,)`` each, from all processes; the same
        in every process.
        """
        if self.size == 1:
            return numbers, values
        parts: list[tuple[list[int], dict[str, Tensor]] | None] = [None] * self.size
        try:
            dist.all_gather_object(parts, (numbers, values), group=self.group)
        except RuntimeError as error:
            raise UserError(
                "another process of this evaluation ended early; its message says why"
            ) from error
        present = [part for part in parts if part is not None and part[0]]
        names = present[0][1] if present else {}
        return [n for part in present for n in part[0]], {
            name: torch.cat([part[1][name] for part in present]) for name in names
        }


def started_first() -> bool:
    """Whether this process is alone or was started as the first of several, by torchrun, Lightning
    or Slurm.
    """
    for ranks in (
        ("RANK",),
        ("LOCAL_RANK", "NODE_RANK"),
        ("SLURM_PROCID",),
    ):  # torchrun within Slurm numbers processes by itself
        found = [os.environ[rank] for rank in ranks if rank in os.environ]
        if found:
            return all(rank == "0" for rank in found)
    return True


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone.

    Raises:
        UserError: the environment of torchrun is there but the processes do not find one another.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes()
        return
    try:
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
        # Values are gathered on the CPU. They may come hours apart, so the wait for a slow process
        # is long.
        group = dist.new_group(timeout=timedelta(days=7))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"WORLD_SIZE is set but the processes cannot be joined ({reason}); start them with"
            " torchrun, or unset it"
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group()
