"""``ndm reproduce``: an experiment of the paper."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from ndm.errors import UserError
from ndm.reproduce import EXPERIMENTS, ExperimentSettings
from ndm.train.config import parse


def run_reproduce(words: Sequence[str]) -> None:
    """``ndm reproduce``: parse and carry out.

    Raises:
        UserError: there is no such experiment, or it does not take these options.
    """
    parser = ArgumentParser(
        prog="ndm reproduce",
        description=(
            "Carry out an experiment of the paper: train, measure, draw the figures, write a page. "
            "Rerun the command to resume an interrupted experiment."
        ),
        epilog=(
            "Example: ndm reproduce checkerboard --out runs/checkerboard. Options after -- go to"
            " every training run, as to ndm train: -- --train.learning_rate 1e-3"
        ),
        exit_on_error=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment; see --list")
    parser.add_argument(
        "--list", action="store_true", help="show all experiments, their sizes and what they take"
    )
    parser.add_argument("--size", help="how large; each experiment has a default")
    parser.add_argument("--out", help="folder for everything; runs/reproduce/NAME-SIZE by default")
    parser.add_argument(
        "--data", help="folder of the data, for the experiments that need or take one"
    )
    parser.add_argument(
        "--features",
        help=(
            "TorchScript file of the feature network for FID, for the experiments on natural images"
        ),
    )
    parser.add_argument(
        "--runs",
        nargs=2,
        metavar=("DDPM", "NDM"),
        help=(
            "folders of two trained runs on the same images, to measure instead of training, for"
            " the experiments that take them"
        ),
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="trainings at once, each with its share of the CPU threads",
    )
    at = list(words).index("--") if "--" in words else len(words)
    arguments = parse(parser, words[:at])
    if arguments.list:
        print(listing())
        return
    name = arguments.name
    if name is None or name not in EXPERIMENTS:
        given = (
            "give the name of an experiment"
            if name is None
            else f"there is no experiment {name!r}; choose one"
        )
        raise UserError(f"{given}: {', '.join(EXPERIMENTS)} (see ndm reproduce --list)")
    size = arguments.size or next(iter(EXPERIMENTS[name].sizes))
    settings = ExperimentSettings(
        name,
        size,
        Path(arguments.out or f"runs/reproduce/{name}-{size}"),
        arguments.seed,
        arguments.data,
        arguments.features,
        tuple(arguments.runs or ()),
        arguments.jobs,
        tuple(words[at + 1 :]),
    )
    EXPERIMENTS[name].run(settings)


def listing() -> str:
    """All experiments and their sizes."""
    lines = []
    for one in EXPERIMENTS.values():
        options = (
            " (--data FOLDER)"
            if one.needs_data
            else " (or --data FOLDER)"
            if one.takes_data
            else ""
        )
        options += " (or trained runs: --runs DDPM NDM)" if one.takes_runs else ""
        options += " (FID: --features FILE)" if one.takes_features else ""
        lines.append(f"{one.name}: {one.shows}{options}")
        lines += [f"    --size {size:<6} {text}" for size, text in one.sizes.items()]
    return "\n".join(lines)
