"""The experiments of the paper (NDM, section 4), each from one command: ``ndm reproduce NAME``.

An experiment is a function in a file of its own that trains what it needs, and fills a :class:`Report` with figures, numbers and text.
:data:`EXPERIMENTS` lists them; a function is imported when it is run.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from ndm.errors import UserError
from ndm.reproduce.report import Report


@dataclass(frozen=True)
class Experiment:
    """What ``ndm reproduce --list`` says of an experiment, and where its code is."""

    name: str
    shows: str
    """One line."""
    sizes: Mapping[str, str]
    """What each size takes, on which machine; the first is the default."""
    module: str
    """Module of ``ndm.reproduce`` that holds ``run(report)``."""
    needs_data: bool = False
    """Whether the user has to say where the data are."""

    def check_size(self, size: str | None) -> str:
        """The size, or the default.

        Raises:
            UserError: the experiment has no such size.
        """
        if size is None:
            return next(iter(self.sizes))
        if size not in self.sizes:
            raise UserError(f"--size {size}: {self.name} has the sizes {', '.join(self.sizes)}")
        return size

    def run(self, report: Report) -> None:
        """Carry it out."""
        importlib.import_module(f"ndm.reproduce.{self.module}").run(report)


_SMOKE = "seconds: does everything work? The numbers mean nothing"

EXPERIMENTS: Mapping[str, Experiment] = {
    one.name: one
    for one in (
        Experiment(
            "checkerboard",
            "the learned transformation of the 2-D checkerboard over time; density and samples beside the data",
            {"small": "3 minutes of two cores", "smoke": _SMOKE},
            "checkerboard",
        ),
        Experiment(
            "ot-1d",
            "a reverse process that is an optimal transport: straight trajectories of a 1-D mixture, a diffusion's beside them",
            {"small": "7 minutes of one core", "smoke": _SMOKE},
            "transport",
        ),
    )
}

__all__ = ["EXPERIMENTS", "Experiment", "Report"]
