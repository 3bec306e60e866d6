r"""Several processes that share an evaluation.

.. math::
    \text{process } r \text{ of } W \text{ takes the batches } r,\; r + W,\; r + 2W, \dots

Processes do not wait for one another while they compute, since an adaptive solver takes as many
steps as its batch needs. They communicate once per measurement, to gather the values of all
examples. Start them with ``torchrun --nproc-per-node W -m ndm.cli evaluate RUN ...``, on any number
of machines. The result equals that of one process.
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

from ndm.errors import UserError, one_line


@dataclass(frozen=True)
class Processes:
    """One of the processes of an evaluation; by default the only one."""

    rank: int = 0
    """Rank of this process."""
    size: int = 1
    """Number of processes."""
    group: Any = None
    """Process group of torch.distributed that gathers the values."""

    @property
    def first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return the indices of the batches, out of ``count``, that this process takes."""
        return range(self.rank, count, self.size)

    def gather(
        self, numbers: list[int], values: dict[str, Tensor]
    ) -> tuple[list[int], dict[str, Tensor]]:
        """Return the example numbers and values ``(n,)`` of all processes, in every process."""
        if self.size == 1:
            return numbers, values
        parts: list[tuple[list[int], dict[str, Tensor]] | None] = [None] * self.size
        try:
            dist.all_gather_object(parts, (numbers, values), group=self.group)
        except RuntimeError as error:
            raise UserError(
                "another process of this evaluation failed; see its error message"
            ) from error
        present = [part for part in parts if part is not None and part[0]]
        names = present[0][1] if present else {}
        return [n for part in present for n in part[0]], {
            name: torch.cat([part[1][name] for part in present]) for name in names
        }


def started_first() -> bool:
    """Return whether this process is the only one, or the first that a launcher started.

    The launcher may be torchrun, Lightning or Slurm.
    """
    # In this order, because torchrun within Slurm assigns its own ranks.
    for ranks in (("RANK",), ("LOCAL_RANK", "NODE_RANK"), ("SLURM_PROCID",)):
        found = [os.environ[rank] for rank in ranks if rank in os.environ]
        if found:
            return all(rank == "0" for rank in found)
    return True


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun, use only this process.

    Raises:
        UserError: the environment of torchrun is set, but the processes cannot be joined.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes()
        return
    try:
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
        # Values are gathered on the CPU. Processes may finish hours apart, hence the long timeout.
        group = dist.new_group(timeout=timedelta(days=7))
    except (ValueError, RuntimeError) as error:
        reason = one_line(error, 120)
        raise UserError(
            f"WORLD_SIZE is set but the processes cannot be joined ({reason}); start them with"
            " torchrun, or unset it"
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group()
