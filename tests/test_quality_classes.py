"""Samples of known classes: accuracy and diversity against laws that hold for real images."""

import math

import pytest
import torch
from torch import Tensor

from ndm.data import Digits
from ndm.errors import UserError
from ndm.quality import (
    Classifier,
    as_frequent,
    class_accuracy,
    class_diversity,
    classifier_features,
    classify,
    measures,
)
from oracles import F64


def images(digits: Digits, split: str) -> tuple[Tensor, Tensor]:
    data = digits.split(split)
    assert data.labels is not None
    return data.__getitems__(list(range(len(data)))), data.labels


def rows(count: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, 3, generator=generator, dtype=F64)


def test_real_images_have_the_accuracy_of_the_classifier(
    digits: Digits, classifier: Classifier
) -> None:
    x, labels = images(digits, "test")
    share, error = class_accuracy(classifier, x, labels)
    assert share == classifier.info["accuracy"]["test"]
    assert error == pytest.approx(math.sqrt(share * (1 - share) / 359))
    assert class_accuracy(classifier, digits.split("test"), labels, batch_size=7) == (share, error)


def test_labels_that_say_nothing_have_the_accuracy_of_chance(
    digits: Digits, classifier: Classifier
) -> None:
    x, labels = images(digits, "test")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    share, error = class_accuracy(classifier, x, labels[order])
    assert abs(share - 0.1) < 4 * error
    found = classify(classifier, x)
    assert class_accuracy(classifier, x, found) == (1.0, 0.0)
    assert class_accuracy(classifier, x, (found + 1) % 10) == (0.0, 0.0)


def test_values_beyond_the_range_are_clipped(digits: Digits, classifier: Classifier) -> None:
    x = images(digits, "test")[0][:50]
    assert torch.equal(classify(classifier, 9 * x.sign()), classify(classifier, x.sign()))


def test_copies_have_no_diversity_and_equal_sets_have_one(
    digits: Digits, classifier: Classifier
) -> None:
    x, labels = images(digits, "test")
    features = classifier_features(classifier)(x)
    first = torch.stack([(labels == k).nonzero()[0, 0] for k in labels.tolist()])
    assert class_diversity(features, labels, features[first], labels) == (0.0, 0.0)
    found = class_diversity(features, labels, features.flip(0), labels.flip(0))
    assert found is not None and found[0] == pytest.approx(1)
    train, known = images(digits, "train")
    other = class_diversity(classifier_features(classifier)(train), known, features, labels)
    assert other is not None and other[0] == pytest.approx(1, abs=0.15)
    mixed = class_diversity(features, labels, features, labels.flip(0))
    assert mixed is not None and mixed[0] > 1.3, "samples of other classes are far apart"


def test_diversity_is_the_scale_within_classes_and_not_the_distance_between_them() -> None:
    """Classes k = 0, 1 are normal with the deviations 1 and 3: the samples have half of both."""
    classes = torch.arange(2).repeat_interleave(300)
    spread = torch.where(classes == 0, 1.0, 3.0)[:, None].double()
    real = rows(600, 0) * spread
    for far in (0, 1000):
        centers = far * classes[:, None].double()
        found = class_diversity(real + centers, classes, 0.5 * rows(600, 1) * spread, classes)
        assert found is not None and found[0] == pytest.approx(0.5, abs=4 * found[1])
    half = class_diversity(real, classes, torch.cat([0 * real[:300], real[300:]]), classes)
    assert half is not None and half[0] == pytest.approx(0.75, abs=0.02), "classes weigh equally"


def test_diversity_is_unbiased_and_its_error_is_that_of_repetitions() -> None:
    classes, many = torch.arange(2).repeat_interleave(20), torch.arange(2).repeat_interleave(1500)
    real, values, errors = rows(3000, 0), [], []
    for seed in range(1, 201):
        found = class_diversity(real, many, rows(40, seed), classes)
        assert found is not None
        values.append(found[0])
        errors.append(found[1])
    measured = torch.tensor(values)
    assert abs(float(measured.mean()) - 1) < 4 * float(measured.std()) / math.sqrt(200) + 0.01
    assert sum(errors) / 200 == pytest.approx(float(measured.std()), rel=0.15)


def test_classes_of_one_sample_or_one_image_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = rows(40, 0), rows(30, 1)
    theirs, ours = torch.arange(40) % 2, torch.arange(30) % 2
    found = class_diversity(real, theirs, generated, ours)
    more = torch.cat([ours, torch.tensor([2, 3, 3])])
    known = torch.cat([theirs, torch.tensor([2, 2, 3])])
    grown = class_diversity(
        torch.cat([real, rows(3, 2)]), known, torch.cat([generated, rows(3, 3)]), more
    )
    assert grown == found
    assert class_diversity(real, theirs, generated[:1], ours[:1]) is None
    monkeypatch.setattr(measures, "_PAIRS_AT_ONCE", 60)
    assert class_diversity(real, theirs, generated, ours) == pytest.approx(found)


def test_real_images_are_chosen_as_frequent_as_the_samples() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 100)
    chosen = as_frequent(labels, torch.tensor([2] * 8 + [1] * 4))
    assert labels[chosen].bincount().tolist() == [0, 30, 60]
    assert torch.equal(chosen, chosen.unique())
    assert torch.equal(as_frequent(labels, torch.tensor([1, 2, 2])), chosen)
    assert not torch.equal(as_frequent(labels, torch.tensor([1, 2, 2]), seed=1), chosen)
    assert torch.equal(as_frequent(labels, torch.tensor([0])), torch.arange(50))
    assert torch.equal(as_frequent(labels, labels.flip(0)), torch.arange(180))
    with pytest.raises(UserError, match="no images of class number 3"):
        as_frequent(labels, torch.tensor([1, 3]))


def test_images_without_a_known_class_are_rejected(digits: Digits, classifier: Classifier) -> None:
    x, labels = images(digits, "test")
    with pytest.raises(UserError, match="358 images have 359 classes"):
        class_accuracy(classifier, x[1:], labels)
    with pytest.raises(UserError, match="the classifier has 10 classes"):
        class_accuracy(classifier, x, labels + 1)
