r"""Splits that a source draws itself, class by class, and the checks that all sources share.

.. math::
    n_{\text{test}, c} = \lfloor f \, n_c + 1/2 \rfloor \quad \text{for every class } c .
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ndm.errors import UserError, check_whole, describe_value


def split_by_class(
    labels: np.ndarray, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a fixed train/test split with the same fraction of every class.

    Args:
        labels: class index of each example, ``(N,)``; all zero for data without classes.
        test_fraction: part of each class that goes to the test split, rounded to whole examples.
        seed: of the draw.

    Returns:
        The indices of the train and of the test examples, each increasing.
    """
    generator = np.random.default_rng(seed)
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        test[members[: math.floor(len(members) * test_fraction + 0.5)]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def check_classes(
    labels: Mapping[str, np.ndarray], classes: Sequence[str], name: str, mend: str
) -> None:
    """Check that every declared class occurs in every split.

    Args:
        labels: split -> index into ``classes`` of each example.
        classes: the declared classes.
        name: of the data, for the message.
        mend: how to mend a missing class, for the message.

    Raises:
        UserError: a class is missing; the message names split and class.
    """
    for split, values in labels.items():
        missing = [
            classes[int(index)]
            for index in np.flatnonzero(np.bincount(values, minlength=len(classes)) == 0)
        ]
        if missing:
            word = "class" if len(missing) == 1 else "classes"
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"{name}: split {split!r} has no example of {word} {shown} of the {len(classes)}"
                f" declared; {mend}"
            )


def draw_split(
    labels: np.ndarray, classes: Sequence[str], name: str, test_fraction: float, seed: int
) -> dict[str, np.ndarray]:
    """Draw train and test with :func:`split_by_class`, and check that neither is empty nor lacks a
    class.

    Args:
        labels: class index of each example, ``(N,)``; all zero for data without classes.
        classes: the declared classes, or none.
        name: of the data, for messages.
        test_fraction: part of each class that goes to the test split.
        seed: of the draw.

    Returns:
        Split -> indices of its examples.

    Raises:
        UserError: a split is empty, or lacks a class.
    """
    train, test = split_by_class(labels, test_fraction, seed)
    parts = {"train": train, "test": test}
    mend = f"give more examples, or change test_fraction={test_fraction:g}"
    if classes:
        check_classes({split: labels[part] for split, part in parts.items()}, classes, name, mend)
    for split, part in parts.items():
        if not len(part):
            raise UserError(
                f"{name}: the {split} split of {len(labels)} examples would be empty; {mend}"
            )
    return parts


def check_split_arguments(test_fraction: float, seed: int) -> None:
    """Check the two arguments of a split drawn by us.

    Raises:
        UserError: ``test_fraction`` is not inside (0, 1), or ``seed`` is not a whole number of at
            least 0.
    """
    if not isinstance(test_fraction, (int, float)) or not 0 < test_fraction < 1:
        raise UserError(
            f"test_fraction={describe_value(test_fraction)}: give a number between 0 and 1, for"
            " example 0.2"
        )
    check_whole("seed", seed, 0)


def split_words(test_fraction: float, seed: int) -> str:
    """How a split was drawn, for the version of a description: ``80/20 split, seed 0``."""
    return f"{100 * (1 - test_fraction):g}/{100 * test_fraction:g} split, seed {seed}"
