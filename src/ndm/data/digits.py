r"""The handwritten digits of scikit-learn: 1797 images of 8 x 8 pixels with 17 integer values.

.. math::
    x = (2k + 1)/17 - 1, \qquad k \in \{0, \dots, 16\} .

The values are counts of set pixels in 4 x 4 blocks of a binary scan, so all 17 values from 0 to 16
occur.
"""

from collections.abc import Sequence

import numpy as np

from ndm.data.arrays import discrete
from ndm.data.source import DataSource, Loaded
from ndm.data.splits import check_split_arguments, describe_split, draw_split
from ndm.errors import UserError, describe_value, require


class Digits(DataSource):
    """Digits of scikit-learn, ``(1, 8, 8)``, 17 values, with a split stratified by class.

    Args:
        seed: seed of the split.
        test_fraction: fraction of each class in the test split.
        classes: the digits to use; all ten by default.
    """

    def __init__(
        self, seed: int = 0, test_fraction: float = 0.2, classes: Sequence[int] | None = None
    ):
        check_split_arguments(test_fraction, seed)
        if classes is not None and (
            not classes or len(set(classes)) < len(classes) or not set(classes) <= set(range(10))
        ):
            raise UserError(
                f"classes={describe_value(classes)}: give different digits from 0 to 9, or leave it"
                " out for all ten"
            )
        self.seed = seed
        self.test_fraction = test_fraction
        self.classes = classes

    def load(self) -> Loaded:
        require("sklearn", "scikit-learn", "data")
        from sklearn.datasets import load_digits

        images, digits = (np.asarray(values) for values in load_digits(return_X_y=True))
        classes = list(range(10)) if self.classes is None else list(self.classes)
        chosen = np.isin(digits, classes)
        images = images[chosen].astype(np.uint8).reshape(-1, 1, 8, 8)
        labels = np.array([classes.index(digit) for digit in digits[chosen]])
        names = [str(digit) for digit in classes]
        parts = draw_split(labels, names, "digits", self.test_fraction, self.seed)
        version = f"scikit-learn 8x8, stratified {describe_split(self.test_fraction, self.seed)}"
        if self.classes is not None:
            version += ", digits " + " ".join(names)
        arrays = {split: images[part] for split, part in parts.items()}
        return discrete(
            "digits",
            version,
            arrays,
            17,
            labels={split: labels[part] for split, part in parts.items()},
            classes=names,
        )
