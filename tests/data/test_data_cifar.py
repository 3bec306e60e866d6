"""Synthetic CIFAR-10 files and face folders: exact pixels, and a message for each fault."""

import numpy as np
import pytest
import torch
from PIL import Image

from ndm.data import CIFAR10, CelebAHQ, cifar
from ndm.errors import UserError

NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def records():
    """The labels and the pixels of six files with twenty records each."""
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
    """Shrink the expected sizes of the release to those of the fixture."""
    monkeypatch.setattr(cifar, "COUNTS", {"train": 100, "test": 20})


def test_pixels_and_labels_are_read_in_order(tmp_path, records, small):
    source = CIFAR10(str(write(tmp_path / "cifar-10-batches-bin", records)))
    description = source.describe()
    assert description.name == "cifar10"
    assert (description.event_shape, description.num_values) == ((3, 32, 32), 256)
    assert description.classes[3] == "cat" and description.splits == {"train": 100, "test": 20}
    for split, names in (("train", NAMES[:5]), ("test", NAMES[5:])):
        examples = source.split(split)
        labels, pixels = (np.concatenate([records[name][k] for name in names]) for k in (0, 1))
        found = source.integers(examples.__getitems__(range(len(examples))))
        np.testing.assert_array_equal(found.numpy(), pixels)
        assert examples.labels.tolist() == labels.tolist()
    assert CIFAR10(str(tmp_path)).describe() == description


def test_a_partial_release_is_rejected_unless_partial_is_set(tmp_path, records):
    folder = str(write(tmp_path, records))
    missing = r"100 of 50000 train, 20 of 10000 test.*partial: true"
    with pytest.raises(UserError, match=missing) as error:
        CIFAR10(folder).describe()
    assert "\n" not in str(error.value)
    description = CIFAR10(folder, partial=True).describe()
    assert description.name == "cifar10-partial" and "100 of 50000" in description.version
    assert description.classes == ()


def test_content_must_match_a_pinned_checksum(tmp_path, records, small):
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
def test_damage_is_reported_in_one_line(tmp_path, records, small, damage, culprits):
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
    names = [f"{i:05d}.png" if padded else f"{i}.png" for i in range(30)]
    source = CelebAHQ(faces(tmp_path, names), size=8, partial=True)
    assert source.describe().name == "celebahq8-partial"
    assert source.describe().splits == {"train": 27, "test": 3}
    for split, shades in (("train", range(27)), ("test", range(27, 30))):
        pixels = source.integers(source.split(split).__getitems__(range(len(shades))))
        assert (pixels[:, 0, 0, 0] // 3).tolist() == list(shades)


def test_faces_scaled_beforehand_have_the_same_pixels(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "large").mkdir()
    for name in ("a.png", "b.png"):
        pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "large" / name)
    large = CelebAHQ(str(tmp_path / "large"), size=8, partial=True)
    (tmp_path / "small").mkdir()
    for split, name in (("train", "a.png"), ("test", "b.png")):
        pixels = large.integers(large.split(split)[0]).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "small" / name)
    small = CelebAHQ(str(tmp_path / "small"), size=8, partial=True)
    for split in ("train", "test"):
        assert torch.equal(large.split(split)[0], small.split(split)[0])


def test_an_incomplete_set_of_faces_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"celebahq64.*9 of 27000 train, 1 of 3000 test.*partial"):
        CelebAHQ(faces(tmp_path / "a", [f"{i}.png" for i in range(10)])).describe()
    with pytest.raises(UserError, match="1 images"):
        CelebAHQ(faces(tmp_path / "b", ["0.png"]), partial=True).describe()
    with pytest.raises(UserError, match="not a folder"):
        CelebAHQ(str(tmp_path / "c")).describe()
