r"""Splits drawn class by class, and checks shared by all sources.

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
        test_fraction: fraction of each class in the test split, rounded to whole examples.
        seed: seed of the draw.

    Returns:
        The indices of the train and of the test examples, each in increasing order.
    """
    generator = np.random.default_rng(seed)
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        test[members[: math.floor(len(members) * test_fraction + 0.5)]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def check_classes(
    labels: Mapping[str, np.ndarray], classes: Sequence[str], name: str, advice: str
) -> None:
    """Check that every declared class occurs in every split.

    Args:
        labels: split -> index into ``classes`` of each example.
        classes: the declared classes.
        name: name of the data, for the message.
        advice: how to fix a missing class, for the message.

    Raises:
        UserError: a class is missing; the message names the split and the class.
    """
    for split, values in labels.items():
        counts = np.bincount(values, minlength=len(classes))
        missing = [classes[int(index)] for index in np.flatnonzero(counts == 0)]
        if missing:
            word = "class" if len(missing) == 1 else "classes"
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"{name}: split {split!r} has no example of {word} {shown} of the {len(classes)}"
                f" declared; {advice}"
            )


def draw_split(
    labels: np.ndarray, classes: Sequence[str], name: str, test_fraction: float, seed: int
) -> dict[str, np.ndarray]:
    """Draw train and test with :func:`split_by_class`, and check that no split or class is empty.

    Args:
        labels: class index of each example, ``(N,)``; all zero for data without classes.
        classes: the declared classes; may be empty.
        name: name of the data, for messages.
        test_fraction: fraction of each class in the test split.
        seed: seed of the draw.

    Returns:
        Split -> indices of its examples.

    Raises:
        UserError: a split is empty, or has no example of a class.
    """
    train, test = split_by_class(labels, test_fraction, seed)
    parts = {"train": train, "test": test}
    advice = f"give more examples, or change test_fraction={test_fraction:g}"
    if classes:
        check_classes({split: labels[part] for split, part in parts.items()}, classes, name, advice)
    for split, part in parts.items():
        if not len(part):
            raise UserError(
                f"{name}: the {split} split of {len(labels)} examples would be empty; {advice}"
            )
    return parts


def check_split_arguments(test_fraction: float, seed: int) -> None:
    """Check the arguments of a split that the source draws.

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


def describe_split(test_fraction: float, seed: int) -> str:
    """Describe how a split was drawn, for a description's version: ``80/20 split, seed 0``."""
    return f"{100 * (1 - test_fraction):g}/{100 * test_fraction:g} split, seed {seed}"
