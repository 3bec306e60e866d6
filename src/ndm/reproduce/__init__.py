"""Experiments of the paper (NDM, section 4) and on photographs; ``ndm reproduce NAME`` runs one.

Each experiment is a module whose ``run(report)`` trains models and fills a :class:`Report` with
figures, numbers and text. :data:`EXPERIMENTS` lists them. A module is imported when it is run.
"""

import importlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ndm.errors import UserError, require
from ndm.reproduce.report import ExperimentSettings, Report


@dataclass(frozen=True)
class Experiment:
    """An experiment: its entry in ``ndm reproduce --list``, its options and its module."""

    name: str
    shows: str
    """What it shows, in one line."""
    sizes: Mapping[str, str]
    """What each size takes, on which machine; the first is the default."""
    module: str
    """Module of ``ndm.reproduce`` that holds ``run(report)``."""
    needs_data: bool = False
    """Whether ``--data`` is required."""
    takes_data: bool = False
    """Whether ``--data`` can replace the experiment's data."""
    takes_runs: bool = False
    """Whether it can measure the user's runs instead of training."""
    takes_features: bool = False
    """Whether FID is measured with a feature network from the user."""
    takes_overrides: bool = True
    """Whether it trains as ``ndm train`` does, with a configuration that can be overridden."""
    takes_jobs: bool = True
    """Whether it trains several models, which can run in parallel."""

    def check(self, settings: ExperimentSettings) -> None:
        """Check that the experiment takes these settings.

        Raises:
            UserError: it does not.
        """
        size, data, features = settings.size, settings.data, settings.features
        if size not in self.sizes:
            raise UserError(f"--size {size}: {self.name} has the sizes {', '.join(self.sizes)}")
        if self.needs_data and data is None and size != "smoke":
            raise UserError(f"{self.name} needs the folder of its data: --data FOLDER")
        if data is not None and not (self.needs_data or self.takes_data):
            raise UserError(f"--data {data}: {self.name} makes its data itself; leave it out")
        if features is not None and not self.takes_features:
            raise UserError(
                f"--features {features}: {self.name} takes no feature network; leave it out"
            )
        if features is not None and not Path(features).is_file():
            raise UserError(
                f"--features {features}: there is no such file; give a TorchScript file, as"
                " torch.jit.save writes it"
            )
        if settings.jobs > 1 and not self.takes_jobs:
            raise UserError(
                f"--jobs {settings.jobs}: {self.name} trains one model at a time; leave it out"
            )
        self._check_overrides(settings.overrides)
        self._check_runs(settings)

    def _check_overrides(self, overrides: Sequence[str]) -> None:
        if overrides and not self.takes_overrides:
            raise UserError(
                f"-- {shlex.join(overrides)}: {self.name} does not use ndm train; leave out --"
                " and what follows it"
            )
        fixed = ["--config", "--out", "--seed"]
        if not (self.needs_data or self.takes_data):
            fixed += ["--data", "--data.class_path"]
        for option in overrides:
            if option.split("=")[0] in fixed:
                raise UserError(f"-- {option}: {self.name} sets that itself; leave it out")

    def _check_runs(self, settings: ExperimentSettings) -> None:
        if not settings.runs:
            return
        if not self.takes_runs:
            raise UserError(
                f"--runs {' '.join(settings.runs)}: {self.name} trains its models itself; leave"
                " it out"
            )
        if settings.data is not None:
            raise UserError(
                f"--data {settings.data}: --runs uses the data of the runs; leave it out"
            )
        if settings.overrides:
            raise UserError(
                f"-- {shlex.join(settings.overrides)}: nothing is trained with --runs; leave out"
                " -- and what follows it"
            )

    def run(self, settings: ExperimentSettings) -> None:
        """Run the experiment and write its report.

        Raises:
            UserError: the experiment does not take these settings, or the folder holds another one.
        """
        require("matplotlib.figure", "matplotlib", "eval")
        self.check(settings)
        report = Report(settings)
        importlib.import_module(f"ndm.reproduce.{self.module}").run(report)
        report.finish()


_SMOKE = "seconds: only checks that everything runs; the numbers mean nothing"

EXPERIMENTS: Mapping[str, Experiment] = {
    one.name: one
    for one in (
        Experiment(
            "checkerboard",
            "the learned transformation of the 2-D checkerboard over time; density and samples"
            " compared with the data",
            {"small": "7 minutes on one core", "smoke": _SMOKE},
            "checkerboard",
        ),
        Experiment(
            "distribution-2d",
            "DDPM and NDM on smooth 2-D densities: z_t, predictions, reverse trajectories,"
            " likelihood and bound",
            {"small": "7 minutes on one core", "smoke": _SMOKE},
            "distribution_2d",
        ),
        Experiment(
            "ot-1d",
            "an optimal transport as reverse process: straight trajectories for a 1-D mixture,"
            " compared with those of a diffusion",
            {"small": "15 minutes on one core", "smoke": _SMOKE},
            "transport",
            takes_overrides=False,
            takes_jobs=False,
        ),
        Experiment(
            "ot-2d",
            "the same in the plane: four Gaussians whose optimal map is known",
            {"small": "12 minutes on one core", "smoke": _SMOKE},
            "transport_plane",
            takes_overrides=False,
            takes_jobs=False,
        ),
        Experiment(
            "mnist",
            "F(x, t), z_t and the prediction over time for DDPM and NDM; bits/dim of both and of"
            " a widened DDPM; samples",
            {
                "small": "70 minutes on one and a half cores, with --jobs 2",
                "quick": "15 minutes on two cores",
                "paper": (
                    "three training runs of two hours each on one H200 (an estimate from 2,150 of"
                    " 20,000 steps)"
                ),
                "smoke": _SMOKE,
            },
            "mnist",
            needs_data=True,
        ),
        Experiment(
            "photos",
            "photographs: the bound of a learned F and of a plain diffusion as large, trained for 8"
            " and 16 steps and in continuous time; lossless picture formats",
            {
                "small": "2 hours on two cores, with --jobs 2 (an estimate)",
                "full": "three seeds: 7 hours on two cores, with --jobs 2 (an estimate)",
                "quick": "6 minutes on one core; only a look: 60 training steps are far too few",
                "smoke": _SMOKE,
            },
            "photos",
            needs_data=True,
        ),
        Experiment(
            "steps",
            "the bound against the number of steps, sample quality against the number of"
            " evaluations: DDPM and NDM, on digits or MNIST",
            {
                "small": (
                    "24 minutes on one core for digits; for MNIST an hour on one core and two"
                    " training runs of half an hour, which --runs avoids"
                ),
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
                ("cifar10", "CIFAR-10", "; published 2.70 bits/dim", "26 to 177 hours on 8 H100"),
                (
                    "imagenet32",
                    "ImageNet at 32 x 32",
                    "; published 3.55 bits/dim",
                    "12 to 30 hours on 8 H100",
                ),
                (
                    "imagenet64",
                    "ImageNet at 64 x 64",
                    "; published 3.35 bits/dim",
                    "85 to 158 hours on 8 H100",
                ),
                ("celebahq64", "CelebA-HQ at 64 x 64", "", "15 to 87 hours on 4 H100"),
                (
                    "celebahq256",
                    "CelebA-HQ at 256 x 256 in a latent space",
                    "",
                    "3 to 10 hours on 4 H100",
                ),
            )
        ),
    )
}

__all__ = ["EXPERIMENTS", "Experiment", "ExperimentSettings", "Report"]
