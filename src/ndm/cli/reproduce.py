"""``ndm reproduce``: run an experiment of the paper, or that on photographs."""

from collections.abc import Sequence
from pathlib import Path

from ndm.cli.parsing import split_overrides
from ndm.errors import UserError
from ndm.reproduce import EXPERIMENTS, ExperimentSettings
from ndm.train.config import Parser, parse


def run_reproduce(arguments: Sequence[str]) -> None:
    """Parse the arguments of ``ndm reproduce`` and run the experiment.

    Raises:
        UserError: there is no such experiment, or it does not accept these options.
    """
    parser = Parser(
        prog="ndm reproduce",
        description=(
            "Run an experiment of the paper, or that on photographs: train, measure, draw figures"
            " and write a report. Rerun the command to resume an interrupted experiment."
        ),
        epilog=(
            "Example: ndm reproduce checkerboard --out runs/checkerboard. Options after -- are"
            " passed to every training run, as to ndm train: -- --train.learning_rate 1e-3"
        ),
        exit_on_error=False,
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="name of the experiment; see --list"
    )
    parser.add_argument(
        "--list", action="store_true", help="list all experiments, their sizes and their options"
    )
    parser.add_argument("--size", help="size of the experiment; each has a default")
    parser.add_argument("--out", help="output folder; default: runs/reproduce/NAME-SIZE")
    parser.add_argument("--data", help="folder of the data, for experiments with --data in --list")
    parser.add_argument(
        "--features",
        help="TorchScript file of the feature network for FID, for experiments on natural images",
    )
    parser.add_argument(
        "--runs",
        nargs=2,
        metavar=("DDPM", "NDM"),
        help=(
            "folders of two trained runs on the same images, to measure instead of training new"
            " ones, for experiments with --runs in --list"
        ),
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="number of parallel training runs, which share the CPU threads",
    )
    own, overrides = split_overrides(arguments)
    values = parse(parser, own)
    if values.list:
        print(listing())
        return
    name = values.name
    if name is None or name not in EXPERIMENTS:
        problem = (
            "give the name of an experiment"
            if name is None
            else f"there is no experiment {name!r}; choose one"
        )
        raise UserError(f"{problem}: {', '.join(EXPERIMENTS)} (see ndm reproduce --list)")
    size = values.size or next(iter(EXPERIMENTS[name].sizes))
    settings = ExperimentSettings(
        name,
        size,
        Path(values.out or f"runs/reproduce/{name}-{size}"),
        values.seed,
        values.data,
        values.features,
        tuple(values.runs or ()),
        values.jobs,
        overrides,
    )
    EXPERIMENTS[name].run(settings)


def listing() -> str:
    """Return a text that lists all experiments, their sizes and their options."""
    lines = []
    for one in EXPERIMENTS.values():
        options = ""
        if one.needs_data:
            options = " (--data FOLDER)"
        elif one.takes_data:
            options = " (or --data FOLDER)"
        options += " (or trained runs: --runs DDPM NDM)" if one.takes_runs else ""
        options += " (FID: --features FILE)" if one.takes_features else ""
        lines.append(f"{one.name}: {one.shows}{options}")
        lines += [f"    --size {size:<6} {text}" for size, text in one.sizes.items()]
    return "\n".join(lines)
