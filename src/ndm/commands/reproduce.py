"""``ndm reproduce``: an experiment of the paper."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from ndm.commands.parsing import parse
from ndm.errors import UserError, check_whole, require
from ndm.reproduce import EXPERIMENTS, Experiment, Report


def run_reproduce(words: Sequence[str]) -> None:
    """``ndm reproduce``: parse and carry out."""
    parser = ArgumentParser(
        prog="ndm reproduce",
        description="Carry out an experiment of the paper: train, measure, draw the figures, write a page. "
        "The same command again goes on where it was interrupted.",
        epilog="Example: ndm reproduce checkerboard --out runs/checkerboard. Words after -- go to every training run as to ndm train: "
        "-- --train.learning_rate 1e-3",
        exit_on_error=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment; see --list")
    parser.add_argument("--list", action="store_true", help="show all experiments, their sizes and what they take")
    parser.add_argument("--size", help="how large; each experiment has a default")
    parser.add_argument("--out", help="folder for everything; by default runs/reproduce/NAME-SIZE")
    parser.add_argument("--data", help="folder of the data, for the experiments that need one or take one")
    parser.add_argument("--features", help="TorchScript file of the feature network for FID, for the experiments on natural images")
    parser.add_argument(
        "--runs",
        nargs=2,
        metavar=("DDPM", "NDM"),
        help="folders of two trained runs on the same images, to measure instead of training, for the experiments that take them",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each with its share of the CPU threads")
    at = list(words).index("--") if "--" in words else len(words)
    arguments = parse(parser, words[:at])
    if arguments.pop("list"):
        print(listing())
        return
    reproduce(**vars(arguments), overrides=words[at + 1 :])


def listing() -> str:
    """All experiments and their sizes."""
    lines = []
    for one in EXPERIMENTS.values():
        word = " (--data FOLDER)" if one.needs_data else " (or --data FOLDER)" if one.takes_data else ""
        word += " (or trained runs: --runs DDPM NDM)" if one.takes_runs else ""
        word += " (FID: --features FILE)" if one.takes_features else ""
        lines.append(f"{one.name}: {one.shows}{word}")
        lines += [f"    --size {size:<6} {text}" for size, text in one.sizes.items()]
    return "\n".join(lines)


def reproduce(
    name: str | None,
    size: str | None,
    out: str | None,
    data: str | None,
    features: str | None,
    runs: Sequence[str] | None,
    seed: int,
    jobs: int,
    overrides: Sequence[str],
) -> None:
    """Carry out an experiment.

    Raises:
        UserError: there is no such experiment or size, the data are missing, or the folder holds something else.
    """
    if name is None or name not in EXPERIMENTS:
        given = "give the name of an experiment" if name is None else f"there is no experiment {name!r}; choose one"
        raise UserError(f"{given}: {', '.join(EXPERIMENTS)} (ndm reproduce --list tells more)")
    require("matplotlib.figure", "matplotlib", "eval")
    check_whole("seed", seed, 0)
    check_whole("jobs", jobs, 1)
    experiment = EXPERIMENTS[name]
    size = experiment.check_size(size)
    _check_files(experiment, size, data, features)
    _check_words(experiment, jobs, overrides)
    _check_runs(experiment, runs, data, overrides)
    words = [*(["--data.path", data] if data is not None else []), *overrides]
    command = ["ndm", "reproduce", experiment.name, "--size", size, "--seed", str(seed)]
    for option, value in (("--data", data), ("--features", features)):
        command += [option, value] if value is not None else []
    command += ["--runs", *runs] if runs else []
    command += ["--jobs", str(jobs)] if jobs > 1 else []
    command += ["--", *overrides] if overrides else []
    folder = Path(out or f"runs/reproduce/{name}-{size}")
    report = Report(experiment.name, folder, size, seed, words, shlex.join(command), data, features, jobs, runs or ())
    experiment.run(report)
    report.finish()


def _check_files(experiment: Experiment, size: str, data: str | None, features: str | None) -> None:
    if experiment.needs_data and data is None and size != "smoke":
        raise UserError(f"{experiment.name} needs the folder of its data: --data FOLDER")
    if data is not None and not (experiment.needs_data or experiment.takes_data):
        raise UserError(f"--data {data}: {experiment.name} makes its data itself; leave it out")
    if features is not None and not experiment.takes_features:
        raise UserError(f"--features {features}: {experiment.name} takes no feature network; leave it out")
    if features is not None and not Path(features).is_file():
        raise UserError(f"--features {features}: there is no such file; name a TorchScript file, as torch.jit.save writes it")


def _check_words(experiment: Experiment, jobs: int, overrides: Sequence[str]) -> None:
    if overrides and not experiment.takes_words:
        raise UserError(f"-- {shlex.join(overrides)}: {experiment.name} does not train by ndm train; leave the words after -- out")
    if jobs > 1 and not experiment.takes_jobs:
        raise UserError(f"--jobs {jobs}: {experiment.name} trains one model at a time; leave it out")
    own = ["--config", "--out", "--seed"]
    if not (experiment.needs_data or experiment.takes_data):
        own += ["--data", "--data.class_path"]
    for word in overrides:
        if word.split("=")[0] in own:
            raise UserError(f"-- {word}: {experiment.name} sets that itself; leave it out")


def _check_runs(experiment: Experiment, runs: Sequence[str] | None, data: str | None, overrides: Sequence[str]) -> None:
    if not runs:
        return
    if not experiment.takes_runs:
        raise UserError(f"--runs {' '.join(runs)}: {experiment.name} trains its models itself; leave it out")
    if data is not None:
        raise UserError(f"--data {data}: the runs know their data; leave it out beside --runs")
    if overrides:
        raise UserError(f"-- {shlex.join(overrides)}: nothing is trained beside --runs; leave the words after -- out")
