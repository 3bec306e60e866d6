"""Laws of every data source: grid, units, splits, indices and checksums."""

import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from ndm.data import (
    MNIST,
    Checkerboard,
    DataSource,
    Digits,
    HuggingFace,
    ImageFolder,
    Mixture,
    Pinwheel,
    Table,
    TwoMoons,
    identity_collate,
)
from ndm.data.arrays import discrete
from ndm.data.source import spread
from ndm.data.splits import check_classes, split_by_class
from ndm.decoder import DiscretizedGaussian, bin_centers, from_grid, to_grid
from ndm.errors import UserError

SMALL: dict[str, Any] = {"train_size": 40, "test_size": 20}
SOURCES = [Digits(), Mixture(**SMALL), Checkerboard(**SMALL), TwoMoons(**SMALL), Pinwheel(**SMALL)]


def named(source: DataSource) -> str:
    return type(source).__name__


@pytest.mark.parametrize("num_values", [2, 17, 256, 65536])
def test_grid_round_trips_every_integer(num_values):
    k = torch.arange(num_values)
    x = to_grid(k, num_values)
    assert torch.equal(x, bin_centers(num_values).float())
    assert torch.equal(from_grid(x, num_values), k)
    half_bin = 0.49 * 2 / num_values
    assert torch.equal(from_grid(x.double() + half_bin, num_values), k)
    assert from_grid(torch.tensor([-9.0, 9.0]), num_values).tolist() == [0, num_values - 1]


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_the_description_agrees_with_the_examples(source):
    description = source.describe()
    assert set(description.splits) == {"train", "test"}
    for split, size in description.splits.items():
        examples = source.split(split)
        batch = examples.__getitems__(range(size))
        assert len(examples) == size
        assert batch.shape == (size, *description.event_shape) and batch.dtype == torch.float32
        assert torch.equal(examples[size - 1], batch[-1]) and torch.equal(examples[-1], batch[-1])
        assert list(examples)[1].equal(batch[1])
    assert json.loads(json.dumps(description.to_dict()))["sha256"] == description.sha256


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_a_pickled_source_gives_the_same_data(source):
    description = source.describe()
    again = pickle.loads(pickle.dumps(source))
    assert "_loaded" not in again.__dict__
    assert again.describe() == description
    assert torch.equal(again.split("test")[3], source.split("test")[3])


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_an_unknown_split_is_rejected_with_the_available_splits(source):
    with pytest.raises(UserError) as error:
        source.split("nope")
    message = str(error.value)
    assert "'nope'" in message and "train, test" in message and "\n" not in message


def test_constructors_read_no_files():
    for kind in (MNIST, ImageFolder, Table, HuggingFace):
        assert "_loaded" not in kind("nowhere.csv").__dict__


def test_loader_workers_give_the_batches_of_the_split():
    examples = Digits().split("test")
    loader = DataLoader(examples, batch_size=100, collate_fn=identity_collate, num_workers=1)
    assert torch.equal(torch.cat(list(loader)), examples.__getitems__(range(len(examples))))


@pytest.mark.parametrize(
    "index",
    [
        slice(2, 9, 3),
        slice(None, None, -1),
        [4, 0, -1],
        (1, 1),
        np.array([3, 2]),
        torch.tensor([5, -2], dtype=torch.int32),
        torch.arange(20) % 3 == 0,
        [],
        slice(5, 5),
        torch.zeros(20, dtype=torch.bool),
    ],
    ids=str,
)
def test_an_index_of_several_examples_returns_a_batch(index):
    examples = Mixture(**SMALL).split("test")
    everything = examples.__getitems__(range(20))
    chosen = list(index) if isinstance(index, tuple) else index
    if isinstance(index, slice):
        chosen = list(range(20)[index])
    elif isinstance(index, torch.Tensor) and index.dtype != torch.bool:
        chosen = index.long()
    batch = examples[index]
    assert batch.dtype == torch.float32 and batch.shape[1:] == everything.shape[1:]
    assert torch.equal(batch, everything[chosen])


def test_an_index_of_one_example_returns_an_event():
    examples = Digits().split("test")
    batch = examples[:4]
    assert batch.shape == (4, 1, 8, 8)
    for index in (3, np.int64(3), torch.tensor(3), 3 - len(examples)):
        assert torch.equal(examples[index], batch[3])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (20, IndexError, "index 20 is out of range for 20 examples"),
        (-21, IndexError, "index -21 is out of range for 20 examples"),
        ([0, 31, 45], IndexError, "index 31 is out of range for 20 examples"),
        (torch.ones(3, dtype=torch.bool), IndexError, "a bool index of length 3 for 20 examples"),
        (1.5, TypeError, "dtype torch.float32"),
        (torch.zeros(2, 2, dtype=torch.long), TypeError, r"shape \(2, 2\)"),
        (True, TypeError, "dtype torch.bool"),
    ],
)
def test_an_invalid_index_is_reported_in_one_line(index, error, message):
    with pytest.raises(error, match=message) as found:
        Mixture(**SMALL).split("test")[index]
    assert "\n" not in str(found.value)


def test_digits_contain_each_scikit_learn_image_once():
    source = Digits()
    x = torch.cat(
        [
            source.split(split).__getitems__(range(size))
            for split, size in source.describe().splits.items()
        ]
    )
    found = sorted(source.integers(x).flatten(1).tolist())
    assert found == sorted(load_digits().data.astype(int).tolist())


def test_digits_lie_on_the_grid_of_their_decoder():
    source = Digits()
    x = source.split("test").__getitems__(range(50))
    assert torch.equal(DiscretizedGaussian(17).index(x), source.integers(x))
    assert torch.equal(source.to_source_units(x), source.integers(x).float())


def test_the_split_of_digits_has_the_published_checksum():
    published = "3bdd44ca130b94ade28a7728b0e41fd4b345bd27b4078e0d27914e64b809bc54"
    assert Digits().describe().sha256 == published


def test_digits_of_selected_classes_have_the_right_labels():
    source, data = Digits(classes=[7, 3]), load_digits()
    keys = [image.tobytes() for image in data.data.astype(int)]
    digit_of = dict(zip(keys, data.target, strict=True))
    for split, size in source.describe().splits.items():
        examples = source.split(split)
        images = source.integers(examples.__getitems__(range(size))).numpy()
        found = [digit_of[image.tobytes()] for image in images]
        assert found == [(7, 3)[label] for label in examples.labels]


def test_a_split_is_a_stratified_reproducible_partition():
    labels = np.random.default_rng(1).integers(0, 5, 1003)
    train, test = split_by_class(labels, 0.3, seed=4)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1003))
    fractions = np.bincount(labels[test]) / np.bincount(labels)
    assert np.abs(fractions - 0.3).max() <= 0.5 / np.bincount(labels).min() + 1e-12
    assert np.array_equal(split_by_class(labels, 0.3, seed=4)[1], test)
    assert not np.array_equal(split_by_class(labels, 0.3, seed=5)[1], test)


def test_the_split_of_digits_is_stratified():
    counts = {split: torch.bincount(Digits().split(split).labels) for split in ("train", "test")}
    assert (counts["test"] / (counts["test"] + counts["train"]) - 0.2).abs().max() < 0.5 / 174


def test_the_checksum_depends_only_on_pixels_split_and_order():
    arrays = {"train": np.arange(24).reshape(3, 8) % 17, "test": np.arange(16).reshape(2, 8)}

    def checksum(arrays, name="a", version="1"):
        return discrete(name, version, arrays, 17).description.sha256

    first = checksum(arrays)
    same = {split: array.astype(np.int64).copy() for split, array in arrays.items()}
    assert checksum(same, "b", "2") == first
    changed = {split: array.copy() for split, array in arrays.items()}
    changed["test"][1, 7] += 1
    assert checksum(changed) != first
    assert checksum({"train": arrays["train"][::-1], "test": arrays["test"]}) != first
    moved = np.concatenate([arrays["train"], arrays["test"]])
    assert checksum({"train": moved[:2], "test": moved[2:]}) != first


def test_a_missing_class_is_reported():
    labels = {"train": np.array([0, 1, 2]), "test": np.array([0, 2])}
    with pytest.raises(UserError) as error:
        check_classes(labels, ["cat", "dog", "owl"], "pets", "add some")
    message = str(error.value)
    assert "'test'" in message and "dog" in message and "owl" not in message


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: Digits(test_fraction=1.5), "test_fraction=1.5"),
        (lambda: Digits(seed=-1), "seed=-1"),
        (lambda: Digits(classes=[3, 12]), "[3, 12]"),
        (lambda: Digits(test_fraction=0.001).describe(), "test_fraction=0.001"),
        (
            lambda: Digits().integers(torch.zeros(1)) and Mixture(**SMALL).integers(torch.zeros(1)),
            "mixture is continuous",
        ),
        (lambda: MNIST("x", limit_train=0), "limit_train=0"),
        (lambda: ImageFolder("x", channels=4), "channels=4"),
        (lambda: ImageFolder("x", size=0), "size=0"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(make, culprit):
    with pytest.raises(UserError) as error:
        make()
    assert culprit in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("count", "limit"), [(7000, 1000), (70, 10), (1000, 3), (10, 10), (5, 9)])
def test_examples_that_are_spread_are_one_in_each_part(count: int, limit: int) -> None:
    found = spread(count, limit)
    most = min(count, limit)
    assert len(found) == most and found == sorted(set(found))
    assert all(k * count // most <= i < -(-(k + 1) * count // most) for k, i in enumerate(found))
    assert spread(count) == list(range(count))


@pytest.mark.parametrize("period", [2, 5, 7, 10])
def test_examples_that_are_spread_are_from_every_column_of_a_grid(period: int) -> None:
    """At equal distances of a multiple of the period they would all be from one column."""
    found = torch.tensor(spread(1000 * period, 1000)) % period
    shares = found.bincount(minlength=period) / 1000
    torch.testing.assert_close(shares, torch.full((period,), 1 / period), rtol=0, atol=0.01)
