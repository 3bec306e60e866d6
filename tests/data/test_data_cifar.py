"""CIFAR-10's binary version and a folder of faces, made here: pixels come back exactly, and each
fault has its message.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from ndm.data import CIFAR10, CelebAHQ, cifar
from ndm.errors import UserError

NAMES = [
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
    "test_batch.bin",
]


@pytest.fixture
def records():
    """Six files of twenty records each, labels first."""
    generator = np.random.default_rng(0)
    found = {}
    for name in NAMES:
        pixels = generator.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
        found[name] = (np.arange(20, dtype=np.uint8) % 10, pixels)
    return found


def write(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (labels, pixels) in records.items():
        rows = b"".join(
            bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True)
        )
        (folder / name).write_bytes(rows)
    return folder


@pytest.fixture
def small(monkeypatch):
    """A release of as many images as the files here hold."""
    monkeypatch.setattr(cifar, "COUNTS", {"train": 100, "test": 20})


def test_pixels_and_labels_come_back_in_order(tmp_path, records, small):
    source = CIFAR10(str(write(tmp_path / "cifar-10-batches-bin", records)))
    description = source.describe()
    assert (description.name, description.event_shape, description.num_values) == (
        "cifar10",
        (3, 32, 32),
        256,
    )
    assert description.classes[3] == "cat" and description.splits == {"train": 100, "test": 20}
    for split, names in (("train", NAMES[:5]), ("test", NAMES[5:])):
        examples = source.split(split)
        pixels = np.concatenate([records[name][1] for name in names])
        np.testing.assert_array_equal(
            source.integers(examples.__getitems__(range(len(examples)))).numpy(), pixels
        )
        assert (
            examples.labels.tolist()
            == np.concatenate([records[name][0] for name in names]).tolist()
        )
    assert CIFAR10(str(tmp_path)).describe() == description


def test_a_part_is_refused_or_has_another_name(tmp_path, records):
    folder = str(write(tmp_path, records))
    with pytest.raises(
        UserError, match=r"100 of 50000 train, 20 of 10000 test.*partial: true"
    ) as error:
        CIFAR10(folder).describe()
    assert "\n" not in str(error.value)
    description = CIFAR10(folder, partial=True).describe()
    assert (
        description.name == "cifar10-partial"
        and "100 of 50000" in description.version
        and description.classes == ()
    )


def test_a_pinned_checksum_holds_the_content(tmp_path, records, small):
    write(tmp_path, records)
    pinned = CIFAR10(str(tmp_path)).describe().sha256
    assert CIFAR10(str(tmp_path), sha256=pinned.upper()).describe().sha256 == pinned
    records[NAMES[4]][1][19, 2, 31, 31] ^= 1
    write(tmp_path, records)
    with pytest.raises(UserError, match=f"there|{pinned}"):
        CIFAR10(str(tmp_path), sha256=pinned).describe()
    with pytest.raises(UserError, match=r"sha256='1234'.*64"):
        CIFAR10(str(tmp_path), sha256="1234")


def truncated(folder):
    (folder / NAMES[2]).write_bytes((folder / NAMES[2]).read_bytes()[:-1])


def mislabeled(folder):
    data = bytearray((folder / NAMES[5]).read_bytes())
    data[3073 * 4] = 10
    (folder / NAMES[5]).write_bytes(bytes(data))


def python_version(folder):
    for name in NAMES:
        (folder / name).rename(folder / name.removesuffix(".bin"))


def no_cats(folder):
    for name in NAMES:
        data = np.fromfile(folder / name, dtype=np.uint8).reshape(-1, 3073)
        data[data[:, 0] == 3, 0] = 5
        data.tofile(folder / name)


@pytest.mark.parametrize(
    ("damage", "culprits"),
    [
        (truncated, [NAMES[2], "truncated", "61459", "3073"]),
        (mislabeled, [NAMES[5], "record 4", "label 10", "0 to 9"]),
        (lambda folder: (folder / NAMES[1]).unlink(), ["lacks", NAMES[1]]),
        (lambda folder: (folder / NAMES[1]).write_bytes(b""), [NAMES[1], "truncated", "0 bytes"]),
        (python_version, ["pickles", "never opened", "cifar-10-binary.tar.gz"]),
        (no_cats, ["class cat", "'train'"]),
        (lambda folder: [(folder / name).unlink() for name in NAMES], ["six files", NAMES[0]]),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, records, small, damage, culprits):
    write(tmp_path, records)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        CIFAR10(str(tmp_path)).describe()
    message = str(error.value)
    assert "\n" not in message and all(culprit in message for culprit in culprits), message


def faces(folder, names, side=8):
    folder.mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate(names):
        Image.fromarray(np.full((side, side, 3), 3 * shade, dtype=np.uint8)).save(folder / name)
    return str(folder)


@pytest.mark.parametrize("padded", [True, False])
def test_faces_are_split_by_the_numbers_in_their_names(tmp_path, padded):
    source = CelebAHQ(
        faces(tmp_path, [f"{i:05d}.png" if padded else f"{i}.png" for i in range(30)]),
        size=8,
        partial=True,
    )
    assert source.describe().name == "celebahq8-partial" and source.describe().splits == {
        "train": 27,
        "test": 3,
    }
    shades = {
        split: (
            (source.integers(source.split(split).__getitems__(range(n)))[:, 0, 0, 0] // 3).tolist()
        )
        for split, n in (("train", 27), ("test", 3))
    }
    assert shades == {"train": list(range(27)), "test": [27, 28, 29]}


def test_faces_scaled_beforehand_are_the_same_pixels(tmp_path):
    rng, names = np.random.default_rng(0), ["a.png", "b.png"]
    for name in names:
        (tmp_path / "large").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
            tmp_path / "large" / name
        )
    large = CelebAHQ(str(tmp_path / "large"), size=8, partial=True)
    (tmp_path / "small").mkdir()
    for split, name in (("train", "a.png"), ("test", "b.png")):
        pixels = large.integers(large.split(split)[0]).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "small" / name)
    small = CelebAHQ(str(tmp_path / "small"), size=8, partial=True)
    assert all(
        torch.equal(large.split(split)[0], small.split(split)[0]) for split in ("train", "test")
    )


def test_another_number_of_faces_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"celebahq64.*9 of 27000 train, 1 of 3000 test.*partial"):
        CelebAHQ(faces(tmp_path / "a", [f"{i}.png" for i in range(10)])).describe()
    with pytest.raises(UserError, match="1 images"):
        CelebAHQ(faces(tmp_path / "b", ["0.png"]), partial=True).describe()
    with pytest.raises(UserError, match="not a directory"):
        CelebAHQ(str(tmp_path / "c")).describe()
