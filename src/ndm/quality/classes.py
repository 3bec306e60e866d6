r"""Samples of known classes: whether they are of their class, and as diverse as real images of it.

.. math::
    \text{accuracy} = \operatorname{mean}_i 1\{\hat c(x_i) = c_i\}, \qquad
    \text{diversity} = \frac{\sum_k p_k\, d_k(\text{samples})}{\sum_k p_k\, d_k(\text{real})},
    \qquad d_k = \operatorname{mean}_{i \ne j:\, c_i = c_j = k} \|f_i - f_j\| .

:math:`c_i` is the class that sample i was drawn for, :math:`\hat c` the answer of a classifier that
was trained on real images, p_k the share of class k among the samples, and f features. Perfect
samples have the accuracy of the classifier on new images, and diversity 1 in expectation, for every
number of images. Strong guidance makes samples typical of their class: accuracy goes up and
diversity down. Copies of one image for each class have diversity 0. Samples of the wrong class or
of none increase the diversity, so read both numbers together.
"""

import math

import torch
from torch import Tensor

from ndm.data import EventDataset
from ndm.errors import UserError
from ndm.quality.classifier import Classifier, classify
from ndm.quality.measures import distances
from ndm.random import part_seed

_CHOICE = 33  # stream of noise


def class_accuracy(
    classifier: Classifier, images: Tensor | EventDataset, classes: Tensor, batch_size: int = 256
) -> tuple[float, float]:
    """Return the fraction of images in which the classifier finds their class, and its error.

    Args:
        classifier: the classifier, trained on real images.
        images: images in [-1, 1], ``(N, C, H, W)`` or a split.
        classes: the class of each, ``(N,)``.
        batch_size: images per batch.

    Raises:
        UserError: the numbers of images and classes differ, or the classifier has fewer classes.
    """
    if len(images) != len(classes) or not len(classes):
        raise UserError(f"{len(images)} images have {len(classes)} classes: give one for each")
    if int(classes.max()) >= classifier.classes:
        raise UserError(
            f"the classifier has {classifier.classes} classes, and the images are of class"
            f" {int(classes.max())}: give a classifier of the same data"
        )
    share = float((classify(classifier, images, batch_size) == classes).double().mean())
    return share, math.sqrt(share * (1 - share) / len(classes))


def class_diversity(
    real: Tensor, real_classes: Tensor, generated: Tensor, classes: Tensor
) -> tuple[float, float] | None:
    """Return the diversity within classes relative to real images, and its standard error.

    Args:
        real: features of real images, ``(N, d)``.
        real_classes: their classes, ``(N,)``.
        generated: features of samples, ``(M, d)``.
        classes: the classes they were drawn for, ``(M,)``.

    Returns:
        None if no class has two samples and two different real images. The error is that of a mean
        over pairs, for independent samples and fixed real images.
    """
    above, variance, below = 0.0, 0.0, 0.0
    for k in classes.unique().tolist():
        ours, theirs = generated[classes == k].double(), real[real_classes == k].double()
        if min(len(ours), len(theirs)) < 2:
            continue
        mean = _mean_distances(ours)
        above += len(ours) * float(mean.mean())
        # A mean over pairs varies as twice the mean over images of their mean distances.
        variance += len(ours) ** 2 * 4 * float(mean.var()) / len(ours)
        below += len(ours) * float(_mean_distances(theirs).mean())
    return (above / below, math.sqrt(variance) / below) if below else None


def _mean_distances(rows: Tensor) -> Tensor:
    """Return the mean distance of each row to the others."""
    sums = torch.cat([block.sum(1) for block in distances(rows, rows, False)])
    return sums / (len(rows) - 1)


def as_frequent(labels: Tensor, classes: Tensor, seed: int = 0) -> Tensor:
    """Choose real images of the classes of the samples, with the same shares, as many as there are.

    Args:
        labels: the classes of the real images, ``(N,)``.
        classes: the classes of the samples, ``(M,)``.
        seed: seed of the choice.

    Returns:
        Their indices, in increasing order.

    Raises:
        UserError: there are no real images of a class.
    """
    kinds, wanted = classes.unique(return_counts=True)
    there = torch.stack([(labels == kind).sum() for kind in kinds])
    if not bool(there.all()):
        missing = int(kinds[there == 0][0])
        raise UserError(
            f"the split has no images of class number {missing}: leave it out of condition, or"
            " choose another split"
        )
    scarce = int((there / wanted).argmin())
    counts = wanted * there[scarce] // wanted[scarce]
    generator = torch.Generator().manual_seed(part_seed(seed, _CHOICE))
    chosen = []
    for kind, count in zip(kinds, counts.tolist(), strict=True):
        found = (labels == kind).nonzero().flatten()
        chosen.append(found[torch.randperm(len(found), generator=generator)[:count]])
    return torch.cat(chosen).sort().values
