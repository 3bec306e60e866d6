"""The experiments of the paper (NDM, section 4), each from one command: ``ndm reproduce NAME``.

An experiment is a function in a file of its own that trains what it needs, and fills a
:class:`Report` with figures, numbers and text.
:data:`EXPERIMENTS` lists them; a function is imported when it is run.
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
    """Whether the user may say where other data are than those that the experiment has by itself.
    """
    takes_runs: bool = False
    """Whether it can measure runs that the user names instead of training."""
    takes_features: bool = False
    """Whether FID is measured by a feature network that the user names."""
    takes_overrides: bool = True
    """Whether it trains as ``ndm train`` does, and the user can override the configuration."""
    takes_jobs: bool = True
    """Whether it trains several models, which may be trained at once."""

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
                f"--features {features}: there is no such file; name a TorchScript file, as"
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
                f"-- {shlex.join(overrides)}: {self.name} does not train by ndm train; leave out --"
                " and what follows it"
            )
        own = ["--config", "--out", "--seed"]
        if not (self.needs_data or self.takes_data):
            own += ["--data", "--data.class_path"]
        for word in overrides:
            if word.split("=")[0] in own:
                raise UserError(f"-- {word}: {self.name} sets that itself; leave it out")

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
                f"--data {settings.data}: the runs name their data; leave it out beside --runs"
            )
        if settings.overrides:
            raise UserError(
                f"-- {shlex.join(settings.overrides)}: nothing is trained beside --runs; leave out"
                " -- and what follows it"
            )

    def run(self, settings: ExperimentSettings) -> None:
        """Carry it out.

        Raises:
            UserError: it does not take these settings, or the folder holds something else.
        """
        require("matplotlib.figure", "matplotlib", "eval")
        self.check(settings)
        report = Report(settings)
        importlib.import_module(f"ndm.reproduce.{self.module}").run(report)
        report.finish()


_SMOKE = "seconds: does everything work? The numbers mean nothing"

EXPERIMENTS: Mapping[str, Experiment] = {
    one.name: one
    for one in (
        Experiment(
            "checkerboard",
            "the learned transformation of the 2-D checkerboard over time; density and samples"
            " beside the data",
            {"small": "7 minutes of one core", "smoke": _SMOKE},
            "checkerboard",
        ),
        Experiment(
            "distribution-2d",
            "DDPM beside NDM on smooth 2-D densities: z_t, predictions, ways back to the data,"
            " likelihood and bound",
            {"small": "7 minutes of one core", "smoke": _SMOKE},
            "distribution_2d",
        ),
        Experiment(
            "ot-1d",
            "a reverse process that is an optimal transport: straight trajectories of a 1-D"
            " mixture, a diffusion's beside them",
            {"small": "a quarter of an hour of one core", "smoke": _SMOKE},
            "transport",
            takes_overrides=False,
            takes_jobs=False,
        ),
        Experiment(
            "ot-2d",
            "the same in the plane: four Gaussians whose optimal map is known",
            {"small": "12 minutes of one core", "smoke": _SMOKE},
            "transport_plane",
            takes_overrides=False,
            takes_jobs=False,
        ),
        Experiment(
            "mnist",
            "F(x, t), z_t and the prediction over time for DDPM and NDM side by side; bits/dim"
            " beside the widened DDPM; samples",
            {
                "small": "70 minutes of one and a half cores, with --jobs 2",
                "quick": "a quarter of an hour of two cores",
                "paper": (
                    "three trainings of two hours of one H200 each (an estimate, from 2,150 of"
                    " 20,000 steps)"
                ),
                "smoke": _SMOKE,
            },
            "mnist",
            needs_data=True,
        ),
        Experiment(
            "steps",
            "the bound against the number of steps, sample quality against the number of"
            " evaluations: DDPM and NDM, on digits or MNIST",
            {
                "small": (
                    "24 minutes of one core on digits; on MNIST an hour of a core, and two"
                    " trainings of half an hour, which --runs spares"
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
                ("cifar10", "CIFAR-10", "; published 2.70 bits/dim", "26 to 177 hours of 8 H100"),
                (
                    "imagenet32",
                    "ImageNet at 32 x 32",
                    "; published 3.55 bits/dim",
                    "12 to 30 hours of 8 H100",
                ),
                (
                    "imagenet64",
                    "ImageNet at 64 x 64",
                    "; published 3.35 bits/dim",
                    "85 to 158 hours of 8 H100",
                ),
                ("celebahq64", "CelebA-HQ at 64 x 64", "", "15 to 87 hours of 4 H100"),
                (
                    "celebahq256",
                    "CelebA-HQ at 256 x 256 in a latent space",
                    "",
                    "3 to 10 hours of 4 H100",
                ),
            )
        ),
    )
}

__all__ = ["EXPERIMENTS", "Experiment", "ExperimentSettings", "Report"]
