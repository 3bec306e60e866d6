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
    takes_data: bool = False
    """Whether the user may say where other data are than those that the experiment has by itself."""
    takes_runs: bool = False
    """Whether it can measure runs that the user names instead of training."""
    takes_features: bool = False
    """Whether FID is measured by a feature network that the user names."""
    takes_words: bool = True
    """Whether it trains as ``ndm train`` does, with words of the user's."""
    takes_jobs: bool = True
    """Whether it trains several models, which may be trained at once."""

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
            {"small": "7 minutes of one core", "smoke": _SMOKE},
            "checkerboard",
        ),
        Experiment(
            "distribution-2d",
            "DDPM beside NDM on smooth 2-D densities: z_t, predictions, ways back to the data, likelihood and bound",
            {"small": "7 minutes of one core", "smoke": _SMOKE},
            "distribution_2d",
        ),
        Experiment(
            "ot-1d",
            "a reverse process that is an optimal transport: straight trajectories of a 1-D mixture, a diffusion's beside them",
            {"small": "a quarter of an hour of one core", "smoke": _SMOKE},
            "transport",
            takes_words=False,
            takes_jobs=False,
        ),
        Experiment(
            "ot-2d",
            "the same in the plane: four Gaussians whose optimal map is known",
            {"small": "12 minutes of one core", "smoke": _SMOKE},
            "transport_plane",
            takes_words=False,
            takes_jobs=False,
        ),
        Experiment(
            "mnist",
            "F(x, t), z_t and the prediction over time for DDPM and NDM side by side; bits/dim beside the widened DDPM; samples",
            {
                "small": "70 minutes of one and a half cores, with --jobs 2",
                "quick": "a quarter of an hour of two cores",
                "paper": "three trainings of two hours of one H200 each (an estimate, from 2,150 of 20,000 steps)",
                "smoke": _SMOKE,
            },
            "mnist",
            needs_data=True,
        ),
        Experiment(
            "steps",
            "the bound against the number of steps, sample quality against the number of evaluations: DDPM and NDM, on digits or MNIST",
            {
                "small": "24 minutes of one core on digits; on MNIST an hour of a core, and two trainings of half an hour, which --runs spares",
                "smoke": _SMOKE,
            },
            "steps",
            takes_data=True,
            takes_runs=True,
        ),
        *(
            Experiment(
                name,
                f"{what}: NELBO, NLL, samples, F(x, t) over time{published}",
                {"paper": f"{time} (an estimate, not run)", "smoke": _SMOKE},
                "images",
                needs_data=True,
                takes_features=True,
                takes_jobs=False,
            )
            for name, what, published, time in (
                ("cifar10", "CIFAR-10", "; published 2.70 bits/dim", "26 to 177 hours of 8 H100"),
                ("imagenet32", "ImageNet at 32 x 32", "; published 3.55 bits/dim", "12 to 30 hours of 8 H100"),
                ("imagenet64", "ImageNet at 64 x 64", "; published 3.35 bits/dim", "85 to 158 hours of 8 H100"),
                ("celebahq64", "CelebA-HQ at 64 x 64", "", "15 to 87 hours of 4 H100"),
                ("celebahq256", "CelebA-HQ at 256 x 256 in a latent space", "", "3 to 10 hours of 4 H100"),
            )
        ),
    )
}

__all__ = ["EXPERIMENTS", "Experiment", "Report"]
