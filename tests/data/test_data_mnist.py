"""Synthetic IDX files: plain and gzipped data agree, and each fault has a message."""

import gzip
import struct

import numpy as np
import pytest
import torch

from ndm.data import MNIST
from ndm.errors import UserError

NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def content():
    generator = np.random.default_rng(0)
    arrays = []
    for size in (30, 20):
        arrays += [generator.integers(0, 256, (size, 5, 4)), np.arange(size) % 10]
    return dict(zip(NAMES, arrays, strict=True))


def write(folder, content, zipped=False):
    folder.mkdir(exist_ok=True)
    for name, array in content.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return MNIST(str(folder))


def test_plain_and_gzipped_files_give_the_exact_pixels(tmp_path, content):
    plain = write(tmp_path / "plain", content)
    zipped = write(tmp_path / "zipped", content, zipped=True)
    assert plain.describe().sha256 == zipped.describe().sha256
    assert plain.describe().event_shape == (1, 5, 4) and plain.describe().name == "plain"
    for split, name in (("train", NAMES[0]), ("test", NAMES[2])):
        x = zipped.split(split).__getitems__(range(len(content[name])))
        assert torch.equal(zipped.integers(x)[:, 0], torch.from_numpy(content[name]))


def test_one_pixel_changes_the_checksum(tmp_path, content):
    before = write(tmp_path / "a", content).describe().sha256
    content[NAMES[0]][3, 2, 1] ^= 1
    assert write(tmp_path / "b", content).describe().sha256 != before


def test_limit_and_classes_select_examples(tmp_path, content):
    write(tmp_path, content)
    limited = MNIST(str(tmp_path), limit_train=7)
    assert limited.describe().splits == {"train": 7, "test": 20}
    chosen = MNIST(str(tmp_path), classes=[4, 2])
    assert chosen.describe().classes == ("4", "2")
    assert chosen.describe().splits == {"train": 6, "test": 4}
    rows = np.isin(content[NAMES[1]], [2, 4])
    x = chosen.split("train").__getitems__(range(6))
    assert torch.equal(chosen.integers(x)[:, 0], torch.from_numpy(content[NAMES[0]][rows]))
    digits = [(4, 2)[label] for label in chosen.split("train").labels]
    assert digits == content[NAMES[1]][rows].tolist()


def swap_magic(folder, content):
    (folder / NAMES[0]).write_bytes(idx(content[NAMES[1]]) + bytes(99))


def corrupt_gzip(folder, content):
    data = gzip.compress(idx(content[NAMES[0]]))
    (folder / NAMES[0]).unlink()
    (folder / f"{NAMES[0]}.gz").write_bytes(data[: len(data) // 2])


def no_gzip(folder, content):
    (folder / NAMES[0]).unlink()
    (folder / f"{NAMES[0]}.gz").write_bytes(b"<html>not found</html>")


def set_label(value):
    def damage(folder, content):
        content[NAMES[3]][content[NAMES[3]] == 8] = value
        (folder / NAMES[3]).write_bytes(idx(content[NAMES[3]]))

    return damage


@pytest.mark.parametrize(
    ("damage", "culprits"),
    [
        (lambda folder, content: (folder / NAMES[2]).unlink(), NAMES),
        (
            lambda folder, content: (folder / NAMES[2]).write_bytes(idx(content[NAMES[2]])[:-3]),
            [NAMES[2], "truncated", "20 x 5 x 4", "397"],
        ),
        (
            lambda folder, content: (folder / NAMES[2]).write_bytes(b"\0\0\x08\x03\0"),
            [NAMES[2], "truncated"],
        ),
        (corrupt_gzip, [f"{NAMES[0]}.gz", "damaged"]),
        (no_gzip, [f"{NAMES[0]}.gz", "damaged"]),
        (swap_magic, [NAMES[0], "2049", "2051"]),
        (
            lambda folder, content: (folder / NAMES[1]).write_bytes(idx(content[NAMES[1]][:-1])),
            [NAMES[1], "30 images", "29 labels"],
        ),
        (set_label(7), ["'test'", "class 8", "classes="]),
        (set_label(12), [NAMES[3], "label 8 is 12", "classes="]),
        (
            lambda folder, content: (folder / NAMES[2]).write_bytes(idx(content[NAMES[2]][:, :4])),
            ["test 4 x 4", "train 5 x 4"],
        ),
    ],
)
def test_damage_is_reported_in_one_line(tmp_path, content, damage, culprits):
    source = write(tmp_path, content)
    damage(tmp_path, content)
    with pytest.raises(UserError) as error:
        source.describe()
    message = str(error.value)
    assert "\n" not in message and all(culprit in message for culprit in culprits), message


def test_a_limit_above_the_number_of_examples_is_rejected(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(UserError, match=r"limit_train=31.*30"):
        MNIST(str(tmp_path), limit_train=31).describe()
